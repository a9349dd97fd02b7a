"""The loop of `simulate decode`, compiled; `decode.fill_steps_numpy` is its twin."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def fill_steps(
    ids_KT: np.ndarray,
    position_T: np.ndarray,
    batch_B: np.ndarray,
    there_BPW: np.ndarray,
    tokens_BP: np.ndarray,
    steps_B: np.ndarray,
    distinct_B: np.ndarray,
    load_E: np.ndarray,
) -> None:
    """Each token goes into the step of its position; a step of B tokens is full, is counted, and begins anew. Sets of experts are
    words of 64 bits. The last five arrays change in place."""
    K, T = ids_KT.shape
    B, W = len(batch_B), there_BPW.shape[2]
    mine_W = np.zeros(W, np.uint64)
    for t in range(T):
        p = position_T[t]
        mine_W[:] = np.uint64(0)
        for k in range(K):
            e = ids_KT[k, t]
            if e >= 0:
                load_E[e] += 1
                mine_W[e >> 6] |= np.uint64(1) << np.uint64(e & 63)
        for b in range(B):
            for w in range(W):
                there_BPW[b, p, w] |= mine_W[w]
            tokens_BP[b, p] += 1
            if tokens_BP[b, p] == batch_B[b]:
                for w in range(W):
                    distinct_B[b] += _bits(there_BPW[b, p, w])
                    there_BPW[b, p, w] = np.uint64(0)
                steps_B[b] += 1
                tokens_BP[b, p] = 0


@njit(nogil=True, cache=True)
def _bits(word):
    """How many bits are set: by twos, by fours, by bytes, and the bytes added up by a product (Warren, Hacker's Delight, 5-1)."""
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))
