"""Two routers' decisions on the same tokens, compared as sets of experts.

T tokens, K slots, N decisions whose slots are not equal one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

Slots = tuple[np.ndarray, ...]  # K arrays [T], the number of experts where a slot routed nowhere


@dataclass(frozen=True)
class Differing:
    """The decisions that are not equal slot by slot. at: int64 [N], which; a, b: [K, N] their
    experts; E: the number of experts, which stands for none. short_T: slots of every decision
    that route nowhere in both, None where there are none."""

    K: int
    E: int
    at: np.ndarray
    a: np.ndarray
    b: np.ndarray
    short_T: np.ndarray | None

    @cached_property
    def equal_KKN(self) -> np.ndarray:
        """bool: whether slot i of A has the expert of slot j of B; nowhere is no expert."""
        return (self.a[:, None] == self.b[None]) & (self.a != self.E)[:, None]

    @cached_property
    def lost_KN(self) -> np.ndarray:
        """bool: A's assignments whose expert B did not choose."""
        return (self.a != self.E) & ~self.equal_KKN.any(1)

    @cached_property
    def gained_KN(self) -> np.ndarray:
        """bool: B's assignments whose expert A did not choose."""
        return (self.b != self.E) & ~self.equal_KKN.any(0)

    @cached_property
    def missing_N(self) -> np.ndarray:
        """int64: assignments of the larger set that the other has no equal of; 0 where the sets
        are the same. An expert that a decision names twice is one."""
        size_a, size_b = (self.a != self.E).sum(0), (self.b != self.E).sum(0)
        common = np.minimum(size_a - self.lost_KN.sum(0), size_b - self.gained_KN.sum(0))
        return np.maximum(size_a, size_b) - common


def differing(a: Slots, b: Slots, E: int) -> Differing:
    """Compares slot by slot first, which most decisions are equal in."""
    differs_T = a[0] != b[0]
    for of_a, of_b in zip(a[1:], b[1:], strict=True):
        differs_T |= of_a != of_b
    at = np.flatnonzero(differs_T)
    a_KN, b_KN = (np.stack([slot[at] for slot in side]) for side in (a, b))
    return Differing(len(a), E, at, a_KN, b_KN, _short(a, b, E, at))


def _short(a: Slots, b: Slots, E: int, at: np.ndarray) -> np.ndarray | None:
    if all(slot.max(initial=0) < E for slot in (*a, *b)):
        return None
    nowhere_a, nowhere_b = (sum((slot == E).astype(np.int64) for slot in side) for side in (a, b))
    return np.minimum(nowhere_a, nowhere_b)


def weight_difference(
    found: Differing, weights_a: tuple[np.ndarray, ...], weights_b: tuple[np.ndarray, ...]
) -> np.ndarray:
    """float32 [T]: Σ |weight in A − weight in B| over the experts that both chose."""
    total_T = np.abs(weights_a[0] - weights_b[0])
    for of_a, of_b in zip(weights_a[1:], weights_b[1:], strict=True):
        total_T += np.abs(of_a - of_b)
    if len(found.at):
        a_KN, b_KN = (np.stack([w[found.at] for w in side]) for side in (weights_a, weights_b))
        apart_KKN = np.abs(a_KN[:, None] - b_KN[None])
        total_T[found.at] = np.where(found.equal_KKN, apart_KKN, 0).sum((0, 1), dtype=np.float32)
    return total_T
