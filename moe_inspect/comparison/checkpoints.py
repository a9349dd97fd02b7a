"""Several traces of one text, in the order of training: when does the routing settle?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from moe_inspect.analysis.metrics.chance import FEWEST_TO_JUDGE
from moe_inspect.comparison.decisions.data import Decisions
from moe_inspect.comparison.result import CHECKPOINT_TABLES, Comparison, ComparisonKind
from moe_inspect.reporting.charts.spec import SERIES, Axis, Chart, Line, Panel
from moe_inspect.reporting.report import report
from moe_inspect.reporting.tables.registry import Excerpt, table
from moe_inspect.reporting.verdict.findings import Finding, finding
from moe_inspect.text import plural

SETTLED = 0.9  # overlap with the last checkpoint
BALANCE = ("max_over_mean", "max_vio", "dead_experts", "entropy")
KEYS = ["layer", "router"]
SPECIALIZATION = ("domain_mi_bits", "domain_mi_null_bits", "vocabulary_specialization")


class Checkpoints(Comparison):
    """Traces of one text, in the order of training, each compared with the last."""

    def __init__(self, comparisons: Sequence[Decisions]):
        traces = [*(made.a for made in comparisons), comparisons[0].b]
        super().__init__(traces, comparisons[0].options.given)
        self.comparisons, self.trace = comparisons, self.b
        self.names = [str(trace.path) for trace in traces]

    @property
    def why(self) -> str:
        return "of more than two traces, each is compared with the last"

    @property
    def title(self) -> str:
        return " → ".join(self.names)

    @property
    def subtitle(self) -> str:
        many = plural(len(self.names), "checkpoint")
        return f"{many} · each compared with {self.names[-1]}"


@table(by_router=("overlap",), tables=CHECKPOINT_TABLES)
def saturation(data: Checkpoints) -> pd.DataFrame:
    """One row per checkpoint but the last and router: the share of experts that are those of the
    last checkpoint (OLMoE, equation 5), and of first choices that stay."""
    overlap = ("overlap", "overlap_low", "overlap_high", "overlap_by_chance")
    return _by_checkpoint(data, "agreement", (*overlap, "set_mismatch", "first_choice"))


@table(tables=CHECKPOINT_TABLES)
def saturation_by_domain(data: Checkpoints) -> pd.DataFrame:
    """The same by domain."""
    return _by_checkpoint(data, "domains", ("domain", "overlap", "set_mismatch"))


def _by_checkpoint(data: Checkpoints, name: str, columns: Sequence[str]) -> pd.DataFrame:
    return _numbered([made.tables[name][[*KEYS, *columns]] for made in data.comparisons])


def _numbered(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The tables of the checkpoints one after the other, their number beside the router."""
    whole = pd.concat(parts, ignore_index=True)
    whole.insert(2, "checkpoint", np.repeat(np.arange(len(parts)), [len(part) for part in parts]))
    return whole


@table(tables=CHECKPOINT_TABLES)
def change(data: Checkpoints) -> pd.DataFrame:
    """One row per checkpoint and router: its balance and specialization."""
    parts, of = list[pd.DataFrame](), data.comparisons[0].options
    for trace in data.traces:
        made = report(trace, layers=of.layers, domains=of.domains, phase=of.phase)
        made.prepare(["balance", "specialization"])
        balance = made.tables["balance"][[*KEYS, *BALANCE]]
        special = made.tables["specialization"][[*KEYS, *SPECIALIZATION]]
        parts.append(balance.merge(special, on=KEYS))
    return _numbered(parts)


@table(tables=CHECKPOINT_TABLES)
def checkpoints(data: Checkpoints) -> pd.DataFrame:
    """One row per checkpoint: its trace."""
    frame = pd.DataFrame({"checkpoint": range(len(data.names)), "trace": data.names})
    return frame.astype({"trace": "str"})


