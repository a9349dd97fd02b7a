"""The routing of each token id at a router: counted in tables, and the metrics that they come to.

V token ids, X those of them that are counted by document too, E experts, T tokens of a shard, D
domains, U units (domain × cluster of documents). Metrics are of the most frequent
token ids, at least MIN_COUNT times each and no more of them than CELLS allows: what that leaves out
is `coverage`. Memory does not grow with the trace; where all token ids are listed it does with the
vocabulary.

Which token ids occur how often, and in which units, is known from the tokens alone: the rows of all
tables, and how their labels are shuffled, are settled before the first decision is read
(`plans_of`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moe_inspect.analysis.counting.count_shard import count_shard
from moe_inspect.analysis.counting.counts import Counts
from moe_inspect.analysis.counting.kernels import Slots, add_cells
from moe_inspect.analysis.counting.router_counts import ByTokenId, RouterDecisions, narrowed
from moe_inspect.analysis.counting.select import SelectedTokens, Selection, selected_tokens
from moe_inspect.analysis.metrics import specialization as sp
from moe_inspect.analysis.metrics.chance import shuffled_p, shuffled_within
from moe_inspect.analysis.metrics.specialization import Expected, Moved
from moe_inspect.analysis.metrics.uncertainty import SEED
from moe_inspect.analysis.tasks import by_shard
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.schema import Router
from moe_inspect.trace.shard import Shard

# the types of counts, and what each holds less than: a row has the narrowest that surely holds it
WIDTHS = {np.uint32: 2**32, np.uint16: 2**16, np.uint8: 2**8}
MIN_COUNT = 8  # occurrences from which the routing of a token id can be told from chance
CELLS = 2**24  # of a table by token id and expert, or by token id and unit
# of the token ids, where there are few tokens; over many, one hardly differs from the next
SHUFFLES = 5
SHORT = 100_000  # tokens
# clusters of documents per domain: the most that let every token id in
UNIT_CLUSTERS = (127, 61, 31, 17)


@dataclass(frozen=True)
class TokenIds:
    """Some token ids, those whose assignments take wider counts first, then by id. `row_of[id]` is
    the row of a token id among them, −1 where it is left out; occurrences_V: of each, in the
    selected tokens; `coverage`: the share of the selected tokens they are; `sizes`: how many take
    each of WIDTHS."""

    ids_V: np.ndarray
    occurrences_V: np.ndarray
    row_of: np.ndarray
    coverage: float
    sizes: np.ndarray

    def rows(self, token_id_T: np.ndarray) -> np.ndarray:
        return self.row_of[np.minimum(token_id_T, len(self.row_of) - 1)]  # -1 is the last too


def frequent(counts: Counts, min_count: int, most: int, router: int | None = None) -> TokenIds:
    """The token ids that occur at least `min_count` times, the `most` most frequent of them; among
    the tokens a router saw, or all."""
    occurrences = counts.token_ids_V if router is None else counts.token_ids_V_of(router)
    tokens = counts.tokens if router is None else counts.tokens_of(router)
    ids_V = np.flatnonzero(occurrences >= max(min_count, 1))
    if len(ids_V) > most:
        ids_V = np.sort(ids_V[np.argsort(-occurrences[ids_V], kind="stable")[:most]])
    top_k = max(counts.routers[r].top_k for r in counts.indices)
    # a damaged decision may name one expert k times
    most_V, (_, *limits) = occurrences[ids_V] * top_k, WIDTHS.values()
    width_V = np.sum([most_V < limit for limit in limits], axis=0)
    ids_V = ids_V[np.argsort(width_V, kind="stable")]
    row_of = np.full(len(occurrences) + 1, -1, np.int32)  # the last is for what is no token id
    row_of[ids_V] = np.arange(len(ids_V))
    coverage = float(occurrences[ids_V].sum() / max(tokens, 1))
    sizes = np.bincount(width_V, minlength=len(WIDTHS))
    return TokenIds(ids_V, occurrences[ids_V], row_of, coverage, sizes)


def unit_ids_of(counts: Counts, router: int | None = None) -> tuple[TokenIds, int]:
    """The token ids that are counted by document too, and the clusters of documents per domain."""
    occurrences = counts.token_ids_V if router is None else counts.token_ids_V_of(router)
    D, frequent_enough = len(counts.domains), int((occurrences >= MIN_COUNT).sum())
    fitting = [c for c in UNIT_CLUSTERS if frequent_enough * D * c <= CELLS]
    clusters = fitting[0] if fitting else UNIT_CLUSTERS[-1]
    return frequent(counts, MIN_COUNT, max(1, CELLS // (D * clusters)), router), clusters


# --- before the decisions are read


@dataclass(frozen=True)
class TokenIdPlan:
    """What is counted by token id at the routers of one stack. `listed`: the token ids of the
    tables; `judged`: those of them that metrics are of; `in_units`: those of these whose tokens are
    counted by document too. tokens_XU: how often each of these occurs in each unit."""

    listed: TokenIds
    judged: TokenIds
    in_units: TokenIds
    shuffles: int
    domains: list[str]
    clusters: int
    tokens_XU: np.ndarray

    @cached_property
    def there_U(self) -> np.ndarray:
        """Which units have any of these token ids."""
        return self.tokens_XU.sum(0) > 0

    @property
    def units(self) -> int:
        return int(self.there_U.sum())

    @cached_property
    def moved(self) -> Moved:
        domain_U = np.repeat(np.arange(len(self.domains)), self.clusters)
        return Moved.of(self.tokens_XU[:, self.there_U], domain_U[self.there_U])

    def bytes(self, E: int) -> int:
        """Bytes of the tables of one router."""
        rows = 2 * (self.listed.sizes + self.shuffles * self.judged.sizes)
        rows[0] += self.units
        return int(rows @ [np.dtype(width).itemsize for width in WIDTHS]) * (E + 1)


def plans_of(trace: Trace, selection: Selection, every: bool) -> dict[str, TokenIdPlan]:
    """Reads the tokens, no decisions. `every`: lists every token id that occurs. By stack."""
    counts = Counts(trace.routers, selection.routers)
    for part in by_shard(trace, "reading tokens", _tokens_of, selection):
        counts.add(part)
    first_of = {trace.routers[r].stack: r for r in reversed(selection.routers)}
    return {stack: _plan(trace, selection, counts, r, every) for stack, r in first_of.items()}


def _tokens_of(shard: Shard, selection: Selection) -> Counts:
    return count_shard(shard, selection, frozenset(), routers=())


def _plan(
    trace: Trace, selection: Selection, counts: Counts, router: int, every: bool
) -> TokenIdPlan:
    widest = max(trace.routers[r].experts for r in selection.routers)
    judged = frequent(counts, MIN_COUNT, CELLS // widest, router)
    listed = frequent(counts, 1, len(counts.token_ids_V_of(router)), router) if every else judged
    none = frequent(counts, MIN_COUNT, 0, router), 0
    in_units, clusters = unit_ids_of(counts, router) if len(counts.domains) > 1 else none
    tokens_XU = np.zeros((len(in_units.ids_V), len(counts.domains) * clusters), np.int32)
    asked = selection, trace.routers[router].stack, in_units, counts.domains, clusters
    for cells, tokens in by_shard(trace, None, _cells, *asked) if tokens_XU.size else ():
        tokens_XU.reshape(-1)[cells] += tokens
    shuffles = SHUFFLES if counts.tokens < SHORT else 1
    return TokenIdPlan(listed, judged, in_units, shuffles, counts.domains, clusters, tokens_XU)


def _cells(
    shard: Shard,
    selection: Selection,
    stack: str,
    in_units: TokenIds,
    domains: list[str],
    clusters: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The cells of tokens_XU that a shard has tokens of, ascending, and how many."""
    seen = selected_tokens(shard, selection, stack)
    row_T, unit_T = in_units.rows(seen.token_id_T), _units(seen, domains, clusters)
    return np.unique((row_T * (len(domains) * clusters) + unit_T)[row_T >= 0], return_counts=True)


