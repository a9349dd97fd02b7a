"""Tables of pairs: experts of one decision, of one layer and the next, of one token and the next.

E experts, N experts of the next router, D domains, U units, R resamples.
The tables of pairs of experts list, for each expert, the `top` partners with the most evidence
against chance. The rows of a router are sorted by that evidence: pairs more frequent than expected
first, pairs less frequent than expected last.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_inspect.analysis.metrics import pairs
from moe_inspect.analysis.metrics import uncertainty as unc
from moe_inspect.later import pd
from moe_inspect.reporting.tables import load
from moe_inspect.reporting.tables.data import ReportData
from moe_inspect.reporting.tables.registry import AsColumns, table

BOUNDS = ("", "_low", "_high")  # suffixes of a value and of its 95% interval
ALPHA = 0.05  # probability that chance alone makes any pair of the trace supported (family-wise)
Listed = tuple[np.ndarray, np.ndarray]  # pairs: expert, partner


@table("pairs", unlisted=("log10_p",))
def coactivation(data: ReportData) -> AsColumns:
    """One row per ordered pair of experts: decisions that chose both (together); P(other chosen,
    given expert chosen) in one decision, over all pairs of slots; that probability as expected by
    chance at these loads (chance); the ratio to it (lift), and whether there is evidence against
    chance (supported: see PairEvidence)."""
    data.decisions("coactivation")

    def columns(r: int) -> load.Columns:
        both = chosen_together(data, r)
        return _coactivation(data, r, both, both.top(data.top))

    return load.rows_per_router(data, columns)


def _coactivation(
    data: ReportData, r: int, both: PairEvidence, listed: Listed
) -> dict[str, np.ndarray]:
    together_EE, (expert, other) = both.count_EN + np.diag(both.load_E), listed
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {
            "expert": expert,
            "other": other,
            "together": both.count_EN[listed],
            "probability": pairs.coactivation(together_EE)[listed],
            "lift": pairs.coactivation_lift(both.count_EN, both.expected_EN)[listed],
            "chance": both.expected_EN[listed] / both.load_E[expert],
        }
    return both.in_order(found, listed)


@table("transitions", unlisted=("log10_p",))
def transitions(data: ReportData) -> pd.DataFrame:
    """One row per expert and expert of the next MoE layer: tokens that chose both (together), and
    the number expected by chance at these loads (expected); P(next_expert chosen there, given
    expert chosen here), over all pairs of slots; its ratio to the probability of next_expert
    (lift), and whether there is evidence against chance (supported: see PairEvidence)."""
    data.decisions("transitions")

    def columns(r: int) -> load.Columns | None:
        both = chosen_next(data, r)
        return both and _transitions(data, r, both, both.top(data.top))

    frame = pd.DataFrame(load.rows_per_router(data, columns))
    if len(frame.columns):
        return frame
    # only the last MoE layer is selected
    whole = ("layer", "router", "next_layer", "next_router", "expert", "next_expert", "together")
    real = ("probability", "lift", "expected", "log10_p")
    kinds = dict.fromkeys(whole, "int64") | dict.fromkeys(real, "float64") | {"supported": "bool"}
    return pd.DataFrame(columns=[*kinds]).astype(kinds)


def _transitions(
    data: ReportData, r: int, both: PairEvidence, listed: Listed
) -> dict[str, np.ndarray]:
    counts, (expert, other) = data.counts, listed
    after = counts.next_router(r)
    assert after is not None, "router without a next one"
    found = {
        "next_layer": np.full(len(expert), counts.routers[after].layer),
        "next_router": np.full(len(expert), after),
        "expert": expert,
        "next_expert": other,
        "together": both.count_EN[listed],
        "probability": pairs.transition(both.count_EN, counts.load_E(r))[listed],
        "lift": pairs.transition_lift(both.count_EN)[listed],
        "expected": both.expected_EN[listed],
    }
    return both.in_order(found, listed)


def supported_pairs(data: ReportData, name: str) -> tuple[pd.DataFrame, int]:
    """The supported rows of a table of pairs, and how many rows it has: found router by router and
    without the other rows, since all of the table takes much memory and time."""
    data.decisions(name)  # an error where there is no such table
    pairs_of, columns_of = {
        "coactivation": (chosen_together, _coactivation),
        "transitions": (chosen_next, _transitions),
    }[name]
    listed = 0

    def columns(r: int) -> load.Columns | None:
        nonlocal listed
        if (both := pairs_of(data, r)) is None:
            return None
        expert, other = both.top(data.top)
        listed += len(expert)
        supported = both.evidence((expert, other))["supported"]
        return columns_of(data, r, both, (expert[supported], other[supported]))

    if (key := (supported_pairs, name)) not in data.made:
        frame = pd.DataFrame(load.rows_per_router(data, columns))
        data.made[key] = frame if len(frame.columns) else data.tables.complete(name), listed
    return data.made[key]


@table("repetition")
def repetition(data: ReportData) -> AsColumns:
    """One row per router and domain: how often a token has the same first choice as the token
    before it in its sequence, with a 95 % interval by document (low, high); and the same for
    independent choices, uniform (random) or with the domain's loads (by_load)."""
    counts = data.decisions("repetition")
    of_domain = [np.flatnonzero(counts.domain_of_unit_U == d) for d in range(len(counts.domains))]
    resampled = [unc.resample_weights(units * 0) for units in of_domain]

    def columns(r: int) -> load.Columns:
        router, of = counts.routers[r], counts.of[r]
        pairs_U, first_DE = _counted(of.pairs_U), of.first_choice_DE
        pairs_D = counts.by_domain(pairs_U)
        found: dict[str, np.ndarray | float] = {"domain": np.array(counts.domains, object)}
        found |= {"pairs": pairs_D}
        found |= {f"first_choice{bound}": np.nan for bound in BOUNDS}
        if (same_U := of.first_same_U) is not None:
            ends = [
                unc.ratio_interval(same_U[units], pairs_U[units], weights)
                for units, weights in zip(of_domain, resampled, strict=True)
            ]
            low_D, high_D = np.array(ends).reshape(-1, 2).T
            share_D = pairs.first_choice(counts.by_domain(same_U), pairs_D)
            found |= {"first_choice": share_D, "first_choice_low": low_D}
            found |= {"first_choice_high": high_D}
        by_load = np.nan if first_DE is None else pairs.first_choice_by_load(first_DE)
        return found | {"first_choice_random": 1 / router.experts, "first_choice_by_load": by_load}

    return load.rows_per_router(data, columns)


