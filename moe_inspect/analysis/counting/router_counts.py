"""The counts of one router: what each is, how it merges, and how a shard's decisions fill it.

A new count is a field of RouterCounts (`_count`: what it is asked for by, its axes, its dtype) and
a line that fills it. A metric takes it by naming a parameter like the field.

E experts, N experts of the next router, K slots, T tokens, D domains, U units (clusters of
documents), W windows, B forward passes, M + 1 frequencies.
"""

# ruff: noqa: RUF009 (`_count` declares a field)

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import Field, dataclass, field, fields
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from moe_inspect.analysis.counting.kernels import (
    Slots,
    TokenRows,
    by_slot,
    load,
    logit_confidence,
    repetition,
    weight_confidence,
    weight_sum,
)
from moe_inspect.analysis.counting.select import SelectedTokens
from moe_inspect.analysis.metrics.balance import max_vio
from moe_inspect.analysis.metrics.specialization import Expected
from moe_inspect.trace.schema import DROPPED, Router
from moe_inspect.trace.shard import Shard

T = TypeVar("T", str, tuple[str, int])  # labels of rows
WANTS = {
    "load": "assignments, first choices and gate weights of each expert",
    "domains": "the same by domain and by cluster of documents (comes with load)",
    "pairs": "experts chosen together: by_slot_EE, together_EE",
    "transitions": "experts here and at the next router: next_EN",
    "repetition": "consecutive tokens: pairs_U, first_same_U, shared_U, chosen_U",
    "windows": "load over time: window_load_WE, window_tokens_W",
    "worth": "sizes of the experts' outputs: gated_norm_UE, norm_UE; saliency_sum_UE",
    "weights": "confidence read off the k gate weights",
    "logits": "confidence, auxiliary and z-loss read off the router logits",
    "token_ids": "what the routing of each token id comes to: Counts.by_token_id",
}
BASE = frozenset({"load", "domains"})


def _count(want: str, axes: str, dtype: type = np.int64, merge: np.ufunc = np.add) -> Any:
    """Declares an array of counts. It merges by addition, row by row where its first axis is U
    (units) or D (domains); it is None where it was not asked for, or is not known."""
    stated = {"want": want, "axes": axes, "dtype": dtype, "merge": merge}
    return field(default=None, metadata=stated)


SUM = {"want": "", "axes": "", "dtype": float}  # a number that merges by addition


