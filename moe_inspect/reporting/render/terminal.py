"""The report as text: the verdict first, then the load at a glance, then the tables cut short."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np
from rich.console import Console
from rich.text import Text

from moe_inspect.reporting.render.console import console_for, print_frame, wrapped
from moe_inspect.reporting.render.heatmap import print_heatmap
from moe_inspect.reporting.render.one_screen import finding_lines, print_one_screen
from moe_inspect.reporting.tables.data import ReportData
from moe_inspect.reporting.tables.summary import facts, notes
from moe_inspect.reporting.verdict.checks import findings
from moe_inspect.reporting.verdict.findings import Finding
from moe_inspect.text import printable

ROWS = 10  # of a table in the report; --table has them all


@dataclass(frozen=True)
class Excerpt:
    """What the report shows of a table. columns: on a terminal, as many as fit, the most
    informative first. rows: those worth reading first, which `what` describes."""

    columns: tuple[str, ...]
    what: str
    rows: Callable[[Any], Any]


def print_report(data: ReportData, file: TextIO, full: bool = False) -> None:
    """The report on one screen; `full`: with every finding and note, and excerpts of the tables."""
    console, model = console_for(file), dict(facts(data))["model"]
    title = Text(
        printable(f"{model} · {data.trace.path} · {data.trace.status}"),
        style="bold",
    )
    if not full:
        print_one_screen(data, title, console)
        return
    for line in wrapped(title, console):
        console.print(line, soft_wrap=True)
    console.print()
    print_verdict(findings(data), console)
    print_heatmap(data, console)
    for name, excerpt in EXCERPTS.items():
        alone = len(data.counts.domains) < 2 and data.selection.domains is None
        if name == "domains" and alone:
            labels = ", ".join(map(repr, data.counts.domains))
            console.print()
            console.print(Text(f"domains: only one, {labels}: nothing to compare it with"))
        elif _has(data, name):
            _print_excerpt(data, name, excerpt, console)
    if notes(data):
        console.print()
    for note in notes(data):
        for line in wrapped(Text(printable(note), style="dim"), console, Text("note: ", "dim")):
            console.print(line, soft_wrap=True)


def _has(data: ReportData, name: str) -> bool:
    """Whether the trace has what a table is made of."""
    if name == "vocabulary":
        return not data.counts.counts_only
    return name != "router" or data.trace.has_weights or "logits" in data.trace.tables


def print_verdict(findings: list[Finding], console: Console) -> None:
    """A bullet per finding."""
    for found in findings:
        for line in finding_lines(found, console):
            console.print(line, soft_wrap=True)


def _print_excerpt(data: ReportData, name: str, excerpt: Excerpt, console: Console) -> None:
    whole: Any = data.tables[name]
    frame = excerpt.rows(whole)
    what = excerpt.what
    if name == "specialization" and not whole["domain_mi_bits"].notna().any():
        what = "the first routers"
    title = f"{name}: {what}, {len(frame):,} of {len(whole):,} rows"
    if console.is_terminal:
        several = len({r.layer for r in data.trace.routers}) < len(data.trace.routers)
        frame = frame[[c for c in excerpt.columns if several or c != "router"]]
    shown = print_frame(
        frame,
        console,
        title if len(frame) < len(whole) else name,
        fitting=console.is_terminal,
    )
    if left_out := len(whole.columns) - shown:
        columns = "column" if left_out == 1 else "columns"
        command = f"moe-inspect report {shlex.quote(str(data.trace.path))} --table {name}"
        console.print(Text(printable(f"+ {left_out} more {columns}: {command}"), style="dim"))


def _highest(frame: Any, column: str) -> Any:
    """The rows with the highest values of a column, in the order of layers; the first rows where it
    has no values."""
    if len(frame) <= ROWS:
        return frame
    if not frame[column].notna().any():
        return frame.head(ROWS)
    return frame.nlargest(ROWS, column).sort_values(["layer", "router"])


def _most_and_least_loaded(frame: Any) -> Any:
    if len(frame) <= ROWS:
        return frame
    ordered = frame.sort_values("load_ratio", ascending=False, kind="stable")
    ordered = ordered.dropna(subset="load_ratio")
    half = ROWS // 2
    return ordered.iloc[[*range(half), *range(half - ROWS, 0)]] if len(ordered) > ROWS else ordered


def _furthest_above_mean(frame: Any) -> Any:
    rise = frame["activation"] - frame["activation"] / frame["lift"]
    return frame.loc[rise.nlargest(ROWS).index]


def _least_confident(frame: Any) -> Any:
    known = frame["gate_entropy_nats"].notna().any()
    return _highest(frame, "gate_entropy_nats" if known else "weight_entropy_nats")


def _most_exclusive(frame: Any) -> Any:
    # first choices may be unknown
    fraction = frame["first_choice_fraction"].fillna(frame["fraction"])
    return frame.loc[(fraction * np.log1p(frame["count"])).nlargest(ROWS).index]


# table → what of it, in the order of the report
EXCERPTS = {
    "balance": Excerpt(
        (
            "layer",
            "router",
            "max_over_mean",
            "expected_by_chance",
            "max_over_mean_low",
            "max_over_mean_high",
            "busiest_expert",
            "dead_experts",
            "cv",
            "gini",
            "max_vio_batch",
        ),
        "the least balanced routers",
        lambda frame: _highest(frame, "max_vio"),
    ),
    "load": Excerpt(
        ("layer", "router", "expert", "assignments", "share", "load_ratio", "first_choice"),
        "the most and the least loaded experts",
        _most_and_least_loaded,
    ),
    "domains": Excerpt(
        ("layer", "router", "domain", "expert", "tokens", "activation", "lift"),
        "furthest above the mean over the domains, by activation minus that mean",
        _furthest_above_mean,
    ),
    "specialization": Excerpt(
        (
            "layer",
            "router",
            "domain_mi_bits",
            "domain_mi_null_bits",
            "token_mi_bits",
            "token_mi_null_bits",
            "jsd_bits",
            "vocabulary_specialization",
        ),
        "the routers that separate domains best",
        lambda frame: _highest(frame, "domain_mi_bits"),
    ),
    "router": Excerpt(
        (
            "layer",
            "router",
            "weight_mass",
            "weight_entropy_nats",
            "aux_loss",
            "z_loss",
            "gate_entropy_nats",
            "top_k_mass",
            "tie_rate",
        ),
        "the least confident routers",
        _least_confident,
    ),
    "vocabulary": Excerpt(
        ("layer", "router", "expert", "token", "count", "fraction", "first_choice_fraction"),
        "the token ids that go to one expert most exclusively",
        _most_exclusive,
    ),
}
