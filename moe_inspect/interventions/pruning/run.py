"""Pruning: the experts with the lowest scores are dropped, for `moe-inspect prune` and
`moe_inspect.prune`.

E experts, K slots.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from torch.nn import Module

from moe_inspect.analysis import scores
from moe_inspect.analysis.weights.measure import aimer_of
from moe_inspect.capture.corpus.plan import batches
from moe_inspect.capture.load import unloaded
from moe_inspect.capture.options import TraceOptions
from moe_inspect.errors import MoeInspectError
from moe_inspect.interventions import ablation
from moe_inspect.interventions.ablation import HeldOut, Progress
from moe_inspect.interventions.pruning import checkpoint, measure
from moe_inspect.interventions.pruning.measure import EVERYTHING, FREQUENCY, RANDOM, WHOLE, Drop
from moe_inspect.interventions.rules import SHARED_OUT, beyond, how_dropped
from moe_inspect.model.config import Config, groups_of
from moe_inspect.model.load import checkpoint_dir, comparable, config_record
from moe_inspect.model.routers import Site, block_of
from moe_inspect.text import first_line, no_such
from moe_inspect.trace.reader import Trace

BY = (*scores.ALL, RANDOM)
# of the loss: a router's scores may be summed in another order, and two that are close then change
# places
ROUNDING_NATS = 0.01
COMMIT = re.compile(r"[0-9a-f]{40}")
# config entries that say how weights are stored or run, not what the model is
OF_A_RUN = {"dtype", "torch_dtype", "use_cache", "output_router_logits"}


@dataclass(frozen=True)
class Pruning:
    """Which experts go, and what the model loses on held-out text without them.

    by         the score asked for
    losses     a row per plan (the whole model, the score asked for, frequency, random), and per
               plan and domain: documents, tokens, draws, loss (nats per token, of the mean of the
               draws), least_loss, greatest_loss, difference (to the whole model), difference_low,
               difference_high (95 %, over documents and draws)
    scores     a row per expert: layer, router, expert, score, assignments, dropped
    findings   warnings about the choice: kind, text
    """

    by: str
    losses: pd.DataFrame
    scores: pd.DataFrame
    findings: pd.DataFrame

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        return {"losses": self.losses, "scores": self.scores, "findings": self.findings}

    @property
    def dropped(self) -> dict[int, list[int]]:
        """Layer → the experts that go, as `intervene(drop=…)` takes them."""
        gone = self.scores[self.scores.dropped]
        layers: list[int] = sorted(set(gone.layer.tolist()))
        return {layer: gone.expert[gone.layer == layer].tolist() for layer in layers}

    @property
    def loss(self) -> float:
        """Nats per token without these experts, on all of the text."""
        of = self.losses[(self.losses.plan == self.by) & (self.losses.domain == EVERYTHING)]
        return float(of.loss.iloc[0])


@dataclass(frozen=True, kw_only=True)
class PruningChoice:
    """How experts are chosen: the share `keep` of each layer by the scores `by`, beside `draws`
    choices at random from `seed` on. `resume`: the directory of an ablation's losses."""

    by: str
    keep: float
    draws: int = 5
    seed: int = 0
    resume: Path | None = None


def prune(
    model: str,
    options: TraceOptions,
    trace: Trace,
    choice: PruningChoice,
    output: Path | None = None,
    progress: Progress | None = None,
) -> Pruning:
    """See `moe_inspect.prune`."""
    if choice.by not in BY:
        raise MoeInspectError(no_such("score", choice.by, BY))
    if options.layers is not None:
        raise MoeInspectError("all layers are pruned alike: leave out layers")
    source = None
    if output is not None:
        checkpoint.refuse_to_replace(output)
        for name in ("loader", "routers", "random_init", "dequantize"):
            if getattr(options, name) not in (None, False):
                raise MoeInspectError(
                    "a checkpoint needs a model that transformers loads unchanged: leave out "
                    f"--{name.replace('_', '-')}, or only measure (--dry-run)"
                )
        source = checkpoint.directory_of(model, options.revision)
    held_out = ablation.open_held_out(model, options)
    done = prune_held_out(held_out, trace, choice, progress)
    if output is None or source is None:
        return done
    site = held_out.sites[0]
    pruned = checkpoint.Pruned(done.dropped, site.experts, beyond(site.logits_module))
    # of one model at a time there is room in memory
    held_out = replace(held_out, network=None)

    def loads(draft: Path) -> dict[str, object]:
        """What its pruning.json says; docs/prune.md describes it."""
        check_loss(draft, held_out, options, done.loss)
        rows = done.losses.to_dict("records")
        return {
            "format": 1,
            "model": model,
            "trace": str(trace.path),
            "by": choice.by,
            "keep": choice.keep,
            "experts": pruned.experts,
            "experts_kept": pruned.left,
            "dropped": {str(layer): experts for layer, experts in done.dropped.items()},
            "losses": [{k: None if v != v else v for k, v in row.items()} for row in rows],
            "findings": done.findings.to_dict("records"),
        }

    checkpoint.write(source, output, pruned, loads)
    return done


