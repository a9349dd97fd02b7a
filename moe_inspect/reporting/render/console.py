"""Tables as text. On a terminal they have colours and columns are chosen to fit; in a file or a
pipe nothing depends on colour and every column is there."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Iterable
from functools import partial
from numbers import Real
from typing import Any, TextIO

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.segment import Segment, Segments
from rich.text import Text

from moe_inspect.text import is_missing, number, printable

SCREEN_LINES = 45
LEAST_LINES = 23
MOST_ROWS = 2_000  # shown by --format table
GAP = 2  # between columns
FILE_WIDTH = 10_000
# columns that identify a row
LEAD = (
    *("layer", "router", "domain", "expert", "other", "next_layer", "next_router", "next_expert"),
    *("window", "token_id", "metric", "policy", "algorithm", "slots", "batch", "capacity_factor"),
    *("checkpoint", "trace"),
)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # Rich would exit with code 1; the command ends quietly


def console_for(file: TextIO) -> Console:
    """A console that prints text as it is, brackets too, and breaks no line of a file."""
    plain = partial(_Console, file=file, markup=False, highlight=False, emoji=False)
    if isinstance(file, _Screen):
        return plain(force_terminal=True, color_system=None)
    console = plain()
    return console if console.is_terminal else plain(width=FILE_WIDTH, color_system=None)


class _Screen(io.StringIO):
    """Takes what is printed as a terminal would, without colours."""


def on_screen(show: Callable[[TextIO], None]) -> str:
    """What `show` prints on a terminal of this width (80 columns where there is none), without
    colours: an object as text."""
    screen = _Screen()
    show(screen)
    return screen.getvalue().rstrip("\n")


def print_table(table: Any, file: TextIO) -> int:
    """One table, a DataFrame or its columns: every column. Returns how many rows were left out."""
    print_frame({name: table[name][:MOST_ROWS] for name in table}, console_for(file))
    return max([0, *(len(table[name]) - MOST_ROWS for name in table)])


def screen_lines(console: Console) -> int:
    """The lines of a screen of text: SCREEN_LINES, or fewer where the terminal is lower."""
    low = console.is_terminal and not isinstance(console.file, _Screen)
    return max(LEAST_LINES, min(SCREEN_LINES, console.height - 1)) if low else SCREEN_LINES


def print_frame(
    frame: Any, console: Console, title: str | None = None, fitting: bool = False
) -> int:
    """Prints a DataFrame, or its columns. On a terminal, columns with the same value in every row
    are a line above it, and if it is too wide it comes in several parts, each beginning with the
    columns that identify a row. `fitting`: only the first part. Returns how many are shown."""
    most = console.width // 3 if fitting else math.inf
    cells = {str(name): [_cell(v, most) for v in frame[name].tolist()] for name in frame}
    constant = _constant(cells) if console.is_terminal else {}
    cells = {name: column for name, column in cells.items() if name not in constant}
    width_of = {name: max([len(name), *map(cell_len, column)]) for name, column in cells.items()}
    parts = _parts(width_of, console.width)
    if title:
        console.print()
        print_lines(title, "bold", console)
    if said := " · ".join(f"{name} {value}" for name, value in constant.items() if value):
        print_lines(f"every row: {said}", "dim", console)
    for part, names in enumerate(parts[:1] if fitting else parts):
        if part:
            console.print()
        right = [frame[name].dtype.kind in "iuf" for name in names]
        widths = [width_of[name] for name in names]
        rows: Iterable[tuple[str, ...]] = zip(*(cells[name] for name in names), strict=True)
        lines = [table_row(row, widths, right) for row in rows]
        before = sum(widths[:-1]) + GAP * (len(widths) - 1)
        # the last column is a long text
        if console.is_terminal and before + widths[-1] > console.width:
            widths[-1] = max(console.width - before, 20)
            wrap = partial(textwrap.fill, width=before + widths[-1], break_on_hyphens=False)
            lines = [wrap(line, subsequent_indent=" " * before) for line in lines]
        console.print(Text(table_row(names, widths, right), style="bold"), soft_wrap=True)
        rule = "─" * (before + widths[-1])
        text = "\n".join([rule, *lines, ""]).expandtabs()
        console.print(Segments([Segment(text)]), soft_wrap=True)  # faster than a Text
    shown = len(parts[0]) if fitting else len(cells)
    return shown + sum(value != "" for value in constant.values())


def print_lines(text: str | Text, style: str, console: Console) -> None:
    """Prints a text, `wrapped`."""
    text = Text(printable(text), style=style) if isinstance(text, str) else text
    for line in wrapped(text, console):
        console.print(line, soft_wrap=True)


def _constant(cells: dict[str, list[str]]) -> dict[str, str]:
    """The columns that say the same in every row, with what they say; "" for the router where every
    layer has one: its number then says nothing that the layer does not."""
    names = list(cells)
    if not names or len(cells[names[0]]) < 2 or names[0] == "key":
        return {}
    found = {name: column[0] for name, column in cells.items() if len(set(column)) == 1}
    for layer, router in (("layer", "router"), ("next_layer", "next_router")):
        pairs = set(zip(cells.get(layer, []), cells.get(router, []), strict=False))
        if pairs and len(pairs) == len({a for a, _ in pairs}):
            found[router] = ""
    return found if len(found) < len(names) else {}


def _parts(width_of: dict[str, int], room: int) -> list[list[str]]:
    """The columns in as few parts as fit `room` characters, each beginning with the columns that
    identify a row, or only with layer and router if those need more than half the room."""
    names = list(width_of)
    if names[:1] == ["key"]:
        return [names]
    lead = [name for name in names if name in LEAD]
    if sum(width_of[n] + GAP for n in lead) > room // 2:
        lead = [name for name in lead if name in ("layer", "router")]
    parts = [list(lead)]
    for name in (name for name in names if name not in lead):
        full = sum(width_of[n] + GAP for n in [*parts[-1], name]) - GAP > room
        if full and len(parts[-1]) > len(lead):
            parts.append(list(lead))
        parts[-1].append(name)
    return parts


def wrapped(text: Text, console: Console, lead: Text | None = None) -> list[Text]:
    """A text in lines of whole words that fit a terminal; in a file or a pipe one line. `lead`: in
    front of the first line, and blanks of its width in front of the others. Only a word that is
    wider than the terminal is broken."""
    lead = lead or Text()
    if not console.is_terminal:
        return [lead + text]
    lines = text.wrap(console, max(console.width - lead.cell_len, 20), overflow="fold")
    for n, line in enumerate(lines):
        line.rstrip()
        lines[n] = (Text(" " * lead.cell_len) if n else lead) + line
    return list(lines)


def table_row(cells: Iterable[str], widths: list[int], right: list[bool]) -> str:
    """Cells side by side, GAP apart, each as wide as its column."""
    padded = list[str]()
    for cell, width, to_the_right in zip(cells, widths, right, strict=True):
        blanks = " " * (width - cell_len(cell))
        padded.append(blanks + cell if to_the_right else cell + blanks)
    return (" " * GAP).join(padded).rstrip(" ")


def _cell(value: object, most: float) -> str:
    """A value in at most so many columns of the terminal."""
    is_number = not isinstance(value, bool) and isinstance(value, Real)
    if is_missing(value):
        return "-"
    cell = number(value) if is_number else printable(str(value))
    fits = most == math.inf or cell_len(cell) <= most
    return cell if fits else set_cell_size(cell, int(most) - 1) + "…"
