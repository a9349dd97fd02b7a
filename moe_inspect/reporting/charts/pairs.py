"""Charts of pairs: consecutive tokens, the experts of one decision, the experts of a layer and the
next.

L routers, E experts, N experts of the next layer's router.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pandas as pd

from moe_inspect.reporting.charts import spec
from moe_inspect.reporting.charts.spec import Axis, Chart, Heatmap, Line, Panel, layer_axis
from moe_inspect.reporting.tables import pairs
from moe_inspect.reporting.tables.data import ReportData
from moe_inspect.reporting.tables.pairs import BOUNDS, PairEvidence
from moe_inspect.text import cut, layer_label, readable

MOST_PAIRS = 60  # rows of the table of pairs below a chart
MOST_DOMAINS = 24  # rows of a heatmap
MOST_DOTS = 60  # dots with intervals that can be told apart; more make a heatmap
MOST_MATRICES = 4  # layers drawn, each as a matrix of experts
MANY_EXPERTS = 64  # more are shown only as far as they have a supported pair
BEYOND = "is chosen more often than chance explains"
SUPPORTED = (
    "the probability of a count at least as far from the expected one, by chance at these loads "
    "(binomial, two-sided; counts ÷ design effect), × all pairs of the trace (Bonferroni), is at "
    f"most {pairs.ALPHA:g}."
)


@spec.chart("repetition", group="Serving")
def repetition(data: ReportData) -> Chart | str:
    """How often the next token has the same first choice, by layer and domain."""
    if data.counts.counts_only:
        return "repetition: counts alone have no order"
    table = data.tables["repetition"]
    if table["first_choice"].isna().all():
        return "repetition: first choices are unknown, or no token follows another"
    few = table["domain"].nunique() * len(data.selection.routers) <= MOST_DOTS
    panel, left_out = (_as_lines if few else _as_heatmap)(data, table)
    return Chart(
        "Repetition",
        "How often two consecutive tokens have the same first choice",
        (panel,),
        text="How often two consecutive tokens have the same first choice, which is what a cache "
        "of experts relies on." + _intervals([panel] if few else []),
        table=table,
        subset=left_out,
    )


def _as_lines(data: ReportData, table: pd.DataFrame) -> tuple[Panel, str]:
    """A line per domain, with its intervals; and chance."""
    order = {r: i for i, r in enumerate(data.selection.routers)}
    marks = list[spec.Mark]()
    for i, (name, rows) in enumerate(table.groupby("domain", sort=False)):
        share, low, high = (rows[f"first_choice{bound}"].to_numpy() for bound in BOUNDS)
        x, ends = rows["router"].map(order).to_numpy(float), spec.known_interval(low, high)
        marks.append(Line(x, share, cut(readable(name)), *spec.look(i), True, *ends))
    chance_of = table.groupby("router", sort=False)["first_choice_random"].first()
    x = chance_of.index.map(order).to_numpy(float)
    marks.append(Line(x, chance_of.to_numpy(float), "chance", "baseline", "dot"))
    y = Axis("share of consecutive pairs", low=0)
    return Panel(tuple(marks), layer_axis(data, order), y), ""


def _as_heatmap(data: ReportData, table: pd.DataFrame) -> tuple[Panel, str]:
    """A row per domain, those with the most pairs; a column per layer."""
    chosen = data.selection.routers
    pairs_of = table.groupby("domain", sort=False)["pairs"].max()
    names = pairs_of.index[pairs_of.index.isin(pairs_of.nlargest(MOST_DOMAINS).index)]
    of = table.set_index(["domain", "router"])
    share_DL, low_DL, high_DL, chance_DL = (
        of[f"first_choice{c}"].unstack().reindex(index=names, columns=chosen).to_numpy(float)
        for c in (*BOUNDS, "_random")
    )
    notes_DL = np.full(share_DL.shape, "", object)
    for at, low in np.ndenumerate(low_DL):
        interval = f"95% interval: {low:.3f} to {high_DL[at]:.3f}\n" if low == low else ""
        notes_DL[at] = f"{interval}chance: {chance_DL[at]:.3f}"
    least = max(2 * float(np.nanmin(chance_DL)), 0.01)
    scale = spec.amount("share of consecutive pairs", 0, share_DL, least)
    domains = Axis("domain", tuple(cut(readable(name)) for name in names))
    heatmap = Heatmap(share_DL, scale, notes=notes_DL)
    fewer = len(names) < len(pairs_of)
    left_out = f"the {len(names)} of {len(pairs_of)} longest domains" if fewer else ""
    return Panel((heatmap,), layer_axis(data, chosen), domains), left_out


def _intervals(panels: Iterable[Panel]) -> str:
    """What bars mean, where any mark has one."""
    marks = (mark for panel in panels for mark in panel.marks)
    return spec.INTERVALS if any(getattr(m, "low", None) is not None for m in marks) else ""


@spec.chart("coactivation", group="Serving")
def coactivation(data: ReportData) -> Chart | str:
    """Which experts one decision chooses together, against chance."""
    if data.counts.counts_only:
        return "co-activation and transitions: counts alone have no decisions"
    table, listed = pairs.supported_pairs(data, "coactivation")
    if not listed:
        return "co-activation: with one expert per token there are no pairs"
    if not (n := int((table["lift"] > 1).sum())):
        return f"co-activation: no pair {BEYOND}"
    drawn = Chart(
        "Chosen together",
        "Pairs of experts that one decision chooses, relative to chance",
        (),
        text="Pairs of experts that one decision chooses together more often than chance, those "
        f"with the most evidence first: {n:,} of the {listed:,} pairs listed have enough. Each "
        "card lists its expert's partners.",
        definitions={
            "probability": "P(other chosen, given expert chosen), over all pairs of slots; "
            "(k − 1)/(E − 1) by chance.",
            "lift": "P(both chosen) relative to what the loads of the two alone would give.",
            "chance": "the probability if experts keep their loads and are otherwise picked at "
            "random.",
        },
    )
    return _with_matrices(drawn, data, table, pairs.chosen_together, "other expert")


@spec.chart("transitions", group="Serving")
def transitions(data: ReportData) -> Chart | str:
    """Which experts of the next layer the tokens of an expert go to, against chance."""
    if data.counts.counts_only:
        return ""  # coactivation says so
    table, listed = pairs.supported_pairs(data, "transitions")
    if not listed:
        return "transitions: no two layers follow each other"
    if not (n := int((table["lift"] > 1).sum())):
        return f"transitions: no link {BEYOND}"
    drawn = Chart(
        "From layer to layer",
        "Experts of one layer and the next, relative to chance",
        (),
        text="Where the tokens of an expert go at the next layer more often than chance, the links "
        f"with the most evidence first: {n:,} of the {listed:,} pairs listed have enough.",
        definitions={
            "probability": "P(next expert chosen at the next MoE layer, given expert chosen here), "
            "over all pairs of slots.",
            "lift": "the probability relative to how often the next expert is chosen overall.",
            "expected": "the number of tokens that choose both if the two layers choose "
            "independently.",
        },
    )
    return _with_matrices(drawn, data, table, pairs.chosen_next, "expert of the next layer")


def _with_matrices(
    chart: Chart,
    data: ReportData,
    table: pd.DataFrame,
    pair_counts: Callable[[ReportData, int], PairEvidence | None],
    other: str,
) -> Chart:
    """The chart with the lift of pairs of experts [E, N] at each of the routers that are furthest
    from chance: of many experts, those with a supported pair. `other`: what each is paired with."""
    lifts = dict[int, np.ndarray]()
    # the routers whose supported pairs are furthest from chance, in order of layers
    distance = (table["probability"] - table["probability"] / table["lift"]).abs()
    by_router = distance.groupby(table["router"]).sum()
    by_router = by_router.reindex(data.selection.routers, fill_value=0)
    for r in sorted(by_router.nlargest(MOST_MATRICES).index.tolist()):
        both = pair_counts(data, r)
        if both is not None and np.isfinite(lift_EN := supported_lift(both)).any():
            lifts[r] = lift_EN
    furthest = max((np.nanmax(lift_EN) for lift_EN in lifts.values()), default=1)
    high = float(2 ** np.ceil(np.log2(max(4, furthest))))
    scale = spec.Scale("ratio", "times as often as by chance", high=high, unknown="may be chance")
    panels = list[Panel]()
    for r, lift_EN in lifts.items():
        supported_EN, kept, axes = np.isfinite(lift_EN), list[np.ndarray](), list[Axis]()
        for side, (title, E) in enumerate(zip(("expert", other), lift_EN.shape, strict=True)):
            shown = np.flatnonzero(supported_EN.any(1 - side) | (E <= MANY_EXPERTS))
            kept.append(shown)
            axes.append(Axis(title, () if len(shown) == E else tuple(map(str, shown))))
        shown_EN = lift_EN[np.ix_(*kept)]
        title = f"layer {layer_label(data.trace.routers, r)}"
        if shown_EN.shape != lift_EN.shape:
            rows, columns = shown_EN.shape
            title += f": the {rows} × {columns} experts with a supported pair"
        heatmap = Heatmap(shown_EN, scale, spec.cell_numbers(shown_EN))
        panels.append(Panel((heatmap,), axes[1], axes[0], title))
    drawn, routers = len(panels), int(table["router"].nunique())
    return replace(
        chart,
        panels=tuple(panels),
        columns=min(2, drawn),
        subset=f"the {drawn} of {routers} layers furthest from chance" if drawn < routers else "",
        # those with the most evidence first
        table=table[table["lift"] > 1].nsmallest(MOST_PAIRS, "log10_p").drop(columns="log10_p"),
        definitions={**chart.definitions, "supported": SUPPORTED},
    )


def supported_lift(counted: PairEvidence) -> np.ndarray:
    """The lift of each pair with evidence, NaN for the others. [E, N]"""
    lift_EN = np.full(counted.count_EN.shape, np.nan)
    possible = np.nonzero(counted.expected_EN > 0)
    lift = counted.count_EN[possible] / counted.expected_EN[possible]
    lift_EN[possible] = np.where(counted.evidence(possible)["supported"], lift, np.nan)
    return lift_EN
