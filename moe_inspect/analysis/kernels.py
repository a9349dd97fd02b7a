"""The functions of counting.py compiled by numba, for traces long enough to be worth loading it: same names, arguments and
results (those with float sums to rounding), an order of magnitude faster, without the GIL. Their twins are in counting.py.

T tokens, K slots, E experts here, N experts of the next router, X rows, D domains. ids_KT: int16, −1 where a slot routed nowhere.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from moe_inspect.analysis.counting import Order


@njit(nogil=True, cache=True)
def _load(ids_KT, row_T, total_XE):  # type: ignore[no-untyped-def]
    K, T = ids_KT.shape
    for t in range(T):
        row_E = total_XE[row_T[t]]
        for j in range(K):
            if ids_KT[j, t] >= 0:
                row_E[np.uint64(ids_KT[j, t])] += 1


def load(row_T: np.ndarray, ids_TK: np.ndarray, X: int, E: int) -> np.ndarray:
    """int64 [X, E]"""
    total_XE = np.zeros((X, E), np.int64)
    _load(_slots(ids_TK), np.ascontiguousarray(row_T, np.int64), total_XE)
    return total_XE


@njit(nogil=True, cache=True)
def _weight_sum(ids_KT, weights_KT, row_T, total_XE):  # type: ignore[no-untyped-def]
    K, T = ids_KT.shape
    for t in range(T):
        row_E = total_XE[row_T[t]]
        for j in range(K):
            if ids_KT[j, t] >= 0:
                row_E[np.uint64(ids_KT[j, t])] += weights_KT[j, t]


def weight_sum(row_T: np.ndarray, ids_TK: np.ndarray, weights_TK: np.ndarray, X: int, E: int) -> np.ndarray:
    """float64 [X, E]"""
    total_XE = np.zeros((X, E))
    _weight_sum(_slots(ids_TK), _slots(weights_TK), np.ascontiguousarray(row_T, np.int64), total_XE)
    return total_XE


@njit(nogil=True, cache=True)
def _pairs(here_KT, there_KT, total_EN):  # type: ignore[no-untyped-def]
    (K, T), J = here_KT.shape, len(there_KT)
    here_K, there_J = np.empty(K, np.uint64), np.empty(J, np.uint64)  # unsigned: no index counts from the end
    for t in range(T):
        n = m = 0
        for i in range(K):
            if here_KT[i, t] >= 0:
                here_K[n] = np.uint64(here_KT[i, t])
                n += 1
        for j in range(J):
            if there_KT[j, t] >= 0:
                there_J[m] = np.uint64(there_KT[j, t])
                m += 1
        for i in range(n):
            row_N = total_EN[here_K[i]]
            for j in range(m):
                row_N[there_J[j]] += np.uint32(1)


@njit(nogil=True, cache=True)
def _together(ids_KT, total_EE):  # type: ignore[no-untyped-def]
    """The upper triangle of the slots: what makes a symmetric table with its transpose."""
    K, T = ids_KT.shape
    here_K = np.empty(K, np.uint64)
    for t in range(T):
        n = 0
        for i in range(K):
            if ids_KT[i, t] >= 0:
                here_K[n] = np.uint64(ids_KT[i, t])
                n += 1
        for i in range(n):
            row_E = total_EE[here_K[i]]
            for j in range(i + 1, n):
                row_E[here_K[j]] += np.uint32(1)


@njit(nogil=True, cache=True)
def _pairs_of_8(here_KT, there_KT, total_EN):  # type: ignore[no-untyped-def]
    """`_pairs` of 8 slots that all routed somewhere: bounds the compiler knows, which it unrolls."""
    there_J = np.empty(8, np.uint64)
    for t in range(here_KT.shape[1]):
        for j in range(8):
            there_J[j] = np.uint64(there_KT[j, t])
        for i in range(8):
            row_N = total_EN[np.uint64(here_KT[i, t])]
            for j in range(8):
                row_N[there_J[j]] += np.uint32(1)


@njit(nogil=True, cache=True)
def _together_of_8(ids_KT, total_EE):  # type: ignore[no-untyped-def]
    here_K = np.empty(8, np.uint64)
    for t in range(ids_KT.shape[1]):
        for i in range(8):
            here_K[i] = np.uint64(ids_KT[i, t])
        for i in range(7):
            row_E = total_EE[here_K[i]]
            for j in range(i + 1, 8):
                row_E[here_K[j]] += np.uint32(1)


def pairs(ids_TK: np.ndarray, next_TK: np.ndarray, E: int, N: int) -> np.ndarray:
    """uint32 [E, N]: of one shard, so that the table stays in the nearest caches."""
    total_EN = np.zeros((E, N), np.uint32)
    eight = ids_TK.shape[1] == next_TK.shape[1] == 8 and min(ids_TK.min(initial=0), next_TK.min(initial=0)) >= 0
    if next_TK is ids_TK:
        (_together_of_8 if eight else _together)(_slots(ids_TK), total_EN)
        own_E = load(np.zeros(len(ids_TK), np.int64), ids_TK, 1, E)[0]
        return total_EN + total_EN.T + np.diag(own_E).astype(np.uint32)
    (_pairs_of_8 if eight else _pairs)(_slots(ids_TK), _slots(next_TK), total_EN)
    return total_EN


@njit(nogil=True, cache=True)
def _repetition(ids_KT, by_T, follows_T, domain_T, E, every_D, first_D, any_D):  # type: ignore[no-untyped-def]
    K, T = ids_KT.shape
    last_E = np.full(E, -1, np.int64)  # the place, in order, of the last token that chose it
    before = -1
    for place in range(T):
        t = by_T[place]
        if follows_T[place]:
            d = domain_T[t]
            every_D[d] += 1
            first_D[d] += ids_KT[0, t] >= 0 and ids_KT[0, t] == ids_KT[0, before]
            common = False
            for j in range(K):
                common |= ids_KT[j, t] >= 0 and last_E[ids_KT[j, t]] == place - 1
            any_D[d] += common
        for j in range(K):
            if ids_KT[j, t] >= 0:
                last_E[ids_KT[j, t]] = place
        before = t


def repetition(ids_TK: np.ndarray, order: Order, domain_T: np.ndarray, D: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int64 [D], three times"""
    every_D, first_D, any_D = (np.zeros(D, np.int64) for _ in range(3))
    E = int(ids_TK.max(initial=0)) + 1
    _repetition(_slots(ids_TK), order.by_T, order.follows_T, domain_T, E, every_D, first_D, any_D)
    return every_D, first_D, any_D


