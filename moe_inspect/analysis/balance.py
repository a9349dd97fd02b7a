"""Is the load of a router balanced? One plain function a metric, on load_LE: int64 [routers, experts], assignments.

L routers, E experts. A function is a metric by being decorated: the balance table, the documentation and the property
tests take it from METRICS. Every one is NaN for a router without load, and none changes when experts are renumbered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Metric:
    """`ideal` is the value under perfectly even load."""

    name: str
    function: Callable[[np.ndarray], np.ndarray]
    ideal: float
    unit: str


METRICS: dict[str, Metric] = {}


def metric(*, ideal: float, unit: str) -> Callable[[Callable[[np.ndarray], np.ndarray]], Callable[[np.ndarray], np.ndarray]]:
    """Registers a function of load_LE as a balance metric under its own name."""

    def register(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
        METRICS[function.__name__] = Metric(function.__name__, function, ideal, unit)
        return function

    return register


@metric(ideal=1.0, unit="ratio")
def max_over_mean(load_LE: np.ndarray) -> np.ndarray:
    """Load of the busiest expert ÷ mean load. 1 is even, E/k is every token on the same k experts."""
    return load_LE.max(1) / _mean(load_LE)


@metric(ideal=0.0, unit="ratio")
def max_vio(load_LE: np.ndarray) -> np.ndarray:
    """(max − mean) / mean of the load, over all tokens ("global" MaxVio). 0 is even. arXiv:2408.15664."""
    return max_over_mean(load_LE) - 1


@metric(ideal=1.0, unit="ratio")
def min_over_max(load_LE: np.ndarray) -> np.ndarray:
    """Load of the least busy expert ÷ load of the busiest, in [0, 1]. 1 is even, 0 has a dead expert."""
    return load_LE.min(1) / _positive(load_LE.max(1))


@metric(ideal=0.0, unit="ratio")
def cv(load_LE: np.ndarray) -> np.ndarray:
    """Coefficient of variation: population σ ÷ mean of the load. 0 is even; chance alone gives √((E−k)/(kT)). Shazeer 2017."""
    return load_LE.std(1) / _mean(load_LE)


@metric(ideal=0.0, unit="ratio")
def gini(load_LE: np.ndarray) -> np.ndarray:
    """Gini coefficient Σ(2i−E−1)c₍ᵢ₎ / (E·Σc), in [0, 1−k/E]. 0 is even, 1−k/E is every token on the same k experts."""
    E = load_LE.shape[1]
    rank_E = 2 * np.arange(1, E + 1) - E - 1
    return (rank_E * np.sort(load_LE, axis=1)).sum(1) / _positive(E * load_LE.sum(1))


@metric(ideal=1.0, unit="ratio to ln E")
def entropy(load_LE: np.ndarray) -> np.ndarray:
    """Entropy of the load ÷ ln E, in [ln k / ln E, 1]. 1 is even. Defined as 1 for a router of one expert."""
    share_LE = load_LE / _positive(load_LE.sum(1))[:, None]
    E = load_LE.shape[1]
    nats_L = -(share_LE * np.log(np.where(share_LE > 0, share_LE, 1))).sum(1)
    return nats_L / np.log(E) if E > 1 else nats_L + 1


@metric(ideal=0.0, unit="experts")
def dead_experts(load_LE: np.ndarray) -> np.ndarray:
    """Experts with no load at all. Means little on few tokens: always read with the number of tokens beside it."""
    return np.where(load_LE.sum(1) > 0, (load_LE == 0).sum(1), np.nan)


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
