"""The counts of one shard.

L routers, E experts, K slots, T tokens selected, D domains, U units (clusters of documents), B
batches, W windows, S samples (the tokens of a sequence in the shard).
"""

# pyarrow has no types
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from moe_inspect.analysis.counting import kernels_numpy
from moe_inspect.analysis.counting.counts import CLUSTERS, Counts, no_counts
from moe_inspect.analysis.counting.router_counts import RouterCounts, RouterDecisions, count_router
from moe_inspect.analysis.counting.select import Selection
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.runs import run_edges
from moe_inspect.trace.schema import DROPPED, sees
from moe_inspect.trace.shard import Shard, codes

NEEDS_WEIGHTS = frozenset({"load", "esft", "weights", "worth"})
NEEDS_SIZES = frozenset({"worth"})
NEEDS_ORDER = frozenset({"repetition", "srp", "esft"})


@dataclass(frozen=True)
class Windows:
    """How the trace is cut into windows: `tokens` of each rank to a window, `count` windows.
    `before` is the number of tokens that each shard, by (rank, index), has before it in its rank:
    ranks run side by side, and so do their windows."""

    tokens: int
    count: int
    before: dict[tuple[int, int], int]

    def of(self, shard: Shard, number_T: Any = 0) -> Any:
        """The windows of the shard's tokens of these numbers, which begin with 0."""
        return (self.before[shard.files.rank, shard.files.index] + number_T) // self.tokens


@dataclass(frozen=True)
class SelectedTokens:
    """The tokens of a shard that the selection takes and a stack's routers see. `keep_R` says which
    of a router's R decisions are theirs, None where all are; the other arrays are of the tokens
    kept, in token order."""

    stack: str
    keep_R: np.ndarray | None
    rows: int
    number_T: np.ndarray
    domain_T: np.ndarray
    domains: list[str]
    document_T: np.ndarray
    token_id_T: np.ndarray
    batch_T: np.ndarray
    sequence_T: np.ndarray | None
    position_T: np.ndarray | None
    labels: set[str]

    def of(self, columns: kernels_numpy.Slots, router: int) -> kernels_numpy.Slots:
        """The decisions of the tokens kept; columns of R rows each."""
        if len(columns[0]) != self.rows:
            raise MoeInspectError(
                f"damaged trace: router {router} has {len(columns[0])} decisions of a shard's "
                f"{self.rows} tokens"
            )
        return columns if self.keep_R is None else tuple(column[self.keep_R] for column in columns)

    @cached_property
    def order(self) -> kernels_numpy.Order | None:
        """How the tokens follow each other within their sequences, where that was asked for."""
        if self.sequence_T is None or self.position_T is None:
            return None
        return kernels_numpy.order_of(self.document_T, self.sequence_T, self.position_T)


def selected_tokens(
    shard: Shard, selection: Selection, stack: str = "", order: bool = False
) -> SelectedTokens:
    """Reads the tokens table of a shard and drops what the selection leaves out or the stack's
    routers do not see."""
    names = ["token_id", "document", "batch", "domain"]
    names += ["phase"] if selection.phase or stack else []
    table = shard.tokens(names + (["sequence", "position"] if order else []))
    code_T, domains = codes(table["domain"])
    keep_T = seen_T = np.ones(len(table), bool)
    if selection.domains is not None:
        keep_T = _those(domains, selection.domains)[code_T]
    if "phase" in names:
        phase_T, phases = codes(table["phase"])
        seen_T = np.array([sees(stack, phase) for phase in phases], bool)[phase_T]
        if selection.phase:
            keep_T = keep_T & _those(phases, {selection.phase})[phase_T]
    taken_T, keep_R = keep_T & seen_T, keep_T[seen_T]

    def taken(name: str) -> np.ndarray:
        return table[name].to_numpy()[taken_T]

    return SelectedTokens(
        stack,
        None if keep_R.all() else keep_R,
        len(keep_R),
        np.flatnonzero(taken_T),
        code_T[taken_T],
        domains,
        taken("document"),
        taken("token_id"),
        taken("batch"),
        taken("sequence") if order else None,
        taken("position") if order else None,
        {domains[d] for d in np.flatnonzero(np.bincount(code_T))},
    )