@dataclass(frozen=True)
class PairEvidence:
    """How often each pair of experts is chosen together, and how often it would be by chance at
    these loads. count_EN, expected_EN: the two numbers. load_E, load_N: how often each expert could
    be chosen with one other. tested: pairs of the whole trace. effect: the design effect.

    The evidence of a pair is the probability of a count at least as far from the expected one, by
    chance at these loads: a two-sided binomial tail, with one trial for each time that the rarer of
    the two experts was chosen. Tokens of one document are not independent: all counts are divided
    by the design effect of the router's load, if there are enough documents to estimate it (pairs
    are not counted by document). A pair is supported if that probability times the number of pairs
    tested, those of all routers of the trace (Bonferroni), is at most ALPHA. The selection of
    layers does not change which pairs are supported."""

    count_EN: np.ndarray
    expected_EN: np.ndarray
    load_E: np.ndarray
    load_N: np.ndarray
    tested: int
    effect: float

    def top(self, top: int) -> Listed:
        """The `top` partners of each expert with the most evidence, among those it is ever chosen
        with; 0: all. Returns (expert, partner)."""
        (E, N), found = self.count_EN.shape, list[Listed]()
        step, most = max(1, pairs.BLOCK // N), min(top or N, N)
        for of in (slice(at, at + step) for at in range(0, E, step)):
            count_EN = self.count_EN[of]
            most_EN = _most(count_EN, self.load_E[of, None], self.load_N)
            # the deviance orders pairs as their evidence does, and is faster to compute
            order_EN = -unc.signed_deviance(count_EN, self.expected_EN[of], most_EN)
            order_EN[count_EN <= 0] = np.inf
            # only those at least as good as the last wanted are sorted, as few are wanted
            last_E1 = np.partition(order_EN, most - 1, axis=1)[:, most - 1 : most]
            expert, other = np.nonzero((order_EN <= last_E1) & (order_EN < np.inf))
            order = np.lexsort((order_EN[expert, other], expert))
            expert, other = expert[order], other[order]
            rank = np.arange(len(expert)) - np.searchsorted(expert, expert)
            found.append((of.start + expert[rank < most], other[rank < most]))
        experts, others = zip(*found, strict=True)
        return np.concatenate(experts), np.concatenate(others)

    def evidence(self, pairs: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        """The columns log10_p and supported of these pairs: (expert, partner)."""
        effect = load.at_least_1(self.effect)
        (expert, other), count, expected = pairs, self.count_EN[pairs], self.expected_EN[pairs]
        most = _most(count, self.load_E[expert], self.load_N[other])
        log10_p = unc.log10_tail(count / effect, expected / effect, most / effect)
        supported = log10_p <= np.log10(ALPHA / self.tested)
        return {"log10_p": log10_p, "supported": supported}

    def in_order(
        self, columns: dict[str, np.ndarray], pairs: tuple[np.ndarray, ...]
    ) -> dict[str, np.ndarray]:
        """The columns of these pairs with the evidence, by which they are sorted: more frequent
        than expected first, less frequent last."""
        rows = columns | self.evidence(pairs)
        together, log10_p = rows["together"], rows["log10_p"]
        beyond = together > self.expected_EN[pairs]
        order = np.lexsort((-together, np.where(beyond, log10_p, -log10_p), ~beyond))
        return {name: values[order] for name, values in rows.items()}


def chosen_together(data: ReportData, r: int) -> PairEvidence:
    """Pairs of experts of one decision. With k = 1 there are none."""
    counts = data.decisions("coactivation")
    together_EE = _counted(counts.of[r].together_EE)
    load_E, expected_EE = np.diagonal(together_EE).copy(), pairs.together_by_chance(together_EE)
    np.fill_diagonal(together_EE, 0)
    tested = sum(
        router.experts * (router.experts - 1) // 2 for router in counts.routers if router.top_k > 1
    )
    effect = load.design_effects(data)[r]
    return PairEvidence(together_EE, expected_EE, load_E, load_E, max(tested, 1), effect)


def chosen_next(data: ReportData, r: int) -> PairEvidence | None:
    """Pairs of an expert of router r and one of the next that a token chooses, if there is one."""
    counts = data.decisions("transitions")
    after, next_EN = counts.next_router(r), counts.of[r].next_EN
    if after is None or next_EN is None:
        return None
    following = [(router, counts.next_router(i)) for i, router in enumerate(counts.routers)]
    tested = sum(
        router.experts * counts.routers[i].experts for router, i in following if i is not None
    )
    next_EN = next_EN.astype(np.int64)
    row_E, column_N = next_EN.sum(1), next_EN.sum(0)
    expected_EN = np.outer(row_E, column_N) / max(next_EN.sum(), 1)
    # an expert that a token chooses is in as many of its pairs as the other router has choices
    loads = row_E / counts.routers[after].top_k, column_N / counts.routers[r].top_k
    effect = load.design_effects(data)[r]
    return PairEvidence(next_EN, expected_EN, *loads, max(tested, 1), effect)


def _most(count: np.ndarray, load: np.ndarray, other_load: np.ndarray) -> np.ndarray:
    """How often two experts could be chosen together that were chosen so often each."""
    return np.maximum(np.minimum(load, other_load), np.maximum(count, 1))


def _counted(values: np.ndarray | None) -> np.ndarray:
    assert values is not None, "not counted"
    return values
