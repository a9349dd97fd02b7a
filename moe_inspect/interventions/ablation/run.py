"""Ablation: the loss of a model without each of its experts, for `moe-inspect ablate` and
`moe_inspect.ablate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from moe_inspect.capture.options import TraceOptions
from moe_inspect.errors import MoeInspectError
from moe_inspect.interventions.ablation.measure import Progress, measure
from moe_inspect.interventions.ablation.store import Store
from moe_inspect.interventions.ablation.tables import tables
from moe_inspect.interventions.held_out import HeldOut, open_held_out
from moe_inspect.model.routers import Site, in_layers


@dataclass(frozen=True)
class Ablation:
    """What experts are worth on held-out text, in nats of loss per token.

    experts    a row per expert: layer, router, expert, how, documents, tokens, loss, loss_without,
               difference, difference_low, difference_high
    domains    the same by domain
    measured   batches of text that were measured with every expert, of `batches`
    passes     forward passes of this run
    """

    experts: pd.DataFrame
    domains: pd.DataFrame
    measured: int
    batches: int
    passes: int

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        return {"experts": self.experts, "domains": self.domains}


def ablate(
    model: str,
    options: TraceOptions,
    *,
    experts: Sequence[int] | None = None,
    most_passes: int | None = None,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> Ablation:
    """See `moe_inspect.ablate`."""
    held_out = open_held_out(model, options)
    return ablate_held_out(
        held_out,
        pairs(held_out.sites, options.layers, experts),
        most_passes=most_passes,
        resume=Path(resume) if resume is not None else None,
        progress=progress,
    )


def ablate_held_out(
    held_out: HeldOut,
    asked: Sequence[tuple[int, int]],
    *,
    most_passes: int | None = None,
    resume: Path | None = None,
    progress: Progress | None = None,
) -> Ablation:
    store = Store(resume, held_out.record)
    try:
        done = measure(held_out, asked, store, most_passes, progress)
    finally:
        store.close()
    of = {b: held_out.batches[b] for b in done.batches}
    by_expert, by_domain = tables(of, held_out.sites, asked, store)
    return Ablation(by_expert, by_domain, len(done.batches), len(held_out.batches), done.passes)


def pairs(
    sites: list[Site], layers: Sequence[int] | None, experts: Sequence[int] | None
) -> list[tuple[int, int]]:
    """The (router, expert) pairs asked for."""
    wanted = {site.path for site in in_layers(sites, layers)}
    found = [
        (r, e)
        for r, site in enumerate(sites)
        if site.path in wanted
        for e in (range(site.experts) if experts is None else sorted(set(experts)))
        if e < site.experts
    ]
    most = max(site.experts for site in sites)
    if experts is not None and max(experts, default=-1) >= most:
        raise MoeInspectError(
            f"no expert {max(experts)}: this model has {most} in a layer (0 to {most - 1})"
        )
    return found
