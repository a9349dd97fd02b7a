"""What consecutive tokens of a sequence share, compiled by numba: the functions of these names of
kernels_numpy, as kernels_numba has them.

T tokens, K slots, E experts, U units, M + 1 frequencies.
"""

# numba infers the types of what it compiles
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import numpy as np
from numba import njit

from moe_inspect.analysis.counting.kernels_numpy import Slots, TokenRows

BLOCK = 4096  # tokens at a time, whose slots stay in the nearest cache
ONE = np.uint64(1)
F_BITS = np.uint64(7)  # of f, below the window since which it is that
F_MASK = np.uint64(2**7 - 1)


@njit(nogil=True, cache=True)
def _meet(before_T, after_T, common_T):  # type: ignore[no-untyped-def]
    for t in range(len(common_T)):
        common_T[t] |= before_T[t] == after_T[t]


@njit(nogil=True, cache=True)
def _repetition(before, after, follows_T, unit_T, first_U, any_U):  # type: ignore[no-untyped-def]
    """Slot by slot, many tokens at once."""
    common = np.empty(BLOCK, np.bool_)
    for start in range(1, len(follows_T), BLOCK):
        end = min(start + BLOCK, len(follows_T))
        common_T = common[: end - start]
        common_T[:] = False
        for i in range(len(before)):
            for j in range(len(after)):
                _meet(before[i][start - 1 : end - 1], after[j][start:end], common_T)
        unit, first, either = unit_T[start], 0, 0
        for t in range(start, end):
            if unit_T[t] != unit:
                first_U[unit] += first
                any_U[unit] += either
                unit, first, either = unit_T[t], 0, 0
            first += follows_T[t] & (before[0][t - 1] == after[0][t])
            either += follows_T[t] & common_T[t - start]
        first_U[unit] += first
        any_U[unit] += either


def repetition(slots: Slots, token_rows: TokenRows, E: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 [U], twice"""
    assert token_rows.order is not None
    by_T, follows_T, unit_T = token_rows.order.by_T, token_rows.order.follows_T, token_rows.unit_T
    if not token_rows.order.in_place:
        slots, unit_T = tuple(slot_T[by_T] for slot_T in slots), unit_T[by_T]
    before = slots
    if E < 2**16:  # nowhere is nothing to have in common
        slots = tuple(slot_T.astype(np.uint16) for slot_T in slots)
        before = tuple(np.where(slot_T == E, np.uint16(2**16 - 1), slot_T) for slot_T in slots)
    first_U, any_U = np.zeros(token_rows.U, np.int64), np.zeros(token_rows.U, np.int64)
    _repetition(before, slots, follows_T, unit_T, first_U, any_U)
    return first_U, any_U


@njit(nogil=True, inline="always")
def _change(slots, t, step, windows, state_E, held_KF):  # type: ignore[no-untyped-def]
    """Adds `step` to f of the experts of a token, and how long each f stayed to held_KF."""
    nowhere = np.uint64(len(state_E))
    for j in range(len(slots)):
        e = np.uint64(slots[j][t])
        if e < nowhere:
            f = state_E[e] & F_MASK
            held_KF[j, f] += np.uint32(windows - (state_E[e] >> F_BITS))
            # a damaged decision may name one expert k times
            state_E[e] = windows << F_BITS | (f + step & F_MASK)


@njit(nogil=True, cache=True)
def _srp(slots, by_T, start_S, unit_T, E, m, total_UM):  # type: ignore[no-untyped-def]
    """f of each expert changes only when a token that chose it enters or leaves: how long it stayed
    is added then, slot by slot: what is added to one number again and again waits for itself. A
    sequence is of one unit."""
    K, state_E = len(slots), np.zeros(E, np.uint64)
    came_KF, went_KF = np.zeros((2, K, F_MASK + ONE), np.uint32)
    for s in range(len(start_S) - 1):
        first, windows = start_S[s], np.uint64(0)
        for index in range(first, start_S[s + 1]):
            _change(slots, by_T[index], ONE, windows, state_E, came_KF)
            if index - first >= m:
                _change(slots, by_T[index - m], -ONE, windows, state_E, went_KF)
            if index - first >= m - 1:
                windows += ONE
        if windows:
            for e in range(E):
                came_KF[0, state_E[e] & F_MASK] += np.uint32(windows - (state_E[e] >> F_BITS))
            total_M = total_UM[unit_T[by_T[first]]]
            for j in range(K):
                for f in range(len(total_M)):
                    total_M[f] += came_KF[j, f] + went_KF[j, f]
                    came_KF[j, f] = went_KF[j, f] = 0
        state_E[:] = 0


def srp(slots: Slots, token_rows: TokenRows, E: int, m: int) -> np.ndarray:
    """int64 [U, m+1]"""
    assert token_rows.order is not None
    assert m < F_MASK, f"segments of {m} tokens"
    by_T, follows_T = token_rows.order.by_T, token_rows.order.follows_T
    start_S = np.append(np.flatnonzero(~follows_T), len(by_T))
    # f is m+1 between a token's coming and another's going, for no window
    total_UM = np.zeros((token_rows.U, m + 2), np.int64)
    _srp(slots, by_T, start_S, token_rows.unit_T, E, m, total_UM)
    return total_UM[:, : m + 1]
