"""A comparison as text: the verdict, then the tables cut short."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TextIO

from rich.text import Text

from moe_inspect.comparison.checkpoints_data import CheckpointData
from moe_inspect.comparison.data import PairData
from moe_inspect.comparison.verdict import findings
from moe_inspect.reporting.render.console import (
    console_for,
    print_and_count,
    print_frame,
    rows_that_fit,
    screen_lines,
)
from moe_inspect.reporting.render.terminal import print_verdict
from moe_inspect.text import printable

ROWS = 10  # of a table in a file; --table has them all
LEAST_OF_TABLE = 8  # lines of a table with two rows


@dataclass(frozen=True)
class Excerpt:
    """What of a table is shown: columns on a terminal, and the rows worth reading first."""

    columns: tuple[str, ...]
    what: str
    rows: Callable[[Any, int], Any]


def _worst(frame: Any, most: int) -> Any:
    if len(frame) <= most:
        return frame
    return frame.nlargest(most, "set_mismatch").sort_values(["layer", "router"])


def _first(frame: Any, most: int) -> Any:
    return frame.head(most)


def _most(frame: Any, most: int) -> Any:
    return frame.nlargest(most, "flips")


EXCERPTS = {
    "agreement": Excerpt(
        (
            "layer",
            "router",
            "set_mismatch",
            "set_mismatch_low",
            "set_mismatch_high",
            "overlap",
            "first_choice",
            "weight_l1",
            "noise_set_mismatch",
        ),
        "the routers that differ most",
        _worst,
    ),
    "tokens": Excerpt(("routers", "tokens", "share", "share_more"), "the first rows", _first),
    "flips": Excerpt(
        ("layer", "router", "expert", "other", "flips", "expected", "lift"),
        "the most frequent",
        _most,
    ),
    "documents": Excerpt(
        ("document", "domain", "tokens", "mismatches", "set_mismatch"),
        "those that differ most",
        _first,
    ),
}


def print_comparison(made: PairData, file: TextIO) -> None:
    """The whole text; on a terminal as much as fits a screen."""
    console = console_for(file)
    title = f"A {made.a.path} · B {made.b.path}"
    lines = print_and_count(partial(print_verdict, findings(made)), console, title)
    shown = [
        name
        for name in EXCERPTS
        if len(made.tables[name]) and (name == "agreement" or made.mismatched)
    ]
    if console.is_terminal:  # tables that have room for two rows
        del shown[max(1, (screen_lines(console) - lines) // LEAST_OF_TABLE) :]
    most = rows_that_fit(console, lines, len(shown)) if console.is_terminal else ROWS
    for name in shown:
        excerpt, whole = EXCERPTS[name], made.tables[name]
        frame = excerpt.rows(whole, most)
        if console.is_terminal:
            frame = frame[[c for c in excerpt.columns if c in frame.columns]]
        cut = len(frame) < len(whole)
        title = f"{name}: {excerpt.what}, {len(frame):,} of {len(whole):,} rows" if cut else name
        columns_shown = print_frame(frame, console, title, fitting=console.is_terminal)
        if left := len(whole.columns) - columns_shown:
            paths = " ".join(shlex.quote(str(trace.path)) for trace in (made.a, made.b))
            columns = "column" if left == 1 else "columns"
            command = f"moe-inspect compare {paths} --table {name}"
            console.print(Text(printable(f"+ {left} more {columns}: {command}"), style="dim"))


def print_checkpoints(made: CheckpointData, file: TextIO) -> None:
    """The text on several checkpoints."""
    console = console_for(file)
    console.print(Text(printable(" → ".join(made.names)), style="bold"))
    console.print()
    print_verdict(made.verdict(), console)
    whole: Any = made.tables["saturation"]
    mean = whole.groupby("checkpoint", as_index=False)[
        ["overlap", "overlap_by_chance", "set_mismatch", "first_choice"]
    ].mean()
    print_frame(mean, console, "saturation: the mean over the routers; --table shows them all")
