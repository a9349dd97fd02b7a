"""The queues before the experts of one router in one shard: which assignments find room in them.

T tokens that reach the router, K slots, E experts, G groups, F capacity factors (ascending), S
sizes of groups, D domains, P POSITIONS, N tenths, R runs of tokens of one domain and the same
tenths.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from moe_inspect.simulate import kernels_numpy
from moe_inspect.simulate.kernels_numpy import NOWHERE
from moe_inspect.simulate.shards import (
    check_length,
    cut,
    deciles,
    document_deciles,
    expert_capacity,
    slots,
)
from moe_inspect.trace.runs import run_edges
from moe_inspect.trace.shard import Shard

if TYPE_CHECKING:
    import pyarrow as pa


Order = Literal["arrival", "token", "weight"]
GroupTokens = int | Literal["batch", "sequence"]
POSITIONS = ("document", "group")  # what a token's tenth is a tenth of


@dataclass(frozen=True)
class Groups:
    """The tokens of a shard that reach the routers of one stack: which they are (`seen`), the first
    token of each group, and the end (start_G), the domain of each and its tenth of its document and
    of its group (tenth_PT). `domains`: how many domains are known so far."""

    seen: slice | np.ndarray
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
    mask: np.ndarray | None,
    group_tokens: GroupTokens,
    domain_T: np.ndarray,
    domains: int,
) -> Groups:
    """The groups that the tokens of a shard form before a router. table: the shard's tokens;
    domain_T: their domains; mask: which of them reach the router (`Shard.seen`)."""
    seen = slice(None) if mask is None else np.flatnonzero(mask)
    document_T, sequence_T, batch_T = (
        table[name].to_numpy()[seen] for name in ("document", "sequence", "batch")
    )
    start_G = run_edges(batch_T, sequence_T) if group_tokens == "sequence" else run_edges(batch_T)
    if isinstance(group_tokens, int):
        start_G = cut(start_G, min(group_tokens, len(batch_T) + 1))
    tenth_PT = np.stack([document_deciles(document_T, sequence_T), deciles(start_G)])
    return Groups(seen, start_G, domain_T[seen], tenth_PT, domains)


@dataclass(frozen=True)
class Drops:
    """What each capacity factor drops of one router's assignments in one shard. size_G: tokens;
    load_GE: assignments; room_F: assignments that all experts and groups have room for; made_D,
    made_PN: assignments by domain and by tenth; last_FD, last_FPN: those that factor f drops and
    the next larger does not. worst_T, best_T: under how many of the factors a token loses an
    assignment, and all of them, uint8; 0 and 0 for a token without any."""

    size_G: np.ndarray
    load_GE: np.ndarray
    room_F: np.ndarray
    made_D: np.ndarray
    made_PN: np.ndarray
    last_FD: np.ndarray
    last_FPN: np.ndarray
    worst_T: np.ndarray
    best_T: np.ndarray


def drops_of(
    shard: Shard,
    router: int,
    groups: Groups,
    factors: tuple[float, ...],
    order: Order,
    small: bool,
) -> Drops:
    """Queues the assignments of one router in one shard. `small`: in numpy, not compiled."""
    k, E = shard.trace.routers[router].top_k, shard.trace.routers[router].experts
    T = len(groups.domain_T)
    ids_KT = slots(shard, router)
    check_length(ids_KT.T, T, router)
    size_G = np.diff(groups.start_G)
    size_S, of_G = np.unique(size_G, return_inverse=True)
    room_SF = np.array(
        [[expert_capacity(f, int(s), k, E) for f in factors] for s in size_S], np.int64
    ).reshape(-1, len(factors))
    level_SC = levels(room_SF, int(size_S.max(initial=0)))
    visit_N = np.zeros(0, np.int64)
    if order == "weight":  # of equal weights the earlier
        weight_N = np.ascontiguousarray(shard.weights(router).T).ravel()
        visit_N = np.lexsort((-weight_N, np.tile(np.repeat(np.arange(len(size_G)), size_G), k)))
    load_GE, level_KT = np.zeros((len(size_G), E), np.int32), np.empty((k, T), np.uint8)
    if small:
        queue = kernels_numpy.queue
    else:
        from moe_inspect.simulate import kernels_numba

        queue = kernels_numba.queue
    queue(ids_KT, groups.start_G, of_G, level_SC, visit_N, order == "token", load_GE, level_KT)
    if T and ids_KT.min() < 0:
        made_D, made_PN = groups.summed((ids_KT >= 0).sum(0))
    else:
        made_D, made_PN = (tokens * k for tokens in groups.tokens)
    room_F = np.bincount(of_G, minlength=len(size_S)) @ room_SF * E
    return Drops(size_G, load_GE, room_F, made_D, made_PN, *dropped(level_KT, groups, len(factors)))


def levels(room_SF: np.ndarray, most: int) -> np.ndarray:
    """How many of the factors have no room for an assignment with c others before it in its queue,
    c = 0 … `most`. room_SF: capacities, ascending, by size of the group. uint8 [S, C]"""
    return np.stack(
        [np.searchsorted(room_F, np.arange(most + 1), side="right") for room_F in room_SF] or [[]]
    ).astype(np.uint8)


def dropped(
    level_KT: np.ndarray, groups: Groups, F: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """last_FD, last_FPN, worst_T and best_T of `Drops`, from how many of the F factors drop each
    assignment (level_KT: uint8, NOWHERE where there is none)."""
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
