"""The counts of one shard.

L routers, E experts, K slots, T tokens selected, D domains, U units (clusters of documents), B
batches, W windows, S samples (the tokens of a sequence in the shard).
"""

# pyarrow has no types
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from moe_inspect.analysis.counting import kernels_numpy
from moe_inspect.analysis.counting.counts import CLUSTERS, Counts, no_counts
from moe_inspect.analysis.counting.kernels_numpy import Slots, TokenRows
from moe_inspect.analysis.counting.router_counts import RouterCounts, RouterDecisions, count_router
from moe_inspect.analysis.counting.select import SelectedTokens, Selection, among, selected_tokens
from moe_inspect.trace.runs import run_edges
from moe_inspect.trace.shard import Shard, codes

NEEDS_ORDER = frozenset({"repetition", "srp", "esft"})


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
    fast: bool = False,
    routers: tuple[int, ...] | None = None,
) -> Counts:
    """The counts of one shard: what the whole adds up from. A sequence's tokens are in one shard,
    prompt and what was generated from it together. Only a loop that generates more than
    writer.CONTINUED shards hold goes on in the next: the pair at that edge is not counted. `fast`:
    by the compiled kernels. `routers`: of those selected, the ones to count now, by default all."""
    prepared = prepare_shard(shard, selection, wants, windows)
    if shard.trace.counts_only:
        _count_counted(shard, selection, prepared.part, windows if "windows" in wants else None)
    else:
        chosen = selection.routers if routers is None else routers
        prepared.part.of = count_routers(prepared, chosen, kernels(fast))
    return prepared.part


def kernels(fast: bool) -> ModuleType:
    """The module to count with."""
    if not fast:
        return kernels_numpy
    from moe_inspect.analysis.counting import kernels_numba

    return kernels_numba


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
    order, windows = bool(wants & NEEDS_ORDER), windows if "windows" in wants else None
    every = selected_tokens(shard, selection, order=order)
    if not len(every.domain_T):
        return prepared
    key_U, unit_T = kernels_numpy.distinct(_unit(every))
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
        batch_B, batch_T = kernels_numpy.distinct(seen.batch_T)
        token_rows = TokenRows(
            of_seen_T,
            domain_of_U[of_seen_T],
            batch_T,
            windows.of(shard, seen.number_T) if windows else np.zeros_like(of_seen_T),
            len(key_U),
            len(part.domains),
            len(batch_B),
            windows.count if windows else 1,
            seen.order,
        )
        prepared.stacks[stack] = seen, token_rows
    return prepared


def count_routers(
    prepared: PreparedShard,
    routers: Sequence[int],
    by: ModuleType,
    visit: Callable[[int, Slots], None] | None = None,
) -> dict[int, RouterCounts]:
    """The counts of routers of a shard, none where token ids alone are counted. `by`: the kernels.
    `visit` is given the decisions of each too."""
    part, shard, counts = prepared.part, prepared.shard, dict[int, RouterCounts]()
    for stack, (seen, token_rows) in prepared.stacks.items():
        chosen = [r for r in routers if part.routers[r].stack == stack]
        linked = chosen if "transitions" in part.wants else []
        reached = {after for r in linked if (after := part.next_router(r)) is not None}
        before: tuple[int, Slots] | None = None
        for r in sorted({*chosen, *reached}):
            slots = seen.of(shard.slots(r), r)
            if r in chosen:
                if part.wants != frozenset({"token_ids"}):
                    decisions = RouterDecisions(shard, r, slots, seen, token_rows, by)
                    counts[r] = count_router(decisions, part.wants)
                if visit:
                    visit(r, slots)
            if before is not None and r in reached:
                b, of_b = before
                here, there = part.routers[b], part.routers[r]
                total_EN, next_first_EN = by.transitions(of_b, slots, here.experts, there.experts)
                ranked = here.first_choice_known and there.first_choice_known
                counts[b].next_EN = total_EN
                counts[b].next_first_EN = next_first_EN if ranked else None
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
    """The shard of a counts-only trace: sums by domain, no documents to tell apart. They know no
    order within a shard: all of it is in the window in which it begins."""
    table = shard.counts()
    code, domains = codes(table["domain"])
    part.counts_only = True
    kept = [int(d) for d in np.unique(code) if domains[d] in (selection.domains or domains)]
    part.domains = [domains[d] for d in kept]
    part.units = [(domain, 0) for domain in part.domains]
    row_of = {d: row for row, d in enumerate(kept)}
    router, expert = table["router"].to_numpy(), table["expert"].to_numpy()
    names = ["assignments", *(["first_choice"] if table["first_choice"].null_count == 0 else [])]
    names += ["weight_sum"] if "weight_sum" in table.column_names else []
    values = {name: table[name].to_numpy() for name in names}
    for r in selection.routers:
        E = part.routers[r].experts
        mine = (router == r) & np.isin(code, kept)
        cell = np.array([row_of[d] for d in code[mine]], np.int64) * E + expert[mine]
        sums = {
            name: np.bincount(cell, of[mine], len(kept) * E).reshape(len(kept), E)
            for name, of in values.items()
        }
        first_choice_DE = sums["first_choice"].astype(np.int64) if "first_choice" in sums else None
        part.of[r] = RouterCounts(
            sums["assignments"].astype(np.int64),
            first_choice_DE if part.routers[r].first_choice_known else None,
            sums.get("weight_sum"),
        )
    tokens_SD = _tokens_counted(shard, router, code, values, len(domains))
    part.tokens_U = np.sum([tokens_D[kept] for tokens_D in tokens_SD.values()], axis=0)
    part.tokens_SU = {s: tokens_D[kept] for s, tokens_D in tokens_SD.items() if s in part.tokens_SU}
    for r, counts in part.of.items():
        slots = part.tokens_of(r) * part.routers[r].top_k
        counts.null_slots = slots - int(counts.assignments_UE.sum())
        if windows:
            w = windows.of(shard, np.array(0))
            part.first_token_W[w] = shard.files.first_token
            counts.window_load_WE = np.zeros((windows.count, part.routers[r].experts), np.int64)
            counts.window_load_WE[w] = part.load_E(r)
            counts.window_tokens_W = np.zeros(windows.count, np.int64)
            counts.window_tokens_W[w] = part.tokens_of(r)


def _tokens_counted(
    shard: Shard, router: np.ndarray, code: np.ndarray, values: dict[str, np.ndarray], domains: int
) -> dict[str, np.ndarray]:
    """The tokens of each domain of a counts-only shard, by stack, int64 [D]. The shard states their
    sum; counts tell how they divide: a token may have no first choice at one router, but at
    another, so that the router that missed fewest tells the most."""
    least_SD = dict[str, np.ndarray]()
    for r, of in enumerate(shard.trace.routers):
        mine = router == r
        name, per_token = (
            ("first_choice", 1) if "first_choice" in values else ("assignments", of.top_k)
        )
        found_D = np.bincount(code[mine], values[name][mine], domains) / per_token
        least_SD[of.stack] = np.maximum(least_SD.get(of.stack, 0), found_D)
    share = np.concatenate(list(least_SD.values()))
    share = share if share.any() else np.ones(len(share))
    ends = np.rint(np.cumsum(share) / share.sum() * shard.files.tokens).astype(np.int64)
    tokens = np.diff(ends, prepend=0).reshape(len(least_SD), domains)
    return dict(zip(least_SD, tokens, strict=True))
