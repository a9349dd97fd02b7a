"""The report on a terminal, or as text in a file: the verdict first, then the load at a glance, then the tables cut short.

On a terminal colours help and columns are chosen to fit; in a file or a pipe nothing depends on colour and every column is
there. L routers, E experts.
"""

from __future__ import annotations

import math
import shlex
import textwrap
from typing import TYPE_CHECKING, Any, TextIO, cast

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_inspect.analysis.balance import load_ratio

if TYPE_CHECKING:
    from moe_inspect.report.report import Report

ROWS = 10  # of a table in the report; --table has them all
MOST_ROWS = 2_000  # of --format table: Rich is slow, and nobody reads more
FILE_WIDTH = 10_000
FILE_TEXT = 100  # columns of sentences in a file
FILE_CELLS = 128  # characters of a heatmap row in a file

# upper end of the load ratio → character, with Unicode and without; 0 is a dead expert
RAMP = [
    (0, "×", "x"),
    (0.25, "▁", "."),
    (0.5, "▂", ":"),
    (0.8, "▃", "-"),
    (1.25, "▄", "="),
    (2, "▅", "+"),
    (4, "▇", "#"),
    (math.inf, "█", "@"),
]

# table → (columns on a terminal, what the rows shown are)
CUTS: dict[str, tuple[list[str], str]] = {
    "balance": (
        [
            "layer",
            "router",
            "max_over_mean",
            "max_vio_low",
            "max_vio_high",
            "noise_floor",
            "max_vio_batch",
            "cv",
            "gini",
            "dead_experts",
            "busiest_expert",
        ],
        "the least balanced routers",
    ),
    "load": (["layer", "router", "expert", "assignments", "share", "load_ratio", "first_choice"], "the most and the least loaded experts"),
    "domains": (
        ["layer", "router", "domain", "expert", "tokens", "activation", "lift"],
        "furthest above the mean over the domains, by activation minus that mean",
    ),
    "specialization": (
        [
            "layer",
            "router",
            "domain_mi_bits",
            "domain_mi_null_bits",
            "token_mi_bits",
            "token_mi_null_bits",
            "jsd_bits",
            "vocabulary_specialization",
        ],
        "the routers that tell domains apart best",
    ),
    "router": (
        ["layer", "router", "weight_mass", "weight_entropy_nats", "aux_loss", "z_loss", "gate_entropy_nats", "top_k_mass", "tie_rate"],
        "the least decided routers",
    ),
    "vocabulary": (
        ["layer", "router", "expert", "token", "count", "fraction", "first_choice_fraction"],
        "the token ids that follow one expert most",
    ),
}


class _Trimmed:
    """A file without the blanks that Rich pads the last column with."""

    def __init__(self, file: TextIO):
        self.file, self.encoding, self.flush = file, file.encoding, file.flush

    def write(self, text: str) -> None:
        self.file.write("\n".join(line.rstrip(" ") for line in text.split("\n")))


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # Rich would exit with 1; the command knows better


def console_for(file: TextIO) -> Console:
    """Text as it is: tokens hold brackets and colons that must not become markup. No line of a file is broken."""
    plain: dict[str, Any] = {"markup": False, "highlight": False, "emoji": False}
    console = _Console(**plain, file=file)
    return console if console.is_terminal else _Console(**plain, file=cast("TextIO", _Trimmed(file)), width=FILE_WIDTH, color_system=None)


def print_report(report: Report, file: TextIO) -> None:
    """The whole report."""
    console, facts = console_for(file), dict(report.facts())
    console.print(Text(printable(f"{facts['model']} · {report.trace.path} · {facts['status']}"), style="bold"))
    console.print()
    _print_verdict(report.verdict(), console)
    print_heatmap(report, console)
    for name, (columns, what) in CUTS.items():
        if name == "vocabulary" and report.counts.counts_only:
            continue
        if name == "router" and not (report.trace.has_weights or "logits" in report.trace.tables):
            continue
        if name == "domains" and len(report.counts.domains) < 2:
            console.print()
            console.print(Text(f"domains: only one, {', '.join(map(repr, report.counts.domains))}, so none to compare it with"))
            continue
        whole = report.tables[name]
        frame = _cut(name, whole)
        if name == "specialization" and not whole["domain_mi_bits"].notna().to_numpy().any():
            what = "the first routers"
        shown = f"{name}: {what}, {len(frame):,} of {len(whole):,} rows" if len(frame) < len(whole) else name
        if console.is_terminal:
            several = len({r.layer for r in report.trace.routers}) < len(report.trace.routers)
            frame = frame[[c for c in columns if several or c != "router"]]
        print_frame(frame, console, shown)
        if left_out := len(whole.columns) - len(frame.columns):
            columns = "column" if left_out == 1 else "columns"
            command = f"moe-inspect report {shlex.quote(str(report.trace.path))} --table {name}"
            console.print(Text(f"+ {left_out} more {columns}: {command}", style="dim"))
    notes = report.notes()
    if notes:
        console.print()
    for note in notes:
        console.print(Text(_wrapped("note: ", printable(note), console), style="dim"))


