"""What a trace of the calibration text says of a model's experts.

E experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_inspect.analysis.scores import ABLATION, ALL, aimer_scores
from moe_inspect.analysis.weights.measure import aimer_of
from moe_inspect.capture.corpus.plan import TokenSequence, batches
from moe_inspect.capture.resume import comparable
from moe_inspect.errors import MoeInspectError
from moe_inspect.interventions.ablation import Progress, ablate_held_out, pairs
from moe_inspect.interventions.held_out import HeldOut
from moe_inspect.model.load import checkpoint_dir
from moe_inspect.model.routers import Site
from moe_inspect.trace.reader import Trace

RANDOM = "random"
BY = (*ALL, RANDOM)
COMMIT = re.compile(r"[0-9a-f]{40}")
# config entries that say how weights are stored or run, not what the model is
OF_A_RUN = {"dtype", "torch_dtype", "use_cache", "output_router_logits"}


def check_trace(trace: Trace, held_out: HeldOut) -> list[int]:
    """The trace's router of each router of the model. MoeInspectError where the trace is of
    another model."""
    plan = (trace.manifest.get("corpus") or {}).get("plan") or {}
    model, name = trace.manifest.get("model") or {}, held_out.record["model"]
    for key, has in (("adapter", "an adapter"), ("random_init", "random weights")):
        if plan and plan.get(key) != held_out.record[key]:
            not_it = "" if plan.get(key) is None else f", of {has}"
            raise MoeInspectError(f"{trace.path} is of a different model than {name}{not_it}")
    if "intervention" in str(model.get("note", "")):
        raise MoeInspectError(f"{trace.path} was recorded during an {model['note']}")
    then, now = model.get("config"), comparable(getattr(held_out.network, "config", None))
    if isinstance(then, dict) and (key := _difference(then, now)):
        raise MoeInspectError(
            f"{trace.path} is of a different model than {name}: its config has a different {key}"
        )
    before, weights = plan.get("weights_hash"), held_out.record["weights_hash"]
    if before and weights and before != weights and _is_commit(before) == _is_commit(weights):
        raise MoeInspectError(
            f"{trace.path} was recorded with different weights than {name} has now: record it again"
        )
    return [_router(trace, site, name) for site in held_out.sites]


def _difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first entry that two configs state differently, with its value in each; "" for none. What
    only one of them states is as it is by default."""
    for key in sorted(set(then) & set(now) - OF_A_RUN):
        before, after = then[key], now[key]
        if before == after or key.startswith("_"):
            continue
        if not (isinstance(before, Mapping) and isinstance(after, Mapping)):
            return f"{key} ({before!r}, not {after!r})"
        if inner := _difference(before, after):
            return inner
    return ""


def _is_commit(value: str) -> bool:
    return COMMIT.fullmatch(value) is not None


def _router(trace: Trace, site: Site, name: str) -> int:
    by_path = [r for r, router in enumerate(trace.routers) if router.path == site.path]
    by_layer = [r for r, router in enumerate(trace.routers) if router.layer == site.layer]
    found = by_path or by_layer
    if len(found) != 1:
        raise MoeInspectError(
            f"{trace.path} has {len(found) or 'no'} routers in layer {site.layer}: record all "
            f"layers of {name}"
        )
    if (E := trace.routers[found[0]].experts) != site.experts:
        raise MoeInspectError(
            f"{trace.path} has {E} experts in layer {site.layer}, {name} has {site.experts}"
        )
    return found[0]


def ablation_scores(
    held_out: HeldOut, trace: Trace, resume: Path | None, progress: Progress | None
) -> list[np.ndarray]:
    """What the model loses on the text of the trace without each expert alone, in nats per token.
    float64 [E] of each router"""
    most = max(sum(len(row.ids) for row in batch) for batch in held_out.batches)
    found = list(batches(sequences_of(trace), most))
    if not found:
        raise MoeInspectError(f"{trace.path} does not hold its text, which {ABLATION} needs")
    calibration = replace(
        held_out,
        batches=found,
        record={**held_out.record, "sources": str(trace.manifest.get("digest"))},
    )
    asked = pairs(held_out.sites, None, None)
    table = ablate_held_out(calibration, asked, resume=resume, progress=progress).experts
    by_router = table.sort_values(["router", "expert"]).groupby("router").difference
    return [of.to_numpy(np.float64) for _, of in by_router]


def aimer_of_model(held_out: HeldOut, trace: Trace, routers: Sequence[int]) -> list[np.ndarray]:
    """See `aimer_scores`."""
    name, revision = held_out.record["model"], held_out.record["revision"]
    return aimer_scores(
        aimer_of(checkpoint_dir(name, revision), trace.routers, routers), routers, name
    )


def sequences_of(trace: Trace) -> Iterator[TokenSequence]:
    """The sequences that a trace was recorded of, as they were fed, without decoded tokens; none
    where it does not hold its text."""
    columns = ["token_id", "document", "sequence", "position", "domain", "phase"]
    for shard in () if trace.counts_only else trace.shards:
        frame = shard.tokens(columns).to_pandas()
        frame = frame[(frame.phase == "prefill") & (frame.token_id >= 0)]
        for (document, sequence), of in frame.groupby(["document", "sequence"], sort=False):
            ids = of.sort_values("position").token_id.to_numpy(np.int32)
            label, source = str(of.domain.iloc[0]), str(trace.path)
            yield TokenSequence(document, sequence, label, source, ids, len(ids), 1)
