"""What chance alone does to the metrics of a window.

T tokens, E experts, k choices per token, W repetitions.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from moe_inspect.analysis.metrics.registry import metrics
from moe_inspect.analysis.metrics.uncertainty import SEED

WINDOWS = 400  # simulated
# Tokens of one document choose alike, which counts do not show: a window is compared with one of a
# fourth of its tokens, whose max_vio by chance is twice as high (as the verdict on counts has it).
DEPENDENCE = 4


def chance_limit(metric: str, T: int, E: int, k: int, above: bool) -> float:
    """The highest (`above`, else the lowest) value of a metric of the load in 400 windows whose
    tokens choose k of E experts at random. Beyond it, chance does not explain a value. A window has
    a fourth of T tokens, for T's dependence on documents, rounded down to a power of 2."""
    tokens = max(1, int(T) // DEPENDENCE)
    return _limit(metric, 1 << (tokens.bit_length() - 1), E, k, above)


@lru_cache(maxsize=1024)
def _limit(metric: str, T: int, E: int, k: int, above: bool) -> float:
    values_W = metrics()[metric].function(uniform_loads(T, E, k))
    return float(values_W.max() if above else values_W.min())


@lru_cache(maxsize=32)
def uniform_loads(T: int, E: int, k: int) -> np.ndarray:
    """The loads of windows of T tokens that choose k of E experts at random, int64 [W, E]. For one
    expert after another: of the tokens that still have j picks among the e experts left,
    Binomial(·, j/e) pick this one."""
    rng = np.random.default_rng([SEED, T, E, k])
    left_JW = np.zeros((k + 1, WINDOWS), np.int64)
    left_JW[k] = T
    picks_J1 = np.arange(k + 1)[:, None]
    load_WE = np.zeros((WINDOWS, E), np.int64)
    for e in range(E):
        took_JW = rng.binomial(left_JW, np.minimum(picks_J1 / (E - e), 1))
        load_WE[:, e] = took_JW.sum(0)
        left_JW -= took_JW
        left_JW[:-1] += took_JW[1:]
    load_WE.flags.writeable = False
    return load_WE