@njit(nogil=True, cache=True)
def _srp(ids_KT, by_T, start_T, E, m, histogram):  # type: ignore[no-untyped-def]
    """f of each expert changes only when a token that chose it enters or leaves: how long it stayed is added then."""
    K, T = ids_KT.shape
    f_E, since_E = np.zeros(E, np.int64), np.zeros(E, np.int64)  # since which window f has been what it is
    windows = 0
    for place in range(T):
        if start_T[place]:  # the run before is over
            for e in range(E):
                histogram[f_E[e]] += windows - since_E[e]
                f_E[e] = since_E[e] = 0
            windows, first = 0, place
        for step in range(2):
            if step == 1:
                if place - first < m:
                    break
                gone = place - m
            t = by_T[place if step == 0 else gone]
            for j in range(K):
                e = ids_KT[j, t]
                if e >= 0:
                    histogram[f_E[e]] += windows - since_E[e]
                    since_E[e] = windows
                    f_E[e] += 1 if step == 0 else -1
        windows += place - first >= m - 1
    for e in range(E):
        histogram[f_E[e]] += windows - since_E[e]


def srp(ids_TK: np.ndarray, order: Order, E: int, m: int) -> np.ndarray:
    """int64 [m+1]"""
    histogram = np.zeros(m + 2, np.int64)  # f is m+1 between a token's coming and another's going, for no window
    _srp(_slots(ids_TK), order.by_T, ~order.follows_T, E, m, histogram)
    return histogram[: m + 1]


def _slots(values_TK: np.ndarray) -> np.ndarray:
    """[K, T], each slot contiguous; no copy of what the reader returned."""
    return np.ascontiguousarray(values_TK.T)
