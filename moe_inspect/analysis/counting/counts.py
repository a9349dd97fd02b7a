"""What a trace comes to: counts that merge by addition.

L routers, E experts, N experts of the next router, K slots, T tokens, D domains, U units (clusters
of documents), W windows. Memory is set by routers, experts, domains and vocabulary, never by the
length of the trace: documents are kept apart only as CLUSTERS clusters per domain, which is enough
for the bootstrap and for permuting document labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from moe_inspect.analysis.counting import router_counts as rc
from moe_inspect.analysis.counting.router_counts import BASE, ByTokenId, RouterCounts
from moe_inspect.analysis.metrics.chance import FEWEST_TO_JUDGE
from moe_inspect.analysis.metrics.registry import metrics_of
from moe_inspect.analysis.metrics.uncertainty import resample_weights
from moe_inspect.trace.schema import Router

# a domain; a prime, so that neither consecutive ids nor ids in strides pile up in a few clusters
CLUSTERS = 127


@dataclass
class Counts:
    """What one shard, or any number of them together, comes to.

    A unit is (domain, cluster of documents); rows by unit follow `units`, rows by domain follow
    `domains`, both sorted once anything has been added, so that the order of shards shows nowhere.
    tokens_U: int64, the tokens of each; tokens_SU: the same by stack, where the model has two.
    token_ids_V: occurrences of each token id; token_ids_SV: by stack. `by_token_id`: of each
    router, whole traces only: it does not merge. `first_token_W`: int64, the first token of each
    window of `window_tokens` tokens, −1 for one without any. `documents_unknown`: of counts not by
    document, a unit is a domain."""

    routers: list[Router]
    indices: tuple[int, ...]
    domains: list[str] = field(default_factory=list[str])
    units: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    tokens_U: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    tokens_SU: dict[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])
    of: dict[int, RouterCounts] = field(default_factory=dict[int, RouterCounts])
    by_token_id: dict[int, ByTokenId] = field(default_factory=dict[int, ByTokenId])
    token_ids_V: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    token_ids_SV: dict[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])
    documents: int = 0
    counts_only: bool = False
    documents_unknown: bool = False
    wants: frozenset[str] = BASE
    window_tokens: int = 0
    first_token_W: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        for stack in {self.routers[r].stack for r in self.indices} - {""}:
            self.tokens_SU.setdefault(stack, np.zeros(len(self.units), np.int64))
            self.token_ids_SV.setdefault(stack, np.zeros(0, np.int64))

    def add(self, other: Counts) -> Counts:
        """Adds `other` in place. Addition is associative and commutative."""
        self.domains, by_domain = rc.rows_of_both(self.domains, other.domains)
        self.units, by_unit = rc.rows_of_both(self.units, other.units)
        self.tokens_U = by_unit(self.tokens_U, other.tokens_U)
        self.tokens_SU = {
            s: by_unit(mine_U, other.tokens_SU[s]) for s, mine_U in self.tokens_SU.items()
        }
        for r, theirs in other.of.items():
            if r not in self.of:
                sizes = {"E": self.routers[r].experts, "W": len(self.first_token_W)}
                if (after := self.next_router(r)) is not None:
                    sizes["N"] = self.routers[after].experts
                self.of[r] = RouterCounts.zero(self.wants, sizes)
            self.of[r].add(theirs, {"D": by_domain, "U": by_unit})
        self.token_ids_V = _summed(self.token_ids_V, other.token_ids_V)
        self.token_ids_SV = {
            s: _summed(mine_V, other.token_ids_SV[s]) for s, mine_V in self.token_ids_SV.items()
        }
        # −1 as uint64 is the largest of all
        self.first_token_W = np.minimum(
            self.first_token_W.astype(np.uint64), other.first_token_W.astype(np.uint64)
        ).astype(np.int64)
        self.documents += other.documents
        self.counts_only |= other.counts_only
        self.documents_unknown |= other.documents_unknown
        return self

    @property
    def tokens(self) -> int:
        return int(self.tokens_U.sum())

    @property
    def decisions(self) -> int:
        return sum(self.tokens_of(r) for r in self.indices)

    @property
    def domain_of_unit_U(self) -> np.ndarray:
        code = {domain: d for d, domain in enumerate(self.domains)}
        return np.array([code[domain] for domain, _ in self.units], np.int64)

    @property
    def documents_tell(self) -> bool:
        """Whether documents are known, and enough to tell a claim from chance."""
        return not self.documents_unknown and len(self.units) >= FEWEST_TO_JUDGE

    @property
    def weights_RU(self) -> np.ndarray | None:
        """`resample_weights` of the documents; None where they are unknown or too few."""
        return None if self.documents_unknown else resample_weights(self.domain_of_unit_U)

    @property
    def tokens_D(self) -> np.ndarray:
        return self.by_domain(self.tokens_U)

    def tokens_U_of(self, router: int) -> np.ndarray:
        """int64 [U]: the tokens the router saw; those of its stack where the model has two."""
        return self.tokens_SU.get(self.routers[router].stack, self.tokens_U)

    def tokens_D_of(self, router: int) -> np.ndarray:
        """int64 [D]"""
        return self.by_domain(self.tokens_U_of(router))

    def tokens_of(self, router: int) -> int:
        return int(self.tokens_U_of(router).sum())

    def token_ids_V_of(self, router: int) -> np.ndarray:
        """int64 [V]: the occurrences of each token id among the tokens the router saw."""
        return self.token_ids_SV.get(self.routers[router].stack, self.token_ids_V)

    def next_router(self, router: int) -> int | None:
        """The router that the same tokens reach next, selected or not; None for the last."""
        later, stack = range(router + 1, len(self.routers)), self.routers[router].stack
        return next((r for r in later if self.routers[r].stack == stack), None)

    def assignments_DE(self, router: int) -> np.ndarray:
        """int64 [D, E]"""
        return self.by_domain(self.of[router].assignments_UE)

    def by_domain(self, values_U: np.ndarray) -> np.ndarray:
        """Sums of what is known by unit: [U, …] → [D, …]"""
        total_D = np.zeros((len(self.domains), *values_U.shape[1:]), values_U.dtype)
        np.add.at(total_D, self.domain_of_unit_U, values_U)
        return total_D

    def load_E(self, router: int) -> np.ndarray:
        """int64 [E]: assignments of each expert, all domains."""
        return self.of[router].assignments_UE.sum(0)

    def filled(self, router: int) -> float:
        """The share of the router's slots that are not empty; 1 without tokens."""
        slots = self.routers[router].top_k * self.tokens_of(router)
        return min(1.0, int(self.load_E(router).sum()) / slots) if slots else 1.0

    def first_choice_E(self, router: int) -> np.ndarray:
        """int64 [E]; NaN where the source does not say."""
        return self._summed(router, self.of[router].first_choice_DE)

    def weight_sum_E(self, router: int) -> np.ndarray:
        """float64 [E]; NaN where the trace holds no weights."""
        return self._summed(router, self.of[router].weight_sum_DE)

    def dropped_E(self, router: int) -> np.ndarray:
        """int64 [E]: assignments that each expert dropped; NaN where the trace does not say, as of
        a router with empty slots none of which is known to be dropped."""
        mine = self.of[router]
        unknown = mine.dropped_UE is not None and mine.null_slots and not mine.dropped_UE.any()
        return self._summed(router, None if unknown else mine.dropped_UE)

    def _summed(self, router: int, values_XE: np.ndarray | None) -> np.ndarray:
        """[E], NaN where nothing is known"""
        E = self.routers[router].experts
        return np.full(E, np.nan) if values_XE is None else values_XE.sum(0)

    def before_drops(self) -> Counts:
        """With what is known to be dropped among the assignments."""
        of = dict(self.of)
        for r, counts in self.of.items():
            if counts.dropped_UE is not None and counts.dropped_UE.any():
                of[r] = replace(counts, assignments_UE=counts.assignments_UE + counts.dropped_UE)
        return replace(self, of=of)

    def windows(self, router: int) -> Iterator[tuple[int, int, int, np.ndarray]]:
        """(window, its first token, tokens the router saw in it, load_E) of every window in which
        it saw any."""
        load_WE, tokens_W = self.of[router].window_load_WE, self.of[router].window_tokens_W
        assert load_WE is not None, "windows were not asked for"
        assert tokens_W is not None
        for w in np.flatnonzero(tokens_W).tolist():
            yield w, int(self.first_token_W[w]), int(tokens_W[w]), load_WE[w].astype(np.int64)


