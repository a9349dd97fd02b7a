"""The verdict on two traces of decisions. The first line is one of nine diagnoses: the same, the
same except for rounding, different, undecided, or one of five misalignments. Then come the
consequences of a difference: whether it grows from layer to layer, and moves the experts' load.

Each check takes the comparison and returns its findings. U units (clusters of documents).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from moe_inspect.analysis.metrics.balance import ratio
from moe_inspect.analysis.metrics.chance import ALPHA, FEWEST_TO_JUDGE, joint_p, signed_sums
from moe_inspect.analysis.metrics.uncertainty import effective_documents, log10_tail
from moe_inspect.comparison.count import UNIT
from moe_inspect.comparison.decisions import Decisions, recorded_otherwise
from moe_inspect.comparison.result import Paired, Row, missing_layers
from moe_inspect.reporting.tables.data import Thresholds
from moe_inspect.reporting.verdict.balance import COLLAPSED
from moe_inspect.reporting.verdict.findings import (
    DROP_LAST,
    DROP_ZERO_FILLED,
    NEVER_FED,
    Finding,
    finding,
)
from moe_inspect.text import cut, join_first, plural

DIFFERENT = 0.02  # share of a router's decisions from which it is more than rounding
LOWEST_TENTH = 0.1  # share of decisions that are close: those with the smallest margins
LITTLE = 0.1  # agreement beyond chance up to which two traces agree as chance would
CLOSE = 0.8  # share of the flips that are close from which rounding explains them
LAST = 5  # how many times as often last tokens must differ
FEWEST_LAST = 5


def misalignments(data: Decisions) -> list[Finding]:
    """Reasons why the decisions that are compared do not belong together: the same routing under
    another numbering, or tokens that were never fed."""
    causes = [*data.renumbered, *zero_filled(data), *last_token(data)]
    options = [cause.values["option"] for cause in causes]
    return [
        replace(cause, text=f"{cause.text} Add {option}.") if option else cause
        for cause, option in zip(causes, options, strict=True)
    ]


def zero_filled(data: Decisions) -> Iterator[Finding]:
    """Tokens that one trace sends to expert 0 in every slot: memory that was set to zero."""
    for name, n in (("A", data.counts.zero_filled_a), ("B", data.counts.zero_filled_b)):
        if n and _zeros_by_chance(data, name, n) < ALPHA:
            text = (
                f"{plural(n, 'token')} of {name} {'has' if n == 1 else 'have'} expert 0 in every "
                f"slot of every router, but different experts in the other trace: {NEVER_FED}, "
                "filled with zeros."
            )
            values: Row = {"zero_filled_tokens": n, "trace": name, "option": DROP_ZERO_FILLED}
            yield finding("never_fed", "critical", text, **values)


def _zeros_by_chance(data: Decisions, name: str, n: int) -> float:
    """Number of tokens that would choose expert 0 at every router if routers chose independently,
    each as often as for its other tokens; 0 if a router has several slots, since it chooses no
    expert twice. n: the tokens of trace `name` that have expert 0 everywhere."""
    shares = dict[str, float]()
    for r, _ in data.pairs:
        router, counts, decisions = data.a.routers[r], data.of(r), int(data.decisions_UX(r).sum())
        load = int(counts.load_UE[:, 0].sum() + (name == "B") * counts.moved_UE[:, 0].sum())
        # one more of each expert, so that there is a share even without other tokens
        share = max(load - n + 1, 1) / (max(decisions - n, 0) + router.experts)
        by_chance = share if router.top_k == 1 else 0.0
        shares[router.stack] = shares.get(router.stack, 1.0) * min(by_chance, 1.0)
    return data.counts.tokens * max(shares.values())


def last_token(data: Decisions) -> Iterator[Finding]:
    """Last tokens of sequences, if they differ far more than others."""
    last = data.counts.last_tokens * len(data.pairs)
    if data.counts.last_tokens < FEWEST_LAST or last == data.decisions:
        return
    mismatched = sum(counts.last_mismatch for counts in data.every)
    share, elsewhere = mismatched / last, (data.mismatched - mismatched) / (data.decisions - last)
    if share >= 0.5 and share >= LAST * elsewhere:
        text = (
            f"The last token of sequences has different experts in {share:.1%} of its decisions, "
            f"other tokens in {elsewhere:.2%}: a generating engine never feeds the last token."
        )
        shares: Row = {"mismatch_last": share, "mismatch_elsewhere": elsewhere}
        yield finding("never_fed", "critical", text, **shares, option=DROP_LAST)


def same(data: Decisions) -> Iterator[Finding]:
    """The first line: whether it is the same routing, and why not."""
    # "183 of 37,016 decisions (0.49%; 1.80% of tokens in any layer)"
    share = data.mismatched / data.decisions
    amount = (
        f"{data.mismatched:,} of {plural(data.decisions, 'decision')} ({percent(share)}; "
        f"{percent(data.tokens_mismatch)} of tokens in any layer) chose different experts"
    )
    values: Row = {
        "decisions": data.decisions,
        "mismatches": data.mismatched,
        "set_mismatch": share,
        "tokens": data.counts.tokens,
        "tokens_mismatch": data.tokens_mismatch,
    }
    if causes := misalignments(data):
        first, *others = causes
        text = f"Misaligned: {amount}, which means nothing until the traces are aligned."
        yield finding(first.kind, "critical", f"{text} {first.text}", **values, **first.values)
        yield from others
    elif not data.mismatched:
        yield _the_same(data, values)
    else:
        yield _other_experts(data, amount, values)


def _the_same(data: Decisions, values: Row) -> Finding:
    amount = f"all {plural(data.decisions, 'decision')} of {plural(data.counts.tokens, 'token')}"
    reordered = sum(int(counts.reordered_U.sum()) for counts in data.every)
    weights = sum(counts.weights_differ for counts in data.every)
    text = f"The same experts in {amount}"
    if not all(data.first_choice_known.values()):
        text += "; at least one trace does not record the order of slots"
    elif reordered:
        text += f"; {reordered:,} in a different order"
    elif data.weights_known and not weights:
        text = f"The same to the bit: {amount} have the same experts, in the same order, with "
        text += "the same weights"
    if not data.weights_known:
        text += "; at least one trace has no weights"
    elif weights:
        mean = sum(int(counts.l1_U.sum()) for counts in data.every) / UNIT / data.decisions
        text += f"; {weights:,} have different weights, by {mean:.2g} on average over all"
    if data.alike:
        text = f"The same to the bit: {amount} are in the same files"
    return finding("same", "good", f"{text}.", **values, weights_differ=weights)


def _other_experts(data: Decisions, amount: str, values: Row) -> Finding:
    hits_RU, decisions_RU = data.hits()
    share_R = hits_RU.sum(1) / np.maximum(decisions_RU.sum(1), 1)
    p_R = p_over_documents(list((hits_RU - DIFFERENT * decisions_RU)[:, data.units]))
    differing = [r for (r, _), p in zip(data.pairs, p_R, strict=True) if p < ALPHA]
    worst, highest = data.pairs[int(share_R.argmax())][0], float(share_R.max())
    (close, documents), margins = _close_share(data), _flip_margin(data)
    values = values | {"worst_set_mismatch": highest, "flips_in_lowest_tenth": close}
    about = data.place(worst)
    amount = f"{amount}; worst: layer {data.label(worst)}, {highest:.2%}."
    if differing:
        n = len(differing)
        text = (
            f"Different from layer {data.label(differing[0])} on: {amount} {n} of "
            f"{plural(len(share_R), 'router')} {'differs' if n == 1 else 'differ'} in "
            f"{DIFFERENT:.0%} of decisions or more.{margins}"
        )
        return finding("different", "warning", text, about, **values)
    if highest >= DIFFERENT:
        text = (
            f"{amount} Too few documents to tell whether {DIFFERENT:.0%} of decisions or more "
            f"differ in other text.{margins}"
        )
        return finding("undecided", "note", text, about, **values)
    if close >= CLOSE and _apart(close, LOWEST_TENTH, documents):
        text = (
            f"The same except for ties and rounding: {amount} {close:.0%} of these are among the "
            f"10% of decisions with the smallest margins.{margins}"
        )
        return finding("rounding", "good", text, about, **values)
    if close < CLOSE and _apart(close, CLOSE, documents):
        text = (
            f"{amount} Rounding does not explain them: only {close:.0%} were close decisions "
            f"(among the 10% with the smallest margins).{margins}"
        )
        return finding("different", "warning", text, about, **values)
    reason = "Record with --logits to tell whether rounding explains them."
    if not np.isnan(close):
        reason = (
            f"{close:.0%} of these were close decisions (among the 10% with the smallest margins), "
            f"mostly in {plural(round(documents), 'document')}: too few to tell whether rounding "
            "explains them."
        )
    elif "logits" in data.a.tables:
        reason = f"It is unknown whether rounding explains them: {data.why_no_margins}."
    return finding("undecided", "note", f"Nearly the same: {amount} {reason}", about, **values)


def _apart(share: float, expected: float, n: float) -> bool:
    """Whether a share of n independent cases is further from the expected one than chance."""
    case = (np.array([x * n]) for x in (share, expected, 1.0))
    return bool(log10_tail(*case)[0] < np.log10(ALPHA))


def _close_share(data: Decisions) -> tuple[float, float]:
    """Share of the flips in the lowest tenth of A's margins, NaN if no margin is known; and the
    number of documents with equally many flips that would show as much about that share."""
    mismatch_UM = np.sum([counts.margin_mismatch_UM for counts in data.every], axis=0)
    flips_U = mismatch_UM.sum(1)
    return ratio(mismatch_UM[:, 0].sum(), flips_U.sum()), effective_documents(flips_U)


def _flip_margin(data: Decisions) -> str:
    """A sentence that compares the margins of flips with those of all decisions."""
    parts = [part for counts in data.every for _, part in sorted(counts.flip_margins.items())]
    flips = np.concatenate([np.zeros(0), *parts])
    if data.margins is None or not len(flips):
        return ""
    middle, overall = np.median(flips), np.median(list(data.margins.medians.values()))
    return f" Median margin (logits): {middle:.2g} for flips, {overall:.2g} for all decisions."


def noise(data: Decisions) -> Iterator[Finding]:
    """Whether B differs from A by more than a second run of A does."""
    if data.noise is None:
        return
    if misalignments(data.noise):
        yield finding("noise", "note", "Unknown noise: the second run of A is misaligned with A.")
        return
    share, base = (x.mismatched / x.decisions for x in (data, data.noise))
    hits_U, decisions_U = data.hits().sum(1)
    noise_U, noise_decisions_U = data.noise.hits().sum(1)
    both_U = (decisions_U > 0) & (noise_decisions_U > 0)
    excess_U = (hits_U - noise_U * decisions_U / np.maximum(noise_decisions_U, 1))[both_U]
    (p,) = p_over_documents([excess_U])
    severity, result = "good", "not beyond that noise"
    if np.isnan(p):
        severity, result = "note", "with too few documents to tell whether that is beyond the noise"
    elif p < ALPHA:
        severity, result = "warning", "beyond that noise"
    text = (
        f"Two runs of A differ in {percent(base)} of decisions: B differs from A in "
        f"{percent(share)}, {result}."
    )
    yield finding("noise", severity, text, set_mismatch=share, noise_set_mismatch=base)


def growth(data: Decisions) -> Iterator[Finding]:
    """How often tokens that have differed differ again; a token near a tie may at several
    layers."""
    before = sum(data.differed_before.values())
    if len(data.pairs) < 2 or before < 30 or not data.mismatched:
        return
    first = sum(counts.new for counts in data.every)
    again, new = (data.mismatched - first) / before, first / max(data.decisions - before, 1)
    text = (
        f"Of the decisions of tokens that differ in an earlier layer, {again:.2%} differ; of the "
        f"others, {percent(new)}."
    )
    yield finding("growth", "note", text, again=again, new=new)


def load(data: Decisions) -> Iterator[Finding]:
    """Whether the load changes by more than it does between documents, and not by chance."""
    rows = data.tables["load_shift"].dropna(subset=["load_shift", "load_shift_halves"])
    if not data.mismatched or not len(rows):
        return
    moved = (data.of(int(r)).moved_UE[data.units] for r in rows["router"])  # one at a time
    p_R = p_over_documents(moved, lambda sums: np.abs(sums).sum(1))
    more_R = rows["load_shift"] > rows["load_shift_halves"]
    more, beyond = rows[more_R], rows[more_R & (p_R < ALPHA)]
    if len(beyond):
        severity, rows = "warning", beyond
        result = f"The load of {plural(len(rows), 'router')} differs by more than between documents"
    elif not len(more):
        severity, result = "good", "The load moves no more than between documents"
    else:
        severity, rows = "note", more
        result = "The load moves more than between documents, which may be chance"
        if np.isnan(p_R).any():
            result = "Too few documents to tell whether the load moved"
    row = rows.iloc[rows["load_shift"].argmax()]
    text = (
        f"{result}: up to {row['load_shift']:.2%} of the load moves, in layer "
        f"{data.label(int(row['router']))} (between two halves of A's documents: "
        f"{row['load_shift_halves']:.2%})."
    )
    shifts = row[["load_shift", "load_shift_halves"]]
    about = data.place(int(row["router"]))
    yield finding("load_shift", severity, text, about, **shifts, routers=len(beyond))


def collapsed(data: Decisions) -> Iterator[Finding]:
    """Whether a router sends most of its tokens to one expert, in one of the traces alone."""
    collapses, differences = list[Collapse](), list[np.ndarray]()
    for r, _ in data.pairs:
        counts, decisions = data.of(r), int(data.decisions_UX(r).sum())
        load_2UE = np.stack([counts.load_UE, counts.load_UE + counts.moved_UE])
        collapses.append(one := Collapse.of(r, load_2UE.sum(1), np.full(2, decisions)))
        more, less = load_2UE[:: -1 if one.name == "B" else 1]
        differences.append((more - less)[data.units, one.expert])
    p_R = p_over_documents(differences)
    beyond = [one for one, p in zip(collapses, p_R, strict=True) if one.differs and p < ALPHA]
    yield from collapse_findings(data, beyond)


class Collapse(NamedTuple):
    """The expert with the largest share of a router's tokens in A or B (`name`), its share in the
    other, and whether the router is collapsed in that one alone."""

    share: float
    other_share: float
    name: str
    expert: int
    router: int
    differs: bool

    @staticmethod
    def of(router: int, load_2E: np.ndarray, tokens_2: np.ndarray) -> Collapse:
        share_2E = load_2E / np.maximum(tokens_2, 1)[:, None]
        overloaded_2 = load_2E.max(1) >= Thresholds.overloaded * load_2E.mean(1)
        is_2 = (share_2E.max(1) >= COLLAPSED) & overloaded_2
        x, e = (int(i) for i in np.unravel_index(share_2E.argmax(), share_2E.shape))
        differs = bool(is_2[x] and not is_2[1 - x])
        return Collapse(share_2E[x, e], share_2E[1 - x, e], "AB"[x], e, router, differs)


def collapse_findings(
    data: Paired, collapses: list[Collapse], assumed: str = ""
) -> Iterator[Finding]:
    """The worst of the routers that are collapsed in one trace. `assumed`: what their chance level
    assumes."""
    if not collapses:
        return
    worst = max(collapses)
    n = sum(one.name == worst.name for one in collapses)
    text = (
        f"{worst.name} is collapsed in layer {data.label(worst.router)}: expert "
        f"{worst.expert} gets {worst.share:.0%} of its tokens, in "
        f"{'A' if worst.name == 'B' else 'B'} {worst.other_share:.0%} "
        f"({n} of {plural(len(data.pairs), 'router')}{assumed})."
    )
    values: Row = {"trace": worst.name, "expert": worst.expert, "token_share": worst.share}
    values |= {"other_token_share": worst.other_share, "routers": n}
    yield finding("collapsed", "critical", text, data.place(worst.router), **values)


class SharedExperts(NamedTuple):
    """Share of experts that A and B have in common in one router, and what independent choices with
    their loads would share; `lacking_U`: by document, the number of experts below that."""

    overlap: float
    by_chance: float
    lacking_U: np.ndarray


def _shared_experts(data: Decisions) -> list[SharedExperts]:
    """The shared experts of each router."""
    routers = list[SharedExperts]()
    for r, _ in data.pairs:
        counts, size_U = data.of(r), data.slots_U(r)
        common_U, size = size_U - counts.missing_UX.sum(1), max(int(size_U.sum()), 1)
        load_a_E = counts.load_UE.sum(0)
        load_b_E = load_a_E + counts.moved_UE.sum(0)
        decisions = max(int(data.decisions_UX(r).sum()), 1)
        by_chance = float(load_a_E @ load_b_E) / decisions / size
        lacking_U = (by_chance * size_U - common_U)[data.units]
        routers.append(SharedExperts(common_U.sum() / size, by_chance, lacking_U))
    return routers


def below_chance(data: Decisions) -> Iterator[Finding]:
    """Routers in which A and B share fewer experts than independent routers would."""
    if not data.mismatched:
        return
    routers = _shared_experts(data)
    below = np.flatnonzero(p_over_documents([one.lacking_U for one in routers]) < ALPHA).tolist()
    if not below:
        return
    i = min(below, key=lambda i: routers[i].overlap - routers[i].by_chance)
    (overlap, by_chance, _), r, n = routers[i], data.pairs[i][0], len(below)
    text = (
        f"In layer {data.label(r)} A and B share {overlap:.1%} of their experts, fewer than "
        f"independent choices with their loads would ({by_chance:.1%}; {n} of "
        f"{plural(len(routers), 'router')}): one avoids what the other chooses, as where experts "
        "are numbered differently."
    )
    values: Row = {"overlap": overlap, "overlap_by_chance": by_chance, "routers": n}
    yield finding("below_chance", "warning", text, data.place(r), **values)


def as_chance(data: Decisions) -> Iterator[Finding]:
    """A and B agree little more than independent routers would, in every router."""
    if not data.mismatched:
        return
    routers = _shared_experts(data)
    excess_R = [_beyond_chance(router) for router in routers]
    i = int(np.argmax(excess_R))
    if not -LITTLE < excess_R[i] < LITTLE:
        return
    most, layer = routers[i], data.label(data.pairs[i][0])
    text = (
        f"A and B agree about as often as chance would: they share at most {most.overlap:.1%} of "
        f"their experts (layer {layer}), and independent choices with their loads would share "
        f"{most.by_chance:.1%}."
    )
    values: Row = {"overlap": most.overlap, "overlap_by_chance": most.by_chance}
    yield finding("as_chance", "warning", text, **values)


def _beyond_chance(router: SharedExperts) -> float:
    """Agreement beyond chance: 0 as by chance, 1 if all experts are shared (Cohen's kappa)."""
    return (router.overlap - router.by_chance) / max(1 - router.by_chance, 1e-9)


def domains(data: Decisions) -> Iterator[Finding]:
    """Whether the routing of a domain changed more than that of the others, beyond chance."""
    domain_U, names = data.counts.domain_U[data.units], data.counts.domains
    if len(names) < 2 or not data.mismatched:
        return
    missing_U, size_U = np.zeros((2, len(domain_U)))
    for r, _ in data.pairs:
        missing_U += data.of(r).missing_UX.sum(1)[data.units]
        size_U += data.slots_U(r)[data.units]
    lacking_U = missing_U - size_U * missing_U.sum() / size_U.sum()
    residuals, shares = list[np.ndarray](), list[tuple[float, float]]()
    for d in range(len(names)):
        in_U = domain_U == d
        size, others = max(size_U[in_U].sum(), 1), max(size_U[~in_U].sum(), 1)
        # a domain is compared with the others: what these lack counts against it
        residuals.append(lacking_U * np.where(in_U, 1, -size_U[in_U].sum() / others))
        shares.append((missing_U[in_U].sum() / size, missing_U[~in_U].sum() / others))
    beyond = np.flatnonzero(p_over_documents(residuals) < ALPHA).tolist()
    if not beyond:
        return
    d = max(beyond, key=lambda d: shares[d][0] - shares[d][1])
    name, (share, others) = names[d], shares[d]
    text = (
        f'The routing of "{name}" changed more than that of the other domains: '
        f"{percent(share)} of its assignments go to other experts, {percent(others)} of theirs."
    )
    yield finding("domain", "note", text, domain=name, share=share, share_of_others=others)


def missing_tokens(data: Decisions) -> Iterator[Finding]:
    """Tokens that only one trace has, or that follow other token ids."""
    alignment, n = data.alignment, data.alignment.diverged
    a, b, matched = alignment.a.tokens, alignment.b.tokens, alignment.matched
    missing = [
        f"{tokens - matched:,} of {name}'s {tokens:,} tokens have no counterpart in {other}"
        for name, other, tokens in (("A", "B", a), ("B", "A", b))
        if tokens > matched
    ]
    if not missing:
        return
    text = " and ".join(missing)
    if n:
        text += (
            f"; {plural(n, 'sequence')} {'continues' if n == 1 else 'continue'} with different "
            f"token ids and {'is' if n == 1 else 'are'} not compared from there on"
        )
    values: Row = {"tokens_a": a, "tokens_b": b, "tokens_matched": matched, "diverged": n}
    yield finding("missing_tokens", "note", f"{text}.", **values)


def unchecked(data: Decisions) -> Iterator[Finding]:
    """That the tokens could not be checked to be the same, and what suggests that they are not."""
    if data.alignment.ids_known:
        return
    text = "At least one trace has no token ids: tokens are matched by document and position alone"
    sources = [trace.documents().set_index("document")["source"].dropna() for trace in data.traces]
    both = pd.concat(sources, axis=1, join="inner", keys=("a", "b"))
    # two runs may state the same files by different paths
    names = [[str(source).rpartition("/")[2] for source in both[side]] for side in both]
    if any(a == b for a, b in zip(*names, strict=True)) or both.empty:
        yield finding("unchecked", "note", f"{text}.")
        return
    first = " and ".join(f'"{cut(source, 40)}"' for source in both.iloc[0])
    yield finding(
        "unchecked",
        "warning",
        f"{text}, and no document of the same number has the same source in both ({first}): they "
        "may be other texts, of which such a comparison says nothing.",
    )


def recorded(data: Decisions) -> Iterator[Finding]:
    """Differences of model, device or settings, which may explain other experts."""
    facts = [
        f"{name} {cut(str(a), 40)} in A, {cut(str(b), 40)} in B"
        for name, (a, b) in recorded_otherwise(data).items()
    ]
    if facts and data.mismatched:
        yield finding("recorded", "note", f"Recorded differently: {join_first(facts, 5, '; ')}.")


def p_over_documents(
    residuals: Iterable[np.ndarray], measure: Callable[[np.ndarray], np.ndarray] | None = None
) -> np.ndarray:
    """P-values of a measure of the sums over documents of each of these residuals, corrected for
    their number, by random signs of whole documents; NaN with too few documents. residuals: each
    [U], or [U, X] with a measure: [B, X] → [B]."""
    observed, drawn, measured = list[float](), list[np.ndarray](), measure or np.ravel
    for residual in residuals:
        if len(residual) < FEWEST_TO_JUDGE:
            observed.append(np.nan)
            continue
        residual_UX = residual if measure else residual[:, None]
        observed.append(float(measured(residual_UX.sum(0, keepdims=True))[0]))
        drawn.append(measured(signed_sums(residual_UX)))
    too_few = len(drawn) < len(observed)
    return np.full(len(observed), np.nan) if too_few else joint_p(observed, drawn)


def percent(share: float) -> str:
    return f"{share:.2%}" if share >= 1e-4 or not share else f"{100 * share:.1g}%"


# in the order in which they are read; the first mean nothing if the traces are misaligned
OF_ALIGNED = (noise, growth, collapsed, below_chance, as_chance, load, domains)
OF_ALL = (missing_tokens, missing_layers, unchecked, recorded)


def findings(data: Decisions) -> Iterator[Finding]:
    yield from same(data)
    for check in OF_ALL if misalignments(data) else (*OF_ALIGNED, *OF_ALL):
        yield from check(data)
