"""The second pass, for what needs token ids: tables by token id, as many routers at a time as fit
in memory.

V token ids, E experts, K slots, T tokens of a shard, U units (domain × cluster of documents), P
occupied (token id, unit) pairs. Only the most frequent token ids are counted, at least `min_count`
times each and no more of them than CELLS allows: what that leaves out is `coverage`. Memory does
not grow with the trace; with `most` it does with the vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from moe_inspect.analysis.counting.count_shard import selected_tokens
from moe_inspect.analysis.counting.counts import Counts
from moe_inspect.analysis.counting.engine import is_long
from moe_inspect.analysis.counting.kernels_numpy import Slots
from moe_inspect.analysis.counting.select import Selection
from moe_inspect.analysis.metrics import specialization
from moe_inspect.analysis.metrics.uncertainty import SEED
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.shard import Shard

MIN_COUNT = 8  # occurrences from which the routing of a token id can be told from chance
CELLS = 2**24  # of one table; all tables of a group of routers hold a few times as many
SHUFFLES = (
    5  # of the token ids, where there are few tokens; over many, one hardly differs from the next
)
SHORT = 100_000  # tokens
UNIT_CLUSTERS = (
    127,
    61,
    31,
    17,
)  # clusters of documents per domain: the most that let every token id in


@dataclass(frozen=True)
class TokenIds:
    """Which token ids are counted. `row_of[id]` is the row of a token id in the tables, −1 where it
    is left out;
    occurrences_V: of each, in the selected tokens; `coverage`: the share of the selected tokens
    they are."""

    ids_V: np.ndarray
    occurrences_V: np.ndarray
    row_of: np.ndarray
    coverage: float

    def rows(self, token_id_T: np.ndarray) -> np.ndarray:
        known_T = (token_id_T >= 0) & (token_id_T < len(self.row_of))
        return np.where(known_T, self.row_of[np.where(known_T, token_id_T, 0)], -1)


def frequent(counts: Counts, min_count: int, most: int, router: int | None = None) -> TokenIds:
    """The token ids that occur at least `min_count` times, the `most` most frequent of them; among
    the tokens a router saw, or all."""
    occurrences = counts.token_ids_V if router is None else counts.token_ids_V_of(router)
    tokens = counts.tokens if router is None else counts.tokens_of(router)
    ids_V = np.flatnonzero(occurrences >= max(min_count, 1))
    if len(ids_V) > most:
        ids_V = np.sort(ids_V[np.argsort(-occurrences[ids_V], kind="stable")[:most]])
    row_of = np.full(max(len(occurrences), 1), -1, np.int64)
    row_of[ids_V] = np.arange(len(ids_V))
    return TokenIds(
        ids_V, occurrences[ids_V], row_of, float(occurrences[ids_V].sum() / max(tokens, 1))
    )


@dataclass
class TokenTables:
    """The tables of one router, uint32. any_VE counts assignments, first_VE first choices (None:
    unknown). With `nulls`: the same with the token ids shuffled within each shard, and any_PE, by
    (token id, unit), with its coordinates."""

    router: int
    token_ids: TokenIds
    any_VE: np.ndarray
    first_VE: np.ndarray | None
    shuffled_any: list[np.ndarray]
    shuffled_first: list[np.ndarray]
    pair_ids: TokenIds | None = None
    by_unit: np.ndarray | None = None  # [pair ids, units, E]
    clusters: int = 0

    def pairs(self, domains: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The occupied (token id, unit) pairs: counts_PE, token_P, domain_P; rows of a token id lie
        together."""
        assert self.by_unit is not None
        token_P, unit_P = np.nonzero(self.by_unit.any(2))
        return self.by_unit[token_P, unit_P].astype(np.int64), token_P, unit_P // self.clusters


