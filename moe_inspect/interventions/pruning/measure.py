"""The loss of a model without several experts at once, on held-out text, for several choices of
them.

U documents, P plans, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from moe_inspect.analysis.metrics.uncertainty import interval, resample_weights
from moe_inspect.interventions.ablation import Progress
from moe_inspect.interventions.held_out import HeldOut
from moe_inspect.interventions.intervene import Intervention

WHOLE, RANDOM, EVERYTHING = "whole", "random", "(all)"
# of a plan: the experts that go, of each router
Drop = Sequence[Sequence[int]]


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
        """Loss of a plan minus that of another in nats per token, of the mean of their draws, and
        its 95 % interval over documents, and draws if they are five or more (NaN where there are
        fewer than five documents)."""
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
        rows: list[dict[str, Any]] = []
        for domain in (None, *self.domains):
            tokens_U = self.tokens_U[self._of(domain)]
            for plan in self.nats:
                draws = self.loss(plan, domain)
                change = self.change(plan, WHOLE, domain)
                rows.append(
                    {
                        "plan": plan,
                        "domain": domain or EVERYTHING,
                        "documents": len(tokens_U),
                        "tokens": int(tokens_U.sum()),
                        "draws": len(draws),
                        "loss": float(np.mean(draws)),
                        "least_loss": min(draws),
                        "greatest_loss": max(draws),
                        "difference": change[0],
                        "difference_low": change[1],
                        "difference_high": change[2],
                    }
                )
        return pd.DataFrame(rows)


def measure(
    held_out: HeldOut,
    plans: Mapping[str, Sequence[Drop]],
    progress: Progress | None = None,
) -> Losses:
    """Losses of the whole model and without the experts of each plan, each router choosing among
    the rest. `plans`: name → one or more draws (of "random": several), each the experts that go, of
    each router of the model in its order."""
    made = {WHOLE: [[]], **plans}
    rows = [row for batch in held_out.batches for row in batch]
    domains = sorted({row.domain for row in rows})
    number = {document: u for u, document in enumerate(sorted({row.document for row in rows}))}
    domain_U, tokens_U = np.zeros((2, len(number)), np.int64)
    for row in rows:
        domain_U[number[row.document]] = domains.index(row.domain)
        tokens_U[number[row.document]] += len(row.ids) - 1
    nats = {name: [np.zeros(len(number)) for _ in draws] for name, draws in made.items()}
    total, done = len(held_out.batches) * sum(map(len, made.values())), 0
    for b, batch in enumerate(held_out.batches):
        place = [number[row.document] for row in batch]
        for name, draws in made.items():
            for draw, sums_U in zip(draws, nats[name], strict=True):
                np.add.at(sums_U, place, without(held_out, draw, b))
                done += 1
                if progress is not None:
                    progress(done, total)
    known = tokens_U > 0
    if not known.all():
        nats = {name: [sums_U[known] for sums_U in of] for name, of in nats.items()}
    return Losses(domains, domain_U[known], tokens_U[known], nats)


def without(held_out: HeldOut, drop: Drop, batch: int) -> np.ndarray:
    """The losses of a batch without these experts; see `HeldOut.losses`."""
    by_path: dict[int | str, Sequence[int]] = {
        s.path: e for s, e in zip(held_out.sites, drop, strict=False) if len(e)
    }
    if not by_path:
        return held_out.losses(batch)
    with Intervention(held_out.network, drop=by_path, routers=held_out.routers):
        return held_out.losses(batch)
