"""Is the load of a router balanced? One plain function per metric, on load_LE: int64 [routers,
experts], assignments.

L routers, E experts, G GPUs, S sizes of forward passes. The balance table takes every metric of
load_LE that is registered for it. Each is NaN for a router without load, and none changes when
experts are renumbered.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_inspect.analysis.metrics.registry import metric

# defaults of the thresholds that analysis, reports and simulations share
UNEVEN = 0.2  # a router with this max_vio or more is uneven
STARVED = 0.1  # an expert with a lower load ratio is starved


@metric("balance", ideal=1.0, range="1 to E/k", axes="L")
def max_over_mean(load_LE: np.ndarray) -> np.ndarray:
    """Load of the busiest expert ÷ mean load. 1 is even, E/k is every token on the same k
    experts."""
    return load_LE.max(1) / _mean(load_LE)


@metric("balance", ideal=0.0, range="0 to E/k − 1", axes="L", source="arXiv:2408.15664")
def max_vio(load_LE: np.ndarray) -> np.ndarray:
    """(max − mean) / mean of the load, over all tokens ("global" MaxVio). 0 is even."""
    mean_L = _mean(load_LE)
    return (load_LE.max(1) - mean_L) / mean_L  # exact, which max_over_mean − 1 is not


@metric("balance", ideal=0.0, range="0 to √(E/k − 1)", axes="L", source="arXiv:1701.06538")
def cv(load_LE: np.ndarray) -> np.ndarray:
    """Coefficient of variation: population σ ÷ mean of the load. 0 is even; chance alone gives
    √((E−k)/(kT))."""
    return load_LE.std(1) / _mean(load_LE)


@metric("balance", ideal=0.0, range="0 to 1 − k/E", axes="L")
def gini(load_LE: np.ndarray) -> np.ndarray:
    """Gini coefficient Σ(2i−E−1)c₍ᵢ₎ / (E·Σc), in [0, 1−k/E]. 0 is even, 1−k/E is every token on
    the same k experts."""
    E: int = load_LE.shape[1]
    rank_E = 2 * np.arange(1, E + 1) - E - 1
    return (rank_E * np.sort(load_LE, axis=1)).sum(1) / nan_for_zero(E * load_LE.sum(1))


@metric("balance", ideal=1.0, range="ln k/ln E to 1", unit="ratio to ln E", axes="L")
def entropy(load_LE: np.ndarray) -> np.ndarray:
    """Entropy of the load ÷ ln E, in [ln k / ln E, 1]. 1 is even. Defined as 1 for a router of one
    expert."""
    E, nats_L = load_LE.shape[1], entropy_nats(load_LE / nan_for_zero(load_LE.sum(1))[:, None])
    return nats_L / np.log(E) if E > 1 else nats_L + 1


@metric("balance", ideal=0.0, range="0 to E − k", unit="experts", axes="L")
def dead_experts(load_LE: np.ndarray) -> np.ndarray:
    """Experts with no load at all. Means little on few tokens: read it together with the number of
    tokens."""
    return np.where(load_LE.sum(1) > 0, (load_LE == 0).sum(1), np.nan)


@metric("balance", ideal=0.0, range="0 to E − 1", unit="experts", axes="L")
def starved_experts(load_LE: np.ndarray, starved: float = STARVED) -> np.ndarray:
    """Experts with some load, but under a tenth of the mean load. Means little on few tokens, like
    dead_experts. `starved`: the load ratio to use instead of a tenth."""
    starved_LE = (load_LE > 0) & (load_ratio(load_LE) < starved)
    return np.where(load_LE.sum(1) > 0, starved_LE.sum(1), np.nan)


@metric("balance", ideal=1.0, range="k/E to 1", axes="L")
def balancedness(load_LE: np.ndarray) -> np.ndarray:
    """Mean ÷ max load with one GPU per expert: the share of the time that GPUs compute, not
    wait for the busiest. The slowdown is 1 ÷ this. For another placement pass the loads of its
    GPUs, load_LG."""
    return 1 / max_over_mean(load_LE)


@metric("balance", ideal=0.0, range="0 to E/k − 1", source="arXiv:2408.15664")
def max_vio_batch(vio_sum_S: np.ndarray, passes_S: np.ndarray, tokens_S: np.ndarray) -> float:
    """Mean of the max_vio of each forward pass ("batch" MaxVio). Passes without load are left out,
    and those with fewer than half the tokens of the largest (`whole_passes`). By size S of the
    passes: the sum of their max_vio, their number, the tokens of each. NaN without any."""
    whole_S = whole_passes(tokens_S)
    return ratio(vio_sum_S[whole_S].sum(), passes_S[whole_S].sum())


@metric("balance", ideal="T * k / E", range="0 to T·k/E", unit="tokens")
def min_tokens(load_E: np.ndarray) -> int:
    """Tokens of the expert with the fewest. 0 if an expert is dead."""
    return int(load_E.min())


def whole_passes(tokens_S: np.ndarray) -> np.ndarray:
    """Which passes have at least half the tokens of the largest. The others, often the last pass of
    a run or decode steps beside prompts, are too small to show more than chance. bool [S]"""
    return 2 * tokens_S >= tokens_S.max(initial=0)


def busiest_expert(load_LE: np.ndarray) -> np.ndarray:
    """The expert with the most load, the lowest id if several have it. int64 [routers]"""
    return load_LE.argmax(1)


def load_ratio(load_LE: np.ndarray) -> np.ndarray:
    """Load of each expert ÷ mean load of its router. float64 [routers, experts]"""
    return load_LE / _mean(load_LE)[:, None]


def load_ratios(loads: Sequence[np.ndarray]) -> np.ndarray:
    """`load_ratio` of routers that may differ in size, load_E each: NaN beyond a router's experts.
    float64 [routers, experts of the widest]"""
    ratio_LE = np.full((len(loads), max(map(len, loads), default=0)), np.nan)
    for ratio_E, load_E in zip(ratio_LE, loads, strict=True):
        ratio_E[: len(load_E)] = load_ratio(np.asarray(load_E)[None])[0]
    return ratio_LE


def _mean(load_LE: np.ndarray) -> np.ndarray:
    return nan_for_zero(load_LE.mean(1))


def entropy_nats(share: np.ndarray) -> np.ndarray:
    """Entropy of shares along the last axis: [..., E] → [...]"""
    return -(share * np.log(np.where(share > 0, share, 1))).sum(-1)


def ratio(part: float, whole: float) -> float:
    """NaN for a whole of 0."""
    return float(part / nan_for_zero(np.asarray(whole, float)))


def nan_for_zero(values: np.ndarray) -> np.ndarray:
    """The values with NaN for 0: a divisor that makes the ratio of nothing NaN."""
    return np.where(values > 0, values, np.nan)
