"""The loss of a model without several experts at once, on held-out text; warnings about the choice.

U documents, P plans, R resamples, E experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from moe_inspect.analysis.counting.counts import Counts
from moe_inspect.analysis.metrics.uncertainty import FEWEST_DOCUMENTS, interval, resample_weights
from moe_inspect.analysis.metrics.worth import JUDGED, super_experts
from moe_inspect.capture.corpus.plan import TokenSequence
from moe_inspect.interventions.ablation import HeldOut, Progress, documents_of
from moe_inspect.text import join_first, plural
from moe_inspect.trace.reader import Trace

WHOLE, RANDOM, FREQUENCY, EVERYTHING = "whole", "random", "frequency", "(all)"
BEGINNING = 32  # tokens by which texts are compared; shorter ones are compared whole
NAMED = 6  # experts or domains listed in a sentence
COLUMNS = [
    *("plan", "domain", "documents", "tokens", "draws", "loss", "least_loss", "greatest_loss"),
    *("difference", "difference_low", "difference_high"),
]
# of a plan: the experts that go, of each router
Drop = Sequence[Sequence[int]]
Finding = tuple[str, str]  # kind of a warning, and its text


@dataclass(frozen=True)
class Losses:
    """The loss of each document without the experts of each plan: `nats[plan][draw]`, the sum over
    the tokens predicted, float64 [U]. `domains`: the labels, of which document u has number
    `domain_U[u]`; `tokens_U`: tokens predicted."""

    domains: list[str]
    domain_U: np.ndarray
    tokens_U: np.ndarray
    nats: dict[str, list[np.ndarray]]

    def change(self, plan: str, beside: str, domain: str | None = None) -> tuple[float, ...]:
        """Loss of a plan minus that of another in nats per token, of the mean of their draws, and a
        95 % interval over documents and draws (NaN for fewer than five documents)."""
        of = self._of(domain)
        tokens_U, total = self.tokens_U[of], self.tokens_U[of].sum()
        weights_RU = resample_weights(np.unique(self.domain_U[of], return_inverse=True)[1])
        value, resampled = 0.0, np.zeros(1)
        for sign, name in ((1, plan), (-1, beside)):
            nats_PU = np.array(self.nats[name])[:, of]
            value += sign * float(nats_PU.sum(1).mean()) / total
            if weights_RU is not None:
                nats_RP = weights_RU @ nats_PU.T
                weights_RP = resample_weights(np.zeros(len(nats_PU), np.int64))
                mean_R = nats_RP.mean(1) if weights_RP is None else (nats_RP * weights_RP).mean(1)
                resampled = resampled + sign * mean_R / (weights_RU @ tokens_U)
        low, high = interval(resampled) if weights_RU is not None else (np.nan, np.nan)
        return value, low, high

    def loss(self, plan: str, domain: str | None = None) -> list[float]:
        """Nats per token, of each draw."""
        of = self._of(domain)
        return [float(nats_U[of].sum() / self.tokens_U[of].sum()) for nats_U in self.nats[plan]]

    def _of(self, domain: str | None) -> np.ndarray:
        """bool [U]: the documents of a domain, all for None."""
        all_U = np.ones(len(self.tokens_U), bool)
        return all_U if domain is None else self.domain_U == self.domains.index(domain)

    def table(self) -> pd.DataFrame:
        """A row per plan, and per plan and domain."""
        rows: list[list[object]] = []
        for domain in (None, *self.domains):
            tokens_U = self.tokens_U[self._of(domain)]
            for plan in self.nats:
                draws = self.loss(plan, domain)
                row = [plan, domain or EVERYTHING, len(tokens_U), int(tokens_U.sum()), len(draws)]
                row += [float(np.mean(draws)), min(draws), max(draws)]
                rows.append([*row, *self.change(plan, WHOLE, domain)])
        return pd.DataFrame(rows, columns=COLUMNS)


def measure(
    held_out: HeldOut, plans: Mapping[str, Sequence[Drop]], progress: Progress | None = None
) -> Losses:
    """Losses of the whole model and without the experts of each plan. `plans`: name → one or more
    draws (of "random": several), each the experts that go, of each router of the model."""
    made: dict[str, Sequence[Drop]] = {WHOLE: [[]], **plans}
    domains, number, domain_U, tokens_U = documents_of(held_out.batches)
    nats = {name: [np.zeros(len(number)) for _ in draws] for name, draws in made.items()}
    total, done = len(held_out.batches) * sum(map(len, made.values())), 0
    for b, batch in enumerate(held_out.batches):
        place = [number[row.document] for row in batch]
        for name, draws in made.items():
            for draw, sums_U in zip(draws, nats[name], strict=True):
                of = zip(held_out.sites, draw, strict=False)
                drop = {site.path: experts for site, experts in of if len(experts)}
                np.add.at(sums_U, place, held_out.losses(b, drop))
                done += 1
                if progress is not None:
                    progress(done, total)
    known = tokens_U > 0
    nats = {name: [sums_U[known] for sums_U in of] for name, of in nats.items()}
    return Losses(domains, domain_U[known], tokens_U[known], nats)


# --- warnings about a choice of experts to drop


def of_calibration(
    trace: Trace, routers: Sequence[int], counts: Counts, held_out: HeldOut, drop: Drop
) -> Iterator[Finding]:
    """What the calibration text did not show. `routers`: the trace's, of each of the model."""
    known = {counts.domains[d] for d in np.flatnonzero(counts.tokens_D)}
    asked = {row.domain for batch in held_out.batches for row in batch}
    if missing := sorted(asked - known):
        yield (
            "coverage",
            f"the calibration text lacks {join_first(missing, NAMED)}: the value of experts for it "
            f"is unknown ({trace.path} has {join_first(sorted(known), NAMED)})",
        )
    if few := _names(held_out, drop, [counts.load_E(r) < JUDGED for r in routers]):
        yield (
            "few tokens",
            f"{plural(len(few), 'dropped expert')} had fewer than {JUDGED} assignments in the "
            f"calibration text: {join_first(few, NAMED)}",
        )