@dataclass
class RouterCounts:
    """The counts of one router; what was not asked for is None.

    assignments_UE, first_choice_DE (None: the source does not say), weight_sum_DE (None without
    weights); null_slots: slots that routed nowhere; dropped_UE: those that each expert is known to
    have dropped (None: unknown). batches[T]: of the forward passes in which the router saw T tokens
    and routed any, how many there were and the sum of their max_vio.
    by_slot_EE: pairs of experts of one decision, that of the earlier slot by that of the later.
    next_EN: of every decision all k·k' pairs (expert here, expert of the same token at the next
    router).
    pairs_U: pairs of consecutive tokens of a sequence; first_same_U: with the same first choice
    (None: unknown); shared_U: the experts that both tokens chose; chosen_U: their assignments.
    window_load_WE, window_tokens_W: load and tokens of each window of the trace.
    gated_norm_UE, norm_UE: Σ over assignments of gate weight × norm of the expert's output, and of
    that norm; energy_UE, saliency_sum_UE: those of the source of counts (`schema.SUMS`). None where
    the trace has none.
    weight_*: Σ over `weight_decisions` decisions; entropy in nats and margin (largest minus second)
    of the k weights made to sum to 1, mass: their sum as it is.
    logit_decisions: decisions whose logits are recorded and finite; the sums are over those.
    probability_sum_E: of the softmax (sigmoid routers: of the sigmoids made to sum to 1);
    entropy_sum in nats and topk_mass_sum (k largest) of the same; z_sum: of (logsumexp of the
    logits)²; top1_margin_sum, boundary_margin_sum: logit of rank 1 minus 2, k minus k+1 (NaN where
    there is no such rank); ties: decisions whose logits of rank k and k+1 are equal as recorded
    (float16)."""

    assignments_UE: np.ndarray = _count("load", "UE")
    first_choice_DE: np.ndarray | None = _count("load", "DE")
    weight_sum_DE: np.ndarray | None = _count("load", "DE", float)
    null_slots: int = field(default=0, metadata=SUM)
    dropped_UE: np.ndarray | None = _count("load", "UE")
    batches: dict[int, tuple[int, float]] = field(default_factory=dict[int, tuple[int, float]])
    by_slot_EE: np.ndarray | None = _count("pairs", "EE")
    next_EN: np.ndarray | None = _count("transitions", "EN")
    pairs_U: np.ndarray | None = _count("repetition", "U")
    first_same_U: np.ndarray | None = _count("repetition", "U")
    shared_U: np.ndarray | None = _count("repetition", "U")
    chosen_U: np.ndarray | None = _count("repetition", "U")
    window_load_WE: np.ndarray | None = _count("windows", "WE")
    window_tokens_W: np.ndarray | None = _count("windows", "W")
    gated_norm_UE: np.ndarray | None = _count("worth", "UE", float)
    norm_UE: np.ndarray | None = _count("worth", "UE", float)
    energy_UE: np.ndarray | None = _count("worth", "UE", float)
    saliency_sum_UE: np.ndarray | None = _count("worth", "UE", float)
    weight_decisions: int = field(default=0, metadata=SUM)
    weight_entropy_sum: float = field(default=0.0, metadata=SUM)
    weight_margin_sum: float = field(default=0.0, metadata=SUM)
    weight_mass_sum: float = field(default=0.0, metadata=SUM)
    logit_decisions: int = field(default=0, metadata=SUM)
    probability_sum_E: np.ndarray | None = _count("logits", "E", float)
    z_sum: float = field(default=0.0, metadata=SUM)
    entropy_sum: float = field(default=0.0, metadata=SUM)
    top1_margin_sum: float = field(default=0.0, metadata=SUM)
    boundary_margin_sum: float = field(default=0.0, metadata=SUM)
    topk_mass_sum: float = field(default=0.0, metadata=SUM)
    ties: int = field(default=0, metadata=SUM)

    @classmethod
    def zero(cls, wants: frozenset[str], sizes: dict[str, int]) -> RouterCounts:
        """What the counts of shards are added to. `sizes`: of the axes E, W and, where there is a
        next router, N; units and domains come with what is added. What has neither is a single 0,
        which `add` makes as large as what is added."""
        arrays: dict[str, Any] = {
            name: np.zeros(
                [sizes.get(axis, 0) for axis in axes if axes[0] in "UD"], f.metadata["dtype"]
            )
            for name, f in DECLARED.items()
            if (axes := f.metadata["axes"])
            and f.metadata["want"] in wants | BASE
            and not set(axes) - set(sizes) - {"U", "D"}
        }
        return cls(**arrays)

    @property
    def together_EE(self) -> np.ndarray | None:
        """int64, symmetric: decisions in which both were chosen; diagonal: decisions in which e
        was."""
        if self.by_slot_EE is None:
            return None
        both_EE = np.add(self.by_slot_EE, self.by_slot_EE.T, dtype=np.int64)
        both_EE[np.diag_indices_from(both_EE)] += self.assignments_UE.sum(0)
        return both_EE

    def narrow(self, wants: Container[str]) -> None:
        """Holds what was counted for these in the narrowest types there are, to be kept, or sent
        and added to others; nothing can be added to it."""
        held = [name for name, f in DECLARED.items() if f.metadata["want"] in wants]
        vars(self).update({name: narrowed(getattr(self, name)) for name in held})

    def add(self, other: RouterCounts, rows: dict[str, AddRows]) -> None:
        """Adds `other` in place. rows["U"], rows["D"]: how the rows of the two are added."""
        for name, f in DECLARED.items():
            mine, theirs = getattr(self, name), getattr(other, name)
            axis = f.metadata["axes"][:1]
            if mine is None or theirs is None:  # what one part does not know, the whole does not
                setattr(self, name, None)
            elif axis in rows:
                setattr(self, name, rows[axis](mine, theirs))
            elif axis and mine.ndim:
                f.metadata["merge"](mine, theirs, out=mine)
            elif axis:
                setattr(self, name, f.metadata["merge"](mine, theirs))
            else:
                setattr(self, name, mine + theirs)
        for size, (n, vio) in other.batches.items():
            self.add_batches(size, n, vio)

    def add_batches(self, tokens: int, n: int, vio: float) -> None:
        before, sum_before = self.batches.get(tokens, (0, 0.0))
        self.batches[tokens] = (before + n, sum_before + vio)