def prune_held_out(
    held_out: HeldOut, trace: Trace, choice: PruningChoice, progress: Progress | None = None
) -> Pruning:
    """What goes by the score asked for, beside frequency and chance, and what is lost with it."""
    if choice.draws < 1:
        raise MoeInspectError(f"draws is {choice.draws}: compare with 1 or more")
    routers = check_trace(trace, held_out)
    # which the trace knows of a model of one's own too
    most = max(trace.routers[r].top_k for r in routers)
    check(held_out.network, held_out.sites, choice.keep, most)
    groups, _, _ = groups_of(config_record(getattr(held_out.network, "config", None)))
    by, scored = choice.by, choice.by != RANDOM
    counts = scores.counted(trace, by if by in scores.SCORES else FREQUENCY)

    def gone(score_LE: list[np.ndarray]) -> Drop:
        return scores.lowest(score_LE, choice.keep, groups)

    def counted(by: str) -> list[np.ndarray]:
        return [scores.score_E(counts, r, by) for r in routers]

    sizes = [site.experts for site in held_out.sites]
    drawn = [scores.random_scores(sizes, choice.seed + draw) for draw in range(choice.draws)]
    if by == RANDOM:
        score_LE = drawn[0]
    elif by == scores.ABLATION:
        score_LE = ablation_scores(held_out, trace, choice.resume, progress)
    elif by == scores.AIMER:
        name, revision = held_out.record["model"], held_out.record["revision"]
        aimer = aimer_of(checkpoint_dir(name, revision), trace.routers, routers)
        score_LE = scores.aimer_scores(aimer, routers, name)
    else:
        score_LE = counted(by)
    drops = {by: [gone(score_LE)]}
    drops.setdefault(FREQUENCY, [gone(counted(FREQUENCY))])
    drops.setdefault(RANDOM, [gone(score_LE) for score_LE in drawn])
    losses = measure.measure(held_out, drops, progress)
    of = trace, routers, counts, held_out, drops[by][0]
    findings = [
        *(measure.of_calibration(*of) if scored else ()),
        *measure.of_overlap(trace, held_out),
        *(measure.of_super_experts(*of) if scored else ()),
        *measure.of_losses(losses, by),
    ]
    experts = [
        pd.DataFrame(
            {
                "layer": site.layer,
                "router": r,
                "expert": np.arange(site.experts),
                "score": score_LE[r],
                "assignments": counts.load_E(routers[r]),
                "dropped": np.isin(np.arange(site.experts), drops[by][0][r]),
            }
        )
        for r, site in enumerate(held_out.sites)
    ]
    return Pruning(
        by,
        losses.table(),
        pd.concat(experts, ignore_index=True),
        pd.DataFrame(findings, columns=["kind", "text"]),
    )


def check_loss(draft: Path, held_out: HeldOut, options: TraceOptions, expected: float) -> None:
    """MoeInspectError where a checkpoint does not load, or its loss is not the expected."""
    gc.collect()
    options = replace(options, revision=None)
    try:
        network = unloaded(str(draft), options).load()
    except MoeInspectError as error:
        raise MoeInspectError(
            f"the tensors of {held_out.record['model']} are not known by name: the checkpoint "
            f"without its experts does not load, and was not kept ({first_line(error)})"
        ) from error
    written = replace(held_out, network=network)
    found = measure.measure(written, {}).loss(WHOLE)[0]
    if abs(found - expected) > ROUNDING_NATS:
        raise MoeInspectError(
            f"the checkpoint has a loss of {found:.4f} nats per token, and {expected:.4f} was "
            "measured by dropping its experts: nothing was kept"
        )


