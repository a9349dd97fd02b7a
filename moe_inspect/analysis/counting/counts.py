"""What a trace comes to: counts that merge by addition.

L routers, E experts, N experts of the next router, K slots, T tokens, D domains, U units (clusters
of documents), W windows. Memory is set by routers, experts, domains and vocabulary, never by the
length of the trace: documents are kept apart only as CLUSTERS clusters a domain, which is enough
for the bootstrap and for permuting document labels.

Where the names differ from what one might look for: ESFT sums are by domain, so `esft_token_DE` and
`esft_gate_DE`; what is read off the weights alone is `weight_entropy_sum`, `weight_margin_sum`,
`weight_mass_sum` over `weight_decisions`; windows are arrays (`window_load_WE`, `window_tokens_W`),
`Counts.windows(router)` lists those that hold tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from moe_inspect.trace.schema import Router

# a domain; a prime, so that neither consecutive ids nor ids in strides pile up in a few clusters
CLUSTERS = 127
SRP_LENGTHS = (1, 4, 16, 64)  # tokens of a segment
WANTS = {
    "load": "assignments, first choices and gate weights of each expert",
    "domains": "the same by domain and by cluster of documents (comes with load)",
    "pairs": "experts chosen together: by_slot_EE, together_EE",
    "transitions": "experts here and at the next router: next_EN, next_first_EN",
    "repetition": "consecutive tokens that choose alike: pairs_U, first_same_U, any_same_U",
    "windows": "load over time: window_load_WE, window_tokens_W",
    "srp": "how often an expert is chosen within m consecutive tokens: srp",
    "esft": "relevance of experts, averaged over sequences: esft_token_DE, esft_gate_DE, samples_D",
    "weights": "confidence read off the k gate weights",
    "logits": "confidence, auxiliary and z-loss read off the router logits",
}
BASE = frozenset({"load", "domains"})


@dataclass
class RouterCounts:
    """The counts of one router; what was not asked for is None.

    assignments_UE, first_choice_DE (None: the source does not say): int64, weight_sum_DE: float64
    (None without weights). batches[T]: of the forward passes in which the router saw T tokens and
    routed any, how many there were and the sum of their max_vio.
    by_slot_EE: int64, pairs of experts of one decision, that of the earlier slot by that of the
    later.
    next_EN: int64, of every decision all k·k' pairs (expert here, expert of the same token at the
    next router).
    next_first_EN: int64, pairs of first choices; None where a router's first choices are unknown.
    pairs_U: int64, pairs of consecutive tokens of a sequence; first_same_U: with the same first
    choice (None: unknown); any_same_U: with an expert in common.
    window_load_WE, window_tokens_W: int64, load and tokens of each window of the trace.
    srp[m]: int64 [U, m+1], how many (m consecutive tokens of a sequence, expert) have f of the m
    tokens choose the expert. esft_token_DE, esft_gate_DE: float64, Σ over samples (the tokens of a
    sequence in a shard) of the mean over tokens of 1[e chosen]/k, and of the gate weight;
    samples_D: int64.
    weight_*: Σ over `weight_decisions` decisions; entropy in nats and margin (largest minus second)
    of the k weights made to sum to 1, mass: their sum as it is.
    logit_decisions: decisions whose logits are recorded and finite; the sums are over those.
    probability_sum_E: of the softmax (sigmoid routers: of the sigmoids made to sum to 1);
    entropy_sum in nats and topk_mass_sum (k largest) of the same;
    z_sum: of (logsumexp logits)²; top1_margin_sum, boundary_margin_sum: logit of rank 1 minus 2, k
    minus k+1 (NaN where there is no such rank); ties: decisions whose logits of rank k and k+1 are
    equal as recorded (float16)."""

    assignments_UE: np.ndarray
    first_choice_DE: np.ndarray | None
    weight_sum_DE: np.ndarray | None
    null_slots: int = 0
    batches: dict[int, tuple[int, float]] = field(default_factory=dict)
    by_slot_EE: np.ndarray | None = None
    next_EN: np.ndarray | None = None
    next_first_EN: np.ndarray | None = None
    pairs_U: np.ndarray | None = None
    first_same_U: np.ndarray | None = None
    any_same_U: np.ndarray | None = None
    window_load_WE: np.ndarray | None = None
    window_tokens_W: np.ndarray | None = None
    srp: dict[int, np.ndarray] | None = None
    esft_token_DE: np.ndarray | None = None
    esft_gate_DE: np.ndarray | None = None
    samples_D: np.ndarray | None = None
    weight_decisions: int = 0
    weight_entropy_sum: float = 0.0
    weight_margin_sum: float = 0.0
    weight_mass_sum: float = 0.0
    logit_decisions: int = 0
    probability_sum_E: np.ndarray | None = None
    z_sum: float = 0.0
    entropy_sum: float = 0.0
    top1_margin_sum: float = 0.0
    boundary_margin_sum: float = 0.0
    topk_mass_sum: float = 0.0
    ties: int = 0

    @property
    def together_EE(self) -> np.ndarray | None:
        """int64, symmetric: decisions in which both were chosen; diagonal: decisions in which e
        was."""
        if self.by_slot_EE is None:
            return None
        return self.by_slot_EE + self.by_slot_EE.T + np.diag(self.assignments_UE.sum(0))

    def add(self, other: RouterCounts, rows: dict[str, Rows]) -> None:
        for name, axis in SUMS.items():
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is None or theirs is None:  # what one part does not know, the whole does not
                setattr(self, name, None)
            elif axis in rows:
                setattr(self, name, _added(mine, theirs, rows[axis]))
            elif isinstance(mine, np.ndarray):
                mine += theirs
            else:
                setattr(self, name, mine + theirs)
        for size, (n, max_vio) in other.batches.items():
            before, sum_before = self.batches.get(size, (0, 0.0))
            self.batches[size] = (before + n, sum_before + max_vio)
        if self.srp is not None and other.srp is not None:
            self.srp = {
                m: _added(mine_UM, other.srp[m], rows["U"]) for m, mine_UM in self.srp.items()
            }
        else:
            self.srp = None


# what of RouterCounts is a plain sum; the suffix of shapes says what the rows are
SUMS = {
    f.name: f.name.rpartition("_")[2][0]
    for f in fields(RouterCounts)
    if f.name not in ("batches", "srp")
}


@dataclass
class Counts:
    """What one shard, or any number of them together, comes to.

    A unit is (domain, cluster of documents); rows by unit follow `units`, rows by domain follow
    `domains`, both sorted once anything has been added, so that the order of shards shows nowhere.
    tokens_U: int64, the tokens of each; tokens_SU: the same by stack, where the model has two.
    `token_ids_V[i]` counts the occurrences of token id i; token_ids_SV: by stack.
    `first_token_W`: int64, the first token of each window of `window_tokens` tokens, −1 for one
    without any."""

    routers: list[Router]
    indices: tuple[int, ...]
    domains: list[str] = field(default_factory=list)
    units: list[tuple[str, int]] = field(default_factory=list)
    tokens_U: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    tokens_SU: dict[str, np.ndarray] = field(default_factory=dict)
    of: dict[int, RouterCounts] = field(default_factory=dict)
    token_ids_V: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    token_ids_SV: dict[str, np.ndarray] = field(default_factory=dict)
    labels: set[str] = field(default_factory=set)
    documents: int = 0
    counts_only: bool = False
    wants: frozenset[str] = BASE
    window_tokens: int = 0
    first_token_W: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        for stack in {self.routers[r].stack for r in self.indices} - {""}:
            self.tokens_SU.setdefault(stack, np.zeros(len(self.units), np.int64))
            self.token_ids_SV.setdefault(stack, np.zeros(0, np.int64))

    def _nothing(self, r: int) -> RouterCounts:
        """What the counts of router r are added to."""
        E, W, wants = self.routers[r].experts, len(self.first_token_W), self.wants
        after = self.next_router(r)
        nothing = RouterCounts(
            np.zeros((0, E), np.int64), np.zeros((0, E), np.int64), np.zeros((0, E))
        )
        if "pairs" in wants:
            nothing.by_slot_EE = np.zeros((E, E), np.int64)
        if "transitions" in wants and after is not None:
            nothing.next_EN, nothing.next_first_EN = (
                np.zeros((E, self.routers[after].experts), np.int64) for _ in range(2)
            )
        if "repetition" in wants:
            nothing.pairs_U, nothing.first_same_U, nothing.any_same_U = (
                np.zeros(0, np.int64) for _ in range(3)
            )
        if "windows" in wants:
            nothing.window_load_WE, nothing.window_tokens_W = (
                np.zeros((W, E), np.int64),
                np.zeros(W, np.int64),
            )
        if "srp" in wants:
            nothing.srp = {m: np.zeros((0, m + 1), np.int64) for m in SRP_LENGTHS}
        if "esft" in wants:
            nothing.esft_token_DE, nothing.esft_gate_DE = np.zeros((0, E)), np.zeros((0, E))
            nothing.samples_D = np.zeros(0, np.int64)
        if "logits" in wants:
            nothing.probability_sum_E = np.zeros(E)
        return nothing

    def add(self, other: Counts) -> Counts:
        """Adds `other` in place. Addition is associative and commutative."""
        domains, units = (
            sorted({*self.domains, *other.domains}),
            sorted({*self.units, *other.units}),
        )
        rows = {
            "D": Rows.of(self.domains, other.domains, domains),
            "U": Rows.of(self.units, other.units, units),
        }
        self.domains, self.units = domains, units
        self.tokens_U = _added(self.tokens_U, other.tokens_U, rows["U"])
        self.tokens_SU = {
            s: _added(mine_U, other.tokens_SU[s], rows["U"]) for s, mine_U in self.tokens_SU.items()
        }
        for r, theirs in other.of.items():
            if r not in self.of:
                self.of[r] = self._nothing(r)
            self.of[r].add(theirs, rows)
        self.token_ids_V = _summed(self.token_ids_V, other.token_ids_V)
        self.token_ids_SV = {
            s: _summed(mine_V, other.token_ids_SV[s]) for s, mine_V in self.token_ids_SV.items()
        }
        # −1 as uint64 is the largest of all
        self.first_token_W = np.minimum(
            self.first_token_W.astype(np.uint64), other.first_token_W.astype(np.uint64)
        ).astype(np.int64)
        self.labels |= other.labels
        self.documents += other.documents
        self.counts_only |= other.counts_only
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
        stack = self.routers[router].stack
        return next(
            (r for r in range(router + 1, len(self.routers)) if self.routers[r].stack == stack),
            None,
        )

    def assignments_DE(self, router: int) -> np.ndarray:
        """int64 [D, E]"""
        return self.by_domain(self.of[router].assignments_UE)

    def by_domain(self, values_U: np.ndarray) -> np.ndarray:
        """Sums of what is known by unit: [U, …] → [D, …]"""
        return by_domain(values_U, self.domain_of_unit_U, len(self.domains))

    def load_E(self, router: int) -> np.ndarray:
        """int64 [E]: assignments of each expert, all domains."""
        return self.of[router].assignments_UE.sum(0)

    def first_choice_E(self, router: int) -> np.ndarray:
        """int64 [E]; NaN where the source does not say."""
        first_DE = self.of[router].first_choice_DE
        return (
            np.full(self.routers[router].experts, np.nan) if first_DE is None else first_DE.sum(0)
        )

    def weight_sum_E(self, router: int) -> np.ndarray:
        """float64 [E]; NaN where the trace holds no weights."""
        sums_DE = self.of[router].weight_sum_DE
        return np.full(self.routers[router].experts, np.nan) if sums_DE is None else sums_DE.sum(0)

    def windows(self, router: int) -> Iterator[tuple[int, int, int, np.ndarray]]:
        """(window, its first token, tokens the router saw in it, load_E) of every window in which
        it saw any."""
        mine = self.of[router]
        assert mine.window_load_WE is not None, "windows were not asked for"
        assert mine.window_tokens_W is not None
        for w in np.flatnonzero(mine.window_tokens_W):
            yield (
                int(w),
                int(self.first_token_W[w]),
                int(mine.window_tokens_W[w]),
                mine.window_load_WE[w],
            )


def merge(parts: Iterable[Counts]) -> Counts:
    """The sum of counts of the same selection; the parts stay as they are."""
    total: Counts | None = None
    for part in parts:
        total = (empty_like(part) if total is None else total).add(part)
    assert total is not None, "nothing to merge"
    return total


def empty_like(part: Counts) -> Counts:
    """No counts, of the same selection and wants: the neutral element of the addition."""
    nothing_W = np.full(len(part.first_token_W), -1, np.int64)
    return Counts(
        part.routers,
        part.indices,
        wants=part.wants,
        window_tokens=part.window_tokens,
        first_token_W=nothing_W,
    )


def by_domain(values_U: np.ndarray, domain_of_U: np.ndarray, D: int) -> np.ndarray:
    total_D = np.zeros((D, *values_U.shape[1:]), values_U.dtype)
    np.add.at(total_D, domain_of_U, values_U)
    return total_D


@dataclass(frozen=True)
class Rows:
    """Where the rows of two parts go among those of both."""

    mine: np.ndarray | slice
    theirs: np.ndarray | slice
    both: int

    @staticmethod
    def of(mine: list[Any], theirs: list[Any], both: list[Any]) -> Rows:
        row_of = {label: row for row, label in enumerate(both)}
        # a slice is added to without a copy
        at, there = (
            slice(None) if part == both else np.array([row_of[x] for x in part], np.int64)
            for part in (mine, theirs)
        )
        return Rows(at, there, len(both))


def _added(mine: np.ndarray, theirs: np.ndarray, rows: Rows) -> np.ndarray:
    if len(mine) != rows.both:
        mine, before = np.zeros((rows.both, *mine.shape[1:]), mine.dtype), mine
        mine[rows.mine] = before
    mine[rows.theirs] += theirs
    return mine


def _summed(a_V: np.ndarray, b_V: np.ndarray) -> np.ndarray:
    """As long as the longer of the two."""
    longer, shorter = (a_V, b_V) if len(a_V) >= len(b_V) else (b_V, a_V)
    total = longer.copy()
    total[: len(shorter)] += shorter
    return total