def _those(labels: list[str], wanted: Container[str]) -> np.ndarray:
    """Which of the labels are wanted. bool"""
    return np.array([label in wanted for label in labels], bool)


@dataclass(frozen=True)
class PreparedShard:
    """What is read of a shard once for all its routers. `part`: its counts, without those of
    routers; of each stack, the tokens selected and their rows. Empty where no token is selected."""

    shard: Shard
    part: Counts
    stacks: dict[str, tuple[SelectedTokens, kernels_numpy.TokenRows]]


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
        _count_counted(shard, selection, prepared.part)
        if windows and "windows" in wants:
            _windows_of_counted(shard, prepared.part, windows)
    else:
        chosen = selection.routers if routers is None else routers
        prepared.part.of = count_routers(prepared, chosen, kernels(fast))
    return prepared.part


def kernels(fast: bool) -> Any:
    """The module to count with."""
    if fast:
        from moe_inspect.analysis.counting import kernels_numba

        return kernels_numba
    return kernels_numpy


def prepare_shard(
    shard: Shard, selection: Selection, wants: frozenset[str], windows: Windows | None = None
) -> PreparedShard:
    sizes = (windows.tokens, windows.count) if windows else (0, 0)
    part = no_counts(shard.trace.routers, selection.routers, wants, sizes)
    part.documents = _documents(shard, selection)
    prepared = PreparedShard(shard, part, {})
    if shard.trace.counts_only:
        return prepared
    order = bool(wants & NEEDS_ORDER)
    windows = windows if "windows" in wants else None
    every = selected_tokens(shard, selection, order=order)
    part.labels = every.labels
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
        token_rows = kernels_numpy.TokenRows(
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
    routers: tuple[int, ...],
    by: Any,
    visit: Callable[[int, kernels_numpy.Slots], None] | None = None,
) -> dict[int, RouterCounts]:
    """The counts of routers of a shard, none where token ids alone are counted. `by`: the kernels.
    `visit` is given the decisions of each too."""
    part, shard, counts = prepared.part, prepared.shard, dict[int, RouterCounts]()
    for stack, (seen, token_rows) in prepared.stacks.items():
        chosen = [r for r in routers if part.routers[r].stack == stack]
        linked = chosen if "transitions" in part.wants else []
        reached = {after for r in linked if (after := part.next_router(r)) is not None}
        before: tuple[int, kernels_numpy.Slots] | None = None
        for r in sorted({*chosen, *reached}):
            slots = seen.of(shard.slots(r), r)
            if r in chosen:
                if part.wants != frozenset({"token_ids"}):
                    decisions = _decisions(shard, r, slots, seen, token_rows, by, part.wants)
                    counts[r] = count_router(decisions, part.wants)
                if visit:
                    visit(r, slots)
            if before is not None and r in reached:
                b, of_b = before
                shape = (part.routers[b].experts, part.routers[r].experts)
                counts[b].next_EN, next_first_EN = by.transitions(of_b, slots, *shape)
                ranked = part.routers[b].first_choice_known and part.routers[r].first_choice_known
                counts[b].next_first_EN = next_first_EN if ranked else None
            before = (r, slots) if r in chosen else None
    return counts