def _print_verdict(sentences: list[str], console: Console) -> None:
    sentences = [printable(sentence) for sentence in sentences]
    if not console.is_terminal:
        for sentence in sentences:
            console.print(Text(_wrapped("• ", sentence, console)))
        return
    hanging = Table.grid(padding=(0, 1, 0, 0))
    for sentence in sentences:
        hanging.add_row(Text("•"), Text(sentence))
    console.print(hanging)


def _wrapped(lead: str, sentence: str, console: Console) -> str:
    """A sentence over several lines of a file; a terminal breaks it by itself."""
    if console.is_terminal:
        return lead + sentence
    return textwrap.fill(
        sentence, FILE_TEXT, initial_indent=lead, subsequent_indent=" " * len(lead), break_long_words=False, break_on_hyphens=False
    )


def print_table(frame: Any, file: TextIO) -> int:
    """One table, every column. Returns how many rows were left out."""
    print_frame(frame.head(MOST_ROWS), console_for(file))
    return max(0, len(frame) - MOST_ROWS)


def print_frame(frame: Any, console: Console, title: str | None = None) -> None:
    """A DataFrame; one too wide for the terminal comes in several parts, each with layer and router in front."""
    cells = {name: ["-" if gone else _said(v) for v, gone in zip(frame[name], frame[name].isna(), strict=True)] for name in frame.columns}
    width_of = {name: max([len(name), *(Text(c).cell_len for c in column)]) + 2 for name, column in cells.items()}
    lead = [name for name in ("layer", "router") if name in cells]
    parts: list[list[str]] = [list(lead)]
    for name in cells:
        if name in lead:
            continue
        if sum(width_of[n] for n in [*parts[-1], name]) > console.width and len(parts[-1]) > len(lead):
            parts.append(list(lead))
        parts[-1].append(name)
    for number, names in enumerate(parts):
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        for name in names:
            numeric = frame[name].dtype.kind in "iuf"
            table.add_column(Text(name), justify="right" if numeric else "left", no_wrap=True, overflow="ellipsis")
        for row in zip(*(cells[name] for name in names), strict=True):
            table.add_row(*(Text(cell) for cell in row))
        if title or number:
            console.print()
        if title and number == 0:
            console.print(Text(title, style="bold"))
        console.print(table)


def _said(value: Any) -> str:
    if isinstance(value, (float, np.floating)):
        return f"{value:,.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"
    if isinstance(value, (int, np.integer)):
        return f"{value:,}"
    return printable(str(value))