def of_overlap(trace: Trace, held_out: HeldOut) -> Iterator[Finding]:
    """Held-out text that was calibrated on, whole or cut; or a trace without its text."""
    fed = defaultdict[bytes, list[np.ndarray]](list)
    for row in sequences_of(trace):
        fed[row.ids[:BEGINNING].tobytes()].append(row.ids)
    if not fed:
        yield "overlap", f"{trace.path} does not hold its text: it may include the held-out text"
    rows = [row for batch in held_out.batches for row in batch]
    again = {
        row.document
        for row in rows
        for other in fed.get(row.ids[:BEGINNING].astype(np.int32).tobytes(), [])
        if np.array_equal(row.ids[: len(other)], other[: len(row.ids)])
    }
    if again:
        documents = plural(len({row.document for row in rows}), "held-out document")
        yield (
            "overlap",
            f"{len(again)} of {documents} are in the calibration trace: their loss says nothing "
            "about unseen text",
        )


def of_super_experts(
    trace: Trace, routers: Sequence[int], counts: Counts, held_out: HeldOut, drop: Drop
) -> Iterator[Finding]:
    """Super experts that would go; or that the trace does not tell which they are."""
    peak_LE = [peak_E for r in routers if (peak_E := counts.of[r].peak_E) is not None]
    if len(peak_LE) < len(routers):
        yield (
            "super experts",
            f"{trace.path} does not show which experts are super experts: record it with "
            "--output-peaks",
        )
        return
    layers = np.array([site.layer for site in held_out.sites])
    if gone := _names(held_out, drop, super_experts(peak_LE, layers, trace.blocks)):
        yield (
            "super experts",
            f"{plural(len(gone), 'super expert')} would be dropped ({join_first(gone, NAMED)}): "
            "they produce the largest activations of the model",
        )


def of_losses(losses: Losses, by: str) -> Iterator[Finding]:
    """Where choosing at random, or by frequency, is as good."""
    if (n := len(losses.tokens_U)) < FEWEST_DOCUMENTS:
        yield "few documents", f"{plural(n, 'held-out document')}: too few to judge chance"
    if by != RANDOM and RANDOM in losses.nats:
        yield from _beside(losses, by, RANDOM)
        worse = [d for d in losses.domains if losses.change(by, RANDOM, d)[0] >= 0]
        if worse and len(losses.domains) > 1:
            yield RANDOM, f"random is as good as {by} or better in {join_first(worse, NAMED)}"
    if by not in (RANDOM, FREQUENCY) and FREQUENCY in losses.nats:
        yield from _beside(losses, by, FREQUENCY)


def _beside(losses: Losses, by: str, other: str) -> Iterator[Finding]:
    value, low, high = losses.change(by, other)
    draws = losses.loss(other)
    spread = f"{plural(len(draws), 'draw')} from {min(draws):.3f} to {max(draws):.3f}"
    of_draws = f", the mean of {spread}" if other == RANDOM else ""
    between = f", 95 % {low:+.3f} to {high:+.3f}" if np.isfinite(low) else ""
    numbers = (
        f"a loss of {np.mean(losses.loss(by)):.3f} nats per token, against {np.mean(draws):.3f}"
        f"{of_draws} (difference {value:+.3f}{between})"
    )
    if low > 0:
        yield other, f"{other} is better than {by}: {numbers}"
    elif value >= 0 and other == RANDOM:
        yield other, f"random is as good as {by}: {numbers}"
    elif value >= 0 or high >= 0:
        yield other, f"{by} is not clearly better than {other}: {numbers}"


def _names(held_out: HeldOut, drop: Drop, is_LE: Iterable[np.ndarray]) -> list[str]:
    """The dropped experts of which this is true (bool [E] of each router)."""
    return [
        f"L{site.layer}E{e}"
        for site, gone, is_E in zip(held_out.sites, drop, is_LE, strict=True)
        for e in gone
        if is_E[e]
    ]


def sequences_of(trace: Trace) -> Iterator[TokenSequence]:
    """The sequences of a trace as they were fed; none where it does not hold its text."""
    columns = ["token_id", "document", "sequence", "position", "domain", "phase"]
    for shard in () if trace.counts_only else trace.shards:
        frame = shard.tokens(columns).to_pandas()
        frame = frame[(frame.phase == "prefill") & (frame.token_id >= 0)]
        for (document, sequence), of in frame.groupby(["document", "sequence"], sort=False):
            ids = of.sort_values("position").token_id.to_numpy(np.int32)
            label, source = str(of.domain.iloc[0]), str(trace.path)
            yield TokenSequence(document, sequence, label, source, ids, len(ids), 1)
