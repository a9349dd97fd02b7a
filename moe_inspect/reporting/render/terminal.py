"""The report on a terminal, or as text in a file: the verdict first, then the load at a glance,
then the tables cut short.

On a terminal colours help and columns are chosen to fit; in a file or a pipe nothing depends on
colour and every column is there. L routers, E experts.
"""

from __future__ import annotations

import math
import shlex
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_inspect.analysis.metrics.balance import load_ratio
from moe_inspect.text import layer_label, printable

if TYPE_CHECKING:
    from moe_inspect.reporting.report import Report
    from moe_inspect.reporting.verdict.findings import Finding

ROWS = 10  # of a table in the report; --table has them all
MOST_ROWS = 2_000  # of --format table: nobody reads more
MOST_ROUTERS = 32  # of the map of loads on a terminal; beyond that the least balanced
GAP = 2  # between columns
# what says which row it is
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
COLOUR_OF = {"critical": "red", "warning": "yellow"}  # of a finding; others have none
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

# table → (columns on a terminal, as many as fit, most telling first; what the rows shown are)
CUTS: dict[str, tuple[list[str], str]] = {
    "balance": (
        [
            "layer",
            "router",
            "max_over_mean",
            "noise_floor",
            "busiest_expert",
            "dead_experts",
            "cv",
            "gini",
            "max_vio_low",
            "max_vio_high",
            "max_vio_batch",
        ],
        "the least balanced routers",
    ),
    "load": (
        ["layer", "router", "expert", "assignments", "share", "load_ratio", "first_choice"],
        "the most and the least loaded experts",
    ),
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
        [
            "layer",
            "router",
            "weight_mass",
            "weight_entropy_nats",
            "aux_loss",
            "z_loss",
            "gate_entropy_nats",
            "top_k_mass",
            "tie_rate",
        ],
        "the least decided routers",
    ),
    "vocabulary": (
        ["layer", "router", "expert", "token", "count", "fraction", "first_choice_fraction"],
        "the token ids that follow one expert most",
    ),
}


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # Rich would exit with 1; the command knows better


def console_for(file: TextIO) -> Console:
    """Text as it is: tokens hold brackets and colons that must not become markup. No line of a file
    is broken."""
    plain: dict[str, Any] = {"markup": False, "highlight": False, "emoji": False}
    console = _Console(**plain, file=file)
    return (
        console
        if console.is_terminal
        else _Console(**plain, file=file, width=FILE_WIDTH, color_system=None)
    )


def print_report(report: Report, file: TextIO) -> None:
    """The whole report."""
    console, facts = console_for(file), dict(report.facts())
    console.print(
        Text(printable(f"{facts['model']} · {report.trace.path} · {facts['status']}"), style="bold")
    )
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
            console.print(
                Text(
                    f"domains: only one, {', '.join(map(repr, report.counts.domains))}, so none "
                    "to compare it with"
                )
            )
            continue
        whole = report.tables[name]
        frame = _cut(name, whole)
        if name == "specialization" and not whole["domain_mi_bits"].notna().to_numpy().any():
            what = "the first routers"
        shown = (
            f"{name}: {what}, {len(frame):,} of {len(whole):,} rows"
            if len(frame) < len(whole)
            else name
        )
        if console.is_terminal:
            several = len({r.layer for r in report.trace.routers}) < len(report.trace.routers)
            frame = frame[[c for c in columns if several or c != "router"]]
        if left_out := len(whole.columns) - print_frame(
            frame, console, shown, fitting=console.is_terminal
        ):
            columns = "column" if left_out == 1 else "columns"
            command = f"moe-inspect report {shlex.quote(str(report.trace.path))} --table {name}"
            console.print(Text(printable(f"+ {left_out} more {columns}: {command}"), style="dim"))
    notes = report.notes()
    if notes:
        console.print()
    for note in notes:
        console.print(Text(_wrapped("note: ", printable(note), console), style="dim"))


def _print_verdict(found: list[Finding], console: Console) -> None:
    if not console.is_terminal:
        for finding in found:
            console.print(Text(_wrapped("• ", printable(finding.text), console)))
        return
    hanging = Table.grid(padding=(0, 1, 0, 0))
    for finding in found:
        colour = COLOUR_OF.get(finding.severity, "")
        hanging.add_row(Text("•", style=colour), Text(printable(finding.text), style=colour))
    console.print(hanging)


def _wrapped(lead: str, sentence: str, console: Console) -> str:
    """A sentence over several lines of a file; a terminal breaks it by itself."""
    if console.is_terminal:
        return lead + sentence
    return textwrap.fill(
        sentence,
        FILE_TEXT,
        initial_indent=lead,
        subsequent_indent=" " * len(lead),
        break_long_words=False,
        break_on_hyphens=False,
    )


def print_table(frame: Any, file: TextIO) -> int:
    """One table, every column. Returns how many rows were left out."""
    print_frame(frame.head(MOST_ROWS), console_for(file))
    return max(0, len(frame) - MOST_ROWS)


