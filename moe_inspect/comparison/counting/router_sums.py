"""What one router's decisions in a shard come to, in both traces.

T tokens of a shard that are compared, N of them whose slots are not equal one by one, K slots,
E experts, V units (clusters of documents) in the shard, X cells, M margin deciles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_inspect.comparison.aligning.rows import CELLS, DECILES
from moe_inspect.comparison.counting import kernels_numpy
from moe_inspect.comparison.counting.kernels_numpy import Slots


@dataclass(frozen=True)
class Decisions:
    """Of one router. unit_T: which of the shard's V units each token is in; cell_T: its cell. b:
    None where the shard is the same in both. weights: of both traces, None where they are not
    compared. decile_T, margin_T: of A's margin, which is not finite where it is not known; None
    where it is known of none."""

    E: int
    V: int
    unit_T: np.ndarray
    cell_T: np.ndarray
    a: Slots
    b: Slots | None
    weights: tuple[Slots, Slots] | None
    decile_T: np.ndarray | None
    margin_T: np.ndarray | None


class RouterSums:
    """What `RouterCounts` adds up, for the units of one shard. l1_V: Σ of weight differences,
    float64. at: int64 [N], the tokens whose slots are not equal one by one; missing_N: assignments
    of each that the other trace did not make, 0 where the sets are the same; zero_a_N, zero_b_N:
    whether every slot is expert 0. compiled: whether by numba."""

    def __init__(self, of: Decisions, compiled: bool):
        self._kernels = kernels_numpy
        if compiled:
            from moe_inspect.comparison.counting import kernels_numba

            self._kernels = kernels_numba
        E, V = of.E, of.V
        load_VE = self._kernels.load(of.a, of.unit_T, V, E)
        self.load_VE = load_VE[:, :E]
        self.margin_VM, self.margin_mismatch_VM = np.zeros((2, V, DECILES), np.int64)
        self.mismatch_VX, self.missing_VX, self.short_VX = np.zeros((3, V, CELLS), np.int64)
        self.reordered_V, self.first_differs_V = np.zeros((2, V), np.int64)
        self.l1_V, self.weights_differ = np.zeros(V), 0
        self.at, self.missing_N = np.zeros((2, 0), np.int64)
        self.zero_a_N, self.zero_b_N = np.zeros((2, 0), bool)
        self._add_margins(of, self.margin_VM, slice(None))
        if load_VE[:, E].any():
            short_T = nowhere_in_both(of.a, of.a if of.b is None else of.b, E)
            self._kernels.add_cells(self.short_VX, of.unit_T, of.cell_T, short_T)
        if of.b is not None:
            self._compare(of, of.b)

    def add_moves(self, unit_V: np.ndarray, moved_UE: np.ndarray, flips_EE: np.ndarray) -> None:
        """Adds to the whole what may be as large as that and is mostly zero in a shard. unit_V: the
        shard's units."""
        a_KN, b_KN, lost_KN, gained_KN, unit_N = self._moves
        self._kernels.add_moves(a_KN, b_KN, lost_KN, gained_KN, unit_V[unit_N], moved_UE, flips_EE)

    def _add_margins(self, of: Decisions, total_VM: np.ndarray, at: np.ndarray | slice) -> None:
        if of.decile_T is None or of.margin_T is None:
            return
        known = np.isfinite(of.margin_T[at])
        self._kernels.add_cells(total_VM, of.unit_T[at], of.decile_T[at], known.view(np.uint8))

    def _compare(self, of: Decisions, b: Slots) -> None:
        E, V, at = of.E, of.V, unequal(of.a, b)
        a_KN, b_KN = (np.stack([slot_T[at] for slot_T in side]) for side in (of.a, b))
        lost_KN, gained_KN, missing_N = sets(a_KN, b_KN, E)
        self.at, self.missing_N = at, missing_N
        self.zero_a_N, self.zero_b_N = (a_KN == 0).all(0), (b_KN == 0).all(0)
        unit_N, cell_N = of.unit_T[at], of.cell_T[at]
        self.reordered_V += np.bincount(unit_N, minlength=V)
        self.first_differs_V += np.bincount(unit_N[a_KN[0] != b_KN[0]], minlength=V)
        self._kernels.add_cells(self.mismatch_VX, unit_N, cell_N, missing_N > 0)
        self._kernels.add_cells(self.missing_VX, unit_N, cell_N, missing_N)
        self._moves = a_KN, b_KN, lost_KN, gained_KN, unit_N
        self._add_margins(of, self.margin_mismatch_VM, at[missing_N > 0])
        if of.weights is not None:
            l1_T = self._kernels.weight_difference(a_KN, b_KN, E, at, *of.weights)
            self.l1_V += np.bincount(of.unit_T, l1_T, V)
            self.weights_differ += int(np.count_nonzero(l1_T))


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
