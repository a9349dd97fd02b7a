"""What is an expert worth? Super experts are those whose outputs hold the few very large
activations of a model.

L routers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

QUANTILE = 0.995
OF_LARGEST = 0.1
DEPTH = 0.75  # of the model's blocks, from the first
JUDGED = 32  # assignments (in a domain) from which an expert is judged on it


def super_experts(
    peak_LE: Sequence[np.ndarray], layer_L: np.ndarray, blocks: int
) -> list[np.ndarray]:
    """Which experts are super experts, bool [E] of each router: the largest |value| of their
    outputs is above the 99.5th percentile over all experts and above a tenth of the largest, and
    their layer is among the first three quarters of the model's `blocks`. peak_LE: float [E] of
    each router. arXiv:2507.23279."""
    every = np.concatenate(list(peak_LE))
    least = max(float(np.quantile(every, QUANTILE)), OF_LARGEST * float(every.max(initial=0)))
    early_L = layer_L < DEPTH * blocks
    return [(peak_E > least) & early for peak_E, early in zip(peak_LE, early_L, strict=True)]