def by_token_id(
    trace: Trace,
    selection: Selection,
    counts: Counts,
    *,
    nulls: bool,
    min_count: int = MIN_COUNT,
    most: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[TokenTables]:
    """The tables of every router selected, in order. `most`: how many token ids, by default what
    CELLS allows."""
    widest = max(trace.routers[r].experts for r in selection.routers)
    shuffles = 0 if not nulls else SHUFFLES if counts.tokens < SHORT else 1
    accumulate = _accumulate
    if is_long(trace, selection):
        from moe_inspect.analysis.counting.kernels_numba import accumulate
    for stack, alike in itertools.groupby(selection.routers, lambda r: trace.routers[r].stack):
        routers = list(alike)
        token_ids = frequent(
            counts, min_count, CELLS // widest if most is None else most, routers[0]
        )
        pair_ids, clusters = (
            (None, 0)
            if not nulls or len(counts.domains) < 2
            else pair_ids_of(counts, widest, routers[0])
        )
        cells = len(token_ids.ids_V) * widest * (2 + 2 * shuffles)
        cells += len(pair_ids.ids_V) * len(counts.domains) * clusters * widest if pair_ids else 0
        at_once = max(1, 2 * CELLS // max(cells, 1))
        for start in range(0, len(routers), at_once):
            group = routers[start : start + at_once]
            tables = [
                _empty(trace, r, token_ids, pair_ids, clusters, len(counts.domains), shuffles)
                for r in group
            ]
            for shard in trace.shards:
                _count_shard(shard, selection, stack, counts, tables, accumulate)
                if progress:
                    progress(shard.files.tokens * len(group))
            yield from tables


def pair_ids_of(counts: Counts, E: int, router: int | None = None) -> tuple[TokenIds, int]:
    occurrences = counts.token_ids_V if router is None else counts.token_ids_V_of(router)
    D, frequent_enough = len(counts.domains), int((occurrences >= MIN_COUNT).sum())
    fitting = [c for c in UNIT_CLUSTERS if frequent_enough * D * c * E <= CELLS]
    clusters = fitting[0] if fitting else UNIT_CLUSTERS[-1]
    return frequent(counts, MIN_COUNT, max(1, CELLS // (D * clusters * E)), router), clusters


def _empty(
    trace: Trace,
    router: int,
    token_ids: TokenIds,
    pair_ids: TokenIds | None,
    clusters: int,
    D: int,
    shuffles: int,
) -> TokenTables:
    V, E = len(token_ids.ids_V), trace.routers[router].experts

    def table(rows: int = V) -> np.ndarray:
        return np.zeros((rows, E), np.uint32)

    ranked = trace.routers[router].first_choice_known
    shuffled_any, shuffled_first = (
        [table() for _ in range(n)] for n in (shuffles, shuffles if ranked else 0)
    )
    tables = TokenTables(
        router, token_ids, table(), table() if ranked else None, shuffled_any, shuffled_first
    )
    if pair_ids is not None:
        tables.pair_ids, tables.clusters = pair_ids, clusters
        tables.by_unit = np.zeros((len(pair_ids.ids_V), D * clusters, E), np.uint32)
    return tables


def _count_shard(
    shard: Shard,
    selection: Selection,
    stack: str,
    counts: Counts,
    group: list[TokenTables],
    accumulate: Callable[..., None],
) -> None:
    chosen = selected_tokens(shard, selection, stack)
    if not len(chosen.domain_T):
        return
    row_T = group[0].token_ids.rows(chosen.token_id_T)
    # one order for all routers and for a whole decision: its k distinct experts stay together
    rng = np.random.default_rng([SEED, shard.files.rank, shard.files.index])
    shuffled = [row_T[rng.permutation(len(row_T))] for _ in group[0].shuffled_any]
    pair_row_T = None
    if (pair_ids := group[0].pair_ids) is not None:
        clusters = group[0].clusters
        code = {domain: d for d, domain in enumerate(counts.domains)}
        domain_T = np.array([code.get(domain, 0) for domain in chosen.domains])[chosen.domain_T]
        kept_T = pair_ids.rows(chosen.token_id_T)
        unit_T = domain_T * clusters + chosen.document_T % clusters
        pair_row_T = np.where(kept_T >= 0, kept_T * len(counts.domains) * clusters + unit_T, -1)
    for tables in group:
        slots = chosen.of(shard.slots(tables.router), tables.router)
        accumulate(tables.any_VE, row_T, slots)
        for any_VE, order_T in zip(tables.shuffled_any, shuffled, strict=True):
            accumulate(any_VE, order_T, slots)
        if tables.first_VE is not None:
            accumulate(tables.first_VE, row_T, slots[:1])
            for first_VE, order_T in zip(tables.shuffled_first, shuffled, strict=True):
                accumulate(first_VE, order_T, slots[:1])
        if tables.by_unit is not None and pair_row_T is not None:
            accumulate(tables.by_unit.reshape(-1, tables.by_unit.shape[-1]), pair_row_T, slots)


def _accumulate(table: np.ndarray, row_T: np.ndarray, slots: Slots) -> None:
    """table[row, expert] += 1 for every slot of every token, but where the row is −1 or the slot
    routed nowhere."""
    E, ids_KT = table.shape[1], np.stack(slots)
    cell = (row_T * E + ids_KT)[(row_T >= 0) & (ids_KT < E)]
    flat = table.reshape(-1)
    if len(flat) <= 2 * len(cell):
        flat += np.bincount(cell, minlength=len(flat)).astype(np.uint32)
    else:  # a table larger than what is added to it is not gone through
        np.add.at(flat, cell, np.uint32(1))


def token_mi(tables: TokenTables) -> tuple[float, float]:
    """I(token id; expert) in bits over the token ids counted, and its mean with the token ids
    shuffled."""
    null = [specialization.token_mi_bits(any_VE) for any_VE in tables.shuffled_any]
    return specialization.token_mi_bits(tables.any_VE), float(np.mean(null))


def top_token_ids(tables: TokenTables, top: int) -> tuple[np.ndarray, np.ndarray]:
    """The `top` token ids of each expert by the fraction of their occurrences that goes to it, then
    by count; 0: all that ever went there. Returns (expert, row in the tables), expert by expert."""
    V, E = tables.any_VE.shape
    if not V:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    fraction_VE = np.minimum(tables.any_VE / tables.token_ids.occurrences_V[:, None], 1)
    rank_VE = (fraction_VE * 2**31).astype(np.uint64) << np.uint64(32) | tables.any_VE
    n = min(top, V) if top else V
    rows_NE = (
        np.argpartition(rank_VE, V - n, axis=0)[V - n :]
        if n < V
        else np.broadcast_to(np.arange(V)[:, None], (V, E))
    )
    order_NE = np.argsort(np.take_along_axis(rank_VE, rows_NE, 0), axis=0, kind="stable")[::-1]
    rows_EN = np.take_along_axis(rows_NE, order_NE, 0).T
    expert_EN = np.broadcast_to(np.arange(E)[:, None], rows_EN.shape)
    there_EN = tables.any_VE[rows_EN, expert_EN] > 0
    return expert_EN[there_EN], rows_EN[there_EN]
