"""The one pass over the rows of a trace: counts that merge by addition.

L routers, E experts, K slots, T tokens of a shard, D domains, U units (clusters of documents), B batches.
Memory is set by routers, experts, domains and vocabulary, never by the length of the trace: documents are kept apart only
as CLUSTERS clusters a domain, which is enough for the bootstrap and for permuting document labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from moe_inspect.analysis.select import Selection
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.reader import Shard, Trace
from moe_inspect.trace.schema import Router

CLUSTERS = 127  # a domain; a prime, so that neither consecutive ids nor ids in strides pile up in a few clusters


@dataclass
class RouterCounts:
    """The counts of one router. assignments_UE, first_choice_DE: int64, weight_sum_DE: float64 (None without weights)."""

    assignments_UE: np.ndarray
    first_choice_DE: np.ndarray
    weight_sum_DE: np.ndarray | None
    null_slots: int = 0


@dataclass
class Counts:
    """What one shard, or any number of them together, comes to.

    A unit is (domain, cluster of documents); rows of `assignments_UE` follow `units`, rows of `first_choice_DE` follow
    `domains`, both sorted once anything has been added, so that the order of shards shows nowhere. `batches[T]` holds, for the batches of T tokens, how many there were and the
    sum over them of each router's max_vio. `token_ids_V[i]` counts the occurrences of token id i."""

    routers: list[Router]
    indices: tuple[int, ...]
    domains: list[str] = field(default_factory=list)
    units: list[tuple[str, int]] = field(default_factory=list)
    tokens_U: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    of: dict[int, RouterCounts] = field(default_factory=dict)
    batches: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict)
    token_ids_V: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    labels: set[str] = field(default_factory=set)
    documents: int = 0
    counts_only: bool = False

    def __post_init__(self) -> None:
        for r in self.indices:
            nothing = np.zeros((0, self.routers[r].experts))
            self.of.setdefault(r, RouterCounts(nothing.astype(np.int64), nothing.astype(np.int64), nothing))

    def add(self, other: Counts) -> Counts:
        """Adds `other` in place. Addition is associative and commutative."""
        domains, units = sorted({*self.domains, *other.domains}), sorted({*self.units, *other.units})
        domain_rows, unit_rows = _rows(self.domains, other.domains, domains), _rows(self.units, other.units, units)
        self.domains, self.units = domains, units
        self.tokens_U = _added(self.tokens_U, other.tokens_U, unit_rows)
        for r, mine in self.of.items():
            theirs = other.of[r]
            mine.assignments_UE = _added(mine.assignments_UE, theirs.assignments_UE, unit_rows)
            mine.first_choice_DE = _added(mine.first_choice_DE, theirs.first_choice_DE, domain_rows)
            if mine.weight_sum_DE is None or theirs.weight_sum_DE is None:
                mine.weight_sum_DE = None
            else:
                mine.weight_sum_DE = _added(mine.weight_sum_DE, theirs.weight_sum_DE, domain_rows)
            mine.null_slots += theirs.null_slots
        for size, (n, max_vio_L) in other.batches.items():
            before, sum_L = self.batches.get(size, (0, 0.0))
            self.batches[size] = (before + n, sum_L + max_vio_L)
        V = max(len(self.token_ids_V), len(other.token_ids_V))
        self.token_ids_V = _padded(self.token_ids_V, V) + _padded(other.token_ids_V, V)
        self.labels |= other.labels
        self.documents += other.documents
        self.counts_only |= other.counts_only
        return self

    @property
    def tokens(self) -> int:
        return int(self.tokens_U.sum())

    @property
    def domain_of_unit_U(self) -> np.ndarray:
        code = {domain: d for d, domain in enumerate(self.domains)}
        return np.array([code[domain] for domain, _ in self.units], np.int64)

    @property
    def tokens_D(self) -> np.ndarray:
        return np.bincount(self.domain_of_unit_U, self.tokens_U, len(self.domains)).astype(np.int64)

    def assignments_DE(self, router: int) -> np.ndarray:
        """int64 [D, E]"""
        return _by_domain(self.of[router].assignments_UE, self.domain_of_unit_U, len(self.domains))

    def load_E(self, router: int) -> np.ndarray:
        """int64 [E]: assignments of each expert, all domains."""
        return self.of[router].assignments_UE.sum(0)

    def first_choice_E(self, router: int) -> np.ndarray:
        return self.of[router].first_choice_DE.sum(0)

    def weight_sum_E(self, router: int) -> np.ndarray:
        """float64 [E]; NaN where the trace holds no weights."""
        sums_DE = self.of[router].weight_sum_DE
        return np.full(self.routers[router].experts, np.nan) if sums_DE is None else sums_DE.sum(0)


def merge(parts: Iterable[Counts]) -> Counts:
    """The sum of counts of the same selection; the parts stay as they are."""
    total: Counts | None = None
    for part in parts:
        total = (Counts(part.routers, part.indices) if total is None else total).add(part)
    assert total is not None, "nothing to merge"
    return total


