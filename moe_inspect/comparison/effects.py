"""What a difference between two traces brings with it: whether it grows from layer to layer, moves
the load of the experts, and which of the two predicts better."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe_inspect.comparison.data import PairData
from moe_inspect.reporting.verdict.findings import Finding, Severity, finding
from moe_inspect.text import layer_label, plural


def losses(data: PairData) -> Iterator[Finding]:
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
    known = low == low
    between = f", 95 % {low:+.4f} to {high:+.4f} over documents" if known else ""
    text = f"a loss of {b:.4f} nats per token, A {a:.4f} ({change:+.4f}{between}), on {of}"
    severity: Severity = "note"
    if not known:
        said = f"B has {text}: too few documents to tell whether that is chance."
    elif low > 0:
        severity, said = "warning", f"B predicts worse than A: it has {text}."
    elif high < 0:
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


def growth(data: PairData) -> Iterator[Finding]:
    """Whether a difference makes further ones in later layers."""
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
        f"After a token's first difference, {again:.2%} of its later decisions differ; without "
        f"one before, {percent(fresh)}.",
        again=again,
        new=fresh,
    )


def load(data: PairData) -> Iterator[Finding]:
    """Whether the load of the experts changed by more than documents do."""
    if not data.mismatched:
        return
    table: Any = data.tables["load_shift"]
    rows = table.dropna(subset=["load_shift", "load_shift_halves"])
    beyond = rows[rows["load_shift"] > rows["load_shift_halves"]]
    if not len(rows):
        return
    row = rows.loc[rows["load_shift"].idxmax()]
    where = f"up to {row['load_shift']:.2%} of the load moves, in layer "
    where += name_of(data, int(row["router"]))
    halves = f"between two halves of A's documents: {row['load_shift_halves']:.2%}"
    yield finding(
        "load_shift",
        "warning" if len(beyond) else "good",
        (
            f"The load of {plural(len(beyond), 'router')} differs by more than between documents: "
            if len(beyond)
            else "The load is the same: "
        )
        + f"{where} ({halves}).",
        {"layer": row["layer"], "router": row["router"]},
        load_shift=row["load_shift"],
        load_shift_halves=row["load_shift_halves"],
        routers=len(beyond),
    )


def percent(share: float) -> str:
    return f"{share:.2%}" if share >= 1e-4 or not share else f"{100 * share:.1g}%"


def name_of(data: PairData, r: int) -> str:
    return layer_label(data.a.routers, r)
