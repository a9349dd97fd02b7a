"""The command: its options are checked, the traces compared, then what was asked for is written."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperOption

from moe_inspect.cli.compare.options import CompareOptions, TraceA, TraceB
from moe_inspect.cli.emit import Format, emit, format_of, text_to
from moe_inspect.cli.options import with_options
from moe_inspect.cli.report.build import decisions_read
from moe_inspect.errors import MoeInspectError
from moe_inspect.text import print_stderr

if TYPE_CHECKING:
    import pandas as pd

    from moe_inspect.comparison.compare import Comparison
    from moe_inspect.reporting.verdict.gate import Gate

MAIN = "agreement"  # the table that --format alone asks for


@with_options(CompareOptions)
def compare(a: TraceA, b: TraceB, options: CompareOptions) -> None:
    """Compare the routing of two traces, token by token.

    Do they choose the same experts, where not, and was it rounding, another model or a
    misalignment? Needs neither torch nor the model."""
    from moe_inspect.comparison.compare import TABLES
    from moe_inspect.comparison.compare import compare as make
    from moe_inspect.reporting.tables.registry import check_table
    from moe_inspect.reporting.verdict.gate import breaches

    form, table = _format(options), options.table
    if table:
        check_table(table, TABLES)
    elif form is not Format.table:
        table = MAIN
    gates = [*_gates(options.fail_above, True), *_gates(options.fail_below, False)]
    with decisions_read() as progress:
        made = make(
            a,
            b,
            noise=options.noise,
            layers=options.layers,
            domains=[label for value in options.domain or [] for label in value.split(",")],
            phase=options.phase and options.phase.value,
            top=options.top,
            shift_layers=options.shift_layers,
            shift_positions=options.shift_positions,
            shift_routes=options.shift_routes,
            drop_last=options.drop_last,
            drop_zero_filled=options.drop_zero_filled,
            progress=progress,
        )
        breached = breaches(made, gates, TABLES)
        frame = None if table is None else _table(made, table, form)
        made.verdict()
    _write(made, frame, form, options)
    for line in breached:
        print_stderr(f"failed: {line}")
    if breached:
        raise typer.Exit(3)


def _format(options: CompareOptions) -> Format:
    form = options.format or format_of(options.output)
    if form is None:
        raise typer.BadParameter(
            f"-o {options.output}: no format has this ending, add --format {', '.join(Format)}"
        )
    return form


def _gates(texts: list[str] | None, above: bool) -> list[Gate]:
    if not texts:
        return []
    from moe_inspect.comparison.compare import TABLES
    from moe_inspect.reporting.verdict.gate import gate

    option = "--fail-above" if above else "--fail-below"
    try:
        return [gate(text, above, TABLES) for value in texts for text in value.split(",")]
    except MoeInspectError as error:
        raise typer.BadParameter(f"{option}: {error}") from None


def _table(made: Comparison, name: str, form: Format) -> pd.DataFrame:
    if name == "verdict" and form is Format.json:  # which alone can hold the numbers of a finding
        from moe_inspect.reporting.verdict.checks import verdict_table

        return verdict_table(made.verdict(), values=True)
    return made.tables[name]


def _write(
    made: Comparison, frame: pd.DataFrame | None, form: Format, options: CompareOptions
) -> None:
    if options.plots is not None:
        from moe_inspect.comparison.charts import draw_charts
        from moe_inspect.reporting.render.matplotlib import write_charts

        for path in write_charts(draw_charts(made)[0], options.plots):
            print_stderr(f"wrote {path}")
    if options.html is not None:
        from moe_inspect.comparison.page import comparison_page
        from moe_inspect.reporting.render.html import write_page

        write_page(options.html, comparison_page(made))
        print_stderr(f"wrote {options.html}")
    if frame is not None:
        emit(frame, form, options.output, options.safe_csv)
        return
    from moe_inspect.comparison.text import print_comparison

    with text_to(options.output) as file:
        print_comparison(made, file)


class CompareCommand(TyperCommand):
    """Names the tables in the help of --table, which takes pandas: only then."""

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        for option in self.params:
            if option.name == "table":
                table: Any = option
                table.get_help_record = partial(_table_help, option)


def _table_help(option: Any, ctx: Any) -> tuple[str, str] | None:
    from moe_inspect.comparison.compare import TABLES

    option.help = f"One table instead of the text: {', '.join(TABLES)}."
    return TyperOption.get_help_record(option, ctx)