def merge(parts: Iterable[Counts]) -> Counts:
    """The sum of counts of the same selection; the parts stay as they are."""
    total: Counts | None = None
    for part in parts:
        total = (empty_like(part) if total is None else total).add(part)
    assert total is not None, "nothing to merge"
    return total


def joined(parts: Iterable[Counts]) -> Counts:
    """The counts of all routers, from counts of the same tokens at some of them each; the first is
    filled in place."""
    whole, *others = parts
    for other in others:
        whole.of |= other.of
        whole.by_token_id |= other.by_token_id
    return whole


def empty_like(part: Counts) -> Counts:
    """No counts, of the same selection and wants: the neutral element of the addition."""
    windows = part.window_tokens, len(part.first_token_W)
    return no_counts(part.routers, part.indices, part.wants, windows)


def no_counts(
    routers: list[Router], indices: tuple[int, ...], wants: frozenset[str], windows: tuple[int, int]
) -> Counts:
    """What counts are added to. `windows`: tokens of one, and how many there are."""
    nothing_W = np.full(windows[1], -1, np.int64)
    return Counts(routers, indices, wants=wants, window_tokens=windows[0], first_token_W=nothing_W)


def _summed(a_V: np.ndarray, b_V: np.ndarray) -> np.ndarray:
    """As long as the longer of the two."""
    total = np.zeros(max(len(a_V), len(b_V)), np.int64)
    total[: len(a_V)] += a_V
    total[: len(b_V)] += b_V
    return total


# what a parameter of this name is given; any other is the field of RouterCounts of that name
DERIVED: dict[str, Callable[[Counts, int], np.ndarray]] = {
    "load_LE": lambda counts, r: counts.load_E(r)[None],
    "load_E": lambda counts, r: counts.load_E(r),
    "weight_sum_LE": lambda counts, r: counts.weight_sum_E(r)[None],
    "first_choice_E": lambda counts, r: counts.first_choice_E(r),
    "assignments_DE": lambda counts, r: counts.assignments_DE(r),
    "tokens_D": lambda counts, r: counts.tokens_D_of(r),
}
INPUTS = frozenset(DERIVED) | frozenset(rc.DECLARED)


def values_of(counts: Counts, router: int, table: str) -> dict[str, float]:
    """Every metric of a table that is one number per router and needs no more than INPUTS, by
    column. NaN where a count is not known."""
    values = dict[str, float]()
    for m in metrics_of(table, INPUTS).values():
        arguments = {
            p: DERIVED[p](counts, router) if p in DERIVED else getattr(counts.of[router], p)
            for p in m.parameters
        }
        known = all(value is not None for value in arguments.values())
        value = np.asarray(m.function(**arguments) if known else np.nan)
        assert value.size == 1, f"{m.name} of table {table} is no number per router"
        values[m.column] = float(value.item())
    return values
