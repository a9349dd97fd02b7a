"""The loop of `simulate decode`, compiled; `decode.fill_steps_numpy` is its twin."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def fill_steps(
    ids_KT: np.ndarray,
    position_T: np.ndarray,
    batch_B: np.ndarray,
    there_BPE: np.ndarray,
    tokens_BP: np.ndarray,
    steps_B: np.ndarray,
    distinct_B: np.ndarray,
) -> None:
    """Each token goes into the step of its position; a step of B tokens is full, is counted, and begins anew."""
    K, T = ids_KT.shape
    E = there_BPE.shape[2]
    for t in range(T):
        p = position_T[t]
        for b in range(len(batch_B)):
            for k in range(K):
                if ids_KT[k, t] >= 0:
                    there_BPE[b, p, ids_KT[k, t]] = True
            tokens_BP[b, p] += 1
            if tokens_BP[b, p] == batch_B[b]:
                distinct = 0
                for e in range(E):
                    distinct += there_BPE[b, p, e]
                    there_BPE[b, p, e] = False
                steps_B[b] += 1
                distinct_B[b] += distinct
                tokens_BP[b, p] = 0
