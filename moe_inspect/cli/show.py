"""How a result is shown: as text or one table, in which format and where, as pictures and as a
page."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from moe_inspect.cli.emit import Format, emit, format_of, text_to
from moe_inspect.cli.help import tables
from moe_inspect.cli.options import Options, Output, option
from moe_inspect.cli.progress import shown
from moe_inspect.text import no_such, plural, print_stderr

if TYPE_CHECKING:
    import pandas as pd

    from moe_inspect.reporting.shown import Shown
    from moe_inspect.reporting.tables.registry import AsColumns

PICTURES = ("png", "svg", "pdf")


def table_option(help: str) -> Any:
    """The option --table."""
    return option(help, "NAME", autocompletion=tables)


@dataclass(frozen=True, kw_only=True)
class ShowOptions(Options):
    """How a command shows its result: as text or a table, as pictures and as a page."""

    panel = "Output"

    table: str | None = table_option("Print one table instead of the summary.")
    format: Literal["table", "csv", "json", "parquet", "png", "svg", "pdf"] | None = option(
        "table, csv, json (a line per row) or parquet (default: by the file's ending); with "
        "--plots also png, svg or pdf."
    )
    output: Output = None
    plots: Path | None = option(
        "Also write charts as pictures (PNG and SVG) into this directory.", "DIR"
    )
    html: Path | None = option(
        "Also write a self-contained page that opens in any browser.", "FILE"
    )

    @property
    def of_table(self) -> Format | None:
        """The format that is asked for a table, if one is. A usage error for a format of pictures
        without --plots."""
        of_pictures = self.format in PICTURES
        if of_pictures and self.plots is None:
            raise typer.BadParameter(
                f"--format {self.format} is about pictures: give it with --plots DIR"
            )
        return None if self.format is None or of_pictures else Format(self.format)

    def chosen(self, tables: Collection[str], main: str | None) -> tuple[str | None, Format]:
        """The table that is asked for, None for the text, and the format. main: the table that a
        format alone asks for; without one, that is a usage error."""
        form = self.of_table or format_of(self.output)
        if form is None:
            if self.table or main:
                said = f"no format has this ending, add --format {', '.join(Format)}"
                raise typer.BadParameter(f"-o {self.output}: {said}")
            form = Format.table
        if form not in (Format.table, Format.json) and not (self.table or main):
            asked = f"--format {self.format}" if self.of_table else f"-o {self.output}"
            raise typer.BadParameter(f"{asked} needs one table: add --table {', '.join(tables)}")
        return self.table or (None if form is Format.table else main), form

    def show(self, result: Shown, page: Callable[[], str] | None = None) -> None:
        """Write the pictures and the page, then print the text (after pictures or a page only its
        headline); or one table, if --table, --format or the ending of the file asks for it. `page`
        makes the page, by default `result.page`."""
        if self.table is not None and self.table not in result.tables:
            raise typer.BadParameter(no_such("table", self.table, result.tables))
        main = result.main_table
        table, form = self.chosen(result.tables, main)
        with shown():
            self._save(result, page or result.page)
        if name := table or (main if self.of_table else None):
            emit(_columns(result, name, form), form, self.output)
        else:
            with text_to(self.output) as file:
                if form is Format.json:
                    file.write(f"{json.dumps(result.as_json(), ensure_ascii=False)}\n")
                elif self.output is None and (self.plots is not None or self.html is not None):
                    result.write_headline(file)
                else:
                    result.write_text(file)

    def _save(self, result: Shown, page: Callable[[], str]) -> None:
        """Write the requested pictures and the page, and name the files on stderr."""
        if self.plots is not None:
            formats = (self.format,) if self.format in PICTURES else None
            written = result.save_plots(self.plots, formats=formats)
            print_stderr(
                f"wrote {plural(len(written), 'picture')} in {self.plots}"
                if written
                else "nothing to draw"
            )
        if self.html is not None:
            from moe_inspect.reporting.render.html import write_page

            write_page(self.html, page())
            print_stderr(f"wrote {self.html}")


def _columns(result: Any, name: str, form: Format) -> pd.DataFrame | AsColumns:
    """The columns of a table. Only JSON can hold the numbers of a finding."""
    if name == "verdict" and form is Format.json:
        from moe_inspect.reporting.verdict.findings import verdict_table

        return verdict_table(result.verdict(), values=True)
    if name == "findings" and form is Format.json:
        return result.table(values=True)
    # a lazy table is written without pandas
    tables = result.tables
    return tables.as_made(name) if hasattr(tables, "as_made") else tables[name]