def count(trace: Trace, selection: Selection, progress: Callable[[int], None] | None = None) -> Counts:
    """The pass. MoeInspectError where the selection holds no token, naming what there is. `progress` is told of the
    decisions of every shard done."""
    total = Counts(trace.routers, selection.routers)
    for shard in trace.shards:
        total.add(count_shard(shard, selection))
        if progress:
            progress(shard.files.tokens * len(selection.routers))
    missing = (selection.domains or set()) - total.labels
    if missing:
        raise MoeInspectError(f"no domain {', '.join(sorted(missing))} in {trace.path}: it has {', '.join(sorted(total.labels))}")
    if not total.tokens:
        asked = f" of phase {selection.phase}" if selection.phase else ""
        raise MoeInspectError(f"{trace.path} holds no tokens{asked}" + ("" if trace.n_tokens else " yet: nothing is committed"))
    return total


def count_shard(shard: Shard, selection: Selection) -> Counts:
    """The counts of one shard: what `count` adds up."""
    return _count_counted(shard, selection) if shard.trace.counts_only else _count_routed(shard, selection)


@dataclass(frozen=True)
class SelectedTokens:
    """The tokens of a shard that the selection takes. `keep_T` is None where it takes all; the other arrays are of the
    tokens kept."""

    keep_T: np.ndarray | None
    rows: int
    domain_T: np.ndarray
    domains: list[str]
    document_T: np.ndarray
    token_id_T: np.ndarray
    batch_T: np.ndarray
    labels: set[str]

    def of(self, values_TK: np.ndarray, router: int) -> np.ndarray:
        """The decisions of the tokens kept."""
        if len(values_TK) != self.rows:
            raise MoeInspectError(f"damaged trace: router {router} has {len(values_TK)} decisions in a shard of {self.rows} tokens")
        return values_TK if self.keep_T is None else values_TK[self.keep_T]


def selected_tokens(shard: Shard, selection: Selection) -> SelectedTokens:
    """Reads the tokens table of a shard and drops what the selection leaves out."""
    names = ["token_id", "document", "batch", "domain"] + (["phase"] if selection.phase else [])
    table = shard.tokens(names)
    code_T, domains = _codes(table["domain"])
    labels = {domains[d] for d in np.unique(code_T)}
    keep_T = None
    if selection.domains is not None:
        keep_T = np.isin(code_T, [d for d, domain in enumerate(domains) if domain in selection.domains])
    if selection.phase:
        phase_T, phases = _codes(table["phase"])
        match_T = np.isin(phase_T, [p for p, phase in enumerate(phases) if phase == selection.phase])
        keep_T = match_T if keep_T is None else keep_T & match_T
    kept = [v if keep_T is None else v[keep_T] for v in (code_T, *(table[n].to_numpy() for n in ("document", "token_id", "batch")))]
    domain_T, document_T, token_id_T, batch_T = kept
    return SelectedTokens(keep_T, len(table), domain_T, domains, document_T, token_id_T, batch_T, labels)


