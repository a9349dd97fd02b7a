"""The counts of one shard.

L routers, E experts, K slots, T tokens selected, D domains, U units (clusters of documents), B
batches, W windows.
"""

# pyarrow has no types
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moe_inspect.analysis.counting.counts import CLUSTERS, Counts, no_counts
from moe_inspect.analysis.counting.kernels import Slots, TokenRows, distinct, transitions
from moe_inspect.analysis.counting.router_counts import RouterCounts, RouterDecisions, count_router
from moe_inspect.analysis.counting.select import SelectedTokens, Selection, among, selected_tokens
from moe_inspect.trace.shard import Shard, codes, numbers, run_edges


@dataclass(frozen=True)
class Windows:
    """How the trace is cut into windows: `tokens` of each rank to a window, `count` windows.
    `before` is the number of tokens that each shard, by (rank, index), has before it in its rank:
    ranks run side by side, and so do their windows."""

    tokens: int
    count: int
    before: dict[tuple[int, int], int]

    def of(self, shard: Shard, number_T: np.ndarray) -> np.ndarray:
        """The windows of the shard's tokens of these numbers, which begin with 0."""
        return (self.before[shard.files.rank, shard.files.index] + number_T) // self.tokens


@dataclass(frozen=True)
class PreparedShard:
    """What is read of a shard once for all its routers. `part`: its counts, without those of
    routers; of each stack, the tokens selected and their rows. Empty where no token is selected."""

    shard: Shard
    part: Counts
    stacks: dict[str, tuple[SelectedTokens, TokenRows]]


def count_shard(
    shard: Shard,
    selection: Selection,
    wants: frozenset[str],
    windows: Windows | None = None,
    routers: tuple[int, ...] | None = None,
) -> Counts:
    """The counts of one shard: what the whole adds up from. A sequence's tokens are in one shard,
    prompt and what was generated from it together. Only a loop that generates more than
    writer.CONTINUED shards hold goes on in the next: the pair at that edge is not counted.
    `routers`: of those selected, the ones to count now, by default all."""
    prepared = prepare_shard(shard, selection, wants, windows)
    if shard.trace.counts_only:
        _count_counted(shard, selection, prepared.part, windows if "windows" in wants else None)
    else:
        chosen = selection.routers if routers is None else routers
        prepared.part.of = count_routers(prepared, chosen)
    return prepared.part