def ablation_scores(
    held_out: HeldOut, trace: Trace, resume: Path | None, progress: Progress | None
) -> list[np.ndarray]:
    """Nats per token lost on the trace's text without each expert alone, float64 [E] by router."""
    most = max(sum(len(row.ids) for row in batch) for batch in held_out.batches)
    found = list(batches(measure.sequences_of(trace), most))
    if not found:
        raise MoeInspectError(f"{trace.path} does not hold its text, which {scores.ABLATION} needs")
    record = {**held_out.record, "sources": str(trace.manifest.get("digest"))}
    calibration = replace(held_out, batches=found, record=record)
    asked = ablation.pairs(held_out.sites, None, None)
    done = ablation.ablate_held_out(calibration, asked, resume=resume, progress=progress)
    by_router = done.experts.sort_values(["router", "expert"]).groupby("router").difference
    return [of.to_numpy(np.float64) for _, of in by_router]


# --- what is refused


def check_trace(trace: Trace, held_out: HeldOut) -> list[int]:
    """The trace's router of each of the model. MoeInspectError where it is of another model."""
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
    of_one_kind = len({bool(COMMIT.fullmatch(hash or "")) for hash in (before, weights)}) == 1
    if before and weights and before != weights and of_one_kind:
        raise MoeInspectError(
            f"{trace.path} was recorded with different weights than {name} has now: record it again"
        )
    return [_router(trace, site, name) for site in held_out.sites]


def _difference(then: Config, now: Config) -> str:
    """The first entry that two configs state differently, with its values; "" for none."""
    for key in sorted(set(then) & set(now) - OF_A_RUN):
        before, after = then[key], now[key]
        if before == after or key.startswith("_"):
            continue
        if not (isinstance(before, dict) and isinstance(after, dict)):
            return f"{key} ({before!r}, not {after!r})"
        if inner := _difference(before, after):
            return inner
    return ""


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
        said = f"{trace.path} has {E} experts in layer {site.layer}"
        raise MoeInspectError(f"{said}, {name} has {site.experts}")
    return found[0]


def check(network: Module, sites: Sequence[Site], keep: float, K: int) -> None:
    """MoeInspectError where that many experts cannot go alike in all layers, or a router does not
    choose by logits that can be seen. K: to how many experts a token goes, at most."""
    sizes = sorted({site.experts for site in sites})
    if len(sizes) > 1:
        raise MoeInspectError(
            f"the layers have different numbers of experts ({', '.join(map(str, sizes))}), and a "
            "config states one: not pruned"
        )
    if len({site.layer for site in sites}) < len(sites):
        raise MoeInspectError("a layer has two routers: models like that are not pruned")
    for site in sites:
        if site.adapter is not None and site.adapter.among is not None:
            raise MoeInspectError(
                f"experts of layer {site.layer} share their keys (product keys): none can be "
                "dropped alone, so the model is not pruned"
            )
        if other := _alike_beside(network, site):
            raise MoeInspectError(
                f"layer {site.layer} has other experts beside those that were traced ({other}), "
                "and the config states one number for both: not pruned"
            )
        block = network.get_submodule(site.path.rpartition(".")[0])
        names = [name for name, _ in (*block.named_parameters(), *block.named_buffers())]
        hashed = any(name.endswith("tid2eid") for name in names)
        if hashed or how_dropped(site) == SHARED_OUT:
            why = "goes by a table of token ids" if hashed else "does not show its logits"
            raise MoeInspectError(
                f"the router of layer {site.layer} {why}: it cannot choose among fewer experts, "
                "so the model is not pruned"
            )
    E = sizes[0]
    groups, _, _ = of_groups = groups_of(config_record(getattr(network, "config", None)))
    if scores.experts_kept(E, keep, groups) == E:
        of = f"{E // groups} experts" + (f" in each of {groups} groups" if groups > 1 else "")
        raise MoeInspectError(f"--keep {keep:g} drops none of {of}: lower it")
    scores.refuse_too_few(E, K, keep, of_groups)


def _alike_beside(network: Module, site: Site) -> str:
    """The path of another block like that of these experts, beside it; "" for none."""
    owner, _, own = block_of(site.path).rpartition(".")
    beside = dict(network.get_submodule(owner).named_children())
    kind = type(network.get_submodule(block_of(site.path)))
    alike = (n for n, m in beside.items() if n != own and type(m) is kind and not n.isdigit())
    return next((f"{owner}.{name}" for name in alike), "")
