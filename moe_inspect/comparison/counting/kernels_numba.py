"""The functions of kernels_numpy.py compiled by numba: same names, arguments and results to the
last digit, several times as fast, without the GIL.

T tokens, N of them whose slots are not equal one by one, K slots, V units, E experts, X cells.
"""

# numba infers the types of what it compiles
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import numpy as np
from numba import njit

from moe_inspect.comparison.counting.kernels_numpy import Slots

ONE = np.uint32(1)
BLOCK = 4096  # decisions at a time, whose slots stay in the nearest cache


def load(slots: Slots, unit_T: np.ndarray, V: int, E: int) -> np.ndarray:
    load_VE = np.zeros((V, E + 1), np.uint32)
    _load(slots, unit_T, load_VE)
    return load_VE


def weight_difference(
    a_KN: np.ndarray,
    b_KN: np.ndarray,
    E: int,
    at: np.ndarray,
    weights_a: Slots,
    weights_b: Slots,
) -> np.ndarray:
    total_T = np.zeros(len(weights_a[0]), np.float32)
    for of_a_T, of_b_T in zip(weights_a, weights_b, strict=True):
        _add_apart(of_a_T, of_b_T, total_T)
    a_weights_KN, b_weights_KN = (
        np.stack([slot_T[at] for slot_T in side]) for side in (weights_a, weights_b)
    )
    total_N = np.zeros(len(at), np.float32)
    _apart_of_shared(a_KN, b_KN, E, a_weights_KN, b_weights_KN, total_N)
    total_T[at] = total_N
    return total_T


@njit(nogil=True, cache=True)
def _load(slots, unit_T, load_VE):  # type: ignore[no-untyped-def]
    for t in range(len(unit_T)):
        load_E = load_VE[unit_T[t]]
        for j in range(len(slots)):
            load_E[np.uint64(slots[j][t])] += ONE


@njit(nogil=True, cache=True)
def add_cells(total_VX, unit_N, cell_N, by_N):  # type: ignore[no-untyped-def]
    for n in range(len(unit_N)):
        total_VX[unit_N[n], cell_N[n]] += by_N[n]


@njit(nogil=True, cache=True)
def add_moves(a_KN, b_KN, lost_KN, gained_KN, unit_N, moved_UE, flips_EE):  # type: ignore[no-untyped-def]
    K, N = a_KN.shape
    for i in range(K):
        for n in range(N):
            if gained_KN[i, n]:
                moved_UE[unit_N[n], b_KN[i, n]] += 1
        for n in range(N):
            if lost_KN[i, n]:
                moved_UE[unit_N[n], a_KN[i, n]] -= 1
                for j in range(K):
                    if gained_KN[j, n]:
                        flips_EE[a_KN[i, n], b_KN[j, n]] += 1


@njit(nogil=True, cache=True)
def _add_apart(a_weight_T, b_weight_T, total_T):  # type: ignore[no-untyped-def]
    for t in range(len(total_T)):
        total_T[t] += abs(a_weight_T[t] - b_weight_T[t])


@njit(nogil=True, cache=True)
def _apart_of_shared(a_KN, b_KN, E, a_weights_KN, b_weights_KN, total_N):  # type: ignore[no-untyped-def]
    K, N = a_KN.shape
    for n in range(0, N, BLOCK):
        part = slice(n, n + BLOCK)
        for i in range(K):
            for j in range(K):
                _add_apart_of_equal(
                    a_KN[i, part],
                    b_KN[j, part],
                    E,
                    a_weights_KN[i, part],
                    b_weights_KN[j, part],
                    total_N[part],
                )


@njit(nogil=True, cache=True)
def _add_apart_of_equal(a_N, b_N, E, a_weight_N, b_weight_N, total_N):  # type: ignore[no-untyped-def]
    for n in range(len(a_N)):
        apart = abs(a_weight_N[n] - b_weight_N[n])
        # without a branch, so that the compiler takes several at a time
        total_N[n] += apart if (a_N[n] == b_N[n]) & (a_N[n] != E) else np.float32(0)
