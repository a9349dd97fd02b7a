"""Is it the same routing under another numbering? Layers moved, routes shifted by a token, experts
numbered differently: looked for in a sample of tokens, beyond chance among them.

T tokens of the sample, E experts, P physical ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from moe_inspect.analysis.counting.select import Selection
from moe_inspect.analysis.metrics.chance import ALPHA, shuffled_p, shuffled_within
from moe_inspect.analysis.metrics.uncertainty import SEED
from moe_inspect.comparison.align import AlignedRows, Alignment, align, rows_of_shard
from moe_inspect.comparison.pairing import layers_named, same_places
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.verdict.findings import (
    LAYERS,
    OF_ANOTHER_ROUTER,
    SHIFT_LAYERS,
    SHIFT_ROUTES,
    Finding,
    finding,
)
from moe_inspect.text import join_first, layer_label, plural, ranges
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.shard import Shard

SAMPLE_CELLS = 8_000_000  # of the sample: tokens · routers · experts
MOST_TOKENS = 4096
GOOD = 0.9  # agreement from which a router is not examined further
MATCH = 0.6  # agreement that the right numbering must reach …
GAIN = 0.3  # … and by how much it must exceed the agreement as compared
BY_CHANCE = 0.1  # agreement below which two routers have nothing in common
SHIFTS = (-2, -1, 1, 2)
SHUFFLES = 20
REPLICAS = 0.9  # agreement, once ids are mapped, from which they are physical
MOST_ROUTERS = 8  # that are tried for replicas

Row = dict[str, Any]
Pair = tuple[int, int]  # a router of A and one of B
Chosen = tuple[np.ndarray, np.ndarray]  # bool [T, E]: the experts chosen in A, in B


@dataclass
class SampledRows:
    """Tokens in a row of one shard, and the routers that they reach, as they are compared."""

    traces: tuple[Trace, Trace]
    rows: AlignedRows
    pairs: list[Pair]
    _chosen: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)

    def chosen(self, side: int, router: int) -> np.ndarray:
        """Experts that a router of A (side 0) or of B (side 1) chose. bool [T, E]"""
        if (side, router) not in self._chosen:
            E = self.traces[side].routers[router].experts
            chosen_TE = np.zeros((len(self.rows), E + 1), bool)
            for slot in self.rows.read(side, Shard.slots, router):
                chosen_TE[np.arange(len(slot)), slot] = True
            self._chosen[side, router] = chosen_TE[:, :E]
        return self._chosen[side, router]

    def both(self, pair: Pair) -> Chosen:
        return self.chosen(0, pair[0]), self.chosen(1, pair[1])

    @cached_property
    def own(self) -> dict[Pair, float]:
        """Agreement of each pair of routers as compared."""
        return {pair: agreement(*self.both(pair)) for pair in self.pairs}

    @cached_property
    def good(self) -> list[Pair]:
        """Pairs that are not examined further."""
        return [pair for pair, value in self.own.items() if value >= GOOD]


def samples(alignment: Alignment, pairs: Sequence[Pair]) -> Iterator[SampledRows]:
    """Sample each stack's tokens from the shard of A with the most tokens that are compared."""
    s, traces = alignment.segments, alignment.traces
    if not len(s.length):
        return
    shards, at = np.unique(s.shard_a, return_inverse=True)
    segments = s.in_shard(int(shards[np.bincount(at, s.length).argmax()]))
    cells = sum(r.experts for trace in traces for r in trace.routers)
    for stack in sorted({traces[0].routers[r].stack for r, _ in pairs}):
        rows = rows_of_shard(traces, segments, alignment.a.domains, stack, Selection(()))
        T = min(len(rows), MOST_TOKENS, max(SAMPLE_CELLS // cells, 256))
        if T:
            at_T = np.arange(len(rows)) - (len(rows) - T) // 2
            of_stack = [pair for pair in pairs if traces[0].routers[pair[0]].stack == stack]
            yield SampledRows(traces, rows.take((at_T >= 0) & (at_T < T)), of_stack)


def first_sample(alignment: Alignment, pairs: Sequence[Pair]) -> SampledRows | None:
    """The sample of the stack of the first router."""
    stack_of = {pair: alignment.traces[0].routers[pair[0]].stack for pair in pairs}
    of_stack = [pair for pair in pairs if stack_of[pair] == stack_of[pairs[0]]]
    return next(samples(alignment, of_stack), None)


def renumberings(
    alignment: Alignment, pairs: Sequence[Pair], routers: Sequence[int]
) -> list[Finding]:
    """How B is numbered differently, in the stack of the first router; empty if the routing agrees
    as it is compared. The value `option` is the option of `compare` that fixes it, or "".
    routers: the selected routers of A."""
    sample = first_sample(alignment, pairs)
    if sample is None or sample.rows.alike:
        return []
    a, b = (trace.routers for trace in alignment.traces)
    stack = a[pairs[0][0]].stack
    of_a = [r for r in routers if a[r].stack == stack]
    of_b = [m for m, router in enumerate(b) if router.stack == stack]
    all_good = len(sample.good) == len(sample.pairs)
    if all_good and len(sample.pairs) in (len(of_a), len(of_b)):
        return []
    first = (
        (None if all_good else _routes_shifted(sample))
        or _layers_moved(sample, of_a, of_b)
        or _experts_renumbered(sample)
        or _foreign(sample)
    )
    return [] if first is None else [first]


def overlap(a_TE: np.ndarray, b_TE: np.ndarray) -> float:
    """Share of the experts that both chose. NaN if none chose any."""
    size = np.maximum(a_TE.sum(1), b_TE.sum(1)).sum()
    return float((a_TE & b_TE).sum() / size) if size else float("nan")


def agreement(a_TE: np.ndarray, b_TE: np.ndarray) -> float:
    """Overlap of the sets beyond chance: 0 if they are independent, 1 if they are equal."""
    if a_TE.shape != b_TE.shape or not a_TE.any():
        return 0.0
    size = np.maximum(a_TE.sum(1), b_TE.sum(1)).sum()
    chance = float((a_TE.mean(0) * b_TE.mean(0)).sum() * len(a_TE) / size)
    return (overlap(a_TE, b_TE) - chance) / (1 - chance) if chance < 1 else 1.0


def beyond_chance(
    value: float, both: Sequence[Chosen], document_T: np.ndarray, tried: int = 1
) -> bool:
    """Whether these routers hardly agree so much on average, in the best of `tried` pairings, once
    B's tokens are shuffled within documents: what the tokens of a document have in common stays."""
    rng, null = np.random.default_rng([SEED, len(document_T)]), list[float]()
    for _ in range(SHUFFLES):
        order_T = shuffled_within(document_T, rng)
        null.append(mean([agreement(a_TE, b_TE[order_T]) for a_TE, b_TE in both]))
    return shuffled_p(value, null, len(document_T)) * tried < ALPHA


def mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def half_of(T: int) -> np.ndarray:
    """A random half, since replicas of an expert may take tokens in turn. bool [T]"""
    return np.random.default_rng([SEED, T]).permutation(T) < T // 2


def _better(value: float, own: float) -> bool:
    return value >= MATCH and value >= own + GAIN


def _evidence(value: float, before: float) -> str:
    return f"agreement beyond chance {value:.1%}, {before:.1%} as compared"


def _routes_shifted(sample: SampledRows) -> Finding | None:
    """Look for A's routes one or two tokens further on in B, in the same document."""
    own, T, document_T = mean(sample.own.values()), len(sample.rows), sample.rows.document_T

    def shifted(shift: int) -> tuple[list[Chosen], np.ndarray]:
        t = np.arange(max(0, -shift), min(T, T - shift))
        t = t[document_T[t] == document_T[t + shift]]
        both = [sample.both(pair) for pair in sample.pairs]
        return [(a_TE[t], b_TE[t + shift]) for a_TE, b_TE in both], document_T[t]

    value, shift = max(
        (mean(agreement(*both) for both in shifted(shift)[0]), shift) for shift in SHIFTS
    )
    if not (_better(value, own) and beyond_chance(value, *shifted(shift), len(SHIFTS))):
        return None
    text = (
        f"B's routes are shifted by {plural(abs(shift), 'token')}: B's token n{shift:+d} has the "
        f"routes of A's token n ({_evidence(value, own)})."
    )
    values: Row = {"option": f"{SHIFT_ROUTES} {shift}", "shift": shift}
    values |= {"agreement": value, "agreement_as_compared": own}
    return finding("routes_shifted", "critical", text, **values)


def _layers_moved(
    sample: SampledRows, routers_a: list[int], routers_b: list[int]
) -> Finding | None:
    """Look for routers of A that agree with another layer of B than the one they are compared
    with."""
    a, b = (trace.routers for trace in sample.traces)
    paired, own, good = dict(sample.pairs), sample.own, {m for _, m in sample.good}
    tried, moved = len(routers_a) * len(routers_b), list[tuple[int, int, float, float]]()
    for r in routers_a:
        before = own[r, paired[r]] if r in paired else 0.0
        if before >= GOOD:
            continue
        rest = [m for m in routers_b if m not in good and m != paired.get(r)]
        value, m = max(((agreement(*sample.both((r, m))), -m) for m in rest), default=(0.0, 0))
        if _better(value, before) and beyond_chance(
            value, [sample.both((r, -m))], sample.rows.document_T, tried
        ):
            moved.append((r, -m, value, before))
    if not moved:
        return None
    routers, others, found, compared = zip(*moved, strict=True)
    names = [f"A's {layer_label(a, r)} is B's {layer_label(b, m)}" for r, m, *_ in moved]
    difference, option = join_first(names, 4, ", "), ""
    steps = {a[r].layer - b[m].layer for r, m, *_ in moved}
    if len(steps) == 1 and not good:
        (step,) = steps
        if len(moved) >= max(1, len(own) - abs(step) - 1):
            difference, option = f"B's layer n is A's n{step:+d}", f"{SHIFT_LAYERS} {step}"
    text = (
        f"Layers are numbered differently: {difference} "
        f"({_evidence(mean(found), mean(compared))}). One trace may skip dense layers, or count "
        "from 0 at each pipeline stage."
    )
    values: Row = {
        "option": option,
        "agreement": mean(found),
        "agreement_as_compared": mean(compared),
        "layers_a": [a[r].layer for r in routers],
        "layers_b": [b[m].layer for m in others],
    }
    return finding("layers_moved", "critical", text, **values)


def _experts_renumbered(sample: SampledRows) -> Finding | None:
    """Match experts by the tokens they share in one half of the sample, and judge the match in the
    other half."""
    moved, own = list[tuple[int, float, float]](), sample.own
    fit_T = half_of(len(sample.rows))
    for pair, before in own.items():
        if before >= GOOD:
            continue
        both = matched(*sample.both(pair), fit_T)
        value, document_T = agreement(*both), sample.rows.document_T[~fit_T]
        if _better(value, before) and beyond_chance(value, [both], document_T, len(own)):
            moved.append((pair[0], value, before))
    if not moved:
        return None
    routers, found, compared = zip(*moved, strict=True)
    value, before = mean(found), mean(compared)
    layers = layers_named([layer_label(sample.traces[0].routers, r) for r in routers])
    text = (
        f"Experts are numbered differently in {layers}: matched by shared "
        f"tokens, they agree (beyond chance {value:.1%}, {before:.1%} as compared). Physical ids "
        "or a permuted checkpoint cause this."
    )
    values: Row = {"option": "", "routers": [*routers]}
    values |= {"agreement": value, "agreement_as_compared": before}
    return finding("experts_renumbered", "critical", text, **values)


def _foreign(sample: SampledRows) -> Finding | None:
    """Look for a few routers that agree no more than by chance, between others that agree: another
    model would differ from there on. The tokens must be enough to tell agreement from chance."""
    a, own, good = sample.traces[0].routers, sample.own, [r for r, _ in sample.good]

    def is_enough(chosen_TE: np.ndarray) -> bool:
        return beyond_chance(MATCH, [(chosen_TE, chosen_TE)], sample.rows.document_T, len(own))

    bad = [
        r for (r, _), value in own.items() if value < BY_CHANCE and is_enough(sample.chosen(0, r))
    ]
    if not bad or 2 * len(good) < len(own) or max(bad) > max(good):
        return None
    value, others = (mean(own[pair] for pair in own if pair[0] in x) for x in (bad, good))
    layers = layers_named([layer_label(a, r) for r in bad])
    text = (
        f"In {layers}, B agrees with A only by chance (beyond chance {value:.1%}; "
        f"in other layers {others:.1%}): these routes belong to a router that A lacks, "
        f"{OF_ANOTHER_ROUTER}."
    )
    left = ranges({a[r].layer for r, _ in own if r not in bad})
    values: Row = {"option": f"{LAYERS} {left}", "routers": bad}
    values |= {"agreement": value, "agreement_elsewhere": others}
    return finding("routes_of_another_router", "critical", text, **values)


def matched_overlaps(
    alignment: Alignment, pairs: Sequence[Pair]
) -> Iterator[tuple[int, int, float, float, float]]:
    """Overlap of each router: its index, the tokens judged, and the overlap as numbered, after
    matching, and after matching B's shuffled tokens. Experts are matched on every other document
    and judged on the rest."""
    sample_of = {pair: sample for sample in samples(alignment, pairs) for pair in sample.pairs}
    for pair in sorted(sample_of):
        sample = sample_of[pair]
        a_TE, b_TE = sample.both(pair)
        document, at_T = np.unique(sample.rows.document_T, return_inverse=True)
        fit_T = at_T % 2 == 0 if len(document) > 1 else np.arange(len(a_TE)) % 2 == 0
        shuffled_TE = np.random.default_rng([SEED, pair[0]]).permutation(b_TE)
        as_matched, by_chance = (
            overlap(*matched(a_TE, side_TE, fit_T)) for side_TE in (b_TE, shuffled_TE)
        )
        as_numbered = overlap(a_TE[~fit_T], b_TE[~fit_T])
        yield pair[0], int((~fit_T).sum()), as_numbered, as_matched, by_chance


def matched(a_TE: np.ndarray, b_TE: np.ndarray, fit_T: np.ndarray) -> Chosen:
    """Match B's experts with A's so that they share most of the tokens of `fit_T` (Hungarian
    algorithm). Return the other tokens of both, with B's experts in A's order."""
    from scipy.optimize import linear_sum_assignment

    shared_EE = a_TE[fit_T].astype(np.float32).T @ b_TE[fit_T].astype(np.float32)
    order_E = linear_sum_assignment(shared_EE, maximize=True)[1]
    return a_TE[~fit_T], b_TE[~fit_T][:, order_E]


def physical_ids(a: Trace, b: Trace) -> Finding | None:
    """Look for a trace with physical ids of replicated experts: mapped by some tokens, they agree
    with the experts of the other trace on the rest."""
    pairs = same_places(a, b, range(len(a.routers)))
    sizes = [(a.routers[r], b.routers[m]) for r, m in pairs]
    if not pairs or any(x.top_k != y.top_k or x.experts == y.experts for x, y in sizes):
        return None
    try:
        alignment = align(a, b)
    except MoeInspectError:
        return None
    if (sample := first_sample(alignment, pairs)) is None:
        return None
    fit_T, mapped = half_of(len(sample.rows)), list[Chosen]()
    for pair in sample.pairs[:: -(-len(sample.pairs) // MOST_ROUTERS)]:
        logical_TE, physical_TP = sorted(sample.both(pair), key=lambda x_TE: x_TE.shape[1])
        mapped.append((logical_TE[~fit_T], _mapped(logical_TE, physical_TP, fit_T)))
    value = mean(agreement(*both) for both in mapped)
    if value < REPLICAS or not beyond_chance(value, mapped, sample.rows.document_T[~fit_T]):
        return None
    experts_a, experts_b = (router.experts for router in sizes[0])
    name, n, logical = "A", experts_a, experts_b
    if experts_b > experts_a:
        name, n, logical = "B", experts_b, experts_a
    text = (
        f"The {n} ids of {name} are physical ids of {logical} experts: mapped by shared tokens, "
        f"the traces agree (beyond chance {value:.1%}). Map them to logical ids before comparing."
    )
    values: Row = {"trace": name, "physical": n, "logical": logical, "agreement": value}
    return finding("experts_renumbered", "critical", text, **values)


def _mapped(logical_TE: np.ndarray, physical_TP: np.ndarray, fit_T: np.ndarray) -> np.ndarray:
    """Map physical ids to experts by the tokens of `fit_T`. Return the experts of the others."""
    fit_TE, fit_TP = (x_TX[fit_T].astype(np.float32) for x_TX in (logical_TE, physical_TP))
    shared_EP, load_E = fit_TE.T @ fit_TP, fit_TE.sum(0)
    # a tie goes to the rarer expert
    expert_P = (shared_EP - (load_E / (load_E.sum() + 1))[:, None]).argmax(0)
    mapped_TE = np.zeros_like(logical_TE[~fit_T])
    t, p = np.nonzero(physical_TP[~fit_T])
    mapped_TE[t, expert_P[p]] = True
    return mapped_TE