def printable(text: str) -> str:
    """A text of which nothing can steer a terminal: control characters, escapes and direction marks are spelled out."""
    return text if text.isprintable() else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _cut(name: str, frame: Any) -> Any:
    """The rows worth reading first."""
    if name == "balance" and len(frame) > ROWS:
        return frame.nlargest(ROWS, "max_vio").sort_values(["layer", "router"])
    if name == "load" and len(frame) > ROWS:
        ordered = frame.sort_values("load_ratio", ascending=False, kind="stable").dropna(subset="load_ratio")
        return ordered if len(ordered) <= ROWS else ordered.iloc[[*range(ROWS // 2), *range(-(ROWS - ROWS // 2), 0)]]
    if name == "domains":
        rise = frame["activation"] - frame["activation"] / frame["lift"]
        return frame.loc[rise.nlargest(ROWS).index]
    if name == "specialization" and len(frame) > ROWS:
        return (
            frame.nlargest(ROWS, "domain_mi_bits").sort_values(["layer", "router"])
            if frame["domain_mi_bits"].notna().any()
            else frame.head(ROWS)
        )
    if name == "router" and len(frame) > ROWS:
        by = "gate_entropy_nats" if frame["gate_entropy_nats"].notna().any() else "weight_entropy_nats"
        return frame.nlargest(ROWS, by).sort_values(["layer", "router"]) if frame[by].notna().any() else frame.head(ROWS)
    if name == "vocabulary":
        return frame.loc[(frame["first_choice_fraction"] * np.log1p(frame["count"])).nlargest(ROWS).index]
    return frame


def print_heatmap(report: Report, console: Console) -> None:
    """A row a router: the load ratio of each expert, as numbers where they fit, as characters otherwise. Where even those do
    not fit, a character is the most extreme of several experts next to each other, and the title says so."""
    counts, routers = report.counts, report.selection.routers
    ratios = {r: load_ratio(counts.load_E(r)[None])[0] for r in routers}
    widest = max(len(ratio_E) for ratio_E in ratios.values())
    label_of = {r: _label(report, r) for r in routers}
    indent = max(len(label) for label in label_of.values()) + 2
    room = (console.width if console.is_terminal else FILE_CELLS + indent) - indent
    numbers = widest * 5 <= room
    together = 1 if numbers else math.ceil(widest / room)
    unicode = (console.encoding or "").lower().startswith("utf")
    console.print()
    console.print(Text(_heatmap_title(numbers, together), style="bold"))
    if numbers:
        console.print(Text(" " * indent + "".join(f"{e:>5}" for e in range(widest))))
    else:
        console.print(Text(_legend(unicode)))
    for r in routers:
        line = Text(label_of[r].ljust(indent))
        if np.isnan(ratios[r]).all():
            line.append("no load")
        elif numbers:
            for ratio in ratios[r]:
                line.append(f"{ratio:>5.2f}" if ratio < 99.5 else f"{ratio:>5.0f}", style=_style(ratio, "on "))
        else:
            for ratio in _extremes(ratios[r], together):
                line.append(_character(ratio, unicode), style=_style(ratio))
        console.print(line, no_wrap=True, overflow="crop")


def _label(report: Report, router: int) -> str:
    layer = report.trace.routers[router].layer
    several = sum(r.layer == layer for r in report.trace.routers) > 1
    return f"layer {layer}/{router}" if several else f"layer {layer}"


def _heatmap_title(numbers: bool, together: int) -> str:
    title = "load of each expert, as a ratio to its router's mean"
    if numbers:
        return title
    return f"{title}; experts left to right" + (f", each character the most extreme of {together}" if together > 1 else "")


def _legend(unicode: bool) -> str:
    low, parts = None, []
    for high, fancy, plain in RAMP:
        character = fancy if unicode else plain
        if high == 0:
            parts.append(f"{character} dead")
        elif high == math.inf:
            parts.append(f"{character} ≥{low:g}" if unicode else f"{character} >={low:g}")
        else:
            parts.append(f"{character} <{high:g}")
        low = high
    return "   ".join(parts)


def _extremes(ratio_E: np.ndarray, together: int) -> list[float]:
    """Of every `together` neighbours the ratio furthest from 1, on the logarithmic scale on which 0.5 is as far as 2."""
    distance_E = np.abs(np.log(np.maximum(ratio_E, 1e-9)))
    starts = range(0, len(ratio_E), together)
    return [float(ratio_E[s + int(distance_E[s : s + together].argmax())]) for s in starts]


def _character(ratio: float, unicode: bool) -> str:
    for high, fancy, plain in RAMP:
        if ratio < high or ratio == high == 0:
            return fancy if unicode else plain
    raise AssertionError(ratio)


def _style(ratio: float, on: str = "") -> str:
    """Blue under the mean, red above it, nothing near it; of the character, or of the ground it is "on "."""
    far = min(abs(math.log2(max(ratio, 1e-3))) / 1.5, 1.0)
    if far < 0.15:
        return ""
    fade, ink = round(215 - 145 * far), "black " if on else ""
    return f"{ink}{on}rgb(255,{fade},{fade})" if ratio > 1 else f"{ink}{on}rgb({fade},{fade},255)"
