"""Tables of what goes together: experts of one decision, of a layer and the next, of a token and the next.

E experts, N experts of the next router, D domains. Of pairs the `top` most probable partners of each expert are listed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from moe_inspect.analysis import pairs
from moe_inspect.analysis.aggregate import SRP_LENGTHS
from moe_inspect.analysis.uncertainty import design_effect
from moe_inspect.report.tables import of_router, stacked, table

if TYPE_CHECKING:
    from moe_inspect.report.report import Report

LENGTHS = [m for m in SRP_LENGTHS if m > 1]  # of one token it is 1
LOCALITY = (
    "first_choice_repetition",
    "any_choice_repetition",
    *(name for m in LENGTHS for name in (f"srp_{m}", f"srp_{m}_by_load")),
    "next_accuracy",
    "next_accuracy_marginal",
    "next_accuracy_null",
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
        effect = design_effect(counts.of[r].assignments_UE, counts.tokens_U_of(r), counts.domain_of_unit_U)
        with np.errstate(divide="ignore", invalid="ignore"):
            columns = {
                "expert": expert,
                "other": other,
                "together": together_EE[expert, other],
                "probability": pairs.coactivation(together_EE)[expert, other],
                "lift": pairs.coactivation_lift(together_EE)[expert, other],
                "chance": by_chance_EE[expert, other] / decisions_E[expert],
                "lift_sd": np.sqrt(max(effect, 1.0) / by_chance_EE[expert, other]) if effect == effect else np.full(len(expert), np.nan),
            }
        parts.append(of_router(report, r, columns))
    return stacked(parts)


@table("transitions")
def transitions(report: Report) -> pd.DataFrame:
    """A row an expert and one of the next MoE layer: P(next_expert chosen there, given expert chosen here), over all pairs of
    slots, and its lift to how often next_expert is chosen at all. No interval: pairs are counted by router, not by document."""
    counts, parts = report.decisions("transitions"), []
    for r in report.selection.routers:
        after, next_EN = counts.next_router(r), counts.of[r].next_EN
        if after is None or next_EN is None:
            continue
        expert, other = top_pairs(next_EN, report.top)
        columns = {
            "next_layer": counts.routers[after].layer,
            "next_router": after,
            "expert": expert,
            "next_expert": other,
            "together": next_EN[expert, other],
            "probability": pairs.transition(next_EN, counts.load_E(r))[expert, other],
            "lift": pairs.transition_lift(next_EN)[expert, other],
        }
        parts.append(of_router(report, r, columns))
    names = ["layer", "router", "next_layer", "next_router", "expert", "next_expert", "together", "probability", "lift"]
    return stacked(parts) if parts else pd.DataFrame(columns=names)


@table("repetition")
def repetition(report: Report) -> pd.DataFrame:
    """A row a domain: how often a token's first choice is that of the token before it in its sequence, and how often the two
    share any expert; beside it what independent choices give, even ones (random) and ones of the domain's loads (by_load). No interval: neighbours are counted by
    domain, not by document; they are alike within a document, so an interval of independent pairs would be too narrow."""
    counts, parts = report.decisions("repetition"), []
    for r in report.selection.routers:
        router, of = counts.routers[r], counts.of[r]
        pairs_D, first_same_D, any_same_D = (_known(v) for v in (of.pairs_D, of.first_same_D, of.any_same_D))
        columns = {
            "domain": np.array(counts.domains, object),
            "pairs": pairs_D,
            "first_choice": pairs.first_choice(first_same_D, pairs_D),
            "first_choice_random": 1 / router.experts,
            "first_choice_by_load": pairs.first_choice_by_load(_known(of.first_choice_DE)),
            "any_choice": pairs.any_choice(any_same_D, pairs_D),
            "any_choice_random": pairs.any_choice_random(router.experts, router.top_k),
        }
        parts.append(of_router(report, r, columns))
    return stacked(parts)


@table("repetition", "srp", "transitions", by_router=LOCALITY)
def locality(report: Report) -> pd.DataFrame:
    """A row a router: how far a choice can be told from the token before (repetition, all domains), from the segment (SRP of m
    tokens, beside that of independent choices with these loads) and from the layer before (accuracy of predicting the next MoE
    layer's first choice, beside its marginal and its null). No intervals, for the reason that `repetition` has none."""
    counts, rows = report.decisions("locality"), []
    for r in report.selection.routers:
        of, total = counts.of[r], float(_known(counts.of[r].pairs_D).sum())
        row: dict[str, float] = {
            "layer": counts.routers[r].layer,
            "router": r,
            "first_choice_repetition": _known(of.first_same_D).sum() / total if total else np.nan,
            "any_choice_repetition": _known(of.any_same_D).sum() / total if total else np.nan,
        }
        for m in LENGTHS:
            row[f"srp_{m}"] = pairs.srp((of.srp or {})[m])
            # without a window of m tokens there is nothing to hold it against
            by_load = pairs.srp_by_load(counts.load_E(r), counts.tokens_of(r), m)
            row[f"srp_{m}_by_load"] = by_load if row[f"srp_{m}"] == row[f"srp_{m}"] else np.nan
        if of.next_first_EN is not None and counts.next_router(r) is not None:
            row["next_accuracy"] = pairs.next_accuracy(of.next_first_EN)
            row["next_accuracy_marginal"] = pairs.next_accuracy_marginal(of.next_first_EN)
            row["next_accuracy_null"] = pairs.next_accuracy_null(of.next_first_EN)
        rows.append(row)
    return pd.DataFrame(rows, columns=["layer", "router", *LOCALITY]).astype(dict.fromkeys(LOCALITY, float))


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
