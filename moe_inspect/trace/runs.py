"""Runs of equal values: where the batches, ranks and sequences of consecutive tokens begin."""

from __future__ import annotations

import numpy as np


def run_edges(*keys_T: np.ndarray) -> np.ndarray:
    """Where each run of consecutive rows with the same keys begins, and the number of rows as the
    last edge: [0] where there are no rows. keys_T: arrays [T] or [T, X]. int64 [runs + 1]"""
    changed_T = np.ones(len(keys_T[0]) + 1, bool)
    changed_T[1:-1] = False
    for key_T in keys_T:
        differs = key_T[1:] != key_T[:-1]
        changed_T[1:-1] |= differs if differs.ndim == 1 else differs.any(1)
    return np.flatnonzero(changed_T)