def print_frame(
    frame: Any, console: Console, title: str | None = None, fitting: bool = False
) -> int:
    """A DataFrame; one too wide for the terminal comes in several parts, each with what its rows
    are about in front; `fitting`: only the first part. Returns how many columns are shown."""
    cells = {
        name: [
            "-" if gone else _said(v)
            for v, gone in zip(frame[name], frame[name].isna(), strict=True)
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
    for number, names in enumerate(parts[:1] if fitting else parts):
        if title or number:
            console.print()
        if title and number == 0:
            console.print(Text(title, style="bold"))
        right = [frame[name].dtype.kind in "iuf" for name in names]
        widths = [width_of[name] for name in names]
        lines = [
            _row(row, widths, right) for row in zip(*(cells[name] for name in names), strict=True)
        ]
        if (
            console.is_terminal and sum(widths) + GAP * (len(widths) - 1) > console.width
        ):  # the last column is a long text
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
    """The columns in as few parts as fit the room, each led by what says which row it is, where
    that leaves half the room."""
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
    padded = []
    for cell, width, to_the_right in zip(cells, widths, right, strict=True):
        blanks = " " * (width - cell_len(cell))
        padded.append(blanks + cell if to_the_right else cell + blanks)
    return (" " * GAP).join(padded).rstrip(" ")


def _clipped(cell: str, most: int) -> str:
    return cell if cell_len(cell) <= most else set_cell_size(cell, most - 1) + "…"


def _said(value: Any) -> str:
    if isinstance(value, (float, np.floating)):
        return f"{value:,.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"
    if isinstance(value, (int, np.integer)):
        return f"{value:,}"
    return printable(str(value))


def _cut(name: str, frame: Any) -> Any:
    """The rows worth reading first."""
    if name == "balance" and len(frame) > ROWS:
        return frame.nlargest(ROWS, "max_vio").sort_values(["layer", "router"])
    if name == "load" and len(frame) > ROWS:
        ordered = frame.sort_values("load_ratio", ascending=False, kind="stable").dropna(
            subset="load_ratio"
        )
        return (
            ordered
            if len(ordered) <= ROWS
            else ordered.iloc[[*range(ROWS // 2), *range(-(ROWS - ROWS // 2), 0)]]
        )
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
        by = (
            "gate_entropy_nats"
            if frame["gate_entropy_nats"].notna().any()
            else "weight_entropy_nats"
        )
        return (
            frame.nlargest(ROWS, by).sort_values(["layer", "router"])
            if frame[by].notna().any()
            else frame.head(ROWS)
        )
    if name == "vocabulary":
        fraction = frame["first_choice_fraction"].fillna(
            frame["fraction"]
        )  # first choices may be unknown
        return frame.loc[(fraction * np.log1p(frame["count"])).nlargest(ROWS).index]
    return frame


def print_heatmap(report: Report, console: Console) -> None:
    """A row a router: the load ratio of each expert, as numbers where they fit, as characters
    otherwise. Where even those do not fit, a character is the most extreme of several experts next
    to each other, and the title says so."""
    counts, routers = report.counts, report.selection.routers
    ratios = {r: load_ratio(counts.load_E(r)[None])[0] for r in routers}
    if console.is_terminal and len(routers) > MOST_ROUTERS:
        routers = sorted(
            sorted(routers, key=lambda r: -np.nan_to_num(ratios[r]).max())[:MOST_ROUTERS]
        )
    widest = max(len(ratio_E) for ratio_E in ratios.values())
    label_of = {r: f"layer {layer_label(report.trace.routers, r)}" for r in routers}
    indent = max(len(label) for label in label_of.values()) + 2
    room = (console.width if console.is_terminal else FILE_CELLS + indent) - indent
    numbers = widest * 5 <= room
    together = 1 if numbers else math.ceil(widest / room)
    unicode = (console.encoding or "").lower().startswith("utf")
    console.print()
    console.print(Text(_heatmap_title(numbers, together), style="bold"))
    if len(routers) < len(ratios):
        console.print(Text(f"the least balanced, {len(routers)} of {len(ratios)} routers"))
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
                line.append(
                    f"{ratio:>5.2f}" if ratio < 99.5 else f"{ratio:>5.0f}",
                    style=_style(ratio, "on "),
                )
        else:
            for ratio in _extremes(ratios[r], together):
                line.append(_character(ratio, unicode), style=_style(ratio))
        console.print(line, no_wrap=True, overflow="crop")


def _heatmap_title(numbers: bool, together: int) -> str:
    title = "load of each expert, as a ratio to its router's mean"
    if numbers:
        return title
    return f"{title}; experts left to right" + (
        f", each character the most extreme of {together}" if together > 1 else ""
    )


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
    """Of every `together` neighbours the ratio furthest from 1, on the logarithmic scale on which
    0.5 is as far as 2."""
    distance_E = np.abs(np.log(np.maximum(ratio_E, 1e-9)))
    starts = range(0, len(ratio_E), together)
    return [float(ratio_E[s + int(distance_E[s : s + together].argmax())]) for s in starts]


def _character(ratio: float, unicode: bool) -> str:
    for high, fancy, plain in RAMP:
        if ratio < high or ratio == high == 0:
            return fancy if unicode else plain
    raise AssertionError(ratio)


def _style(ratio: float, on: str = "") -> str:
    """Blue under the mean, red above it, nothing near it; of the character, or of the ground it is
    "on "."""
    far = min(abs(math.log2(max(ratio, 1e-3))) / 1.5, 1.0)
    if far < 0.15:
        return ""
    fade, ink = round(215 - 145 * far), "black " if on else ""
    return f"{ink}{on}rgb(255,{fade},{fade})" if ratio > 1 else f"{ink}{on}rgb({fade},{fade},255)"
