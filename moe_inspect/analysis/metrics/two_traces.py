"""Do two traces of the same tokens make the same decisions? Pure functions of sums over decisions
or tokens; `ideal` is the value of a trace and itself.

E experts. An axis of 2 is the two traces.
"""

from __future__ import annotations

import numpy as np

from moe_inspect.analysis.metrics.balance import ratio
from moe_inspect.analysis.metrics.registry import metric
from moe_inspect.analysis.metrics.windows import step_jsd_bits, step_total_variation


@metric("agreement", ideal=0.0, range="0 to 1")
def set_mismatch(mismatch_sum: float, decisions: float) -> float:
    """Share of the decisions for which the two traces chose different sets of experts. The order of
    slots does not matter. NaN without decisions."""
    return ratio(mismatch_sum, decisions)


@metric("agreement", ideal=1.0, range="0 to 1, k/E by chance", source="arXiv:2409.02060, eq. 5")
def overlap(common_sum: float, chosen: float) -> float:
    """Share of the experts of a decision that both traces chose; if B is the last checkpoint of
    A's training, router saturation. Of the larger set where one is smaller. NaN where none chose
    any."""
    return ratio(common_sum, chosen)


@metric("agreement", column="first_choice", ideal=1.0, range="0 to 1")
def same_first_choice(same_first_sum: float, decisions: float) -> float:
    """Share of the decisions with the same expert of the largest weight. NaN where a trace does not
    know the order of its slots."""
    return ratio(same_first_sum, decisions)


@metric("agreement", column="order", ideal=1.0, range="0 to 1")
def same_order(same_order_sum: float, decisions: float) -> float:
    """Share of the decisions with the same experts slot by slot, in descending weight. NaN where a
    trace does not know the order of its slots."""
    return ratio(same_order_sum, decisions)


@metric("agreement", ideal=0.0, range="0 to the sum of both's weights", unit="gate weight")
def weight_l1(weights_apart_sum: float, decisions: float) -> float:
    """Mean over decisions of Σ|weight in A − weight in B| over the experts that both chose. NaN
    without weights in both."""
    return ratio(weights_apart_sum, decisions)


@metric("agreement", ideal=0.0, range="0 and up", unit="nats")
def kl_nats(kl_sum: float, decisions: float) -> float:
    """Mean over decisions of KL(A ‖ B), the divergence of the routers' probabilities of all
    experts. NaN without logits in both."""
    return ratio(kl_sum, decisions)


@metric("overall", ideal=0.0, range="0 to 1")
def tokens_mismatch(differing_sum: float, tokens: float) -> float:
    """Share of the tokens with a different set of experts at any router. Grows with the number of
    routers: compare it only between models of one depth."""
    return ratio(differing_sum, tokens)


@metric("overall", ideal=1.0, range="0 to 1", source="RSPO")
def router_shift(gamma_sum: float, tokens: float) -> float:
    """Mean over tokens of γ = exp(−mean over routers and A's experts of |ln r_B − ln r_A|), r the
    routers' probabilities. RSPO leaves tokens under 0.8 out of training. NaN without logits in
    both."""
    return ratio(gamma_sum, tokens)


@metric("load_shift", ideal=0.0, range="0 to 1")
def load_shift(load_2E: np.ndarray) -> float:
    """Total variation ½Σ|p − q| of the experts' load shares in the two traces: the share of the
    assignments that move, all tokens together. Read it beside what two halves of A's documents
    give (load_shift_halves). NaN where one has no load."""
    return float(step_total_variation(load_2E)[0])


@metric("load_shift", column="jsd_bits", ideal=0.0, range="0 to 1", unit="bits")
def load_shift_jsd_bits(load_2E: np.ndarray) -> float:
    """Jensen–Shannon divergence of the experts' load shares in the two traces. NaN where one has no
    load."""
    return float(step_jsd_bits(load_2E)[0])