def _units(seen: SelectedTokens, domains: list[str], clusters: int) -> np.ndarray:
    """The unit of each token: its domain, as a row of `domains`, and cluster of documents."""
    code = {domain: d for d, domain in enumerate(domains)}
    row_D = np.array([code.get(domain, 0) for domain in seen.domains], np.int64)
    return row_D[seen.domain_T] * clusters + seen.document_T % max(clusters, 1)


# --- while they are


# token indices in the order of their rows in a table, and these rows: one table for each of WIDTHS
Visits = list[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class ShardRows:
    """Rows of a shard's tokens in the tables of any router of a stack. `unit_T`: None if no token
    id is counted by unit; −1 for the token ids that are not."""

    by_id: Visits
    unit_T: np.ndarray | None
    shuffled_ids: list[Visits]


def rows_of(shard: Shard, seen: SelectedTokens, plan: TokenIdPlan) -> ShardRows:
    """The rows of a shard's tokens in the tables of any router of a stack."""
    listed_T = plan.listed.rows(seen.token_id_T)
    judged_T = listed_T if plan.judged is plan.listed else plan.judged.rows(seen.token_id_T)
    unit_T = None
    if plan.tokens_XU.size:
        row_U = np.append(np.cumsum(plan.there_U) - 1, -1)  # the last: in no unit
        in_unit_T = plan.in_units.rows(seen.token_id_T) >= 0
        unit_T = row_U[np.where(in_unit_T, _units(seen, plan.domains, plan.clusters), -1)]
    # one order for all routers and for a whole decision: its k distinct experts stay together
    rng = np.random.default_rng([SEED, shard.files.rank, shard.files.index])
    orders = [shuffled_within(seen.document_T, rng) for _ in range(plan.shuffles)]
    return ShardRows(
        _visits(listed_T, plan.listed.sizes),
        unit_T,
        [_visits(judged_T[order_T], plan.judged.sizes) for order_T in orders],
    )


def _visits(row_T: np.ndarray, sizes: np.ndarray) -> Visits:
    """Sort tokens by their rows, so that a row stays in the nearest cache; tokens of row −1 are
    left out. `sizes`: rows of each of WIDTHS."""
    # numpy sorts 16 bits by radix
    key_T = (row_T + 1).astype(np.uint16) if sizes.sum() < 2**16 else row_T
    by_N = np.argsort(key_T, kind="stable")[int((row_T < 0).sum()) :]
    row_N, before = row_T[by_N].astype(np.intp), np.cumsum(sizes) - sizes
    starts = [*np.searchsorted(row_N, before), len(row_N)]
    parts = zip(map(slice, starts, starts[1:]), before, strict=True)
    return [(by_N[part], row_N[part] - first) for part, first in parts]


class Counters:
    """Assignments by row and expert and, where they are known and asked for, first choices. A table
    for each of WIDTHS, of so many rows (`sizes`); a column more than there are experts takes what
    routed nowhere."""

    def __init__(self, sizes: np.ndarray, experts: int, first: bool):
        shapes = [((n, experts + 1), width) for n, width in zip(sizes, WIDTHS, strict=True)]
        self._any = [np.zeros(*shape) for shape in shapes]
        self._first = [np.zeros(*shape) if first else None for shape in shapes]

    def add(self, visits: Visits, slots: Slots) -> None:
        for any_XE, first_XE, (by_N, row_N) in zip(self._any, self._first, visits, strict=True):
            chosen = tuple(slot_T.take(by_N) for slot_T in slots)
            add_cells(any_XE, row_N, chosen)
            if first_XE is not None:
                add_cells(first_XE, row_N, chosen[:1])

    @property
    def any_XE(self) -> np.ndarray:
        """uint32"""
        return np.concatenate([any_XE[:, :-1] for any_XE in self._any], dtype=np.uint32)

    @property
    def first_XE(self) -> np.ndarray | None:
        """uint32; None where they are not counted."""
        known = [first_XE[:, :-1] for first_XE in self._first if first_XE is not None]
        return np.concatenate(known, dtype=np.uint32) if known else None


class TokenTables:
    """The tables of one router: assignments by token id with first choices, by unit, and by token
    id with these shuffled."""

    def __init__(self, plan: TokenIdPlan, router: Router):
        self.plan, E, first = plan, router.experts, router.first_choice_known
        self.by_id = Counters(plan.listed.sizes, E, first)
        self.by_unit_UE = np.zeros((plan.units, E), np.uint32)
        self.shuffled_ids = [Counters(plan.judged.sizes, E, first) for _ in range(plan.shuffles)]

    def add(self, rows: ShardRows, decisions: RouterDecisions) -> None:
        """Counts the decisions of a shard."""
        self.by_id.add(rows.by_id, decisions.slots)
        if rows.unit_T is not None:
            self.by_unit_UE += decisions.loads["id_unit"].astype(np.uint32)
        for counters, visits in zip(self.shuffled_ids, rows.shuffled_ids, strict=True):
            counters.add(visits, decisions.slots)


ROUNDING = np.float32(1e-6)


def by_token_id(tables: TokenTables, top: int) -> ByTokenId:
    """What the tables of a router come to. `top`: token ids per expert, 0 for all."""
    plan, listed = tables.plan, tables.plan.listed
    any_VE, first_VE = tables.by_id.any_XE, tables.by_id.first_XE
    judged = slice(None) if plan.judged is listed else listed.rows(plan.judged.ids_V)
    columns = _columns(tables, any_VE[judged], None if first_VE is None else first_VE[judged])
    expert_N, row_N = top_token_ids(any_VE, listed, top)
    expected = None
    if plan.tokens_XU.size:  # several domains, and ids frequent enough
        load_UE, rows_X = tables.by_unit_UE, listed.rows(plan.in_units.ids_V)
        expected = Expected.of(load_UE, any_VE[rows_X], plan.moved)
    return ByTokenId(
        columns,
        expected,
        narrowed(expert_N),
        narrowed(listed.ids_V[row_N]),
        narrowed(any_VE[row_N, expert_N]),
        None if first_VE is None else narrowed(first_VE[row_N, expert_N]),
        narrowed(listed.occurrences_V[row_N]),
    )


def _columns(
    tables: TokenTables, any_VE: np.ndarray, first_VE: np.ndarray | None
) -> dict[str, float]:
    """The metrics of token ids, each beside its mean with the token ids shuffled."""
    occurrences_V = tables.plan.judged.occurrences_V
    shuffled_any = [shuffled.any_XE for shuffled in tables.shuffled_ids]
    columns = {
        "token_mi_bits": sp.token_mi_bits(any_VE),
        "token_mi_null_bits": float(np.mean([*map(sp.token_mi_bits, shuffled_any)])),
    }
    if first_VE is not None:
        firsts = [of.first_XE for of in tables.shuffled_ids]
        null_R = [sp.vocabulary_specialization(of_VE) for of_VE in firsts if of_VE is not None]
        found, occurrences = sp.vocabulary_specialization(first_VE), int(occurrences_V.sum())
        columns["vocabulary_specialization"] = found
        columns["vocabulary_specialization_null"] = float(np.mean(null_R))
        columns["vocabulary_specialization_p"] = shuffled_p(found, null_R, occurrences)
    return columns


def top_token_ids(any_VE: np.ndarray, listed: TokenIds, top: int) -> tuple[np.ndarray, np.ndarray]:
    """The `top` token ids of each expert by the fraction of their occurrences that goes to it, then
    by count, then by id, highest first; 0: all that ever went there. Returns (expert, row), expert
    by expert."""
    (V, E), occurrences_V = any_VE.shape, listed.occurrences_V
    share_VE = any_VE.astype(np.float32) * (1 / occurrences_V).astype(np.float32)[:, None]
    least_E, blocks = np.float32(0), 8 * top
    if 0 < 2 * blocks < V:
        # of the largest shares of blocks of token ids, `top` are no less than the one at this rank
        highest_BE = share_VE[: V - V % blocks].reshape(blocks, -1, E).max(1)
        least_E = np.partition(highest_BE, -top, axis=0)[-top] * (1 - ROUNDING)
    row_N, expert_N = np.divmod(np.flatnonzero((share_VE >= least_E) & (any_VE > 0)), E)
    count_N = any_VE[row_N, expert_N]
    fraction_N = np.minimum(count_N / occurrences_V[row_N], 1)
    order_N = np.lexsort((-listed.ids_V[row_N], -count_N.astype(np.int64), -fraction_N, expert_N))
    row_N, expert_N = row_N[order_N], expert_N[order_N]
    rank_N = np.arange(len(expert_N)) - np.searchsorted(expert_N, expert_N)
    kept_N = rank_N < (top or V)
    return expert_N[kept_N], row_N[kept_N]
