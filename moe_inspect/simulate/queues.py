"""The queues before the experts of one router in one shard: which assignments find room in them.

T tokens that reach the router, K slots, E experts, G groups, F capacity factors (ascending), S
sizes of groups, D domains, P POSITIONS, N tenths, R runs of tokens of one domain and the same
tenths.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moe_inspect.analysis.counting.router_counts import narrowed
from moe_inspect.simulate.kernels_numba import NOWHERE, queue
from moe_inspect.simulate.shards import Seen, cut, deciles, document_deciles, expert_capacity
from moe_inspect.trace.runs import run_edges
from moe_inspect.trace.schema import Router
from moe_inspect.trace.shard import Shard

if TYPE_CHECKING:
    import pyarrow as pa


Order = Literal["arrival", "token", "weight"]
STEP = 100  # the least factor is searched for in hundredths
GroupTokens = int | Literal["batch", "sequence"]
POSITIONS = ("document", "group")  # what a token's tenth is a tenth of


@dataclass(frozen=True)
class Groups:
    """The tokens of a shard that reach the routers of one stack: which they are (`seen`), the first
    token of each group, and the end (start_G), the domain of each and its tenth of its document and
    of its group (tenth_PT). `domains`: how many domains are known so far."""

    seen: Seen
    start_G: np.ndarray
    domain_T: np.ndarray
    tenth_PT: np.ndarray
    domains: int

    @cached_property
    def start_R(self) -> np.ndarray:
        return run_edges(self.domain_T, *self.tenth_PT)

    @cached_property
    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        return self.summed(None)

    def summed(self, made_T: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """made_T (None: 1 each) summed by domain, int64 [D], and by tenth, int64 [P, N]."""
        by_tenth = [np.bincount(tenth_T, made_T, 10) for tenth_T in self.tenth_PT]
        made_D = np.bincount(self.domain_T, made_T, self.domains)
        return made_D.astype(np.int64), np.stack(by_tenth).astype(np.int64)


def groups_of(
    table: pa.Table,
    seen: Seen,
    group_tokens: GroupTokens,
    domain_T: np.ndarray,
    domains: int,
) -> Groups:
    """The groups that the tokens of a shard form before a router. table: the shard's tokens;
    domain_T: their domains; seen: which of them reach the router."""
    document_T, sequence_T, batch_T = (
        table[name].to_numpy()[seen] for name in ("document", "sequence", "batch")
    )
    start_G = run_edges(batch_T, sequence_T) if group_tokens == "sequence" else run_edges(batch_T)
    if isinstance(group_tokens, int):
        start_G = cut(start_G, min(group_tokens, len(batch_T) + 1))
    tenth_PT = np.stack([document_deciles(document_T, sequence_T), deciles(start_G)])
    return Groups(seen, start_G, domain_T[seen], tenth_PT, domains)


@dataclass
class Drops:
    """What each capacity factor drops of one router's assignments. room_F: assignments that all
    experts and groups have room for; made_D, made_PN: assignments by domain and by tenth; last_FD,
    last_FPN: those that factor f drops and the next larger does not; hit_F, lost_F: decisions that
    lose an assignment, and all of them. dropped_at, room_at: what factors of 1/STEP, 2/STEP, …
    drop and have room for. int64 each."""

    router: Router
    decisions: int
    groups: int
    made_D: np.ndarray
    made_PN: np.ndarray
    last_FD: np.ndarray
    last_FPN: np.ndarray
    room_F: np.ndarray
    hit_F: np.ndarray
    lost_F: np.ndarray
    dropped_at: np.ndarray
    room_at: np.ndarray

    def __getstate__(self) -> dict[str, Any]:
        """As it is sent to be added to others: in narrow types."""
        return {name: narrowed(value) for name, value in self.__dict__.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            wide = value.astype(np.int64) if isinstance(value, np.ndarray) else value
            setattr(self, name, wide)

    @property
    def assignments(self) -> int:
        return int(self.made_D.sum())

    def add(self, other: Drops, row_D: np.ndarray, D: int) -> None:
        """`row_D`: which of our D domains each of the other's is."""
        more = D - len(self.made_D)
        self.made_D = np.pad(self.made_D, (0, more))
        self.last_FD = np.pad(self.last_FD, ((0, 0), (0, more)))
        self.made_D[row_D] += other.made_D
        self.last_FD[:, row_D] += other.last_FD
        for name in SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def needed(self, target: float) -> dict[str, float]:
        """The least factor, in hundredths, that drops at most `target`; what it drops; the share of
        capacity it leaves unused."""
        at = int(np.argmax(self.dropped_at <= target * self.assignments))
        dropped = int(self.dropped_at[at])
        return {
            "capacity_factor": (at + 1) / STEP,
            "simulated_drop_rate": dropped / self.assignments,
            "unused_capacity": 1 - (self.assignments - dropped) / int(self.room_at[at]),
        }


SUMS = [f.name for f in fields(Drops) if f.name not in ("router", "made_D", "last_FD")]


