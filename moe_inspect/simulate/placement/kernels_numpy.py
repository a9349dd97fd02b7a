"""The loops over every decision, in numpy: the references of kernels_numba.py.

T tokens, K slots of a decision, E experts, G GPUs (or nodes), W windows.
"""

from __future__ import annotations

import numpy as np

CHUNK = 16_384  # tokens at a time


def reached(ids_KT: np.ndarray, share_EG: np.ndarray) -> float:
    """The sum over decisions of the GPUs each is expected to reach: Σ_t Σ_g 1 − Π_k (1 − share).
    ids_KT: experts, −1 for none; share_EG: of each expert's load, by GPU."""
    # the last row: −1, a slot that routed nowhere
    miss_EG = np.vstack([1 - share_EG, np.ones(share_EG.shape[1])])
    total = 0.0
    for start in range(0, ids_KT.shape[1], CHUNK):
        total += float((1 - miss_EG[ids_KT[:, start : start + CHUNK]].prod(0)).sum())
    return total


def count_windows(ids_KT: np.ndarray, window_T: np.ndarray, load_WE: np.ndarray) -> None:
    """Adds the assignments of each window to load_WE. ids_KT: experts, −1 for none."""
    W, E = load_WE.shape
    cell_N = (window_T * E + ids_KT)[ids_KT >= 0]
    load_WE += np.bincount(cell_N, minlength=W * E).reshape(W, E)