def narrowed(value: Any) -> Any:
    """An array of whole numbers in the narrowest type of at most 32 bits that holds them; all else
    as it is."""
    if getattr(getattr(value, "dtype", None), "kind", "") not in ("i", "u"):
        return value
    ends = int(value.min(initial=0)), int(value.max(initial=0))
    kind = np.promote_types(*map(np.min_scalar_type, ends))
    return value.astype(kind) if kind.itemsize <= 4 else value


# all but `batches`, which `add` merges by name
DECLARED: dict[str, Field[Any]] = {f.name: f for f in fields(RouterCounts) if f.metadata}


@dataclass(frozen=True)
class ByTokenId:
    """What the routing of each token id comes to at one router. `columns`: metrics by name;
    `expected`: the load of documents beside what their token ids explain. Of the token ids that go
    to each expert most exclusively, expert by expert, a row each (`narrowed`): expert, token id,
    how often it goes there, how often as first choice (None: unknown), how often it occurs."""

    columns: dict[str, float]
    expected: Expected | None
    expert_N: np.ndarray
    token_id_N: np.ndarray
    count_N: np.ndarray
    first_N: np.ndarray | None
    occurrences_N: np.ndarray


AddRows = Callable[[np.ndarray, np.ndarray], np.ndarray]


def rows_of_both(mine: list[T], theirs: list[T]) -> tuple[list[T], AddRows]:
    """The labels of the rows of a sum and of a part that is added to it, sorted as those of every
    sum are, and the function that adds a table of the part to one of the sum: to that itself where
    it has all the rows."""
    both = mine if {*mine} >= {*theirs} else sorted({*mine, *theirs})
    row_of = {label: row for row, label in enumerate(both)}
    # a slice is added to without a copy
    at, there = (
        slice(None) if part == both else np.array([row_of[x] for x in part], np.int64)
        for part in (mine, theirs)
    )

    def added(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        if len(mine) != len(both):
            mine, before = np.zeros((len(both), *mine.shape[1:]), mine.dtype), mine
            mine[at] = before
        mine[there] += theirs
        return mine

    return both, added


@dataclass(frozen=True)
class RouterDecisions:
    """Decisions of router r on the selected tokens of a shard. `slots`: k arrays [T]; the other
    values are read when they are asked for."""

    shard: Shard
    r: int
    slots: Slots
    seen: SelectedTokens
    token_rows: TokenRows

    @property
    def router(self) -> Router:
        return self.shard.trace.routers[self.r]

    @property
    def E(self) -> int:
        return self.router.experts

    def values(self, name: str) -> Slots | None:
        """Of each slot, k arrays [T]; None where they are not recorded."""
        if name not in self.shard.trace.slot_values:
            return None
        return self.seen.of(self.shard.slot_values(self.r, name), self.r)

    @cached_property
    def loads(self) -> dict[str, np.ndarray]:
        """Assignments of each expert by row, by table: `TokenRows.loads`."""
        return self.token_rows.loads(self.slots, self.E)

    @cached_property
    def weights(self) -> Slots | None:
        return self.values("weight")

    def sums_UE(self, values: Slots) -> np.ndarray:
        """Values of each expert's assignments, summed by unit. float64 [U, E]"""
        rows = self.token_rows
        return weight_sum(rows.unit_T, self.slots, values, rows.U, self.E)


def count_router(decisions: RouterDecisions, wants: frozenset[str]) -> RouterCounts:
    """The counts of one router in one shard; those of transitions need the next router too and are
    filled by count_shard."""
    router, rows, slots = decisions.router, decisions.token_rows, decisions.slots
    counts = RouterCounts(decisions.loads["unit"])
    if router.first_choice_known:
        counts.first_choice_DE = load(rows.domain_T, slots[:1], rows.D, router.experts)
    counts.null_slots = router.top_k * len(slots[0]) - int(counts.assignments_UE.sum())
    if decisions.shard.trace.has_dropped:
        dropped = decisions.seen.of(decisions.shard.slots(decisions.r, DROPPED), decisions.r)
        counts.dropped_UE = load(rows.unit_T, dropped, rows.U, router.experts)
    vio_B = max_vio(decisions.loads["batch"])
    for tokens, vio in zip(rows.tokens_B.tolist(), vio_B.tolist(), strict=True):
        if not math.isnan(vio):
            counts.add_batches(tokens, 1, vio)
    for want, fill in FILLS.items():
        if want in wants:
            fill(decisions, counts)
    return counts


def _load(decisions: RouterDecisions, counts: RouterCounts) -> None:
    if decisions.weights is not None:
        rows, slots = decisions.token_rows, decisions.slots
        sums_DE = weight_sum(rows.domain_T, slots, decisions.weights, rows.D, decisions.E)
        counts.weight_sum_DE = sums_DE


def _windows(decisions: RouterDecisions, counts: RouterCounts) -> None:
    window_T, W = decisions.token_rows.divisions["window"]
    counts.window_load_WE = decisions.loads["window"]
    counts.window_tokens_W = np.bincount(window_T, minlength=W)


def _pairs(decisions: RouterDecisions, counts: RouterCounts) -> None:
    counts.by_slot_EE = by_slot(decisions.slots, decisions.E)


def _repetition(decisions: RouterDecisions, counts: RouterCounts) -> None:
    counts.pairs_U = decisions.token_rows.pairs_U.copy()
    repeated = repetition(decisions.slots, decisions.token_rows, decisions.E)
    first_same_U, counts.shared_U, counts.chosen_U = repeated
    counts.first_same_U = first_same_U if decisions.router.first_choice_known else None


def _worth(decisions: RouterDecisions, counts: RouterCounts) -> None:
    if (norms := decisions.values("norm")) is not None:
        counts.norm_UE = decisions.sums_UE(norms)
        if decisions.weights is not None:
            gated = tuple(w * n for w, n in zip(decisions.weights, norms, strict=True))
            counts.gated_norm_UE = decisions.sums_UE(gated)


def _weights(decisions: RouterDecisions, counts: RouterCounts) -> None:
    if decisions.weights is not None:
        vars(counts).update(weight_confidence(decisions.weights))


def _logits(decisions: RouterDecisions, counts: RouterCounts) -> None:
    if "logits" in decisions.shard.trace.tables:
        (logits_TE,) = decisions.seen.of((decisions.shard.logits(decisions.r),), decisions.r)
        router = decisions.router
        vars(counts).update(logit_confidence(logits_TE, router.top_k, router.scoring))


FILLS: dict[str, Callable[[RouterDecisions, RouterCounts], None]] = {
    "load": _load,
    "windows": _windows,
    "pairs": _pairs,
    "repetition": _repetition,
    "worth": _worth,
    "weights": _weights,
    "logits": _logits,
}
