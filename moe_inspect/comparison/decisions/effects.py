"""What a difference between two traces brings with it: whether it grows from layer to layer, moves
the load of the experts, and which of the two predicts better."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_inspect.analysis.metrics.chance import ALPHA, FEWEST_TO_JUDGE, joint_p, signed_sums
from moe_inspect.comparison.decisions.data import Decisions
from moe_inspect.reporting.tables.data import Thresholds
from moe_inspect.reporting.verdict.balance import COLLAPSED
from moe_inspect.reporting.verdict.findings import Finding, Severity, finding
from moe_inspect.text import layer_label, plural


def losses(data: Decisions) -> Iterator[Finding]:
    """Which of the two predicts the same tokens better."""
    table: Any = () if data.alike else data.tables["loss"]
    if not len(table):
        return
    row = table.iloc[0]
    change, low, high = row[["difference_nats", "difference_nats_low", "difference_nats_high"]]
    b, a, n = row["mean_loss_nats_b"], row["mean_loss_nats_a"], int(row["tokens"])
    of = f"the {plural(n, 'token')} with the same next token in both"
    if not row["absolute_difference_nats"]:
        yield finding("loss", "good", f"The same loss at each of {of}: {a:.4f} nats per token.")
        return
    between = f", 95 % {low:+.4f} to {high:+.4f} over documents" if low == low else ""
    text = f"a loss of {b:.4f} nats per token, A {a:.4f} ({change:+.4f}{between}), on {of}"
    severity: Severity = "note"
    of_U = {side: data.losses[side][:, data.units].sum(0) for side in "ab"}
    (p,) = p_over_documents([(of_U["b"] - of_U["a"])[:, None]], lambda sums: np.abs(sums[:, 0]))
    if np.isnan(p):
        said = f"B has {text}: too few documents to tell whether that is chance."
    elif p < ALPHA and change > 0:
        severity, said = "warning", f"B predicts worse than A: it has {text}."
    elif p < ALPHA:
        severity, said = "good", f"B predicts better than A: it has {text}."
    else:
        # which does not say that it is the same: the interval is how far apart it may be
        said = f"These documents do not show which predicts better: B has {text}."
    yield finding(
        "loss",
        severity,
        said,
        difference_nats=change,
        difference_nats_low=low,
        difference_nats_high=high,
        tokens=n,
    )


def growth(data: Decisions) -> Iterator[Finding]:
    """How often tokens that have differed differ again: a description of these tokens, of which
    those near a tie may be so at several layers."""
    pairs = [data.of(r) for r, _ in data.pairs]
    before = sum(c.before for c in pairs)
    decisions = data.decisions
    if len(pairs) < 2 or before < 30 or not data.mismatched:
        return
    again = sum(c.again for c in pairs) / before
    fresh = sum(c.new for c in pairs) / max(decisions - before, 1)
    yield finding(
        "growth",
        "note",
        f"Of the decisions of tokens that differ in an earlier layer, {again:.2%} differ; of the "
        f"others, {percent(fresh)}.",
        again=again,
        new=fresh,
    )


def load(data: Decisions) -> Iterator[Finding]:
    """Whether the load of the experts changed by more than it does between documents, and not by
    chance among them."""
    table: Any = data.tables["load_shift"]
    rows = table.dropna(subset=["load_shift", "load_shift_halves"])
    if not data.mismatched or not len(rows):
        return
    moved = [data.of(int(r)).moved_UE[data.units] for r in rows["router"]]
    p_R = p_over_documents(moved, lambda sums: np.abs(sums).sum(1))
    more_R = rows["load_shift"] > rows["load_shift_halves"]
    more, beyond = rows[more_R], rows[more_R & (p_R < ALPHA)]
    severity: Severity = "note"
    if len(beyond):
        severity, of = "warning", beyond
        said = f"The load of {plural(len(beyond), 'router')} differs by more than between documents"
    elif not len(more):
        severity, of, said = "good", rows, "The load moves no more than between documents"
    elif np.isnan(p_R).any():
        of, said = more, "Too few documents to tell whether the load moved"
    else:
        of, said = more, "The load moves more than between documents, which may be chance"
    row = of.loc[of["load_shift"].idxmax()]
    yield finding(
        "load_shift",
        severity,
        f"{said}: up to {row['load_shift']:.2%} of the load moves, in layer "
        f"{name_of(data, int(row['router']))} (between two halves of A's documents: "
        f"{row['load_shift_halves']:.2%}).",
        {"layer": row["layer"], "router": row["router"]},
        load_shift=row["load_shift"],
        load_shift_halves=row["load_shift_halves"],
        routers=len(beyond),
    )


def collapsed(data: Decisions) -> Iterator[Finding]:
    """Whether in one of the traces a router sends most of its tokens to one expert, and not in the
    other."""
    cases, apart = list[Collapse](), list[np.ndarray]()
    for r, _ in data.pairs:
        counts, decisions = data.of(r), int(data.decisions_UX(r).sum())
        load_2UE = np.stack([counts.load_UE, counts.load_UE + counts.moved_UE])
        cases.append(one := Collapse.of(r, load_2UE.sum(1), np.full(2, decisions)))
        more, less = load_2UE[:: -1 if one.name == "B" else 1]
        apart.append((more - less)[data.units, one.expert : one.expert + 1])
    p_R = p_over_documents(apart, lambda sums: sums[:, 0])
    found = [one for one, p in zip(cases, p_R, strict=True) if one.differs and p < ALPHA]
    yield from said_of_collapse(data, found)


class Collapse(NamedTuple):
    """The expert with the largest share of a router's tokens in A or B (`name`), the share that it
    has in the other, and whether the router is collapsed in that one alone."""

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


def said_of_collapse(data: Any, found: list[Collapse], beyond: str = "") -> Iterator[Finding]:
    """The finding on routers that are collapsed in one trace, beyond chance; `beyond`: what that
    takes for granted."""
    if not found:
        return
    worst, routers = max(found), data.a.routers
    n = sum(one.name == worst.name for one in found)
    yield finding(
        "collapsed",
        "critical",
        f"{worst.name} is collapsed in layer {layer_label(routers, worst.router)}: expert "
        f"{worst.expert} gets {worst.share:.0%} of its tokens, in "
        f"{'A' if worst.name == 'B' else 'B'} {worst.other_share:.0%} "
        f"({n} of {plural(len(data.pairs), 'router')}{beyond}).",
        {"layer": routers[worst.router].layer, "router": worst.router},
        trace=worst.name,
        expert=worst.expert,
        token_share=worst.share,
        other_token_share=worst.other_share,
        routers=n,
    )


def below_chance(data: Decisions) -> Iterator[Finding]:
    """Routers in which the two share fewer experts than if they chose without each other."""
    if not data.mismatched:
        return
    lacking, shares = list[np.ndarray](), list[tuple[float, float]]()
    for r, _ in data.pairs:
        counts, decisions_U = data.of(r), data.decisions_UX(r).sum(1)
        size_U = data.router(r).top_k * decisions_U - counts.short_UX.sum(1)
        common_U, size = size_U - counts.missing_UX.sum(1), max(int(size_U.sum()), 1)
        load_a_E = counts.load_UE.sum(0)
        load_b_E = load_a_E + counts.moved_UE.sum(0)
        by_chance = float(load_a_E @ load_b_E) / max(int(decisions_U.sum()), 1) / size
        lacking.append((by_chance * size_U - common_U)[data.units, None])
        shares.append((common_U.sum() / size, by_chance))
    p_R = p_over_documents(lacking, lambda sums: sums[:, 0])
    below = [i for i in range(len(shares)) if p_R[i] < ALPHA]
    if not below:
        return
    i = min(below, key=lambda i: shares[i][0] - shares[i][1])
    (overlap, by_chance), r = shares[i], data.pairs[i][0]
    yield finding(
        "below_chance",
        "warning",
        f"In layer {name_of(data, r)} A and B share {overlap:.1%} of their experts, fewer than "
        f"independent choices with their loads would ({by_chance:.1%}; {len(below)} of "
        f"{plural(len(shares), 'router')}): one avoids what the other chooses, as where experts "
        "are numbered differently.",
        {"layer": data.router(r).layer, "router": r},
        overlap=overlap,
        overlap_by_chance=by_chance,
        routers=len(below),
    )


def domains(data: Decisions) -> Iterator[Finding]:
    """Whether the routing of a domain changed by more than that of the others, beyond chance among
    documents."""
    domain_U, names = data.counts.domain_U[data.units], data.counts.domains
    if len(names) < 2 or not data.mismatched:
        return
    missing_U, size_U = np.zeros((2, len(domain_U)))
    for r, _ in data.pairs:
        missing_U += data.of(r).missing_UX.sum(1)[data.units]
        size_U += data.router(r).top_k * data.decisions_UX(r).sum(1)[data.units]
        size_U -= data.of(r).short_UX.sum(1)[data.units]
    lacking_U = missing_U - size_U * missing_U.sum() / size_U.sum()
    residuals, shares = list[np.ndarray](), list[tuple[float, float]]()
    for d in range(len(names)):
        in_U = domain_U == d
        of, others = size_U[in_U].sum(), size_U[~in_U].sum()
        # a domain is compared with the others: what these lack counts against it
        residuals.append((lacking_U * np.where(in_U, 1, -of / max(others, 1)))[:, None])
        shares.append((missing_U[in_U].sum() / max(of, 1), missing_U[~in_U].sum() / max(others, 1)))
    p_D = p_over_documents(residuals, lambda sums: sums[:, 0])
    beyond = [d for d in range(len(names)) if p_D[d] < ALPHA]
    if not beyond:
        return
    d = max(beyond, key=lambda d: shares[d][0] - shares[d][1])
    share, others = shares[d]
    yield finding(
        "domain",
        "note",
        f'The routing of "{names[d]}" changed more than that of the other domains: '
        f"{percent(share)} of its assignments go to other experts, {percent(others)} of theirs.",
        domain=names[d],
        share=share,
        share_of_others=others,
    )


def p_over_documents(
    residuals: Sequence[np.ndarray], measure: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """P-values of a measure of the sums over documents of each of these residuals, corrected for
    their number, by random signs of whole documents; NaN with too few documents. residuals: each
    [U, X]. measure: [B, X] → [B]."""
    if any(len(residual_UX) < FEWEST_TO_JUDGE for residual_UX in residuals):
        return np.full(len(residuals), np.nan)
    observed = [float(measure(x.sum(0, keepdims=True))[0]) for x in residuals]
    return joint_p(observed, [measure(signed_sums(x)) for x in residuals])


def percent(share: float) -> str:
    return f"{share:.2%}" if share >= 1e-4 or not share else f"{100 * share:.1g}%"


def name_of(data: Decisions, r: int) -> str:
    return layer_label(data.a.routers, r)