def drops_of(
    shard: Shard,
    router: int,
    groups: Groups,
    ids_KT: np.ndarray,
    factors: tuple[float, ...],
    order: Order,
) -> tuple[Drops, np.ndarray, np.ndarray]:
    """Queues the assignments of one router in one shard: its drops, worst_T and best_T of
    `dropped`."""
    of = shard.trace.routers[router]
    (k, T), E, F = ids_KT.shape, of.experts, len(factors)
    size_G = np.diff(groups.start_G)
    size_S, of_G = np.unique(size_G, return_inverse=True)
    room_SF = np.array(
        [[expert_capacity(f, int(s), k, E) for f in factors] for s in size_S], np.int64
    ).reshape(-1, F)
    level_SC = levels(room_SF, int(size_S.max(initial=0)))
    visit_N = np.zeros(0, np.int64)
    if order == "weight":  # of equal weights the earlier
        weight_N = np.ascontiguousarray(shard.weights(router).T).ravel()
        visit_N = np.lexsort((-weight_N, np.tile(np.repeat(np.arange(len(size_G)), size_G), k)))
    load_GE, level_KT = np.zeros((len(size_G), E), np.int32), np.empty((k, T), np.uint8)
    queue(ids_KT, groups.start_G, of_G, level_SC, visit_N, order == "token", load_GE, level_KT)
    if T and ids_KT.min() < 0:
        made_D, made_PN = groups.summed((ids_KT >= 0).sum(0))
    else:
        made_D, made_PN = (tokens * k for tokens in groups.tokens)
    room_F = np.bincount(of_G, minlength=len(size_S)) @ room_SF * E
    last_FD, last_FPN, worst_T, best_T = dropped(level_KT, groups, F)
    drops = Drops(
        of,
        T,
        len(size_G),
        made_D,
        made_PN,
        last_FD,
        last_FPN,
        room_F,
        at_least(worst_T, F),
        at_least(best_T, F),
        *hundredths(of, size_G, load_GE),
    )
    return drops, worst_T, best_T


def hundredths(
    router: Router, size_G: np.ndarray, load_GE: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """dropped_at and room_at of `Drops`, of groups of so many tokens and their loads: Σ max(0, load
    − capacity), exact, in memory that no trace makes grow."""
    k, E = router.top_k, router.experts
    n = np.arange(1, -(-STEP * E // k) + 1)
    dropped_at, room_at = np.zeros((2, len(n)), np.int64)
    for size in np.unique(size_G):
        at_G = size_G == size
        load_C = np.bincount(load_GE[at_G].ravel(), minlength=size + 1)
        above_C = np.cumsum(load_C[::-1])[::-1] - load_C  # experts with more than c
        excess_C = np.append(np.cumsum(above_C[::-1])[::-1], 0)
        capacity_n = -(-n * int(size) * k // (STEP * E))
        dropped_at += excess_C[np.minimum(capacity_n, size + 1)]
        room_at += capacity_n * E * int(at_G.sum())
    return dropped_at, room_at


def at_least(level_T: np.ndarray, F: int) -> np.ndarray:
    """How many tokens each factor meets: those whose level is above its index. int64 [F]"""
    return np.array([np.count_nonzero(level_T > f) for f in range(F)])


def levels(room_SF: np.ndarray, most: int) -> np.ndarray:
    """How many of the factors have no room for an assignment with c others before it in its queue,
    c = 0 … `most`. room_SF: capacities, ascending, by size of the group. uint8 [S, C]"""
    return np.stack(
        [np.searchsorted(room_F, np.arange(most + 1), side="right") for room_F in room_SF] or [[]]
    ).astype(np.uint8)


def dropped(
    level_KT: np.ndarray, groups: Groups, F: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """last_FD and last_FPN of `Drops`; and worst_T, best_T: under how many of the F factors a token
    loses an assignment, and all of them, uint8; 0 and 0 for a token without any. level_KT: how many
    factors drop each assignment, uint8, NOWHERE where there is none."""
    last_FD, last_FPN = np.zeros((F, groups.domains), np.int64), np.zeros((F, 2, 10), np.int64)
    there_KT = (
        level_KT
        if level_KT.max(initial=0) < NOWHERE
        else np.where(level_KT == NOWHERE, np.uint8(0), level_KT)
    )
    worst_T, first_R = there_KT.max(0, initial=0), groups.start_R[:-1]
    for f in range(int(worst_T.max(initial=0))):
        # uint8 holds it: a token has fewer slots than 256
        last_T = (level_KT == f + 1).view(np.uint8).sum(0, dtype=np.uint8)
        last_R = np.add.reduceat(last_T, first_R, dtype=np.int64)
        np.add.at(last_FD[f], groups.domain_T[first_R], last_R)
        for p, tenth_T in enumerate(groups.tenth_PT):
            np.add.at(last_FPN[f, p], tenth_T[first_R], last_R)
    return last_FD, last_FPN, worst_T, np.minimum(level_KT.min(0, initial=NOWHERE), worst_T)
