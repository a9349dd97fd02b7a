"""The functions of kernels_numpy compiled by numba, for traces long enough to be worth loading it:
same names, arguments and results (those with float sums to rounding), an order of magnitude faster,
without the GIL.

T tokens, K slots, J slots of the next router, E experts here, N experts of the next router, U
units, B batches, W windows, D domains, X rows, M + 1 frequencies. slots: K arrays [T], as they were
decoded; their number is part of the type, so that the compiler unrolls. A slot that routed nowhere
holds E, and tables have one more column for it, which is cut off: no branch.
"""

# numba infers the types of what it compiles
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

from functools import cache

import numpy as np
from numba import njit

from moe_inspect.analysis.counting.kernels_numpy import Slots, TokenRows, Visits

ONE = np.uint32(1)
BFLOAT16_SHIFT, FLOAT16_SHIFT = 16, 13  # bits of a float32 that the rounding leaves 0
TINY = float(np.finfo(np.float32).tiny)  # for 0 times its logarithm


@njit(nogil=True, cache=True)
def _loads(slots, unit_T, domain_T, batch_T, window_T, total_UE, first_DE, total_BE, total_WE):  # type: ignore[no-untyped-def]
    for t in range(len(unit_T)):
        of_u_E, of_b_E, of_w_E = total_UE[unit_T[t]], total_BE[batch_T[t]], total_WE[window_T[t]]
        first_DE[domain_T[t], np.uint64(slots[0][t])] += ONE
        for j in range(len(slots)):
            e = np.uint64(slots[j][t])
            of_u_E[e] += ONE
            of_b_E[e] += ONE
            of_w_E[e] += ONE


