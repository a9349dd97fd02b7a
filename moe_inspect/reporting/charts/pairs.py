"""Charts of pairs: consecutive tokens, the experts of one decision, the experts of a layer and the
next.

L routers, E experts, N experts of the next layer's router.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moe_inspect.reporting.charts.domains import MOST_DOMAINS
from moe_inspect.reporting.charts.spec import (
    INTERVALS,
    SERIES,
    Axis,
    Chart,
    Heatmap,
    Line,
    Mark,
    Panel,
    Points,
    Scale,
    amount,
    cell_numbers,
    chart,
    definitions,
    known_interval,
    layer_axis,
    look,
)
from moe_inspect.reporting.tables.pairs import (
    ALPHA,
    BOUNDS,
    LENGTHS,
    PairEvidence,
    chosen_next,
    chosen_together,
)
from moe_inspect.text import cut, layer_label, readable

if TYPE_CHECKING:
    from moe_inspect.reporting.tables.data import ReportData

MOST_PAIRS = 60  # rows of the table of pairs below a chart
MOST_DOTS = 60  # dots with intervals that can be told apart; more make a heatmap
MOST_MATRICES = 4  # layers drawn, each as a matrix of experts
NEXT = "First choice at the next layer"
MANY_EXPERTS = 64  # more are shown only as far as they have a supported pair
OFFSET = 0.1  # between the dots of one layer, which would hide each other; layers are 1 apart
BEYOND = "is chosen more often than chance explains"
LOG10_P = (
    "the evidence: log₁₀ of the probability of a count at least as far from the expected one, by "
    "chance at these loads (binomial, two-sided; counts ÷ design effect). Supported: that "
    f"probability × all pairs of the trace (Bonferroni) is at most {ALPHA:g}."
)
LIFT_SD = "the standard deviation of lift by chance, for tokens that come in documents."


@chart("repetition", group="Serving")
def repetition(data: ReportData) -> Chart | str:
    """How often the next token has the same first choice, by layer and domain."""
    if data.counts.counts_only:
        return "repetition and locality: counts alone have no order"
    table = data.frame("repetition")
    if table["first_choice"].isna().all():
        return "repetition: first choices are unknown, or no token follows another"
    chosen = data.selection.routers
    few = table["domain"].nunique() * len(chosen) <= MOST_DOTS
    panel, left_out = (_as_lines if few else _as_heatmap)(data, table)
    return Chart(
        "Repetition",
        "How often two consecutive tokens have the same first choice",
        (panel,),
        text="How often two consecutive tokens have the same first choice, which is what a cache "
        "of experts relies on." + (INTERVALS if few and _has_interval(panel.marks) else ""),
        table=table,
        subset=left_out,
    )


def _as_lines(data: ReportData, table: Any) -> tuple[Panel, str]:
    """A line per domain, with its intervals; and chance."""
    order = {r: i for i, r in enumerate(data.selection.routers)}
    marks: list[Mark] = []
    for i, (name, rows) in enumerate(table.groupby("domain", sort=False)):
        share, low, high = (rows[f"first_choice{bound}"].to_numpy() for bound in BOUNDS)
        x = rows["router"].map(order).to_numpy(float)
        ends = known_interval(low, high)
        marks.append(Line(x, share, cut(readable(name)), *look(i), True, *ends))
    chance_of = table.groupby("router", sort=False)["first_choice_random"].first()
    x = np.array([order[r] for r in chance_of.index], float)
    marks.append(Line(x, chance_of.to_numpy(float), "chance", "baseline", "dot"))
    axis = Axis("share of consecutive pairs", low=0)
    return Panel(tuple(marks), layer_axis(data, order), axis), ""


def _as_heatmap(data: ReportData, table: Any) -> tuple[Panel, str]:
    """A row per domain, those with the most pairs; a column per layer."""
    chosen = data.selection.routers
    pairs_of = table.groupby("domain", sort=False)["pairs"].max()
    kept = pairs_of.index.isin(pairs_of.nlargest(MOST_DOMAINS).index)
    names, of = pairs_of.index[kept], table.set_index(["domain", "router"])
    share_DL, low_DL, high_DL, chance_DL = (
        of[f"first_choice{c}"].unstack().reindex(index=names, columns=chosen).to_numpy(float)
        for c in (*BOUNDS, "_random")
    )
    notes_DL = np.full(share_DL.shape, "", object)
    for at, low in np.ndenumerate(low_DL):
        interval = f"95% interval: {low:.3f} to {high_DL[at]:.3f}\n" if low == low else ""
        notes_DL[at] = f"{interval}chance: {chance_DL[at]:.3f}"
    chance = float(np.nanmin(chance_DL))
    scale = amount("share of consecutive pairs", 0, share_DL, max(2 * chance, 0.01))
    labels = tuple(cut(readable(name)) for name in names)
    panel = Panel(
        (Heatmap(share_DL, scale, notes=notes_DL),),
        layer_axis(data, chosen),
        Axis("domain", labels),
    )
    fewer = len(names) < len(pairs_of)
    return panel, f"the {len(names)} of {len(pairs_of)} longest domains" if fewer else ""


@chart("locality", "repetition", group="Serving")
def locality(data: ReportData) -> Chart | str:
    """How well a choice can be predicted from the token before, the segment and the layer before,
    by layer, each beside what chance gives."""
    if data.counts.counts_only:
        return ""  # repetition says so
    table = data.frame("locality")
    x, axis = np.arange(len(table), dtype=float), layer_axis(data, table["router"])
    lengths = [
        (f"srp_{m}", f"segments of {m} tokens", f"srp_{m}_by_load", "at these loads")
        for m in LENGTHS
    ]
    kinds_of = {
        "First choice of the token before": (
            "share of tokens",
            [("first_choice_repetition", "the same again", "by_load", "chance at these loads")],
        ),
        "Any choice of the token before": (
            "share of tokens",
            [("any_choice_repetition", "an expert in common", "by_chance", "chance")],
        ),
        "Experts of a segment (SRP)": ("SRP", lengths),
        NEXT: ("accuracy", [("next_accuracy", "predicted", "next_accuracy_null", "chance")]),
    }
    frame = table.assign(**_references(data, table))
    panels = list[Panel]()
    for title, (unit, kinds) in kinds_of.items():
        marks: list[Mark] = []
        for i, (column, name, reference, meaning) in enumerate(kinds):
            value, low, high, expected = (
                frame[c].to_numpy() for c in (*(column + b for b in BOUNDS), reference)
            )
            if not np.isnan(value).all():
                beside = x + OFFSET * (i - (len(kinds) - 1) / 2)
                ends = known_interval(low, high)
                marks.append(Points(beside, value, name, SERIES[i], "dot", *ends))
                marks.append(Points(beside, expected, f"{name}: {meaning}", SERIES[i], "tick"))
        if marks and title == NEXT:
            marginal = table["next_accuracy_marginal"].to_numpy()
            marks.append(Points(x + OFFSET, marginal, "always the most frequent", "c2", "tick"))
        if marks:
            panels.append(Panel(tuple(marks), axis, Axis(unit, low=0), title))
    if not panels:
        return "locality: no token follows another, and no layer another"
    drawn = {panel.title for panel in panels}
    missing = [title[0].lower() + title[1:] for title in kinds_of if title not in drawn]
    has_interval = any(_has_interval(panel.marks) for panel in panels)
    return Chart(
        "Locality",
        "How well a choice can be predicted from the choices just before",
        tuple(panels),
        columns=2,
        text="How well a choice can be predicted from the choices just before: what prefetching "
        "and caching of experts can gain. Only the distance of a dot above the dash of its "
        "colour is locality."
        + (INTERVALS if has_interval else "")
        + (f" Not in this trace: {', '.join(missing)}." if missing else ""),
        table=table,
        definitions={
            **definitions(
                "first_choice", "any_choice", "srp", "next_accuracy", "next_accuracy_marginal"
            ),
            "chance": "the value expected of tokens that choose independently: at these loads; at "
            "even loads; for the next layer, with the same number of first choices.",
        },
    )


@chart("coactivation", group="Serving")
def coactivation(data: ReportData) -> Chart | str:
    """Which experts one decision chooses together, against chance."""
    if data.counts.counts_only:
        return "co-activation and transitions: counts alone have no decisions"
    table = data.frame("coactivation")
    if table.empty:
        return "co-activation: with one expert per token there are no pairs"
    if not _above_chance(table).any():
        return f"co-activation: no pair {BEYOND}"
    drawn = Chart(
        "Chosen together",
        "Pairs of experts that one decision chooses, relative to chance",
        _matrices(data, table, chosen_together, "other expert"),
        text="Pairs of experts that one decision chooses together more often than chance, those "
        f"with the most evidence first: {_supported(table)} Each card lists its expert's partners.",
        definitions={
            "probability": "P(other chosen, given expert chosen), over all pairs of slots; "
            "(k − 1)/(E − 1) by chance.",
            "lift": "P(both chosen) relative to what the loads of the two alone would give.",
            "expected": "the number of decisions that choose both if experts keep their loads and "
            "are otherwise picked at random.",
        },
    )
    return _with_evidence(drawn, data, table)


@chart("transitions", group="Serving")
def transitions(data: ReportData) -> Chart | str:
    """Which experts of the next layer the tokens of an expert go to, against chance."""
    if data.counts.counts_only:
        return ""  # coactivation says so
    table = data.frame("transitions")
    if table.empty:
        return "transitions: no two layers follow each other"
    if not _above_chance(table).any():
        return f"transitions: no link {BEYOND}"
    drawn = Chart(
        "From layer to layer",
        "Experts of one layer and the next, relative to chance",
        _matrices(data, table, chosen_next, "expert of the next layer"),
        text="Where the tokens of an expert go at the next layer more often than chance, the links "
        f"with the most evidence first: {_supported(table)}",
        definitions={
            "probability": "P(next expert chosen at the next MoE layer, given expert chosen here), "
            "over all pairs of slots.",
            "lift": "the probability relative to how often the next expert is chosen overall.",
            "expected": "the number of tokens that choose both if the two layers choose "
            "independently.",
        },
    )
    return _with_evidence(drawn, data, table)


def _references(data: ReportData, table: Any) -> dict[str, np.ndarray]:
    """The references of repetition over all domains, per router; all pairs of tokens have equal
    weight."""
    rows = data.frame("repetition")
    by_router = rows.assign(expected=rows["first_choice_by_load"] * rows["pairs"]).groupby("router")
    by_load = by_router["expected"].sum() / by_router["pairs"].sum()
    return {
        "by_load": by_load.reindex(table["router"]).to_numpy(),
        "by_chance": by_router["any_choice_random"].first().reindex(table["router"]).to_numpy(),
    }


def _has_interval(marks: Any) -> bool:
    return any(getattr(mark, "low", None) is not None for mark in marks)


def _matrices(
    data: ReportData,
    table: Any,
    pair_counts: Callable[[ReportData, int], PairEvidence | None],
    xlabel: str,
) -> tuple[Panel, ...]:
    """Heatmaps of the lift of pairs of experts [E, N], for each of the routers that are furthest
    from chance; pairs without evidence are grey. Of many experts, only those with a supported pair
    are shown."""
    lifts = dict[int, np.ndarray]()
    for r in _furthest_routers(table):
        counted = pair_counts(data, r)
        if counted is not None and np.isfinite(lift_EN := supported_lift(counted)).any():
            lifts[r] = lift_EN
    furthest = max((np.nanmax(lift_EN) for lift_EN in lifts.values()), default=1)
    high = float(2 ** np.ceil(np.log2(max(4, furthest))))
    scale = Scale("ratio", "times as often as by chance", high=high, unknown="may be chance")
    panels = list[Panel]()
    for r, lift_EN in lifts.items():
        known_EN = np.isfinite(lift_EN)
        rows, columns = (_with_supported(np.atleast_1d(known_EN.any(axis))) for axis in (1, 0))
        shown_EN = lift_EN[np.ix_(rows, columns)]
        of_chart = Heatmap(shown_EN, scale, cell_numbers(shown_EN))
        x, y = (
            Axis(title, () if len(kept) == E else tuple(map(str, kept)))
            for title, kept, E in (
                (xlabel, columns, lift_EN.shape[1]),
                ("expert", rows, len(lift_EN)),
            )
        )
        title = f"layer {layer_label(data.trace.routers, r)}"
        if shown_EN.shape != lift_EN.shape:
            title += f": the {len(rows)} × {len(columns)} experts with a supported pair"
        panels.append(Panel((of_chart,), x, y, title))
    return tuple(panels)


def _with_supported(supported_E: np.ndarray) -> np.ndarray:
    """The experts to show: of many, those with a supported pair."""
    return np.arange(E) if (E := len(supported_E)) <= MANY_EXPERTS else np.nonzero(supported_E)[0]


def _with_evidence(chart: Chart, data: ReportData, table: Any) -> Chart:
    """A chart of matrices with what all such charts have: the pairs more frequent than chance by
    their evidence, its definitions, and which layers are shown."""
    shown = len(chart.panels)
    routers = int(table.loc[table["supported"], "router"].nunique())
    return replace(
        chart,
        columns=min(2, shown),
        subset=f"the {shown} of {routers} layers furthest from chance" if shown < routers else "",
        table=strongest_pairs(table),
        definitions={**chart.definitions, "lift_sd": LIFT_SD, "log10_p": LOG10_P},
    )


def supported_lift(counted: PairEvidence) -> np.ndarray:
    """The lift of each pair with evidence, NaN for the others. [E, N]"""
    lift_EN = np.full(counted.count_EN.shape, np.nan)
    possible = np.nonzero(counted.expected_EN > 0)
    lift = counted.count_EN[possible] / counted.expected_EN[possible]
    lift_EN[possible] = np.where(counted.evidence(possible)["supported"], lift, np.nan)
    return lift_EN


def strongest_pairs(table: Any) -> pd.DataFrame:
    """The supported pairs more frequent than chance, those with the most evidence first."""
    return table[_above_chance(table)].nsmallest(MOST_PAIRS, "log10_p")


def _furthest_routers(table: Any) -> list[int]:
    """The routers whose supported pairs are furthest from chance, in order of layers."""
    distance = (table["probability"] - table["probability"] / table["lift"]).abs()
    by_router = (distance * table["supported"]).groupby(table["router"]).sum()
    return sorted(int(r) for r in by_router.nlargest(MOST_MATRICES).index)


def _above_chance(table: Any) -> Any:
    """Which pairs are supported and more frequent than chance. bool, a value per row"""
    return table["supported"] & (table["lift"] > 1)


def _supported(table: Any) -> str:
    n = int(_above_chance(table).sum())
    return f"{n:,} of the {len(table):,} pairs listed have enough."