def _decisions(
    shard: Shard,
    r: int,
    slots: kernels_numpy.Slots,
    seen: SelectedTokens,
    token_rows: kernels_numpy.TokenRows,
    kernels: Any,
    wants: frozenset[str],
) -> RouterDecisions:
    trace, logits_TE = shard.trace, None

    def values(name: str, needed_by: frozenset[str]) -> kernels_numpy.Slots | None:
        if wants.isdisjoint(needed_by) or name not in trace.slot_values:
            return None
        return seen.of(shard.slot_values(r, name), r)

    if "logits" in wants and "logits" in trace.tables:
        (logits_TE,) = seen.of((shard.logits(r),), r)
    return RouterDecisions(
        trace.routers[r],
        slots,
        token_rows,
        kernels,
        weights=values("weight", NEEDS_WEIGHTS),
        norms=values("norm", NEEDS_SIZES),
        peaks=values("peak", NEEDS_SIZES),
        logits_TE=logits_TE,
        dropped=seen.of(shard.slots(r, DROPPED), r) if trace.has_dropped else None,
    )


def _occurrences(seen: SelectedTokens) -> np.ndarray:
    """int64 [V]: of each token id; a token of unknown id is −1."""
    return np.bincount(seen.token_id_T[seen.token_id_T >= 0])


def _unit(seen: SelectedTokens) -> np.ndarray:
    return seen.domain_T.astype(np.int64) * CLUSTERS + seen.document_T % CLUSTERS


def _count_counted(shard: Shard, selection: Selection, part: Counts) -> None:
    """The shard of a counts-only trace: sums by domain, no documents to tell apart."""
    table = shard.counts()
    code, domains = codes(table["domain"])
    part.labels, part.counts_only = {domains[d] for d in np.unique(code)}, True
    wanted = part.labels & (selection.domains or part.labels)
    kept = [d for d, domain in enumerate(domains) if domain in wanted]
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
    tokens_SD = _tokens_counted(shard, table, code, len(domains))
    part.tokens_U = np.sum([tokens_D[kept] for tokens_D in tokens_SD.values()], axis=0)
    part.tokens_SU = {s: tokens_D[kept] for s, tokens_D in tokens_SD.items() if s in part.tokens_SU}
    for r, counts in part.of.items():
        slots = part.tokens_of(r) * part.routers[r].top_k
        counts.null_slots = slots - int(counts.assignments_UE.sum())


def _tokens_counted(
    shard: Shard, table: Any, code: np.ndarray, domains: int
) -> dict[str, np.ndarray]:
    """The tokens of each domain of a counts-only shard, by stack, int64 [D]. The shard states their
    sum; counts tell how they divide: a token may have no first choice at one router, but at
    another, so that the router that missed fewest tells the most."""
    router, first = table["router"].to_numpy(), table["first_choice"].null_count == 0
    values = table["first_choice" if first else "assignments"].to_numpy()
    least_SD = dict[str, np.ndarray]()
    for r, of in enumerate(shard.trace.routers):
        mine = router == r
        found_D = np.bincount(code[mine], values[mine], domains) / (1 if first else of.top_k)
        least_SD[of.stack] = np.maximum(least_SD.get(of.stack, 0), found_D)
    share = np.concatenate(list(least_SD.values()))
    share = share if share.any() else np.ones(len(share))
    ends = np.rint(np.cumsum(share) / share.sum() * shard.files.tokens).astype(np.int64)
    tokens = np.diff(ends, prepend=0).reshape(len(least_SD), domains)
    return dict(zip(least_SD, tokens, strict=True))


def _windows_of_counted(shard: Shard, part: Counts, windows: Windows) -> None:
    """Counts know no order within a shard: all of it is in the window in which it begins."""
    w = windows.of(shard)
    part.first_token_W[w] = shard.files.first_token
    for r, counts in part.of.items():
        counts.window_load_WE = np.zeros((windows.count, part.routers[r].experts), np.int64)
        counts.window_load_WE[w] = part.load_E(r)
        counts.window_tokens_W = np.zeros(windows.count, np.int64)
        counts.window_tokens_W[w] = part.tokens_of(r)


def _documents(shard: Shard, selection: Selection) -> int:
    """Documents that begin in this shard."""
    if selection.domains is None:
        return shard.files.rows["documents"]
    code, domains = codes(shard.table("documents", ["domain"])["domain"])
    return int(_those(domains, selection.domains)[code].sum())
