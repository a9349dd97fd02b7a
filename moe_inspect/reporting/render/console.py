"""Tables as text. On a terminal they have colours and columns are chosen to fit; in a file or a
pipe nothing depends on colour and every column is there."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from numbers import Real
from typing import Any, TextIO

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from moe_inspect.text import number, printable

MOST_ROWS = 2_000  # shown by --format table
GAP = 2  # between columns
FILE_WIDTH = 10_000
# columns that identify a row
LEAD = (
    "layer",
    "router",
    "domain",
    "expert",
    "other",
    "next_layer",
    "next_router",
    "next_expert",
    "window",
    "token_id",
    "metric",
)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # Rich would exit with code 1; the command ends quietly


def console_for(file: TextIO) -> Console:
    """A console that prints text as it is: brackets and colons in tokens are not markup. It breaks
    no line in a file."""
    plain: dict[str, Any] = {"markup": False, "highlight": False, "emoji": False}
    console = _Console(**plain, file=file)
    return (
        console
        if console.is_terminal
        else _Console(**plain, file=file, width=FILE_WIDTH, color_system=None)
    )


def print_table(frame: Any, file: TextIO) -> int:
    """One table, every column. Returns how many rows were left out."""
    print_frame(frame.head(MOST_ROWS), console_for(file))
    return max(0, len(frame) - MOST_ROWS)


def print_frame(
    frame: Any, console: Console, title: str | None = None, fitting: bool = False
) -> int:
    """Prints a DataFrame; if it is too wide for the terminal, in several parts, each beginning with
    the columns that identify a row. `fitting`: only the first part. Returns how many columns are
    shown."""
    cells = {
        name: [
            "-" if missing else _cell(v)
            for v, missing in zip(frame[name], frame[name].isna(), strict=True)
        ]
        for name in frame.columns
    }
    if fitting:
        cells = {
            name: [_clipped(cell, console.width // 3) for cell in column]
            for name, column in cells.items()
        }
    width_of = {name: max([len(name), *map(cell_len, column)]) for name, column in cells.items()}
    parts = _parts(width_of, console.width)
    for part, names in enumerate(parts[:1] if fitting else parts):
        if title or part:
            console.print()
        if title and part == 0:
            console.print(Text(title, style="bold"))
        right = [frame[name].dtype.kind in "iuf" for name in names]
        widths = [width_of[name] for name in names]
        lines = [
            _row(row, widths, right) for row in zip(*(cells[name] for name in names), strict=True)
        ]
        # the last column is a long text
        if console.is_terminal and sum(widths) + GAP * (len(widths) - 1) > console.width:
            before = sum(widths[:-1]) + GAP * (len(widths) - 1)
            room = max(console.width - before, 20)
            lines = [
                textwrap.fill(
                    line, before + room, subsequent_indent=" " * before, break_on_hyphens=False
                )
                for line in lines
            ]
            widths[-1] = room
        console.print(Text(_row(names, widths, right), style="bold"), soft_wrap=True)
        console.print(
            Text("\n".join(["─" * (sum(widths) + GAP * (len(widths) - 1)), *lines])), soft_wrap=True
        )
    return len(parts[0]) if fitting else len(cells)


def _parts(width_of: dict[str, int], room: int) -> list[list[str]]:
    """The columns in as few parts as fit `room` characters, each beginning with the columns that
    identify a row, or only with layer and router if those need more than half the room."""
    names = list(width_of)
    lead = [name for name in names if name in LEAD]
    if sum(width_of[n] + GAP for n in lead) > room // 2:
        lead = [name for name in lead if name in ("layer", "router")]
    if names[:1] == ["key"]:
        return [names]
    parts = [list(lead)]
    for name in names:
        if name in lead:
            continue
        if sum(width_of[n] + GAP for n in [*parts[-1], name]) - GAP > room and len(parts[-1]) > len(
            lead
        ):
            parts.append(list(lead))
        parts[-1].append(name)
    return parts


def _row(cells: Iterable[str], widths: list[int], right: list[bool]) -> str:
    padded = list[str]()
    for cell, width, to_the_right in zip(cells, widths, right, strict=True):
        blanks = " " * (width - cell_len(cell))
        padded.append(blanks + cell if to_the_right else cell + blanks)
    return (" " * GAP).join(padded).rstrip(" ")


def _clipped(cell: str, most: int) -> str:
    return cell if cell_len(cell) <= most else set_cell_size(cell, most - 1) + "…"


def _cell(value: Any) -> str:
    is_number = not isinstance(value, bool) and isinstance(value, Real)
    return number(value) if is_number else printable(str(value))
