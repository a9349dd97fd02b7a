"""What a comparison comes to: the same to the bit, the same but for rounding, different from some
layer on, or misaligned, with what to do.

Each check takes the comparison and returns its findings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from moe_inspect.analysis.metrics.chance import ALPHA
from moe_inspect.analysis.metrics.uncertainty import log10_tail
from moe_inspect.comparison.counting.counts import UNIT
from moe_inspect.comparison.decisions.agreement import recorded_otherwise
from moe_inspect.comparison.decisions.data import Decisions
from moe_inspect.comparison.decisions.effects import (
    below_chance,
    collapsed,
    domains,
    growth,
    load,
    losses,
    name_of,
    p_over_documents,
    percent,
)
from moe_inspect.comparison.result import missing_layers
from moe_inspect.reporting.verdict.findings import Finding, finding, most_important_first
from moe_inspect.text import join_first, plural

DIFFERENT = 0.02  # share of a router's decisions from which it is more than rounding
LOWEST_TENTH = 0.1  # share of decisions that are close: those with the smallest margins
CLOSE = 0.8  # share of the flips that are close from which rounding explains them
LAST = 5  # how many times as often last tokens must differ
FEWEST_LAST = 5


def is_misaligned(data: Decisions) -> bool:
    """Whether decisions are compared that do not belong together, so that what differs means
    nothing."""
    return any(True for check in (misaligned, zero_filled, last_token) for _ in check(data))


def misaligned(data: Decisions) -> Iterator[Finding]:
    """The same routing under another numbering."""
    for one in data.misaligned:
        mend = f" Add {one.option}." if one.option else ""
        yield finding(one.kind, "critical", one.text + mend, option=one.option, **one.values)


def zero_filled(data: Decisions) -> Iterator[Finding]:
    """Tokens that one trace sends to expert 0 in every slot: not routing, but memory that was set
    to zero."""
    sides = ("A", data.counts.zero_filled_a), ("B", data.counts.zero_filled_b)
    for name, n in sides:
        if n and _zeros_by_chance(data, name, n) < ALPHA:
            yield finding(
                "zero_filled",
                "critical",
                f"{plural(n, 'token')} of {name} {'has' if n == 1 else 'have'} expert 0 in every "
                "slot of every router, but different experts in the other trace: tokens that were "
                "never fed, or padding, filled with zeros. Add --drop-zero-filled.",
                tokens=n,
                trace=name,
                option="--drop-zero-filled",
            )


def _zeros_by_chance(data: Decisions, name: str, n: int) -> float:
    """How many tokens would choose expert 0 at every router if these chose independently, each as
    often as for its other tokens; none where a router has several slots, as it chooses no expert
    twice. n: the tokens of `name` that have it everywhere."""
    shares = dict[str, float]()
    for r, _ in data.pairs:
        router, counts = data.router(r), data.of(r)
        decisions = int(data.decisions_UX(r).sum())
        load = int(counts.load_UE[:, 0].sum() + (name == "B") * counts.moved_UE[:, 0].sum())
        # one more of each expert: also where no other token is known
        share = max(load - n + 1, 1) / (max(decisions - n, 0) + router.experts)
        by_chance = share if router.top_k == 1 else 0.0
        shares[router.stack] = shares.get(router.stack, 1.0) * min(by_chance, 1.0)
    return data.counts.tokens * max(shares.values())


def last_token(data: Decisions) -> Iterator[Finding]:
    """The last token of a sequence, which a generating engine never feeds."""
    routers = len(data.pairs)
    last = data.counts.last_tokens * routers
    of_last = sum(data.of(r).last_mismatch for r, _ in data.pairs)
    if data.counts.last_tokens < FEWEST_LAST or last == data.decisions:
        return
    there, elsewhere = of_last / last, (data.mismatched - of_last) / (data.decisions - last)
    if there >= 0.5 and there >= LAST * elsewhere:
        yield finding(
            "last_token",
            "critical",
            f"The last token of sequences has different experts in {there:.1%} of its decisions, "
            f"other tokens in {elsewhere:.2%}: a generating engine never feeds the last token. "
            "Add --drop-last.",
            mismatch_last=there,
            mismatch_elsewhere=elsewhere,
            option="--drop-last",
        )


def same(data: Decisions) -> Iterator[Finding]:
    """Whether it is the same routing; the headline."""
    if is_misaligned(data):
        yield finding(
            "misaligned",
            "critical",
            f"Misaligned: {_amount(data)} chose different experts, which means nothing until the "
            "traces are aligned.",
            **_values(data),
        )
    elif not data.mismatched:
        yield _the_same(data)
    else:
        yield _other_experts(data)


def _the_same(data: Decisions) -> Finding:
    all_of = f"all {plural(data.decisions, 'decision')} of {plural(data.counts.tokens, 'token')}"
    counts = [data.of(r) for r, _ in data.pairs]
    reordered = sum(int(c.reordered_U.sum()) for c in counts)
    weights = sum(c.weights_differ for c in counts)
    known = data.a.has_weights and data.b.has_weights
    said = f"The same experts in {all_of}"
    if data.alike:
        said = f"The same to the bit: {all_of} are in the same files"
    elif not all(data.first_choice_known.values()):
        said += "; at least one trace does not record the order of slots"
    elif reordered:
        said += f"; {reordered:,} in a different order"
    elif known and not weights:
        said = f"The same to the bit: {all_of} have the same experts, in the same order, with "
        said += "the same weights"
    if known and weights and not data.alike:
        mean = sum(int(c.l1_U.sum()) for c in counts) / UNIT / data.decisions
        said += f"; {weights:,} have different weights, by {mean:.2g} on average over all"
    elif not known and not data.alike:
        said += "; at least one trace has no weights"
    return finding("same", "good", said + ".", **_values(data), weights_differ=weights)


def _other_experts(data: Decisions) -> Finding:
    hits_RU, of_RU = _hits(data)
    share_R = hits_RU.sum(1) / np.maximum(of_RU.sum(1), 1)
    beyond_RU = (hits_RU - DIFFERENT * of_RU)[:, data.units]
    p_R = p_over_documents(list(beyond_RU[..., None]), lambda sums: sums[:, 0])
    differing = [r for (r, _), p in zip(data.pairs, p_R, strict=True) if p < ALPHA]
    worst, most = data.pairs[int(share_R.argmax())][0], float(share_R.max())
    (close, documents), at = _close_share(data), _flip_margin(data)
    values = _values(data) | {"worst_set_mismatch": most, "flips_in_lowest_tenth": close}
    about: dict[str, Any] = {"layer": data.router(worst).layer, "router": worst}
    worst_of = f"worst: layer {name_of(data, worst)}, {most:.2%}"
    if differing:
        n = len(differing)
        return finding(
            "different",
            "warning",
            f"Different from layer {name_of(data, differing[0])} on: {_amount(data)} chose "
            f"different experts; {worst_of}. {n} of {plural(len(share_R), 'router')} "
            f"{'differs' if n == 1 else 'differ'} in {DIFFERENT:.0%} of decisions or more.{at}",
            about,
            **values,
        )
    if most >= DIFFERENT:
        return finding(
            "different_unknown",
            "note",
            f"{_amount(data)} chose different experts; {worst_of}. Too few documents to tell "
            f"whether {DIFFERENT:.0%} of decisions or more differ in other text.{at}",
            about,
            **values,
        )
    if close is not None and close >= CLOSE and _apart(close, LOWEST_TENTH, documents):
        return finding(
            "rounding",
            "good",
            f"The same except for ties and rounding: {_amount(data)} chose different experts; "
            f"{worst_of}. {close:.0%} of these are among the 10% of decisions with the smallest "
            f"margins.{at}",
            about,
            **values,
        )
    if close is not None and close < CLOSE and _apart(close, CLOSE, documents):
        return finding(
            "not_rounding",
            "warning",
            f"{_amount(data)} chose different experts; {worst_of}. Rounding does not explain them: "
            f"only {close:.0%} were close decisions (among the 10% with the smallest margins).{at}",
            about,
            **values,
        )
    untold = "Record with --logits to tell whether rounding explains them."
    if close is not None:
        untold = (
            f"{close:.0%} of these were close decisions (among the 10% with the smallest margins), "
            f"mostly in {plural(round(documents), 'document')}: too few to tell whether rounding "
            "explains them."
        )
    elif "logits" in data.a.tables:
        untold = f"It is unknown whether rounding explains them: {data.why_no_margins}."
    return finding(
        "rounding_unknown",
        "note",
        f"Nearly the same: {_amount(data)} chose different experts; {worst_of}. {untold}",
        about,
        **values,
    )


def _apart(share: float, expected: float, n: float) -> bool:
    """Whether a share of n independent cases is further from the expected one than chance."""
    case = (np.array([x * n]) for x in (share, expected, 1.0))
    return bool(log10_tail(*case)[0] < np.log10(ALPHA))


def _amount(data: Decisions) -> str:
    """ "183 of 37,016 decisions (0.49%; 1.80% of tokens in any layer)" """
    return (
        f"{data.mismatched:,} of {plural(data.decisions, 'decision')} "
        f"({percent(data.mismatched / data.decisions)}; {percent(data.tokens_mismatch)} of "
        "tokens in any layer)"
    )


def _values(data: Decisions) -> dict[str, Any]:
    return {
        "decisions": data.decisions,
        "mismatches": data.mismatched,
        "set_mismatch": data.mismatched / data.decisions,
        "tokens": data.counts.tokens,
        "tokens_mismatch": data.tokens_mismatch,
    }


def _close_share(data: Decisions) -> tuple[float | None, float]:
    """Share of the flips in the lowest tenth of A's margins, None where none is known; and how many
    documents with equally many flips would tell as much of that share."""
    mismatch_UM = np.sum([data.of(r).margin_mismatch_UM for r, _ in data.pairs], axis=0)
    flips_U = mismatch_UM.sum(1).astype(float)
    total = flips_U.sum()
    if not total:
        return None, 0.0
    return float(mismatch_UM[:, 0].sum() / total), float(total**2 / (flips_U**2).sum())


def _flip_margin(data: Decisions) -> str:
    """A sentence on the margins of flips beside those of all decisions."""
    parts = [part for r, _ in data.pairs for _, part in sorted(data.of(r).flip_margins.items())]
    flips = np.concatenate([np.zeros(0), *parts])
    if data.margins is None or not len(flips):
        return ""
    overall = float(np.median(list(data.margins.medians.values())))
    return (
        f" Median margin (logits): {np.median(flips):.2g} for flips, {overall:.2g} for all "
        "decisions."
    )


def noise(data: Decisions) -> Iterator[Finding]:
    """Two runs of one model, as what is no difference."""
    if data.noise is None:
        return
    if is_misaligned(data.noise):
        yield finding("noise", "note", "Unknown noise: the second run of A is misaligned with A.")
        return
    share, base = (x.mismatched / x.decisions for x in (data, data.noise))
    (hits_U, of_U), (noise_U, of_noise_U) = _hits(data).sum(1), _hits(data.noise).sum(1)
    both_U = (of_U > 0) & (of_noise_U > 0)
    beyond_U = (hits_U - noise_U * of_U / np.maximum(of_noise_U, 1))[both_U]
    (p,) = p_over_documents([beyond_U[:, None]], lambda sums: sums[:, 0])
    severity, said = "good", "not beyond that noise"
    if np.isnan(p):
        severity, said = "note", "with too few documents to tell whether that is beyond the noise"
    elif p < ALPHA:
        severity, said = "warning", "beyond that noise"
    text = (
        f"Two runs of A differ in {percent(base)} of decisions: B differs from A in "
        f"{percent(share)}, {said}."
    )
    yield finding("noise", severity, text, set_mismatch=share, noise_set_mismatch=base)


def _hits(data: Decisions) -> np.ndarray:
    """int64 [2, R, U]: decisions with another set of experts, and all that are compared, by router
    and unit of A's documents."""
    of_R = [(data.of(r).mismatch_UX.sum(1), data.decisions_UX(r).sum(1)) for r, _ in data.pairs]
    return np.stack(of_R, axis=1)


