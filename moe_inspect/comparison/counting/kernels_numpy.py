"""The loops over a router's decisions in NumPy. kernels_numba.py has the last four compiled, for
traces long enough to be worth loading the compiler.

T tokens of a shard that are compared, N of them whose slots are not equal one by one, K slots,
E experts, V units (clusters of documents), X cells.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Slots = tuple[np.ndarray, ...]  # K arrays [T], the number of experts where a slot routed nowhere
BLOCK = 8192  # decisions whose pairs of slots are gone through at a time


def unequal(a: Slots, b: Slots) -> np.ndarray:
    """int64 [N]: the decisions of which any slot differs."""
    differs_T = a[0] != b[0]
    for of_a_T, of_b_T in zip(a[1:], b[1:], strict=True):
        differs_T |= of_a_T != of_b_T
    return np.flatnonzero(differs_T)


def nowhere_in_both(a: Slots, b: Slots, E: int) -> np.ndarray:
    """int64 [T]: slots that route nowhere in A and in B."""
    nowhere_a, nowhere_b = (
        np.sum([slot_T == E for slot_T in side], axis=0, dtype=np.int64) for side in (a, b)
    )
    return np.minimum(nowhere_a, nowhere_b)


def sets(a_KN: np.ndarray, b_KN: np.ndarray, E: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """bool [K, N], twice: A's assignments whose expert B did not choose, and B's that A did not.
    int64 [N]: assignments of the larger set that the other has no equal of; 0 where the sets are
    the same. An expert that a decision names twice is one; nowhere is none."""
    some_a_KN, some_b_KN = a_KN != E, b_KN != E
    equal_KKN = a_KN[:, None] == b_KN[None]
    lost_KN, gained_KN = some_a_KN & ~equal_KKN.any(1), some_b_KN & ~equal_KKN.any(0)
    size_a, size_b = some_a_KN.sum(0), some_b_KN.sum(0)
    common = np.minimum(size_a - lost_KN.sum(0), size_b - gained_KN.sum(0))
    return lost_KN, gained_KN, np.maximum(size_a, size_b) - common


def weight_difference(
    kernels: Any, a_KN: np.ndarray, b_KN: np.ndarray, E: int, at: np.ndarray, a: Slots, b: Slots
) -> np.ndarray:
    """float32 [T]: Σ |weight in A − weight in B| over the experts that both chose. at: [N], the
    decisions whose slots differ, of which a_KN and b_KN are the experts. a, b: the weights."""
    total_T, total_N = np.zeros(len(a[0]), np.float32), np.zeros(len(at), np.float32)
    for of_a_T, of_b_T in zip(a, b, strict=True):
        total_T += np.abs(of_a_T - of_b_T)
    of_at = (np.stack([slot_T[at] for slot_T in side]) for side in (a, b))
    kernels.add_apart(a_KN, b_KN, E, *of_at, total_N)
    total_T[at] = total_N
    return total_T


def add_load(slots: Slots, unit_T: np.ndarray, load_VE: np.ndarray) -> None:
    """Counts the assignments of each expert, last those that routed nowhere. In place."""
    V, E = load_VE.shape
    for slot_T in slots:
        load_VE += np.bincount(unit_T * E + slot_T, minlength=V * E).reshape(V, E).astype(np.uint32)


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


def add_apart(
    a_KN: np.ndarray,
    b_KN: np.ndarray,
    E: int,
    a_weights_KN: np.ndarray,
    b_weights_KN: np.ndarray,
    total_N: np.ndarray,
) -> None:
    """Adds |weight in A − weight in B| of the experts that both chose. In place."""
    for a_N, a_weight_N in zip(a_KN, a_weights_KN, strict=True):
        for b_N, b_weight_N in zip(b_KN, b_weights_KN, strict=True):
            apart_N = np.abs(a_weight_N - b_weight_N)
            total_N += np.where((a_N == b_N) & (a_N != E), apart_N, np.float32(0))
