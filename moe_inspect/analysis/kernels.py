"""The functions of counting.py compiled by numba, for traces long enough to be worth loading it: same names, arguments and
results (those with float sums to rounding), an order of magnitude faster, without the GIL. Their twins are in counting.py.

T tokens, K slots, J slots of the next router, E experts here, N experts of the next router, G runs of tokens, U units,
B batches, W windows, D domains, X rows. ids_KT: int16, each slot contiguous; a slot that routed nowhere holds E, and tables
have one more column for it, which is cut off: no branch. Kernels are made for their K, so that the compiler unrolls.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import njit

from moe_inspect.analysis.counting import Order, Places

SHORT = 16  # tokens of a run below which its load is counted in place


@cache
def _loads_of(K: int) -> Any:
    @njit(nogil=True, cache=True)
    def kernel(ids_KT, start_G, unit_T, batch_T, window_T, total_UE, first_UE, total_BE, total_WE):  # type: ignore[no-untyped-def]
        run_E = np.zeros(total_UE.shape[1], np.int64)
        for g in range(len(start_G) - 1):
            start, end = start_G[g], start_G[g + 1]
            of_u_E, of_b_E, of_w_E = total_UE[unit_T[start]], total_BE[batch_T[start]], total_WE[window_T[start]]
            first_E = first_UE[unit_T[start]]
            for t in range(start, end):
                first_E[np.uint64(ids_KT[0, t])] += 1
            if end - start < SHORT:
                for t in range(start, end):
                    for j in range(K):
                        e = np.uint64(ids_KT[j, t])
                        of_u_E[e] += 1
                        of_b_E[e] += 1
                        of_w_E[e] += 1
            else:
                for t in range(start, end):
                    for j in range(K):
                        run_E[np.uint64(ids_KT[j, t])] += 1
                for e in range(len(run_E)):
                    of_u_E[e] += run_E[e]
                    of_b_E[e] += run_E[e]
                    of_w_E[e] += run_E[e]
                    run_E[e] = 0

    return kernel


def loads(ids_TK: np.ndarray, places: Places, E: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """int64 [U, E], [U, E], [B, E], [W, E]"""
    tables = [np.zeros((rows, E + 1), np.int64) for rows in (places.U, places.U, places.B, places.W)]
    _loads_of(ids_TK.shape[1])(_placed(ids_TK, E), places.start_G, places.unit_T, places.batch_T, places.window_T, *tables)
    units_UE, first_UE, batches_BE, windows_WE = (table[:, :E] for table in tables)
    return units_UE, first_UE, batches_BE, windows_WE


@cache
def _weight_sum_of(K: int) -> Any:
    @njit(nogil=True, cache=True)
    def kernel(ids_KT, weights_KT, row_T, total_XE):  # type: ignore[no-untyped-def]
        for t in range(ids_KT.shape[1]):
            row_E = total_XE[row_T[t]]
            for j in range(K):
                row_E[np.uint64(ids_KT[j, t])] += weights_KT[j, t]

    return kernel


def weight_sum(row_T: np.ndarray, ids_TK: np.ndarray, weights_TK: np.ndarray, X: int, E: int) -> np.ndarray:
    """float64 [X, E]"""
    total_XE = np.zeros((X, E + 1))
    _weight_sum_of(ids_TK.shape[1])(_placed(ids_TK, E), np.ascontiguousarray(weights_TK.T), row_T, total_XE)
    return total_XE[:, :E]


@cache
def _pairs_of(K: int, J: int) -> Any:
    @njit(nogil=True, cache=True)
    def kernel(here_KT, there_KT, total_EN):  # type: ignore[no-untyped-def]
        there_J = np.empty(J, np.uint64)
        for t in range(here_KT.shape[1]):
            for j in range(J):
                there_J[j] = np.uint64(there_KT[j, t])
            for i in range(K):
                row_N = total_EN[np.uint64(here_KT[i, t])]
                for j in range(J):
                    row_N[there_J[j]] += np.uint32(1)

    return kernel


@cache
def _together_of(K: int) -> Any:
    """The upper triangle of the slots: what makes a symmetric table with its transpose."""

    @njit(nogil=True, cache=True)
    def kernel(ids_KT, total_EE):  # type: ignore[no-untyped-def]
        here_K = np.empty(K, np.uint64)
        for t in range(ids_KT.shape[1]):
            for i in range(K):
                here_K[i] = np.uint64(ids_KT[i, t])
            for i in range(K - 1):
                row_E = total_EE[here_K[i]]
                for j in range(i + 1, K):
                    row_E[here_K[j]] += np.uint32(1)

    return kernel


def pairs(ids_TK: np.ndarray, next_TK: np.ndarray, E: int, N: int) -> np.ndarray:
    """uint32 [E, N]: of one shard, so that the table stays in the nearest caches."""
    total_EN = np.zeros((E + 1, N + 1), np.uint32)
    _pairs_of(ids_TK.shape[1], next_TK.shape[1])(_placed(ids_TK, E), _placed(next_TK, N), total_EN)
    return total_EN[:E, :N]


def together(ids_TK: np.ndarray, load_E: np.ndarray) -> np.ndarray:
    """uint32 [E, E]"""
    E = len(load_E)
    total_EE = np.zeros((E + 1, E + 1), np.uint32)
    _together_of(ids_TK.shape[1])(_placed(ids_TK, E), total_EE)
    upper_EE = total_EE[:E, :E]
    return upper_EE + upper_EE.T + np.diag(load_E.astype(np.uint32))


@cache
def _repetition_of(K: int) -> Any:
    @njit(nogil=True, cache=True)
    def kernel(ids_KT, by_T, follows_T, domain_T, E, first_D, any_D):  # type: ignore[no-untyped-def]
        last_E = np.full(E + 1, -2, np.int64)  # the place, in order, of the last token that chose it
        before = E
        for place in range(len(by_T)):
            t = by_T[place]
            common = False
            for j in range(K):
                e = np.uint64(ids_KT[j, t])
                common |= last_E[e] == place - 1
                last_E[e] = place
            last_E[E] = -2  # nowhere is nothing to have in common
            first = ids_KT[0, t]
            if follows_T[place]:
                first_D[domain_T[t]] += first == before and first != E
                any_D[domain_T[t]] += common
            before = first

    return kernel


def repetition(ids_TK: np.ndarray, order: Order, domain_T: np.ndarray, D: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int64 [D], three times"""
    first_D, any_D = np.zeros(D, np.int64), np.zeros(D, np.int64)
    E = int(ids_TK.max(initial=0)) + 1
    _repetition_of(ids_TK.shape[1])(_placed(ids_TK, E), order.by_T, order.follows_T, domain_T, E, first_D, any_D)
    return np.bincount(domain_T[order.by_T[order.follows_T]], minlength=D), first_D, any_D


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
    _srp(np.ascontiguousarray(ids_TK.T), order.by_T, ~order.follows_T, E, m, histogram)
    return histogram[: m + 1]