def missing_tokens(data: Decisions) -> Iterator[Finding]:
    """Tokens that only one of the traces has, or that come after other token ids."""
    alignment = data.alignment
    beyond = (("A", "B", alignment.a.tokens), ("B", "A", alignment.b.tokens))
    said = [
        f"{tokens - alignment.matched:,} of {name}'s {tokens:,} tokens have no counterpart in "
        f"{other}"
        for name, other, tokens in beyond
        if tokens > alignment.matched
    ]
    if not said:
        return
    more = ""
    if alignment.diverged:
        n = alignment.diverged
        more = (
            f"; {plural(n, 'sequence')} {'continues' if n == 1 else 'continue'} with different "
            f"token ids and {'is' if n == 1 else 'are'} not compared from there on"
        )
    yield finding(
        "missing_tokens",
        "note",
        f"{' and '.join(said)}{more}.",
        tokens_a=alignment.a.tokens,
        tokens_b=alignment.b.tokens,
        tokens_matched=alignment.matched,
        diverged=alignment.diverged,
    )


def unchecked(data: Decisions) -> Iterator[Finding]:
    """Whether the tokens are the same could not be checked."""
    if not data.alignment.ids_known:
        yield finding(
            "unchecked",
            "note",
            "At least one trace has no token ids: tokens are matched by document and position "
            "alone.",
        )


def recorded(data: Decisions) -> Iterator[Finding]:
    """How the two were recorded otherwise."""
    apart = recorded_otherwise(data)
    if apart and data.mismatched:
        said = [f"{name} {_short(a)} in A, {_short(b)} in B" for name, (a, b) in apart.items()]
        yield finding("recorded", "note", f"Recorded differently: {join_first(said, 5, '; ')}.")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


Check = Callable[[Decisions], Iterator[Finding]]
# in the order in which they are read
CHECKS: tuple[Check, ...] = (
    same,
    misaligned,
    zero_filled,
    last_token,
    noise,
    losses,
    growth,
    collapsed,
    below_chance,
    load,
    domains,
    missing_tokens,
    missing_layers,
    unchecked,
    recorded,
)
# those that say nothing of misaligned traces
OF_ALIGNED: tuple[Check, ...] = (noise, growth, collapsed, below_chance, load, domains)


def findings(data: Decisions) -> Iterator[Finding]:
    """What every check finds, most important first."""
    left_out = OF_ALIGNED if is_misaligned(data) else ()
    found = [one for check in CHECKS if check not in left_out for one in check(data)]
    yield from most_important_first(found)
