"""Options of the commands that draw: where pictures go, which, how wide, and in which format."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

import typer

from moe_inspect.cli.emit import Format
from moe_inspect.text import print_stderr

if TYPE_CHECKING:
    from moe_inspect.reporting.shown import Shown

UNITS = {"in": 1.0, "": 1.0, "cm": 1 / 2.54, "mm": 1 / 25.4, "pt": 1 / 72.27}  # in inches


class OutputFormat(StrEnum):
    """Those of a table, then those of pictures."""

    table = "table"
    csv = "csv"
    json = "json"
    parquet = "parquet"
    png = "png"
    svg = "svg"
    pdf = "pdf"


PICTURES = (OutputFormat.png, OutputFormat.svg, OutputFormat.pdf)


def inches(text: str | float) -> float:
    """ "3.3in", "8.4cm", "84mm", "239pt" or "3.3" → inches."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+) ?(in|cm|mm|pt|)", str(text).strip())
    if found is None:
        raise typer.BadParameter(f"cannot read {text!r}: write a width like 3.3in or 84mm")
    width = float(found[1]) * UNITS[found[2]]
    if not 2 <= width <= 40:
        raise typer.BadParameter(f"{text} is no width of a chart: give 2in to 40in")
    return width


Plots = Annotated[
    Path | None,
    typer.Option(
        "--plots",
        metavar="DIR",
        help="Also write charts as pictures (PNG and SVG) into this directory.",
        show_default=False,
    ),
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        "--only", metavar="CHART", help="With --plots: only these charts.", show_default=False
    ),
]
Width = Annotated[
    float | None,
    typer.Option(
        "--width",
        metavar="LENGTH",
        parser=inches,
        help="With --plots: width of the pictures, e.g. 3.3in or 84mm for a column of a paper; "
        "type keeps its size.",
        show_default=False,
    ),
]
FormatOfAny = Annotated[
    OutputFormat | None,
    typer.Option(
        "--format",
        help="Format of the table, by default from the file's ending, else table; json is one "
        "object per line. With --plots also png, svg or pdf, that of the pictures.",
        show_default=False,
    ),
]


class Drawing(Protocol):
    """The options of a command that draws."""

    @property
    def format(self) -> OutputFormat | None: ...
    @property
    def plots(self) -> Path | None: ...
    @property
    def only(self) -> Sequence[str] | None: ...
    @property
    def width(self) -> float | None: ...


def table_format(options: Drawing) -> Format | None:
    """The format that is asked for a table, if one is. A usage error where what is about pictures
    is given without --plots."""
    of_pictures = options.format in PICTURES
    given = {
        "--only": options.only,
        "--width": options.width,
        f"--format {options.format}": of_pictures,
    }
    if options.plots is None and (names := [name for name, asked in given.items() if asked]):
        raise typer.BadParameter(f"{names[0]} is about pictures: give it with --plots DIR")
    return None if options.format is None or of_pictures else Format(options.format.value)


def save_pictures(made: Shown, options: Drawing) -> None:
    """Writes the pictures that were asked for, and says which."""
    if options.plots is None:
        return
    form = options.format
    formats = (form.value,) if form is not None and form in PICTURES else None
    written = made.save_plots(
        options.plots, only=options.only or (), width_inches=options.width, formats=formats
    )
    for line in [f"wrote {path}" for path in written] or ["nothing to draw"]:
        print_stderr(line)