@njit(nogil=True, cache=True)
def _weight_confidence(weights_KT, log_KT, sums):  # type: ignore[no-untyped-def]
    K, T = weights_KT.shape
    for t in range(T):
        mass = plogp = largest = second = 0.0
        for j in range(K):
            w = np.float64(weights_KT[j, t])
            mass += w
            plogp += w * log_KT[j, t]
            second = max(second, min(w, largest))
            largest = max(largest, w)
        if mass > 0:
            sums[0] += 1
            sums[1] += np.log(mass) - plogp / mass
            sums[2] += (largest - second) / mass
            sums[3] += mass


def weight_confidence(weights_TK: np.ndarray) -> dict[str, float]:
    """The logarithms are numpy's, which takes many at once."""
    weights_KT, sums = np.ascontiguousarray(weights_TK.T), np.zeros(4)
    log_KT = weights_KT.astype(np.float64)
    np.log(log_KT, out=log_KT, where=log_KT > 0)
    _weight_confidence(weights_KT, log_KT, sums)
    return {
        "weight_decisions": int(sums[0]),
        "weight_entropy_sum": float(sums[1]),
        "weight_margin_sum": float(sums[2]),
        "weight_mass_sum": float(sums[3]),
    }


@njit(nogil=True, cache=True)
def _accumulate(table, row_T, ids_KT):  # type: ignore[no-untyped-def]
    for t in range(len(row_T)):
        if row_T[t] >= 0:
            row_E = table[row_T[t]]
            for j in range(len(ids_KT)):
                if ids_KT[j, t] >= 0:
                    row_E[np.uint64(ids_KT[j, t])] += np.uint32(1)


def accumulate(table: np.ndarray, row_T: np.ndarray, ids_TK: np.ndarray) -> None:
    """The twin of tokenids._accumulate."""
    _accumulate(table, row_T, np.ascontiguousarray(ids_TK.T))


def _placed(ids_TK: np.ndarray, E: int) -> np.ndarray:
    """[K, T], each slot contiguous, E where it routed nowhere; no copy of what the reader returned where all did."""
    ids_KT = np.ascontiguousarray(ids_TK.T)
    return ids_KT if ids_KT.min(initial=0) >= 0 else np.where(ids_KT < 0, np.int16(E), ids_KT)
