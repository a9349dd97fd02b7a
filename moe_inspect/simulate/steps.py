"""The loop of `simulate decode`, compiled; `decode.fill_steps_numpy` is its twin."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def fill_steps(slots, position_T, batch_B, there_BPW, tokens_BP, steps_B, distinct_B, load_E):  # type: ignore[no-untyped-def]
    """Each token goes into the step of its position; a step of B tokens is full, is counted, and
    begins anew. slots: K arrays [T], −1 for none. Sets of experts are words of 64 bits. The last
    five arrays change in place."""
    W = there_BPW.shape[2]
    even_W, odd_W = (
        np.zeros(W, np.uint64),
        np.zeros(W, np.uint64),
    )  # two, so that no slot waits for the one before
    for t in range(len(position_T)):
        p = position_T[t]
        even_W[:] = np.uint64(0)
        odd_W[:] = np.uint64(0)
        for k in range(len(slots)):
            e = slots[k][t]
            if e >= 0:
                load_E[e] += 1
                mine_W = odd_W if k % 2 else even_W
                mine_W[e >> 6] |= np.uint64(1) << np.uint64(e & 63)
        for b in range(len(batch_B)):
            there_W = there_BPW[b, p]
            tokens_BP[b, p] += 1
            full = tokens_BP[b, p] == batch_B[b]
            for w in range(W):
                word = there_W[w] | even_W[w] | odd_W[w]
                if full:
                    distinct_B[b] += _bits(word)
                there_W[w] = np.uint64(0) if full else word
            if full:
                steps_B[b] += 1
                tokens_BP[b, p] = 0


@njit(nogil=True, cache=True)
def _bits(word):
    """How many bits are set: by twos, by fours, by bytes, and the bytes added up by a product
    (Warren, Hacker's Delight, 5-1)."""
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + (
        (word >> np.uint64(2)) & np.uint64(0x3333333333333333)
    )
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))
