"""Pruning: the experts with the lowest scores are dropped, for `moe-inspect prune` and
`moe_inspect.prune`.

E experts, K slots.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moe_inspect.analysis.counting.counts import Counts
from moe_inspect.analysis.scores import (
    ABLATION,
    AIMER,
    SCORES,
    counted,
    experts_kept,
    lowest,
    random_scores,
    refuse_too_few,
    score_E,
)
from moe_inspect.capture.load import unloaded
from moe_inspect.capture.options import TraceOptions
from moe_inspect.errors import MoeInspectError
from moe_inspect.interventions.ablation import Progress
from moe_inspect.interventions.among import SHARED_OUT, beyond, how_dropped
from moe_inspect.interventions.held_out import HeldOut, open_held_out
from moe_inspect.interventions.pruning import advise, checkpoint
from moe_inspect.interventions.pruning.calibration import (
    BY,
    RANDOM,
    ablation_scores,
    aimer_of_model,
    check_trace,
)
from moe_inspect.interventions.pruning.measure import EVERYTHING, WHOLE, Drop, Losses, measure
from moe_inspect.model.config import groups_of
from moe_inspect.model.load import config_record
from moe_inspect.model.routers import Site, block_of
from moe_inspect.text import first_line, no_such
from moe_inspect.trace.reader import Trace

FREQUENCY = advise.FREQUENCY
# of the loss: a router's scores may be summed in another order, and two that are close then change
# places
ROUNDING_NATS = 0.01


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
class Choice:
    """How experts are chosen: the share `keep` of each layer by the scores `by`, beside `draws`
    choices at random from `seed` on. `resume`: the directory of an ablation's losses."""

    by: str
    keep: float
    draws: int = 5
    seed: int = 0
    resume: Path | None = None


@dataclass(frozen=True)
class Plans:
    """What goes by each way to choose. `score_LE`: of the one asked for, float64 [E] of each
    router; `routers`: the trace's router of each router of the model; `counts`: of the trace."""

    by: str
    score_LE: list[np.ndarray]
    drops: dict[str, list[Drop]]
    routers: list[int]
    counts: Counts

    @property
    def drop(self) -> Drop:
        return self.drops[self.by][0]