def prepare_shard(
    shard: Shard, selection: Selection, wants: frozenset[str], windows: Windows | None = None
) -> PreparedShard:
    sizes = (windows.tokens, windows.count) if windows else (0, 0)
    part = no_counts(shard.trace.routers, selection.routers, wants, sizes)
    part.documents = shard.files.rows["documents"]  # that begin in it
    if selection.domains is not None:
        code, domains = codes(shard.table("documents", ["domain"])["domain"])
        part.documents = int(among(domains, selection.domains)[code].sum())
    prepared = PreparedShard(shard, part, {})
    if shard.trace.counts_only:
        return prepared
    order, windows = "repetition" in wants, windows if "windows" in wants else None
    every = selected_tokens(shard, selection, order=order)
    if not len(every.domain_T):
        return prepared
    key_U, unit_T = distinct(_unit(every))
    part.tokens_U = np.bincount(unit_T)
    part.units = [(every.domains[key // CLUSTERS], int(key % CLUSTERS)) for key in key_U]
    domain_U, domain_of_U = np.unique(key_U // CLUSTERS, return_inverse=True)
    part.domains = [every.domains[d] for d in domain_U]
    part.token_ids_V = _occurrences(every)
    if windows:
        window_T = windows.of(shard, every.number_T)
        at_W = run_edges(window_T)[:-1]
        part.first_token_W[window_T[at_W]] = shard.files.first_token + every.number_T[at_W]
    for stack in sorted({part.routers[r].stack for r in part.indices}):
        seen, of_seen_T = every, unit_T
        if stack:
            seen = selected_tokens(shard, selection, stack, order)
            of_seen_T = np.searchsorted(key_U, _unit(seen))
            part.token_ids_SV[stack] = _occurrences(seen)
            part.tokens_SU[stack] = np.bincount(of_seen_T, minlength=len(key_U))
        batch_B, batch_T = distinct(seen.batch_T)
        token_rows = TokenRows(
            of_seen_T,
            domain_of_U[of_seen_T],
            batch_T,
            len(key_U),
            len(part.domains),
            len(batch_B),
            windows.of(shard, seen.number_T) if windows else None,
            windows.count if windows else 0,
            order=seen.order,
        )
        prepared.stacks[stack] = seen, token_rows
    return prepared


def count_routers(
    prepared: PreparedShard,
    routers: Sequence[int],
    visit: Callable[[RouterDecisions], None] | None = None,
) -> dict[int, RouterCounts]:
    """The counts of routers of a shard, none if token ids alone are counted. `visit` is called with
    the decisions of each router."""
    part, shard, counts = prepared.part, prepared.shard, dict[int, RouterCounts]()
    for stack, (seen, token_rows) in prepared.stacks.items():
        chosen = [r for r in routers if part.routers[r].stack == stack]
        linked = chosen if "transitions" in part.wants else []
        reached = {after for r in linked if (after := part.next_router(r)) is not None}
        before: tuple[int, Slots] | None = None
        for r in sorted({*chosen, *reached}):
            slots = seen.of(shard.slots(r), r)
            if r in chosen:
                decisions = RouterDecisions(shard, r, slots, seen, token_rows)
                if part.wants != frozenset({"token_ids"}):
                    counts[r] = count_router(decisions, part.wants)
                if visit:
                    visit(decisions)
            if before is not None and r in reached:
                b, of_b = before
                here, there = part.routers[b], part.routers[r]
                counts[b].next_EN = transitions(of_b, slots, here.experts, there.experts)
            before = (r, slots) if r in chosen else None
    return counts


def _occurrences(seen: SelectedTokens) -> np.ndarray:
    """int64 [V]: of each token id; a token of unknown id is −1."""
    return np.bincount(seen.token_id_T[seen.token_id_T >= 0])


def _unit(seen: SelectedTokens) -> np.ndarray:
    return seen.domain_T.astype(np.int64) * CLUSTERS + seen.document_T % CLUSTERS


def _count_counted(
    shard: Shard, selection: Selection, part: Counts, windows: Windows | None
) -> None:
    """The shard of a counts-only trace, of whose parts X (documents, else domains) the sums are
    known. They know no order within: all of a document is in the window in which it begins; where
    none is known, all of the shard."""
    table, trace = shard.counts(), shard.trace
    router_N, expert_N = numbers(table["router"]), numbers(table["expert"])
    code_N, domains = codes(table["domain"])
    names = ["assignments", *(["first_choice"] if table["first_choice"].null_count == 0 else [])]
    names += trace.sums
    values = {name: numbers(table[name]) for name in names}
    part.counts_only, part.documents_unknown = True, not trace.by_document
    part_N, number_X, size_X = code_N, np.zeros(len(domains), np.int64), None
    if trace.by_document:
        listed = shard.table("documents", ["document", "tokens"])
        number_X, size_X = (numbers(listed[name]) for name in ("document", "tokens"))
        order_X = np.argsort(number_X)
        of_N = np.searchsorted(number_X[order_X], numbers(table["document"]))
        part_N = order_X[of_N]
    domain_X = np.full(len(number_X), -1)
    domain_X[part_N] = code_N
    tokens_SX = _tokens_counted(shard, router_N, part_N, values, len(number_X), size_X)
    tokens_X = np.sum(list(tokens_SX.values()), axis=0)
    wanted = [name in (selection.domains or domains) for name in domains]
    kept = np.flatnonzero(np.array([*wanted, False])[domain_X])  # the last: of a part without rows
    key_K = domain_X[kept] * CLUSTERS + number_X[kept] % CLUSTERS
    key_U, unit_K = np.unique(key_K, return_inverse=True)
    domain_D, domain_K = np.unique(domain_X[kept], return_inverse=True)
    part.domains = [domains[d] for d in domain_D]
    part.units = [(domains[key // CLUSTERS], int(key % CLUSTERS)) for key in key_U]

    def by_unit(of_X: np.ndarray) -> np.ndarray:
        return np.bincount(unit_K, of_X[kept], len(key_U)).astype(np.int64)

    part.tokens_U = by_unit(tokens_X)
    part.tokens_SU = {s: by_unit(of_X) for s, of_X in tokens_SX.items() if s in part.tokens_SU}
    window_K = 0 * kept
    if windows:
        start_K = (np.cumsum(tokens_X) - tokens_X)[kept] * trace.by_document
        window_K = windows.of(shard, start_K)
        part.first_token_W[window_K[::-1]] = shard.files.first_token + start_K[::-1]
    place_X = np.full(len(number_X), -1)
    place_X[kept] = np.arange(len(kept))
    sizes = len(key_U), len(domain_D), windows.count if windows else 1
    for r in selection.routers:
        router = part.routers[r]
        mine_N = (router_N == r) & (place_X[part_N] >= 0)
        place_M, expert_M = place_X[part_N[mine_N]], expert_N[mine_N]
        of = {name: values_N[mine_N] for name, values_N in values.items()}
        cells = ((row_K[place_M], expert_M) for row_K in (unit_K, domain_K, window_K))
        unit_M, domain_M, window_M = cells
        UE, DE, WE = ((n, router.experts) for n in sizes)
        counts = part.of[r] = RouterCounts(_summed(of["assignments"], unit_M, UE))
        if "first_choice" in of and router.first_choice_known:
            counts.first_choice_DE = _summed(of["first_choice"], domain_M, DE)
        if "weight_sum" in of:
            counts.weight_sum_DE = _summed(of["weight_sum"], domain_M, DE)
        for name in of.keys() & {"energy", "saliency_sum"}:
            setattr(counts, f"{name}_UE", _summed(of[name], unit_M, UE))
        slots = part.tokens_of(r) * router.top_k
        counts.null_slots = slots - int(counts.assignments_UE.sum())
        if windows:
            tokens_K = tokens_SX[router.stack][kept]
            counts.window_load_WE = _summed(of["assignments"], window_M, WE)
            counts.window_tokens_W = np.bincount(window_K, tokens_K, windows.count).astype(np.int64)


def _summed(
    values_N: np.ndarray, cell_N: tuple[np.ndarray, np.ndarray], shape: tuple[int, int]
) -> np.ndarray:
    """Sums of values by the row and the column that each is of, in their type."""
    sums = np.bincount(np.ravel_multi_index(cell_N, shape), values_N, math.prod(shape))
    return sums.astype(values_N.dtype).reshape(shape)


def _tokens_counted(
    shard: Shard,
    router: np.ndarray,
    part: np.ndarray,
    values: dict[str, np.ndarray],
    parts: int,
    size_X: np.ndarray | None,
) -> dict[str, np.ndarray]:
    """The tokens of each part of a counts-only shard, by stack, int64 [X]. Of documents, their
    number is stated (size_X), else the shard states their sum; counts tell how they divide: a token
    may have no first choice at one router, but at another, so that the router that missed fewest
    tells the most."""
    least_SX = dict[str, np.ndarray]()
    for r, of in enumerate(shard.trace.routers):
        mine = router == r
        name, per_token = (
            ("first_choice", 1) if "first_choice" in values else ("assignments", of.top_k)
        )
        found_X = np.bincount(part[mine], values[name][mine], parts) / per_token
        least_SX[of.stack] = np.maximum(least_SX.get(of.stack, 0), found_X)
    share_SX = np.stack(list(least_SX.values()))
    if size_X is None:  # all of them are of the same tokens
        share_SX = share_SX if share_SX.any() else np.ones(share_SX.shape)
        ends = np.rint(np.cumsum(share_SX) / share_SX.sum() * shard.files.tokens)
        tokens_SX = np.diff(ends, prepend=0).reshape(share_SX.shape)
    else:
        share_SX = np.where(share_SX.any(0), share_SX, 1)
        ends_SX = np.rint(np.cumsum(share_SX, 0) / share_SX.sum(0) * size_X)
        tokens_SX = np.diff(ends_SX, axis=0, prepend=0)
    return dict(zip(least_SX, tokens_SX.astype(np.int64), strict=True))
