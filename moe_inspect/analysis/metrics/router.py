"""How confident is a router, and what are its balancing losses? Pure functions on sums over
decisions.

N decisions (those with recorded logits, or weights), E experts, k choices. Probabilities are of all
E experts: the softmax of the logits, or the scores of a sigmoid router scaled to sum to 1. Weights
are the gate weights of the k experts chosen.
"""

from __future__ import annotations

import numpy as np

from moe_inspect.analysis.metrics.balance import nan_for_zero, ratio
from moe_inspect.analysis.metrics.registry import metric


@metric(
    "router",
    ideal=1.0,
    range="0 to E/k; 1 or more where both agree",
    source="arXiv:2101.03961, eq. 4",
)
def aux_loss(load_E: np.ndarray, probability_sum_E: np.ndarray) -> float:
    """Switch load-balancing loss of one router, E·Σ f_e·P_e, with f the share of assignments and P
    the mean softmax of the logits (for a sigmoid router its scores, scaled to sum to 1). 1 is even.
    (A loss averaged over layers, or one with f per token, which gives k, is another number.) NaN
    without logits."""
    share_E = load_E / nan_for_zero(np.asarray(load_E.sum()))
    probability_E = probability_sum_E / nan_for_zero(np.asarray(probability_sum_E.sum()))
    return float(len(load_E) * (share_E * probability_E).sum())


@metric(
    "router", ideal="log(E) ** 2", range="0 and up", unit="nats²", source="arXiv:2202.08906, eq. 5"
)
def z_loss(z_sum: float, logit_decisions: int) -> float:
    """Mean of (logsumexp of the logits)²: how large the logits have grown. (ln E)² if all are 0.
    NaN without logits."""
    return ratio(z_sum, logit_decisions)


@metric("router", ideal="log(E)", range="0 to ln E", unit="nats")
def gate_entropy_nats(entropy_sum: float, logit_decisions: int) -> float:
    """Mean entropy of the probabilities of one decision: 0 is certain, ln E is uniform. NaN without
    logits."""
    return ratio(entropy_sum, logit_decisions)


@metric("router", ideal=0.0, range="0 and up", unit="logits")
def top1_margin(top1_margin_sum: float, logit_decisions: int) -> float:
    """Mean of the largest logit minus the second: how clear the first choice is. NaN without
    logits."""
    return ratio(top1_margin_sum, logit_decisions)


@metric("router", ideal=0.0, range="0 and up", unit="logits")
def boundary_margin(boundary_margin_sum: float, logit_decisions: int) -> float:
    """Mean of the k-th largest logit minus the next: how much noise changes the experts chosen. NaN
    without logits, and where k = E."""
    return ratio(boundary_margin_sum, logit_decisions)


@metric("router", ideal="k / E", range="k/E to 1")
def top_k_mass(topk_mass_sum: float, logit_decisions: int) -> float:
    """Mean total probability of the k most probable experts: at 1 the other experts have none. NaN
    without logits."""
    return ratio(topk_mass_sum, logit_decisions)


@metric("router", ideal=1.0, range="0 to 1")
def tie_rate(ties: int, logit_decisions: int) -> float:
    """The share of decisions whose k-th and next logit are equal as recorded (float16): the order
    of the experts then decides which is chosen. Even logits always tie. NaN without logits."""
    return ratio(ties, logit_decisions)


@metric("router", ideal="log(k)", range="0 to ln k", unit="nats")
def weight_entropy_nats(weight_entropy_sum: float, weight_decisions: int) -> float:
    """Mean entropy of a decision's k gate weights, scaled to sum to 1: 0 if one expert has all the
    weight, ln k if all have the same. NaN without weights."""
    return ratio(weight_entropy_sum, weight_decisions)


@metric("router", ideal=0.0, range="0 to 1")
def weight_margin(weight_margin_sum: float, weight_decisions: int) -> float:
    """Mean of the largest gate weight of a decision minus the second, with the k scaled to sum to
    1. NaN without weights, and where k = 1."""
    return ratio(weight_margin_sum, weight_decisions)


@metric("router", ideal="k / E", range="0 and up; 1 where weights are renormalised", unit="weight")
def weight_mass(weight_mass_sum: float, weight_decisions: int) -> float:
    """Mean sum of a decision's k gate weights as the experts get them: for a softmax that is not
    renormalised, the probability of the k chosen. NaN without weights."""
    return ratio(weight_mass_sum, weight_decisions)
