"""Tables of what goes together: experts of one decision, of a layer and the next, of a token and the next.

E experts, N experts of the next router, D domains. Of pairs the `top` most probable partners of each expert are listed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moe_inspect.analysis import pairs
from moe_inspect.analysis import uncertainty as unc
from moe_inspect.analysis.aggregate import SRP_LENGTHS
from moe_inspect.report.tables import of_router, stacked, table

if TYPE_CHECKING:
    from moe_inspect.report.report import Report

LENGTHS = [m for m in SRP_LENGTHS if m > 1]  # of one token it is 1
BOUNDS = ("", "_low", "_high")  # 95 %
LOCALITY = (
    *(name + bound for name in ("first_choice_repetition", "any_choice_repetition") for bound in BOUNDS),
    *(f"srp_{m}{suffix}" for m in LENGTHS for suffix in (*BOUNDS, "_by_load")),
    *(f"next_accuracy{suffix}" for suffix in (*BOUNDS, "_marginal", "_null")),
)


@table("pairs")
def coactivation(report: Report) -> pd.DataFrame:
    """A row an ordered pair of experts: P(other chosen, given expert chosen) in one decision, over all pairs of slots; what chance
    gives experts of these loads (chance), the ratio to it (lift), and the standard deviation of lift by chance, for tokens that
    come in documents (lift_sd)."""
    counts, parts = report.decisions("coactivation"), []
    for r in report.selection.routers:
        together_EE = _known(counts.of[r].together_EE)
        expert, other = top_pairs(together_EE - np.diag(np.diagonal(together_EE)), report.top)
        if counts.routers[r].top_k == 1:
            expert, other = expert[:0], other[:0]  # a decision of one choice has no pairs
        by_chance_EE = pairs.together_by_chance(together_EE)
        decisions_E = np.diagonal(together_EE)
        effect = _effect(report, r)
        with np.errstate(divide="ignore", invalid="ignore"):
            columns = {
                "expert": expert,
                "other": other,
                "together": together_EE[expert, other],
                "probability": pairs.coactivation(together_EE)[expert, other],
                "lift": pairs.coactivation_lift(together_EE)[expert, other],
                "chance": by_chance_EE[expert, other] / decisions_E[expert],
                "lift_sd": np.sqrt(np.maximum(effect, 1) / by_chance_EE[expert, other]),
            }
        parts.append(of_router(report, r, columns))
    return stacked(parts)


@table("transitions")
def transitions(report: Report) -> pd.DataFrame:
    """A row an expert and one of the next MoE layer: P(next_expert chosen there, given expert chosen here), over all pairs of
    slots, its lift to how often next_expert is chosen at all, and the standard deviation of lift by chance, for tokens that come
    in documents (lift_sd)."""
    counts, parts = report.decisions("transitions"), []
    for r in report.selection.routers:
        after, next_EN = counts.next_router(r), counts.of[r].next_EN
        if after is None or next_EN is None:
            continue
        expert, other = top_pairs(next_EN, report.top)
        by_chance = next_EN.sum(1)[expert] * next_EN.sum(0)[other] / max(next_EN.sum(), 1)
        columns = {
            "next_layer": counts.routers[after].layer,
            "next_router": after,
            "expert": expert,
            "next_expert": other,
            "together": next_EN[expert, other],
            "probability": pairs.transition(next_EN, counts.load_E(r))[expert, other],
            "lift": pairs.transition_lift(next_EN)[expert, other],
            "lift_sd": np.sqrt(np.maximum(_effect(report, r), 1) / by_chance),
        }
        parts.append(of_router(report, r, columns))
    if not parts:  # the last MoE layer
        integers = ["layer", "router", "next_layer", "next_router", "expert", "next_expert", "together"]
        kinds = dict.fromkeys(integers, np.int64) | dict.fromkeys(["probability", "lift", "lift_sd"], float)
        return pd.DataFrame({name: np.zeros(0, kind) for name, kind in kinds.items()})
    return stacked(parts)


@table("repetition")
def repetition(report: Report) -> pd.DataFrame:
    """A row a domain: how often a token's first choice is that of the token before it in its sequence, and how often the two
    share any expert, with 95 % intervals by document (low, high); beside it what independent choices give, even ones (random) and
    ones of the domain's loads (by_load)."""
    counts, parts = report.decisions("repetition"), []
    of_domain = [np.flatnonzero(counts.domain_of_unit_U == d) for d in range(len(counts.domains))]
    resampled = [unc.resample_weights(units * 0) for units in of_domain]
    for r in report.selection.routers:
        router, of = counts.routers[r], counts.of[r]
        pairs_U = _known(of.pairs_U)
        columns: dict[str, Any] = {"domain": np.array(counts.domains, object), "pairs": counts.by_domain(pairs_U)}
        for name, formula, same in (
            ("first_choice", pairs.first_choice, of.first_same_U),
            ("any_choice", pairs.any_choice, of.any_same_U),
        ):
            if same is None:  # first choices are unknown
                columns |= dict.fromkeys((name, f"{name}_low", f"{name}_high"), np.nan)
                continue
            columns[name] = formula(counts.by_domain(same), columns["pairs"])
            bounds = [unc.ratio_interval(same[u], pairs_U[u], w) for u, w in zip(of_domain, resampled, strict=True)]
            columns[f"{name}_low"], columns[f"{name}_high"] = np.array(bounds).reshape(-1, 2).T
        columns["first_choice_random"] = 1 / router.experts
        first_DE = of.first_choice_DE
        columns["first_choice_by_load"] = np.nan if first_DE is None else pairs.first_choice_by_load(first_DE)
        columns["any_choice_random"] = pairs.any_choice_random(router.experts, router.top_k)
        parts.append(of_router(report, r, columns))
    return stacked(parts)


