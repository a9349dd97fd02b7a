"""Writes a report: as text or one table, with pictures and a page where they were asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from moe_inspect.cli.emit import Format, emit, text_to
from moe_inspect.cli.pictures import save_pictures
from moe_inspect.cli.report.options import Simulated
from moe_inspect.cli.report.request import Request
from moe_inspect.errors import MoeInspectError
from moe_inspect.text import print_stderr

if TYPE_CHECKING:
    import pandas as pd

    from moe_inspect.reporting.render.html import Section
    from moe_inspect.reporting.report import Report


def write_files(made: Report, request: Request) -> None:
    """The pictures and the page."""
    if made.warning:
        print_stderr(f"warning: {made.warning}")
    save_pictures(made, request.drawing)
    if request.html is not None:
        from moe_inspect.reporting.render.html import write_page

        simulated = simulated_sections(made, request.simulate, request.selection["layers"])
        write_page(request.html, made.page(simulated, request.text))
        print_stderr(f"wrote {request.html}")


def write(made: Report, request: Request) -> None:
    """The text or the table."""
    if request.table:
        table = table_of(made, request.table, request.format)
        emit(table, request.format, request.output, request.safe_csv)
    else:
        with text_to(request.output) as file:
            made.write_text(file, request.full)


def table_of(made: Any, name: str, form: Format) -> pd.DataFrame:
    """A table of a report or a comparison, as the format holds it."""
    if name == "verdict" and form is Format.json:  # which alone can hold the numbers of a finding
        from moe_inspect.reporting.verdict.checks import verdict_table

        return verdict_table(made.verdict(), values=True)
    return made.tables[name]


def simulated_sections(
    made: Report, names: Sequence[Simulated], layers: str | None
) -> Iterator[Section | str]:
    """A section per simulation, or why the trace has none to give."""
    import moe_inspect

    for name in dict.fromkeys(names):
        try:
            limits = {"uneven": made.thresholds.uneven} if name is Simulated.routing else {}
            simulate = getattr(moe_inspect, f"simulate_{name}")
            yield simulate(made.trace, layers=layers, **limits).section()
        except MoeInspectError as error:
            yield str(error)
