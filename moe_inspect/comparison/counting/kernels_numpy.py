"""The loops over a router's decisions in NumPy. kernels_numba.py has the same functions compiled,
for traces long enough to be worth loading the compiler.

T tokens of a shard that are compared, N of them whose slots are not equal one by one, K slots,
E experts, V units (clusters of documents), X cells.
"""

from __future__ import annotations

import numpy as np

Slots = tuple[np.ndarray, ...]  # K arrays [T], the number of experts where a slot routed nowhere
BLOCK = 8192  # decisions whose pairs of slots are gone through at a time


def load(slots: Slots, unit_T: np.ndarray, V: int, E: int) -> np.ndarray:
    """int [V, E + 1]: assignments of each expert in each unit; the last column: slots that routed
    nowhere."""
    base_T = unit_T * (E + 1)
    load_C = np.zeros(V * (E + 1), np.int64)
    for slot_T in slots:
        load_C += np.bincount(base_T + slot_T, minlength=len(load_C))
    return load_C.reshape(V, E + 1)


def add_cells(
    total_VX: np.ndarray, unit_N: np.ndarray, cell_N: np.ndarray, by_N: np.ndarray
) -> None:
    """Adds up `by_N` in each (unit, cell); in place."""
    np.add.at(total_VX, (unit_N, cell_N), by_N)


def add_moves(
    a_KN: np.ndarray,
    b_KN: np.ndarray,
    lost_KN: np.ndarray,
    gained_KN: np.ndarray,
    unit_N: np.ndarray,
    moved_UE: np.ndarray,
    flips_EE: np.ndarray,
) -> None:
    """Adds assignments that B has and A does not, less those that it lacks; and each pair of an
    expert that was lost and one that was gained. In place."""
    for experts_KN, which_KN, sign in ((a_KN, lost_KN, -1), (b_KN, gained_KN, 1)):
        slot, n = np.nonzero(which_KN)
        np.add.at(moved_UE, (unit_N[n], experts_KN[slot, n]), sign)
    for n in range(0, len(unit_N), BLOCK):
        part = slice(n, n + BLOCK)
        i, j, at = np.nonzero(lost_KN[:, None, part] & gained_KN[None, :, part])
        np.add.at(flips_EE, (a_KN[:, part][i, at], b_KN[:, part][j, at]), 1)


def weight_difference(
    a_KN: np.ndarray,
    b_KN: np.ndarray,
    E: int,
    at: np.ndarray,
    weights_a: Slots,
    weights_b: Slots,
) -> np.ndarray:
    """float32 [T]: Σ |weight in A − weight in B| over the experts that both chose. at: [N], the
    decisions whose slots are not equal one by one, of which a_KN and b_KN are the experts."""
    total_T = np.zeros(len(weights_a[0]), np.float32)
    for of_a_T, of_b_T in zip(weights_a, weights_b, strict=True):
        total_T += np.abs(of_a_T - of_b_T)
    total_N = np.zeros(len(at), np.float32)
    for a_N, of_a_T in zip(a_KN, weights_a, strict=True):
        for b_N, of_b_T in zip(b_KN, weights_b, strict=True):
            equal_N = (a_N == b_N) & (a_N != E)
            total_N += np.where(equal_N, np.abs(of_a_T[at] - of_b_T[at]), np.float32(0))
    total_T[at] = total_N
    return total_T
