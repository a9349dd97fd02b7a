"""What chance alone does to the metrics of a window, and how much more the text does.

T tokens, E experts, k choices per token, W repetitions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from moe_inspect.analysis.metrics.balance import max_vio
from moe_inspect.analysis.metrics.chance import ALPHA, LONG_DOCUMENT, z_of
from moe_inspect.analysis.metrics.registry import metrics
from moe_inspect.analysis.metrics.uncertainty import random_loads

WINDOWS = 400  # simulated
RUN = 1_000  # windows of a run: one run in 1 / ALPHA may raise a false alarm by a rule
OFF_RATIO = {"max_over_mean": 0, "max_vio": 1, "max_vio_batch": 1}  # load ratio − metric
PAIRS = 64  # windows that a design effect is estimated from, at most


def tail_of(routers: int, windows: int) -> float:
    """The probability by which a window is beyond chance, so that so many in a row are in ALPHA of
    the runs by chance, at any of the routers."""
    return (ALPHA / (routers * RUN)) ** (1 / windows)


def chance_limit(
    metric: str, T: float, E: int, k: int, above: bool, effect: float, tail: float, steps: int = 1
) -> float:
    """The highest (`above`, else the lowest) value of a metric of the load that chance gives with
    probability `tail`: a Gumbel tail at the mean and standard deviation of 400 windows whose
    tokens choose k of E experts at random. A window has T tokens ÷ the design effect of their
    documents, rounded down to a power of 2. `steps`: of the mean over so many windows."""
    tokens = int(max(1.0, T / max(effect, 1.0)))
    mean, sd = _moments(metric, 1 << (tokens.bit_length() - 1), E, k)
    limit = mean + (1 if above else -1) * far(tail) * sd / math.sqrt(steps)
    # not above that of an expert which every token chooses
    return min(limit, E / k - OFF_RATIO[metric]) if metric in OFF_RATIO else limit


def share(load_E: np.ndarray) -> np.ndarray:
    return np.asarray(load_E) / max(int(np.sum(load_E)), 1)


def far(tail: float) -> float:
    """How many standard deviations above its mean the tail of a Gumbel distribution begins."""
    at = -math.log(-math.log1p(-tail)) - float(np.euler_gamma)
    return max(0.0, at * math.sqrt(6) / math.pi)


@lru_cache(maxsize=32)
def _windows(T: int, E: int, k: int) -> np.ndarray:
    return random_loads(T, E, k, WINDOWS)


@lru_cache(maxsize=1024)
def _moments(metric: str, T: int, E: int, k: int) -> tuple[float, float]:
    function = max_vio if metric == "max_vio_batch" else metrics()[metric].function
    values_W = np.asarray(function(_windows(T, E, k)))
    return float(values_W.mean()), float(values_W.std())


def effect_of_pair(before_E: np.ndarray, load_E: np.ndarray, k: int) -> float:
    """How much more the load moved from one window to the next than that of independent tokens
    does on average: the design effect, as far as documents lie within windows. NaN without load."""
    T_before, T = before_E.sum() / k, load_E.sum() / k
    if not (T_before and T):
        return math.nan
    chosen_E = np.minimum((before_E + load_E) / (T_before + T), 1)
    moved_E = (load_E / T - before_E / T_before) ** 2
    expected = float((chosen_E * (1 - chosen_E)).sum()) * (1 / T_before + 1 / T)
    return float(moved_E.sum()) / expected if expected > 0 else math.nan


def effect_of(pairs: Sequence[float], E: int) -> float:
    """The design effect of a run, from those of pairs of windows: about the upper end of a
    95 % interval (one-sided, χ²) of their median, which one change of the load does not move; at
    least 1, and at most LONG_DOCUMENT: a model that is being trained moves by itself."""
    degrees = len(pairs) * max(E - 1, 1)
    low = 1 - 2 / (9 * degrees) - z_of(0.05) * math.sqrt(2 / (9 * degrees))  # Wilson and Hilferty
    lower_median = sorted(pairs)[(len(pairs) - 1) // 2]
    return float(np.clip(lower_median / max(low, 0.1) ** 3, 1, LONG_DOCUMENT))