def saturation_curves(data: Checkpoints) -> Chart:
    """A line per layer, or the mean, least and most of many."""
    rows, names = data.tables["saturation"], [Path(name).name for name in data.names]
    by_router = rows.pivot(index="checkpoint", columns="router", values="overlap")
    x, colours = by_router.index.to_numpy(float), SERIES
    routers = sorted(set(rows["router"]))
    of = [(f"layer {data.trace.routers[r].layer}", by_router[r]) for r in routers]
    if len(of) > len(SERIES):
        colours = ("c3", "c1", "c2")
        of = [
            ("the layer that agrees most", by_router.max(axis=1)),
            ("mean of the layers", by_router.mean(axis=1)),
            ("the layer that agrees least", by_router.min(axis=1)),
        ]
    lines = tuple(
        Line(x, values.to_numpy(float), said, colour, dots=True)
        for (said, values), colour in zip(of, colours, strict=False)
    )
    *labels, last = names
    panel = Panel(lines, Axis("checkpoint", tuple(labels)), Axis("overlap", low=0, high=1))
    caption = f"Share of the experts that are those of the last checkpoint, {last}"
    return Chart("Router saturation", caption, (panel,), table=rows)


def misaligned(data: Checkpoints) -> Iterator[Finding]:
    for made in data.comparisons:
        for one in made.misaligned:
            said = f"{made.a.path} (A) and {made.b.path} (B): {one.text}"
            yield finding(one.kind, "critical", said, option=one.values["option"])


def settling(data: Checkpoints) -> Iterator[Finding]:
    rows = data.tables["saturation"]
    mean = rows.groupby("checkpoint")["overlap"].mean()
    chance = float(rows["overlap_by_chance"].mean())
    settled = [i for i in mean.index if (mean.loc[i:] >= SETTLED).all()]
    within = f"the routing is within {SETTLED:.0%} of the last"
    when = f"From no checkpoint on does the routing stay within {SETTLED:.0%} of the last"
    if any(len(made.counts.domain_U[made.units]) < FEWEST_TO_JUDGE for made in data.comparisons):
        settled, when = [], f"Too few documents to tell when {within}"
    elif settled:
        when = f"From checkpoint {settled[0]} on ({data.names[settled[0]]}) {within}"
    ends = " → ".join(f"{value:.1%}" for value in mean)
    text = f"{when}: mean overlap {ends} (by chance {chance:.1%})."
    first = rows[rows["checkpoint"] == 0]
    most, least = (first.iloc[i] for i in (first["overlap"].argmax(), first["overlap"].argmin()))
    if f"{most['overlap']:.1%}" != f"{least['overlap']:.1%}":
        text += (
            f" At the first checkpoint layer {data.label(int(most['router']))} agrees most "
            f"({most['overlap']:.1%}), layer {data.label(int(least['router']))} least "
            f"({least['overlap']:.1%})."
        )
    values = {"overlap": mean.tolist(), "settled": settled[0] if settled else None}
    yield finding("saturation", "note", text, **values)


OF_MEAN = ["overlap", "overlap_by_chance", "set_mismatch", "first_choice"]
Checkpoints.kind = ComparisonKind(
    of="checkpoints",
    tables=CHECKPOINT_TABLES,
    main="saturation",
    checks=(misaligned, settling),
    title="When does the routing settle?",
    footer="Overlap is the share of the experts of a decision that the last checkpoint chooses "
    "too.",
    charts={"saturation": (saturation_curves, "Decisions", "saturation")},
    sections={
        "saturation_by_domain": ("Decisions", "By domain", ""),
        "change": ("Load and specialization", "Balance and specialization", ""),
        "checkpoints": ("", "The checkpoints", ""),
    },
    excerpts={
        "saturation": Excerpt(
            "the mean over the routers",
            lambda of, most: of.groupby("checkpoint", as_index=False)[OF_MEAN].mean().tail(most),
        )
    },
)