@table("repetition", "srp", "transitions", by_router=LOCALITY)
def locality(report: Report) -> pd.DataFrame:
    """A row a router: how far a choice can be told from the token before (repetition, all domains), from the segment (SRP of m
    tokens, beside that of independent choices with these loads) and from the layer before (accuracy of predicting the next MoE
    layer's first choice, beside its marginal and its null). 95 % intervals (low, high) by document; that of the accuracy by the
    design effect of the router's load, since pairs of layers are not counted by document."""
    counts, rows = report.decisions("locality"), []
    weights_RU = unc.resample_weights(counts.domain_of_unit_U)
    for r in report.selection.routers:
        of = counts.of[r]
        row: dict[str, float] = {"layer": counts.routers[r].layer, "router": r}
        pairs_U = _known(of.pairs_U)
        found: dict[str, tuple[float, tuple[float, float]]] = {}
        for name, same in (("first_choice_repetition", of.first_same_U), ("any_choice_repetition", of.any_same_U)):
            if same is not None:  # else first choices are unknown
                value = same.sum() / pairs_U.sum() if pairs_U.any() else np.nan
                found[name] = value, unc.ratio_interval(same, pairs_U, weights_RU)
        for m in LENGTHS:
            windows_UM = (of.srp or {})[m]
            value = pairs.srp(windows_UM.sum(0))
            spread_R = pairs.best_f(weights_RU @ windows_UM) if weights_RU is not None else np.array([np.nan])
            found[f"srp_{m}"] = value, unc.interval(spread_R)
            # without a window of m tokens there is nothing to hold it against
            row[f"srp_{m}_by_load"] = pairs.srp_by_load(counts.load_E(r), counts.tokens_of(r), m) if value == value else np.nan
        if of.next_first_EN is not None:
            value = pairs.next_accuracy(of.next_first_EN)
            found["next_accuracy"] = value, unc.share_interval(value, of.next_first_EN.sum(), _effect(report, r))
            row["next_accuracy_marginal"] = pairs.next_accuracy_marginal(of.next_first_EN)
            row["next_accuracy_null"] = pairs.next_accuracy_null(of.next_first_EN)
        for name, (value, (low, high)) in found.items():
            row |= {name: value, f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return pd.DataFrame(rows, columns=["layer", "router", *LOCALITY]).astype(dict.fromkeys(LOCALITY, float))


def _effect(report: Report, r: int) -> float:
    """The design effect of a router's load; NaN with few documents."""
    counts = report.counts
    return unc.design_effect(counts.of[r].assignments_UE, counts.tokens_U_of(r), counts.domain_of_unit_U)


def top_pairs(counts_EN: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """The `top` partners of each expert that it meets most, most first; 0: all it ever met. (expert, partner)"""
    E, N = counts_EN.shape
    order_EN = np.argsort(-counts_EN, axis=1, kind="stable")[:, : top or N]
    expert_EN = np.broadcast_to(np.arange(E)[:, None], order_EN.shape)
    met_EN = np.take_along_axis(counts_EN, order_EN, 1) > 0
    return expert_EN[met_EN], order_EN[met_EN]


def _known(values: np.ndarray | None) -> np.ndarray:
    assert values is not None, "not counted"
    return values