def _count_routed(shard: Shard, selection: Selection) -> Counts:
    trace = shard.trace
    chosen = selected_tokens(shard, selection)
    part = Counts(trace.routers, selection.routers, labels=chosen.labels)
    part.documents = _documents(shard, selection)
    T = len(chosen.domain_T)
    if T == 0:
        return part
    key_U, unit_T, part.tokens_U = np.unique(
        chosen.domain_T.astype(np.int64) * CLUSTERS + chosen.document_T % CLUSTERS, return_inverse=True, return_counts=True
    )
    part.units = [(chosen.domains[key // CLUSTERS], int(key % CLUSTERS)) for key in key_U]
    domain_U, domain_of_U = np.unique(key_U // CLUSTERS, return_inverse=True)
    part.domains = [chosen.domains[d] for d in domain_U]
    domain_T, D, U = domain_of_U[unit_T], len(domain_U), len(key_U)
    batch_B, batch_of_T, size_B = np.unique(chosen.batch_T, return_inverse=True, return_counts=True)
    max_vio_LB = np.zeros((len(selection.routers), len(batch_B)))
    for row, r in enumerate(selection.routers):
        E = trace.routers[r].experts
        ids_TK = chosen.of(shard.ids(r), r)
        weights_TK = chosen.of(shard.weights(r), r) if trace.has_weights else None
        cell_N, there_TK = _cells(unit_T, ids_TK, E, r)
        assignments_UE = np.bincount(cell_N, minlength=U * E).reshape(U, E)
        first_choice_DE = np.bincount(_cells(domain_T, ids_TK[:, :1], E, r)[0], minlength=D * E).reshape(D, E)
        sums_DE = None
        if weights_TK is not None:
            weights_N = weights_TK.T[there_TK.T] if there_TK is not None else weights_TK.T.reshape(-1)
            sums_DE = _by_domain(np.bincount(cell_N, weights_N, U * E).reshape(U, E), domain_of_U, D)
        part.of[r] = RouterCounts(assignments_UE, first_choice_DE, sums_DE, ids_TK.size - len(cell_N))
        # what the batches add up to is the whole: a batch is one forward pass, and never crosses a shard
        B = len(batch_B)
        load_BE = assignments_UE.sum(0)[None] if B == 1 else np.bincount(_cells(batch_of_T, ids_TK, E, r)[0], minlength=B * E).reshape(B, E)
        total_B = load_BE.sum(1)
        max_vio_LB[row] = np.where(total_B > 0, load_BE.max(1) * E / np.maximum(total_B, 1) - 1, 0)
    for size in np.unique(size_B):
        part.batches[int(size)] = (int((size_B == size).sum()), max_vio_LB[:, size_B == size].sum(1))
    known_T = chosen.token_id_T[chosen.token_id_T >= 0]
    part.token_ids_V = np.bincount(known_T).astype(np.int64)
    return part


def _cells(row_T: np.ndarray, ids_TK: np.ndarray, E: int, router: int) -> tuple[np.ndarray, np.ndarray | None]:
    """row · E + expert of every slot that routed somewhere, slot by slot, and which those are (None: all). int64 [N]"""
    top, bottom = (int(ids_TK.max()), int(ids_TK.min())) if ids_TK.size else (0, 0)
    if top >= E:
        raise MoeInspectError(f"damaged trace: router {router} has {E} experts and an assignment to expert {top}")
    cell_KT = row_T * E + ids_TK.T
    there_TK = ids_TK >= 0 if bottom < 0 else None
    return cell_KT.reshape(-1) if there_TK is None else cell_KT[there_TK.T], there_TK


def _by_domain(values_UE: np.ndarray, domain_of_U: np.ndarray, D: int) -> np.ndarray:
    total_DE = np.zeros((D, values_UE.shape[1]), values_UE.dtype)
    np.add.at(total_DE, domain_of_U, values_UE)
    return total_DE


def _count_counted(shard: Shard, selection: Selection) -> Counts:
    """The shard of a counts-only trace: sums by domain, no documents to tell apart."""
    trace = shard.trace
    table = shard.table("counts")
    code, domains = _codes(table["domain"])
    part = Counts(trace.routers, selection.routers, labels={domains[d] for d in np.unique(code)}, counts_only=True)
    part.documents = _documents(shard, selection)
    kept = [d for d, domain in enumerate(domains) if domain in part.labels and (not selection.domains or domain in selection.domains)]
    part.domains = [domains[d] for d in kept]
    part.units = [(domain, 0) for domain in part.domains]
    row_of = {d: row for row, d in enumerate(kept)}
    router, expert = table["router"].to_numpy(), table["expert"].to_numpy()
    for r in selection.routers:
        E = trace.routers[r].experts
        mine = (router == r) & np.isin(code, kept)
        cell = np.array([row_of[d] for d in code[mine]], np.int64) * E + expert[mine]

        def summed(name: str, mine: np.ndarray = mine, cell: np.ndarray = cell, E: int = E) -> np.ndarray:
            return np.bincount(cell, table[name].to_numpy()[mine], len(kept) * E).reshape(len(kept), E)

        weight_sum_DE = summed("weight_sum") if "weight_sum" in table.column_names else None
        part.of[r] = RouterCounts(summed("assignments").astype(np.int64), summed("first_choice").astype(np.int64), weight_sum_DE)
    # every token has a first choice at some router: the router that missed fewest tells how many tokens there were
    first_LD = np.array([part.of[r].first_choice_DE.sum(1) for r in selection.routers])
    part.tokens_U = first_LD.max(0, initial=0).astype(np.int64)
    for r in selection.routers:
        part.of[r].null_slots = int(part.tokens_U.sum()) * trace.routers[r].top_k - int(part.of[r].assignments_UE.sum())
    return part


def _documents(shard: Shard, selection: Selection) -> int:
    """Documents that begin in this shard."""
    if selection.domains is None:
        return shard.files.rows["documents"]
    code, domains = _codes(shard.table("documents", ["domain"])["domain"])
    return int(np.isin(code, [d for d, domain in enumerate(domains) if domain in selection.domains]).sum())


def _codes(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """Dictionary codes and labels of a column; a label may be unused."""
    if not len(column):
        return np.zeros(0, np.int32), []
    array = column.unify_dictionaries().combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    return array.indices.to_numpy(), array.dictionary.to_pylist()


def _rows(mine: list[Any], theirs: list[Any], both: list[Any]) -> tuple[np.ndarray, np.ndarray, int]:
    """Where the rows of `mine` and of `theirs` go among `both`, and how many those are."""
    row_of = {label: row for row, label in enumerate(both)}
    return np.array([row_of[label] for label in mine], np.int64), np.array([row_of[label] for label in theirs], np.int64), len(both)


def _added(mine: np.ndarray, theirs: np.ndarray, rows: tuple[np.ndarray, np.ndarray, int]) -> np.ndarray:
    my_rows, their_rows, length = rows
    if len(mine) != length:
        mine, before = np.zeros((length, *mine.shape[1:]), mine.dtype), mine
        mine[my_rows] = before
    mine[their_rows] += theirs
    return mine


def _padded(values: np.ndarray, length: int) -> np.ndarray:
    if len(values) == length:
        return values
    return np.concatenate([values, np.zeros((length - len(values), *values.shape[1:]), values.dtype)])
