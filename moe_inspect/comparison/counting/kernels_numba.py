"""Functions of kernels_numpy.py compiled by numba: same names, arguments and results to the last
digit, several times as fast, without the GIL.

T tokens, N of them whose slots are not equal one by one, K slots, V units, E experts, X cells.
"""

# numba infers the types of what it compiles
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import numpy as np
from numba import njit

ONE = np.uint32(1)
BLOCK = 4096  # decisions at a time, whose slots stay in the nearest cache


@njit(nogil=True, cache=True)
def add_load(slots, unit_T, load_VE):  # type: ignore[no-untyped-def]
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
def add_apart(a_KN, b_KN, E, a_weights_KN, b_weights_KN, total_N):  # type: ignore[no-untyped-def]
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
