"""`moe-inspect report`: what a trace says, as text, tables, pictures or a page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from moe_inspect.cli.help import TABLES
from moe_inspect.cli.help import traces as complete
from moe_inspect.cli.options import (
    TRACE,
    GateOptions,
    Scheduler,
    SelectionOptions,
    exit_if_failed,
    gate_option,
    option,
)
from moe_inspect.cli.progress import shown
from moe_inspect.cli.show import ShowOptions, table_option
from moe_inspect.cli.simulate import Gpus, TimesOptions
from moe_inspect.errors import MoeInspectError
from moe_inspect.progress import phase
from moe_inspect.text import print_stderr

if TYPE_CHECKING:
    import pandas as pd

    from moe_inspect.reporting.report import Report
    from moe_inspect.reporting.verdict.gate import Gate

# before any command imports numpy: of small matrices, threads of a BLAS mostly wait for each other
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@dataclass(frozen=True, kw_only=True)
class ReportOptions(ShowOptions):
    table: str | None = table_option(f"One table instead of the report: {TABLES['report']}.")


def report(
    *,
    trace: Annotated[str | None, TRACE] = None,
    selection: SelectionOptions,
    show: ReportOptions,
    text: bool = option(
        "With --html: show the documents that differ most between domains (up to 1 MB).",
        default=True,
    ),
    baseline: str | None = option(
        "A trace of an untrained or earlier model over the same text: say what "
        "specialisation is beyond it.",
        "TRACE",
        autocompletion=complete,
    ),
    top: int = option(
        "Token ids per expert in vocabulary, partners per expert in tables of pairs; 0 is all.",
        min=0,
        default=20,
    ),
    window: int | None = option(
        "Tokens per window in the tables windows and drift (default: 1/64 of the trace).", min=1
    ),
    times: TimesOptions,
    gpus: Gpus = None,
    threshold: list[str] | None = gate_option(
        "A threshold of the verdict, e.g. uneven=0.3 (summary lists them).", "NAME=VALUE"
    ),
    limits: GateOptions,
    list_metrics: bool = option("List every metric: definition, range, source.", default=False),
    scheduler: Scheduler = None,
) -> None:
    """Report load balance and expert specialisation.

    Which layers and experts are out of balance, compared with chance, and what each expert
    specialises in. Needs neither torch nor the model. With --hardware, also what imbalance costs in
    milliseconds, as simulate placement does.

    Examples:
    moe-inspect report runs/a
    moe-inspect report runs/a --html report.html
    moe-inspect report runs/a --hardware h200 --engine vllm --dtype fp8 --gpus 32
    moe-inspect report runs/a --plots figs --format pdf
    moe-inspect report runs/a --table load --layers 0-3 --format csv -o load.csv
    moe-inspect report runs/a --fail-above max_vio=0.5 --fail-above dead_experts=0"""
    if list_metrics:
        import pandas as pd

        from moe_inspect.analysis.metrics.registry import listing
        from moe_inspect.reporting.shown import Result

        table = pd.DataFrame(listing())
        show.show(Result("metrics", {"metrics": table}, partial(print_metrics, table)))
        return
    if trace is None:
        raise typer.BadParameter("give the directory of a trace", param_hint="TRACE")
    if not text and show.html is None:
        raise typer.BadParameter("--no-text is about the page: give it with --html")
    from moe_inspect.public import report as make
    from moe_inspect.reporting.report import TABLES, check_table
    from moe_inspect.reporting.verdict.gate import GateResult, check_gates

    table, _ = show.chosen(TABLES, None)
    if table:
        check_table(table)
    gates = limits.gates(TABLES)
    settings: dict[str, Any] = {
        **selection.keywords(),
        "baseline": baseline,
        "top": top,
        "window": window,
        "thresholds": _thresholds(threshold or []),
        "scheduler": scheduler,
    }
    priced = {k: v for k, v in (times.keywords() | {"gpus": gpus}).items() if v is not None}
    with shown():
        made = make(trace, times=priced, **settings)
        _count(made, table, show, gates)
        result = check_gates(made, gates) if gates else GateResult([], [])
    if made.warning:
        print_stderr(f"warning: {made.warning}")
    show.show(made, lambda: made.page(text))
    exit_if_failed(*result)


def _count(made: Report, table: str | None, show: ShowOptions, gates: Sequence[Gate]) -> None:
    """Counts everything that is asked for in one pass over the rows."""
    from moe_inspect.reporting.verdict.gate import gated
    from moe_inspect.reporting.verdict.specialization import is_small

    of_text = ["balance", "specialization", *(["router"] if made.trace.has_weights else [])]
    of_text += ["drift"] if is_small(made.trace) else []
    tables = [table] if table else of_text
    counted = [*tables, *(gated()[gate.metric] for gate in gates)]
    if show.html is not None or show.plots is not None:
        from moe_inspect.reporting.charts.spec import tables_of_charts

        counted += tables_of_charts()
    made.prepare(counted)
    advance = phase("computing", len(tables), "tables")
    lazy: Any = made.tables
    for name in tables:  # some tables count more when they are requested
        lazy.as_made(name)
        advance(1)


def _thresholds(texts: list[str]) -> dict[str, float]:
    from moe_inspect.reporting.tables.data import thresholds_with

    of_name: dict[str, float] = {}
    for text in texts:
        name, _, value = (part.strip() for part in text.partition("="))
        try:
            thresholds_with({name: float(value)})
            wrong = f"{name} is given twice" if name in of_name else None
        except ValueError:
            wrong = "expected NAME=VALUE, e.g. uneven=0.3"
        except MoeInspectError as error:
            wrong = str(error)
        if wrong:
            raise typer.BadParameter(f"--threshold {text}: {wrong}")
        of_name[name] = float(value)
    return of_name


def print_metrics(metrics: pd.DataFrame, file: TextIO) -> None:
    """On a terminal, the metrics of each table under its name, with definition, range, value if
    everything is even and source; elsewhere, the table of metrics."""
    from rich.text import Text

    from moe_inspect.reporting.render.console import console_for, print_table, wrapped

    console = console_for(file)
    if not console.is_terminal:
        print_table(metrics, file)
        return
    indent, listed = Text("    "), metrics.to_dict("records")
    order = {name: n for n, name in enumerate(dict.fromkeys(row["table"] for row in listed))}
    listed.sort(key=lambda row: order[row["table"]])
    for table, rows in groupby(listed, lambda row: row["table"]):
        console.print(Text(f"table {table}", style="bold"))
        for row in rows:
            even = f"even {row['even']}" if row["even"] else ""
            facts = [row["range"], even, row["unit"], row["source"]]
            said = " · ".join(fact for fact in facts if fact)
            parts = [(Text("  "), row["metric"], "bold"), (indent, row["definition"], "")]
            for lead, text, style in [*parts, (indent, said, "dim")]:
                for line in wrapped(Text(text, style=style), console, lead):
                    console.print(line, soft_wrap=True)
