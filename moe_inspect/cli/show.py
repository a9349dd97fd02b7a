"""How a result is shown: as text or one table, in which format and where, as pictures and as a
page."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from moe_inspect.cli.emit import Format, emit, format_of, text_to
from moe_inspect.cli.help import tables
from moe_inspect.cli.options import Options, Output, in_panel, option
from moe_inspect.text import print_stderr

if TYPE_CHECKING:
    import pandas as pd

    from moe_inspect.reporting.shown import Shown
    from moe_inspect.reporting.tables.registry import AsColumns

UNITS = {"in": 1.0, "": 1.0, "cm": 1 / 2.54, "mm": 1 / 25.4, "pt": 1 / 72.27}  # in inches


PICTURES = ("png", "svg", "pdf")


def inches(text: str | float) -> float:
    """ "3.3in", "8.4cm", "84mm", "239pt" or "3.3" → inches."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+) ?(in|cm|mm|pt|)", str(text).strip())
    if found is None:
        raise typer.BadParameter(f"cannot read {text!r}: write a width like 3.3in or 84mm")
    width = float(found[1]) * UNITS[found[2]]
    if not 2 <= width <= 40:
        raise typer.BadParameter(f"{text} is no width of a chart: give 2in to 40in")
    return width


output_option = in_panel("Output")


def table_option(help: str) -> Any:
    """The option --table."""
    return option(help, "NAME", autocompletion=tables)


def _no_format(output: Path | None) -> typer.BadParameter:
    return typer.BadParameter(
        f"-o {output}: no format has this ending, add --format {', '.join(Format)}"
    )


@dataclass(frozen=True, kw_only=True)
class TableOptions(Options):
    """Of a command whose result is a table."""

    panel = "Output"

    format: Format | None = option(
        "table is for reading, json is one object per line. Default: by the ending of the "
        "file, else table."
    )
    output: Output = None

    def form(self) -> Format:
        """The format that is asked for. Raises a usage error where it is not known."""
        if (form := self.format or format_of(self.output)) is None:
            raise _no_format(self.output)
        return form

    def emit(self, table: pd.DataFrame) -> None:
        emit(table, self.form(), self.output)


@dataclass(frozen=True, kw_only=True)
class ShowOptions(Options):
    """Of a command whose result is text, tables, pictures and a page."""

    panel = "Output"

    table: str | None = table_option("Print one table instead of the summary.")
    format: Literal["table", "csv", "json", "parquet", "png", "svg", "pdf"] | None = option(
        "Format of the table, by default from the file's ending, else table; json is one "
        "object per line. With --plots also png, svg or pdf, that of the pictures."
    )
    output: Output = None
    plots: Path | None = option(
        "Also write charts as pictures (PNG and SVG) into this directory.", "DIR"
    )
    width: float | None = option(
        "With --plots: width of the pictures, e.g. 3.3in or 84mm for a column of a paper; "
        "type keeps its size.",
        "LENGTH",
        parser=inches,
    )
    html: Path | None = option(
        "Also write a self-contained page that opens in any browser.", "FILE"
    )

    @property
    def of_table(self) -> Format | None:
        """The format that is asked for a table, if one is. A usage error where what is about
        pictures is given without --plots."""
        of_pictures = self.format in PICTURES
        given = {"--width": self.width, f"--format {self.format}": of_pictures}
        if self.plots is None and (names := [name for name, asked in given.items() if asked]):
            raise typer.BadParameter(f"{names[0]} is about pictures: give it with --plots DIR")
        return None if self.format is None or of_pictures else Format(self.format)

    def chosen(self, tables: Collection[str], main: str | None) -> tuple[str | None, Format]:
        """The table that is asked for, None for the text, and the format. main: the table that a
        format alone asks for; without one, that is a usage error."""
        form = self.of_table or format_of(self.output)
        if form is None:
            if self.table or main:
                raise _no_format(self.output)
            form = Format.table
        if form is not Format.table and not (self.table or main):
            asked = f"--format {self.format}" if self.of_table else f"-o {self.output}"
            raise typer.BadParameter(f"{asked} needs one table: add --table {', '.join(tables)}")
        return self.table or (None if form is Format.table else main), form

    def save(self, made: Shown, page: Callable[[], str] | None = None) -> None:
        """Writes the pictures and the page that were asked for, and says which. made: a `Shown`.
        page: what makes the page, if not `made`."""
        if self.plots is not None:
            formats = (self.format,) if self.format in PICTURES else None
            written = made.save_plots(self.plots, width_inches=self.width, formats=formats)
            for line in [f"wrote {path}" for path in written] or ["nothing to draw"]:
                print_stderr(line)
        if self.html is not None:
            from moe_inspect.reporting.render.html import write_page

            write_page(self.html, (page or made.page)())
            print_stderr(f"wrote {self.html}")

    def write(self, made: Shown, table: str | None, form: Format, **how: Any) -> None:
        """Writes a table, or the text. how: keywords of `made.write_text`."""
        if table is None:
            with text_to(self.output) as file:
                made.write_text(file, **how)
        else:
            emit(table_of(made, table, form), form, self.output)


def table_of(made: Any, name: str, form: Format = Format.table) -> pd.DataFrame | AsColumns:
    """A table of a result, as the format holds it."""
    from moe_inspect.reporting.tables.registry import LazyTables

    if name == "verdict" and form is Format.json:  # which alone can hold the numbers of a finding
        from moe_inspect.reporting.verdict.checks import verdict_table

        return verdict_table(made.verdict(), values=True)
    tables: LazyTables | Mapping[str, pd.DataFrame] = made.tables
    return tables.as_made(name) if isinstance(tables, LazyTables) else tables[name]