def loads(
    slots: Slots, token_rows: TokenRows, E: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """uint32 [U, E], [D, E], [B, E], [W, E]"""
    of = token_rows
    tables = [np.zeros((rows, E + 1), np.uint32) for rows in (of.U, of.D, of.B, of.W)]
    _loads(slots, of.unit_T, of.domain_T, of.batch_T, of.window_T, *tables)
    units_UE, first_DE, batches_BE, windows_WE = (table[:, :E] for table in tables)
    return units_UE, first_DE, batches_BE, windows_WE


@njit(nogil=True, cache=True)
def _load(slots, row_T, total_XE):  # type: ignore[no-untyped-def]
    for t in range(len(row_T)):
        row_E = total_XE[row_T[t]]
        for j in range(len(slots)):
            row_E[np.uint64(slots[j][t])] += ONE


def load(row_T: np.ndarray, slots: Slots, X: int, E: int) -> np.ndarray:
    """uint32 [X, E]"""
    total_XE = np.zeros((X, E + 1), np.uint32)
    _load(slots, row_T, total_XE)
    return total_XE[:, :E]


@njit(nogil=True, cache=True)
def _weight_sum(slots, weights, row_T, total_XE):  # type: ignore[no-untyped-def]
    for t in range(len(row_T)):
        row_E = total_XE[row_T[t]]
        for j in range(len(slots)):
            row_E[np.uint64(slots[j][t])] += weights[j][t]


def weight_sum(row_T: np.ndarray, slots: Slots, weights: Slots, X: int, E: int) -> np.ndarray:
    """float64 [X, E]"""
    total_XE = np.zeros((X, E + 1))
    _weight_sum(slots, weights, row_T, total_XE)
    return total_XE[:, :E]


@njit(nogil=True, cache=True)
def _transitions(slots, next_slots, total_EN):  # type: ignore[no-untyped-def]
    in_fours = len(slots) - len(slots) % 4
    for t in range(len(slots[0])):
        # four rows at a time, so that their addresses stay in registers
        for i in range(0, in_fours, 4):
            a_N, b_N = total_EN[np.uint64(slots[i][t])], total_EN[np.uint64(slots[i + 1][t])]
            c_N, d_N = total_EN[np.uint64(slots[i + 2][t])], total_EN[np.uint64(slots[i + 3][t])]
            for j in range(len(next_slots)):
                n = np.uint64(next_slots[j][t])
                a_N[n] += ONE
                b_N[n] += ONE
                c_N[n] += ONE
                d_N[n] += ONE
        for i in range(in_fours, len(slots)):
            row_N = total_EN[np.uint64(slots[i][t])]
            for j in range(len(next_slots)):
                row_N[np.uint64(next_slots[j][t])] += ONE


def transitions(slots: Slots, next_slots: Slots, E: int, N: int) -> np.ndarray:
    """uint32 [E, N]"""
    total_EN = np.zeros((E + 1, N + 1), np.uint32)
    _transitions(slots, next_slots, total_EN)
    return total_EN[:E, :N]


@njit(nogil=True, cache=True)
def _by_slot(slots, total_EE):  # type: ignore[no-untyped-def]
    for t in range(len(slots[0])):
        for i in range(len(slots)):
            row_E = total_EE[np.uint64(slots[i][t])]
            for j in range(i + 1, len(slots)):
                row_E[np.uint64(slots[j][t])] += ONE


def by_slot(slots: Slots, E: int) -> np.ndarray:
    """uint32 [E, E]"""
    total_EE = np.zeros((E + 1, E + 1), np.uint32)
    _by_slot(slots, total_EE)
    return total_EE[:E, :E]


@njit(nogil=True, cache=True)
def _weight_confidence(weights, bits, shift, terms_N, sums):  # type: ignore[no-untyped-def]
    """False at the first weight that has bits which `shift` drops. Shift 0: without `terms_N`."""
    below, mass_product = (np.uint32(1) << np.uint32(shift)) - np.uint32(1), 1.0
    for t in range(len(weights[0])):
        mass = plogp = largest = second = 0.0
        dropped = np.uint32(0)
        for j in range(len(weights)):
            w, b = np.float64(weights[j][t]), bits[j][t]
            dropped |= b & below
            mass += w
            plogp += terms_N[b >> np.uint32(shift)] if shift else w * np.log(max(w, TINY))
            second = max(second, min(w, largest))
            largest = max(largest, w)
        if dropped:
            return False
        if mass > 0:
            sums[0] += 1
            sums[1] -= plogp / mass
            sums[2] += (largest - second) / mass
            sums[3] += mass
            mass_product *= mass  # one logarithm of a product instead of one per decision
            if not 1e-200 < mass_product < 1e200:
                sums[1] += np.log(mass_product)
                mass_product = 1.0
    sums[1] += np.log(mass_product)
    return True


@cache
def _entropy_terms(shift: int) -> np.ndarray:
    """w · ln w of each float32 whose last `shift` bits are 0, by its other bits. float64 [2^(32 −
    shift)]"""
    bits_N = np.arange(2 ** (32 - shift), dtype=np.uint32) << np.uint32(shift)
    with np.errstate(invalid="ignore"):  # some are no numbers
        w_N = bits_N.view(np.float32).astype(float)
        return w_N * np.log(np.maximum(w_N, TINY))


def weight_confidence(weights: Slots) -> dict[str, float]:
    """Weights rounded to bfloat16 or float16, as a trace has them, look up their logarithms."""
    bits = tuple(weight_T.view(np.uint32) for weight_T in weights)
    for shift in (BFLOAT16_SHIFT, FLOAT16_SHIFT, 0):
        sums = np.zeros(4)
        terms_N = _entropy_terms(shift) if shift else np.zeros(0)
        if _weight_confidence(weights, bits, shift, terms_N, sums):
            break
    return {
        "weight_decisions": int(sums[0]),
        "weight_entropy_sum": float(sums[1]),
        "weight_margin_sum": float(sums[2]),
        "weight_mass_sum": float(sums[3]),
    }


@njit(nogil=True, cache=True)
def _sorted_rows(row_T, end_X, by_N, row_N):  # type: ignore[no-untyped-def]
    for t in range(len(row_T)):
        if row_T[t] >= 0:
            end_X[row_T[t] + 1] += 1
    for x in range(1, len(end_X)):
        end_X[x] += end_X[x - 1]
    for t in range(len(row_T)):
        if row_T[t] >= 0:
            at = end_X[row_T[t]]
            by_N[at], row_N[at] = t, row_T[t]
            end_X[row_T[t]] = at + 1
    return end_X[-1]


def sorted_rows(row_T: np.ndarray, X: int) -> tuple[np.ndarray, np.ndarray]:
    """uint32, twice"""
    by_N, row_N = np.empty((2, len(row_T)), np.uint32)
    end_X = np.zeros(X + 1, np.int64)
    n = _sorted_rows(row_T, end_X, by_N, row_N)
    return by_N[:n], row_N[:n]


@njit(nogil=True, cache=True)
def _accumulate(any_XE, first_XE, by_N, row_N, ids_TK, slots):  # type: ignore[no-untyped-def]
    for i in range(len(by_N)):
        ids_K, row_E = ids_TK[by_N[i]], any_XE[row_N[i]]
        if first_XE is not None:
            first_XE[row_N[i], np.uint64(ids_K[0])] += ONE
        for j in range(len(slots)):
            row_E[np.uint64(ids_K[j])] += ONE


def accumulate(
    any_XE: np.ndarray, first_XE: np.ndarray | None, visits: Visits, ids_TK: np.ndarray
) -> None:
    """Adds to tables of unsigned integers in place."""
    if len(visits.by_N):
        slots = (0,) * ids_TK.shape[1]  # their number is part of the type
        _accumulate(any_XE, first_XE, visits.by_N, visits.row_N, ids_TK, slots)


@njit(nogil=True, cache=True)
def _repetition(slots, by_T, follows_T, unit_T, nowhere, first_U, shared_U, chosen_U):  # type: ignore[no-untyped-def]
    for index in range(1, len(by_T)):
        if follows_T[index]:
            before, t, shared, chosen = by_T[index - 1], by_T[index], 0, 0
            for i in range(len(slots)):
                e, common = slots[i][before], False
                for j in range(len(slots)):
                    common |= (e == slots[j][t]) & (e < nowhere)
                shared += common
                chosen += (e < nowhere) + (slots[i][t] < nowhere)
            e, u = slots[0][t], unit_T[t]
            first_U[u] += (e == slots[0][before]) & (e < nowhere)
            shared_U[u] += shared
            chosen_U[u] += chosen


def repetition(
    slots: Slots, token_rows: TokenRows, E: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int64 [U], three times"""
    assert token_rows.order is not None
    by_T, follows_T = token_rows.order.by_T, token_rows.order.follows_T
    first_U, shared_U, chosen_U = np.zeros((3, token_rows.U), np.int64)
    _repetition(slots, by_T, follows_T, token_rows.unit_T, E, first_U, shared_U, chosen_U)
    return first_U, shared_U, chosen_U
