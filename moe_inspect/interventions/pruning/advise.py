"""Warnings about a choice of experts to drop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moe_inspect.analysis.counting.counts import Counts
from moe_inspect.analysis.metrics.uncertainty import FEWEST_DOCUMENTS
from moe_inspect.analysis.metrics.worth import JUDGED, super_experts
from moe_inspect.interventions.held_out import HeldOut
from moe_inspect.interventions.pruning.calibration import RANDOM, sequences_of
from moe_inspect.interventions.pruning.measure import Drop, Losses
from moe_inspect.text import plural
from moe_inspect.trace.reader import Trace

FREQUENCY = "frequency"
BEGINNING = 32  # tokens; shorter texts are compared whole
NAMED = 6  # experts or domains listed in a sentence


@dataclass(frozen=True)
class Finding:
    """`kind`: coverage, few tokens, overlap, super experts, few documents, random or frequency."""

    kind: str
    text: str


def of_coverage(
    trace: Trace, routers: Sequence[int], counts: Counts, held_out: HeldOut, drop: Drop
) -> Iterator[Finding]:
    """What the calibration text did not show. `routers`: the trace's, of each router of the model;
    `counts`: of the trace."""
    known = {counts.domains[d] for d in np.flatnonzero(counts.tokens_D)}
    asked = {row.domain for batch in held_out.batches for row in batch}
    if missing := sorted(asked - known):
        yield Finding(
            "coverage",
            f"the calibration text lacks {_list(missing)}: the value of experts for it is unknown "
            f"({trace.path} has {_list(sorted(known))})",
        )
    few = [
        f"L{site.layer}E{e}"
        for site, r, gone in zip(held_out.sites, routers, drop, strict=True)
        for e in gone
        if counts.load_E(r)[e] < JUDGED
    ]
    if few:
        yield Finding(
            "few tokens",
            f"{plural(len(few), 'dropped expert')} had fewer than {JUDGED} assignments in the "
            f"calibration text: {_list(few)}",
        )


def of_overlap(trace: Trace, held_out: HeldOut) -> Iterator[Finding]:
    """Held-out text that was calibrated on, whole or cut elsewhere; or that the trace does not tell
    its text."""
    fed: dict[bytes, list[np.ndarray]] = {}
    for row in sequences_of(trace):
        fed.setdefault(_beginning(row.ids), []).append(row.ids)
    if not fed:
        yield Finding(
            "overlap",
            f"{trace.path} does not hold its text: it may include the held-out text",
        )
    rows = [row for batch in held_out.batches for row in batch]
    again = {
        row.document
        for row in rows
        for other in fed.get(_beginning(row.ids), [])
        if np.array_equal(row.ids[: len(other)], other[: len(row.ids)])
    }
    if again:
        documents = plural(len({row.document for row in rows}), "held-out document")
        yield Finding(
            "overlap",
            f"{len(again)} of {documents} are in the calibration trace: their loss says nothing "
            "about unseen text",
        )


def _beginning(ids: np.ndarray) -> bytes:
    return ids[:BEGINNING].astype(np.int32).tobytes()


def of_super_experts(
    trace: Trace, routers: Sequence[int], counts: Counts, held_out: HeldOut, drop: Drop
) -> Iterator[Finding]:
    """Super experts that would go; or that the trace does not tell which they are."""
    peak_LE = [peak_E for r in routers if (peak_E := counts.of[r].peak_E) is not None]
    if len(peak_LE) < len(routers):
        yield Finding(
            "super experts",
            f"{trace.path} does not show which experts are super experts: record it with "
            "--output-peaks",
        )
        return
    layers = np.array([site.layer for site in held_out.sites])
    is_super_LE = super_experts(peak_LE, layers, trace.blocks)
    gone = [
        f"L{site.layer}E{e}"
        for site, is_super_E, dropped in zip(held_out.sites, is_super_LE, drop, strict=True)
        for e in dropped
        if is_super_E[e]
    ]
    if gone:
        yield Finding(
            "super experts",
            f"{plural(len(gone), 'super expert')} would be dropped ({_list(gone)}): they produce "
            "the largest activations of the model",
        )


def of_losses(losses: Losses, by: str) -> Iterator[Finding]:
    """Where choosing at random, or by frequency, is as good."""
    if (documents := len(losses.tokens_U)) < FEWEST_DOCUMENTS:
        yield Finding(
            "few documents",
            f"{plural(documents, 'held-out document')}: too few to judge chance",
        )
    if by != RANDOM and RANDOM in losses.nats:
        yield from _beside_random(losses, by)
    if by not in (RANDOM, FREQUENCY) and FREQUENCY in losses.nats:
        value, low, high = losses.change(by, FREQUENCY)
        numbers = f"{_two(losses, by, FREQUENCY)} ({_interval(value, low, high)})"
        if low > 0:
            yield Finding("frequency", f"frequency is better than {by}: a loss of {numbers}")
        elif value >= 0 or high >= 0:
            yield Finding(
                "frequency", f"{by} is not clearly better than frequency: a loss of {numbers}"
            )


def _beside_random(losses: Losses, by: str) -> Iterator[Finding]:
    value, low, high = losses.change(by, RANDOM)
    draws = losses.loss(RANDOM)
    numbers = (
        f"{_two(losses, by, RANDOM)}, the mean of {plural(len(draws), 'draw')} from "
        f"{min(draws):.3f} to {max(draws):.3f} ({_interval(value, low, high)})"
    )
    if low > 0:
        yield Finding("random", f"random is better than {by}: a loss of {numbers}")
    elif value >= 0:
        yield Finding("random", f"random is as good as {by}: a loss of {numbers}")
    elif high >= 0:
        yield Finding("random", f"{by} is not clearly better than random: a loss of {numbers}")
    worse = [d for d in losses.domains if losses.change(by, RANDOM, d)[0] >= 0]
    if worse and len(losses.domains) > 1:
        yield Finding("random", f"random is as good as {by} or better in {_list(worse)}")


def _two(losses: Losses, one: str, other: str) -> str:
    a, b = (float(np.mean(losses.loss(name))) for name in (one, other))
    return f"{a:.3f} nats per token, against {b:.3f}"


def _interval(value: float, low: float, high: float) -> str:
    between = f", 95 % {low:+.3f} to {high:+.3f}" if np.isfinite(low) else ""
    return f"difference {value:+.3f}{between}"


def _list(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