def prune(
    model: str,
    options: TraceOptions,
    trace: Trace,
    choice: Choice,
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
    held_out = open_held_out(model, options)
    plans = planned(held_out, trace, choice, progress)
    done = judged(held_out, trace, plans, progress)
    if output is None or source is None:
        return done
    site = held_out.sites[0]
    pruned = checkpoint.Pruned(done.dropped, site.experts, beyond(site.logits_module))
    # of one model at a time there is room in memory
    held_out = replace(held_out, network=None)

    def loads(draft: Path) -> dict[str, Any]:
        check_loss(draft, held_out, options, done.loss)
        return record(done, model, trace, choice, pruned)

    checkpoint.write(source, output, pruned, loads)
    return done


def judged(
    held_out: HeldOut, trace: Trace, plans: Plans, progress: Progress | None = None
) -> Pruning:
    losses = measure(held_out, plans.drops, progress)
    found = [vars(finding) for finding in findings(held_out, plans, trace, losses)]
    return Pruning(
        plans.by,
        losses.table(),
        score_table(held_out, plans),
        pd.DataFrame(found, columns=["kind", "text"]),
    )


def check_loss(draft: Path, held_out: HeldOut, options: TraceOptions, expected: float) -> None:
    """Loads a checkpoint and measures its loss. MoeInspectError where it is not the one that was
    measured by dropping the experts."""
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
    found = measure(written, {}).loss(WHOLE)[0]
    if abs(found - expected) > ROUNDING_NATS:
        raise MoeInspectError(
            f"the checkpoint has a loss of {found:.4f} nats per token, and {expected:.4f} was "
            "measured by dropping its experts: nothing was kept"
        )


def record(
    done: Pruning, model: str, trace: Trace, choice: Choice, pruned: checkpoint.Pruned
) -> dict[str, Any]:
    """What the checkpoint's pruning.json says; docs/prune.md describes it."""
    return {
        "format": 1,
        "model": model,
        "trace": str(trace.path),
        "by": choice.by,
        "keep": choice.keep,
        "experts": pruned.experts,
        "experts_kept": pruned.left,
        "dropped": {str(layer): experts for layer, experts in done.dropped.items()},
        "losses": [
            {k: None if v != v else v for k, v in row.items()}
            for row in done.losses.to_dict("records")
        ],
        "findings": done.findings.to_dict("records"),
    }


def planned(
    held_out: HeldOut, trace: Trace, choice: Choice, progress: Progress | None = None
) -> Plans:
    """What goes by the score asked for, by frequency, and at random."""
    if choice.draws < 1:
        raise MoeInspectError(f"draws is {choice.draws}: compare with 1 or more")
    routers = check_trace(trace, held_out)
    # which the trace knows of a model of one's own too
    most = max(trace.routers[r].top_k for r in routers)
    check(held_out.network, held_out.sites, choice.keep, most)
    groups, _, _ = groups_of(config_of(held_out.network))
    counts = counted(trace, choice.by if choice.by in SCORES else FREQUENCY)

    def gone(score_LE: list[np.ndarray]) -> Drop:
        return lowest(score_LE, choice.keep, groups)

    def at_random(draw: int) -> list[np.ndarray]:
        return random_scores([site.experts for site in held_out.sites], choice.seed + draw)

    if choice.by == RANDOM:
        score_LE = at_random(0)
    elif choice.by == ABLATION:
        score_LE = ablation_scores(held_out, trace, choice.resume, progress)
    elif choice.by == AIMER:
        score_LE = aimer_of_model(held_out, trace, routers)
    else:
        score_LE = [score_E(counts, r, choice.by) for r in routers]
    drops = {choice.by: [gone(score_LE)]}
    drops.setdefault(FREQUENCY, [gone([score_E(counts, r, FREQUENCY) for r in routers])])
    drops.setdefault(RANDOM, [gone(at_random(draw)) for draw in range(choice.draws)])
    return Plans(choice.by, score_LE, drops, routers, counts)


def findings(
    held_out: HeldOut, plans: Plans, trace: Trace, losses: Losses
) -> Sequence[advise.Finding]:
    scored = plans.by != RANDOM
    of = (trace, plans.routers, plans.counts, held_out, plans.drop)
    return [
        *(advise.of_coverage(*of) if scored else ()),
        *advise.of_overlap(trace, held_out),
        *(advise.of_super_experts(*of) if scored else ()),
        *advise.of_losses(losses, plans.by),
    ]


def score_table(held_out: HeldOut, plans: Plans) -> pd.DataFrame:
    parts = [
        pd.DataFrame(
            {
                "layer": site.layer,
                "router": r,
                "expert": np.arange(site.experts),
                "score": plans.score_LE[r],
                "assignments": plans.counts.load_E(plans.routers[r]),
                "dropped": np.isin(np.arange(site.experts), plans.drop[r]),
            }
        )
        for r, site in enumerate(held_out.sites)
    ]
    return pd.concat(parts, ignore_index=True)


def check(network: Any, sites: Sequence[Site], keep: float, K: int) -> None:
    """MoeInspectError where that many experts cannot go alike in all layers, or where routers do
    not choose by logits that can be seen. K: to how many experts a token goes, at most."""
    sizes = sorted({site.experts for site in sites})
    if len(sizes) > 1:
        raise MoeInspectError(
            f"the layers have different numbers of experts ({', '.join(map(str, sizes))}), and a "
            "config states one: not pruned"
        )
    if (layers := [s.layer for s in sites]) and len(set(layers)) < len(layers):
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
        hashed = any(name.endswith("tid2eid") for name, _ in _tensors_beside(network, site))
        if hashed or how_dropped(site) == SHARED_OUT:
            why = "goes by a table of token ids" if hashed else "does not show its logits"
            raise MoeInspectError(
                f"the router of layer {site.layer} {why}: it cannot choose among fewer experts, "
                "so the model is not pruned"
            )
    E = sizes[0]
    groups, _, _ = of_groups = groups_of(config_of(network))
    if experts_kept(E, keep, groups) == E:
        within = f" in each of {groups} groups" if groups > 1 else ""
        raise MoeInspectError(
            f"--keep {keep:g} drops none of {E // groups} experts{within}: lower it"
        )
    refuse_too_few(E, K, keep, of_groups)


def config_of(network: Any) -> dict[str, Any]:
    """The config of a model as config.json has it; empty where it has none."""
    return config_record(getattr(network, "config", None))


def _alike_beside(network: Any, site: Site) -> str:
    """The path of another block like that of these experts, beside it; "" for none."""
    path = block_of(site.path)
    owner, _, own = path.rpartition(".")
    kind = type(network.get_submodule(path))
    return next(
        (
            f"{owner}.{name}"
            for name, module in network.get_submodule(owner).named_children()
            if name != own and type(module) is kind and not name.isdigit()
        ),
        "",
    )


def _tensors_beside(network: Any, site: Site) -> Iterator[tuple[str, Any]]:
    block = network.get_submodule(site.path.rpartition(".")[0])
    yield from block.named_parameters()
    yield from block.named_buffers()
