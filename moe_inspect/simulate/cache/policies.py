"""Eviction policies, and the caches of one router that they are replayed in.

T decisions, K slots of a decision, E experts, P phases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moe_inspect.trace.schema import PHASES

NEVER = 2**62

POLICIES: dict[str, Callable[[int, Past], Any]] = {}


class Past:
    """What a policy may look at: `last[e]` and `count[e]` of the accesses so far; `next[e]`, the
    next decision that wants e."""

    def __init__(self) -> None:
        self.last: dict[int, int] = {}
        self.count: dict[int, int] = {}
        self.next: dict[int, int] = {}


def policy(function: Callable[[int, Past], Any]) -> Callable[[int, Past], Any]:
    """Registers an eviction policy: the expert with the least value is evicted."""
    POLICIES[function.__name__] = function
    return function


@policy
def lru(e: int, past: Past) -> Any:
    """The least recently used; of one decision the earlier choice."""
    return past.last[e]


@policy
def lfu(e: int, past: Past) -> Any:
    """The least used since the trace began; of equals the least recently used."""
    return past.count[e], past.last[e]


@policy
def belady(e: int, past: Past) -> Any:
    """Evicts the expert whose next use is furthest away: the upper bound of any policy, which only
    one that knows the future reaches."""
    return -past.next[e]


def replay(ids_KT: np.ndarray, slots: int, name: str) -> np.ndarray:
    """Hits of each decision, under the policy `name`. ids_KT: experts, −1 for none. int64 [T]"""
    wanted_of = [[e for e in row if e >= 0] for row in ids_KT.T.tolist()]
    upcoming: dict[int, int] = {}
    next_of: list[list[int]] = []
    for t, wanted in reversed(list(enumerate(wanted_of))):
        next_of.append([upcoming.get(e, NEVER) for e in wanted])
        upcoming.update(dict.fromkeys(wanted, t))
    next_of.reverse()
    value, past = POLICIES[name], Past()
    cached, hits_T, accesses = set[int](), np.zeros(len(wanted_of), np.int64), 0
    for t, wanted in enumerate(wanted_of):
        hits_T[t] = sum(e in cached for e in wanted)
        for e, again in zip(wanted, next_of[t], strict=True):
            past.last[e], past.count[e], past.next[e] = accesses, past.count.get(e, 0) + 1, again
            accesses += 1
        for e in wanted:
            if e not in cached:
                if len(cached) == slots:
                    cached.remove(min(cached.difference(wanted), key=lambda x: value(x, past)))
                cached.add(e)
    return hits_T


class Cache:
    """The caches of one router: one for each policy (`names`) and number of slots (`sizes`). All
    decisions are kept in memory and replayed: for short traces."""

    def __init__(self, E: int, sizes: Sequence[int], names: Sequence[str]) -> None:
        self.sizes, self.names, self.load_E = sizes, names, np.zeros(E, np.int64)
        self.decisions_P, self.accesses_P, self.cold_P = (
            np.zeros(len(PHASES), np.int64) for _ in range(3)
        )
        self.parts: list[tuple[np.ndarray, np.ndarray]] = []

    def feed(self, ids_KT: np.ndarray, phase_T: np.ndarray) -> None:
        self.decisions_P += np.bincount(phase_T, minlength=len(PHASES))
        self.run(ids_KT, phase_T)

    def run(self, ids_KT: np.ndarray, phase_T: np.ndarray) -> None:
        there_KT = ids_KT >= 0
        self.accesses_P += np.bincount(phase_T, there_KT.sum(0), len(PHASES)).astype(np.int64)
        self.load_E += np.bincount(ids_KT[there_KT], minlength=len(self.load_E))
        self.parts.append((ids_KT, phase_T))

    def hits(self) -> dict[tuple[str, int], np.ndarray]:
        """Hits of each (policy, number of slots) by phase, int64 [P]; call it once, after the last
        shard: it also completes the counts by phase."""
        if not self.parts:
            return {
                (name, size): np.zeros(len(PHASES), np.int64)
                for name in self.names
                for size in self.sizes
            }
        ids_KT, phase_T = (
            np.concatenate([part[i] for part in self.parts], axis=-1) for i in (0, 1)
        )
        experts, first = np.unique(ids_KT.T.ravel(), return_index=True)
        self.cold_P = np.bincount(
            phase_T[first[experts >= 0] // len(ids_KT)], minlength=len(PHASES)
        )
        return {
            (name, size): np.bincount(phase_T, replay(ids_KT, size, name), len(PHASES)).astype(
                np.int64
            )
            for name in self.names
            for size in self.sizes
        }


class CompiledCache(Cache):
    """The same with compiled loops, for traces of any length: what a cache holds is carried from
    shard to shard, in memory for E experts."""

    def __init__(self, E: int, sizes: Sequence[int], names: Sequence[str]) -> None:
        super().__init__(E, sizes, names)
        kind = np.int8 if E <= 256 else np.int16
        self.rank_E = (np.arange(E) + np.iinfo(kind).min).astype(kind)
        self.known, self.at_PE = np.zeros(1, np.int64), np.zeros((len(PHASES), E), np.int64)
        self.done = {
            (name, size): np.zeros(len(PHASES), np.int64)
            for name in names
            if name != "lru"
            for size in sizes
        }
        fresh: dict[str, Callable[[], tuple[np.ndarray, ...]]] = {
            "lfu": lambda: (
                np.zeros(E, np.bool_),
                np.zeros(E, np.int64),
                np.zeros(E + 1, np.int64),
            ),
            "belady": lambda: (
                np.zeros(E, np.int16 if E < 2**15 else np.int32),
                np.zeros(E, np.int64),
                np.zeros(1, np.int64),
            ),
        }
        self.state = {(name, size): fresh[name]() for name, size in self.done}

    def lru(self, ids_KT: np.ndarray, phase_T: np.ndarray) -> tuple[Any, ...]:
        """The arguments of `kernels_numba.lru`."""
        return tuple(ids_KT), phase_T, self.rank_E, self.known, self.load_E, self.at_PE, self.cold_P

    def run(self, ids_KT: np.ndarray, phase_T: np.ndarray) -> None:
        from moe_inspect.simulate import kernels_numba

        # also where not asked for: it counts accesses
        kernels_numba.lru(*self.lru(ids_KT, phase_T))
        for (name, size), state in self.state.items():
            getattr(kernels_numba, name)(ids_KT, phase_T, size, *state, self.done[name, size])

    def hits(self) -> dict[tuple[str, int], np.ndarray]:
        self.accesses_P = self.at_PE.sum(1) + self.cold_P
        of_lru = {("lru", size): self.at_PE[:, :size].sum(1) for size in self.sizes}
        return {
            (name, size): (of_lru | self.done)[name, size]
            for name in self.names
            for size in self.sizes
        }
