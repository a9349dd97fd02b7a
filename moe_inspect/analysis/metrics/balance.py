"""Is the load of a router balanced? One plain function per metric, on load_LE: int64 [routers,
experts], assignments.

L routers, E experts, G GPUs, B forward passes. The balance table takes every metric of load_LE that
is registered for it. Every one is NaN for a router without load, and none changes when experts are
renumbered.
"""

from __future__ import annotations

import numpy as np

from moe_inspect.analysis.metrics.registry import metric

# the defaults of the thresholds that analysis, report and simulations share
UNEVEN = 0.2  # max_vio from which a router is uneven
STARVED = 0.1  # load ratio under which an expert is starved


@metric(table="balance", ideal=1.0, unit="ratio", range="1 to E/k", axes="L")
def max_over_mean(load_LE: np.ndarray) -> np.ndarray:
    """Load of the busiest expert ÷ mean load. 1 is even, E/k is every token on the same k
    experts."""
    return load_LE.max(1) / _mean(load_LE)


@metric(
    table="balance",
    ideal=0.0,
    unit="ratio",
    range="0 to E/k − 1",
    axes="L",
    source="arXiv:2408.15664",
)
def max_vio(load_LE: np.ndarray) -> np.ndarray:
    """(max − mean) / mean of the load, over all tokens ("global" MaxVio). 0 is even."""
    mean_L = _mean(load_LE)
    return (
        load_LE.max(1) - mean_L
    ) / mean_L  # exactly 0.2 for 1.2 times the mean, which 1.2 − 1 is not


@metric(table="balance", ideal=1.0, unit="ratio", range="0 to 1", axes="L")
def min_over_max(load_LE: np.ndarray) -> np.ndarray:
    """Load of the least busy expert ÷ load of the busiest, in [0, 1]. 1 is even, 0 has a dead
    expert."""
    return load_LE.min(1) / _positive(load_LE.max(1))


@metric(
    table="balance",
    ideal=0.0,
    unit="ratio",
    range="0 to √(E/k − 1)",
    axes="L",
    source="arXiv:1701.06538",
)
def cv(load_LE: np.ndarray) -> np.ndarray:
    """Coefficient of variation: population σ ÷ mean of the load. 0 is even; chance alone gives
    √((E−k)/(kT))."""
    return load_LE.std(1) / _mean(load_LE)


@metric(table="balance", ideal=0.0, unit="ratio", range="0 to 1 − k/E", axes="L")
def gini(load_LE: np.ndarray) -> np.ndarray:
    """Gini coefficient Σ(2i−E−1)c₍ᵢ₎ / (E·Σc), in [0, 1−k/E]. 0 is even, 1−k/E is every token on
    the same k experts."""
    E = load_LE.shape[1]
    rank_E = 2 * np.arange(1, E + 1) - E - 1
    return (rank_E * np.sort(load_LE, axis=1)).sum(1) / _positive(E * load_LE.sum(1))


@metric(table="balance", ideal=1.0, unit="ratio to ln E", range="ln k/ln E to 1", axes="L")
def entropy(load_LE: np.ndarray) -> np.ndarray:
    """Entropy of the load ÷ ln E, in [ln k / ln E, 1]. 1 is even. Defined as 1 for a router of one
    expert."""
    share_LE = load_LE / _positive(load_LE.sum(1))[:, None]
    E = load_LE.shape[1]
    nats_L = -(share_LE * np.log(np.where(share_LE > 0, share_LE, 1))).sum(1)
    return nats_L / np.log(E) if E > 1 else nats_L + 1


@metric(table="balance", ideal=0.0, unit="experts", range="0 to E − k", axes="L")
def dead_experts(load_LE: np.ndarray) -> np.ndarray:
    """Experts with no load at all. Means little on few tokens: always read with the number of
    tokens beside it."""
    return np.where(load_LE.sum(1) > 0, (load_LE == 0).sum(1), np.nan)


@metric(table="balance", ideal="E", unit="experts", range="k to E", axes="L")
def effective_experts(load_LE: np.ndarray) -> np.ndarray:
    """Exponential of the entropy of the load: how many evenly loaded experts would be as diverse. E
    is even."""
    share_LE = load_LE / _positive(load_LE.sum(1))[:, None]
    return np.exp(-(share_LE * np.log(np.where(share_LE > 0, share_LE, 1))).sum(1))


@metric(table="balance", ideal=0.0, unit="experts", range="0 to E − 1", axes="L")
def starved_experts(load_LE: np.ndarray, starved: float = STARVED) -> np.ndarray:
    """Experts with load, but under a tenth of the mean load. Means little on few tokens, like
    dead_experts. `starved`: the threshold of that name, in place of the tenth."""
    starved_LE = (load_LE > 0) & (load_ratio(load_LE) < starved)
    return np.where(load_LE.sum(1) > 0, starved_LE.sum(1), np.nan)


@metric(table="balance", ideal=1.0, unit="ratio", range="k/E to 1", axes="L")
def balancedness(load_LE: np.ndarray) -> np.ndarray:
    """Mean ÷ max load with one GPU per expert: the share of the time that GPUs compute, the rest
    being spent waiting for the busiest. The slowdown is 1 ÷ this. For another placement pass the
    loads of its GPUs, load_LG."""
    return 1 / max_over_mean(load_LE)


@metric(
    table="balance",
    ideal=0.0,
    unit="ratio",
    range="0 to √(E − 1)",
    axes="L",
    source="arXiv:1701.06538",
)
def importance_cv(weight_sum_LE: np.ndarray) -> np.ndarray:
    """Coefficient of variation of the summed gate weights of each expert ("importance"). NaN
    without weights."""
    return cv(weight_sum_LE)


@metric(table="balance", ideal=0.0, unit="ratio", range="0 to E/k − 1", source="arXiv:2408.15664")
def max_vio_batch(vio_sum_S: np.ndarray, passes_S: np.ndarray, tokens_S: np.ndarray) -> float:
    """Mean over forward passes (B) of the max_vio of each ("batch" MaxVio); passes without load are
    left out. So are those with under half the tokens of the largest (`whole_passes`). By size S of
    the passes: the sum of their max_vio, their number, the tokens of each. NaN without any."""
    whole_S = whole_passes(tokens_S)
    return float(vio_sum_S[whole_S].sum() / _positive(np.asarray(passes_S[whole_S].sum())))


def whole_passes(tokens_S: np.ndarray) -> np.ndarray:
    """Which passes have at least half the tokens of the largest: the last is often a remnant, in
    which chance is all there is to see, and so are decode steps beside prompts. bool [S]"""
    return 2 * tokens_S >= tokens_S.max(initial=0)


def busiest_expert(load_LE: np.ndarray) -> np.ndarray:
    """The expert with the most load, the lowest id of several. int64 [routers]"""
    return load_LE.argmax(1)


def load_ratio(load_LE: np.ndarray) -> np.ndarray:
    """Load of each expert ÷ mean load of its router. float64 [routers, experts]"""
    return load_LE / _mean(load_LE)[:, None]


def _mean(load_LE: np.ndarray) -> np.ndarray:
    return _positive(load_LE.mean(1))


def _positive(values: np.ndarray) -> np.ndarray:
    """NaN instead of 0, so that what has no load has no ratio either."""
    return np.where(values > 0, values, np.nan)
