"""Ablation: the loss of a model without each of its experts, for `moe-inspect ablate` and
`moe_inspect.ablate`. The blocks below a layer are computed once; what was measured is kept, on disk
if it is to be resumable.

U documents, A (router, expert) pairs, R resamples.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
from torch.nn import ModuleList

from moe_inspect.analysis.metrics.uncertainty import resample_weights
from moe_inspect.capture.corpus.plan import TokenSequence
from moe_inspect.capture.hook.sink import replaced
from moe_inspect.errors import MoeInspectError, reading, writing
from moe_inspect.interventions.held_out import HeldOut, documents_of
from moe_inspect.interventions.rules import how_dropped
from moe_inspect.model.families import LAYER
from moe_inspect.model.routers import Site, in_layers
from moe_inspect.trace.files.lock import hold
from moe_inspect.trace.manifest import refuse_within_trace

Progress = Callable[[int, int], None]  # (passes done, passes in all)
FORMAT = 1
WHOLE = (-1, -1)  # in place of a router and an expert: the whole model


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


def ablate_held_out(
    held_out: HeldOut,
    asked: Sequence[tuple[int, int]],
    *,
    most_passes: int | None = None,
    resume: Path | None = None,
    progress: Progress | None = None,
) -> Ablation:
    """See `moe_inspect.ablate`; `asked`: (router, expert) pairs."""
    with kept_losses(resume, held_out.record) as losses:
        batches, passes = measure(held_out, asked, losses, most_passes, progress)
    of = {b: held_out.batches[b] for b in batches}
    by_expert, by_domain = tables(of, held_out.sites, asked, losses)
    return Ablation(by_expert, by_domain, len(batches), len(held_out.batches), passes)


def pairs(
    sites: list[Site], layers: Sequence[int] | None, experts: Sequence[int] | None
) -> list[tuple[int, int]]:
    """The (router, expert) pairs asked for."""
    wanted = {site.path for site in in_layers(sites, layers)}
    most = max(site.experts for site in sites)
    if experts is not None and max(experts, default=-1) >= most:
        raise MoeInspectError(
            f"no expert {max(experts)}: this model has {most} in a layer (0 to {most - 1})"
        )
    return [
        (r, e)
        for r, site in enumerate(sites)
        if site.path in wanted
        for e in (range(site.experts) if experts is None else sorted(set(experts)))
        if e < site.experts
    ]


def measure(
    held_out: HeldOut,
    asked: Sequence[tuple[int, int]],
    losses: KeptLosses,
    most_passes: int | None = None,
    progress: Progress | None = None,
) -> tuple[list[int], int]:
    """Measures each batch without each of the (router, expert) `asked`. With `most_passes` it stops
    before the batch that would exceed them. Returns the batches that were measured with every
    expert, and the forward passes of this run."""
    sites = held_out.sites
    below = Below(held_out.network, [sites[r] for r in sorted({r for r, _ in asked})])
    left = {
        b: [pair for pair in sorted(asked) if (b, *pair) not in losses]
        for b in range(len(held_out.batches))
    }
    total = sum(len(pairs) + 1 for pairs in left.values() if pairs)
    batches, passes = list[int](), 0
    for b, pairs in left.items():
        if pairs and most_passes is not None and passes + len(pairs) + 1 > most_passes:
            if not batches:
                raise MoeInspectError(
                    f"--most-passes {most_passes} is not enough for one batch, which takes "
                    f"{len(pairs) + 1}: ask for fewer experts or layers, or allow more"
                )
            break
        if pairs:
            with below.remembered():
                whole = held_out.losses(b)
            if not passes:
                _check_below(below, held_out, b, pairs, whole)
            losses[b, *WHOLE] = whole.tolist()
            passes += 1
        for r, expert in pairs:
            with below.skipped(sites[r]):
                losses[b, r, expert] = held_out.losses(b, {sites[r].path: [expert]}).tolist()
            passes += 1
            if progress is not None:
                progress(passes, total)
        batches.append(b)
    return batches, passes


def _check_below(
    below: Below, held_out: HeldOut, b: int, pairs: Sequence[tuple[int, int]], whole: np.ndarray
) -> None:
    """Nothing is skipped in a model whose losses would not stay the same to the bit, wherever it
    begins, and the second time too."""
    routers = sorted({r for r, _ in pairs})
    for r in [*routers, routers[-1]]:
        with below.skipped(held_out.sites[r]):
            if below.usable and not np.array_equal(held_out.losses(b), whole):
                below.usable = False


class Below:
    """`remembered` notes, in a pass of the whole model, what comes out of the block below each of
    `sites`. While `skipped` lasts for one of these, all blocks below return that at once: the model
    computes the rest. Whether a model allows this (blocks that hand on more than their output do
    not) is for the caller to check, by its losses; `usable` is False where blocks are not found."""

    def __init__(self, network: Any, sites: Sequence[Site]):
        found = {site.path: LAYER.search(site.path) for site in sites}
        # path of a module → the number of its block
        self._block_of = {path: int(at[1]) for path, at in found.items() if at is not None}
        lists = {path[: at.start(1) - 1] for path, at in found.items() if at is not None}
        blocks = network.get_submodule(lists.pop()) if len(lists) == 1 else None
        self.usable = isinstance(blocks, ModuleList) and self._block_of.keys() == found.keys()
        self._blocks: list[Any] = list(blocks) if isinstance(blocks, ModuleList) else []
        self._outputs: dict[int, Any] = {}

    @contextmanager
    def remembered(self) -> Iterator[None]:
        """A pass of the whole model runs."""
        below = {n - 1 for n in self._block_of.values() if n > 0} if self.usable else set[int]()
        outputs: dict[int, list[Any]] = {n: [] for n in below}
        with ExitStack() as hooks:
            for n, of in outputs.items():
                hook = self._blocks[n].register_forward_hook(lambda m, a, y, of=of: of.append(y))
                hooks.callback(hook.remove)
            yield
        self._outputs = {n: of[-1] for n, of in outputs.items() if of}
        if any(len(of) > 1 for of in outputs.values()):  # a block that runs several times in a pass
            self.usable = False

    @contextmanager
    def skipped(self, site: Site) -> Iterator[None]:
        """A pass runs from the block of this site on; all of it where that cannot be."""
        n = self._block_of.get(site.path, 0)
        if not self.usable or n - 1 not in self._outputs:
            yield
            return
        output = self._outputs[n - 1]
        with ExitStack() as undo:
            for block in self._blocks[:n]:
                undo.callback(replaced(block, "forward", lambda own: lambda *a, **k: output))
            yield


class KeptLosses(dict[tuple[int, int, int], list[float]]):
    """(batch, router, expert) → the loss of each sequence. What is set is appended to the `file`, a
    line each, and flushed."""

    file: BinaryIO | None = None

    def __setitem__(self, at: tuple[int, int, int], nats: list[float]) -> None:
        super().__setitem__(at, nats)
        self.append(dict(zip(("batch", "router", "expert"), at, strict=True)) | {"nats": nats})

    def append(self, line: Mapping[str, Any]) -> None:
        if self.file is not None:
            with writing(self.file.name):
                self.file.write(json.dumps(line).encode() + b"\n")
                self.file.flush()


@contextmanager
def kept_losses(path: Path | None, record: Mapping[str, Any]) -> Iterator[KeptLosses]:
    """Those in the directory `path`; None: in memory alone. Its file `losses.jsonl` has a line that
    says what is measured, then a line per forward pass. A line that was cut off is ignored and
    overwritten. MoeInspectError where the directory holds another measurement, or another process
    writes to it."""
    losses = KeptLosses()
    if path is None:
        yield losses
        return
    refuse_within_trace(path)
    file, head = path / "losses.jsonl", {"format": FORMAT, **record}
    with hold(path), ExitStack() as opened:
        with reading(file):
            lines = file.read_bytes().split(b"\n") if file.exists() else [b""]
        whole, rest = lines[:-1], lines[-1]  # what is behind the last line's end was cut off
        if whole:
            _refuse_other(path, json.loads(whole[0]), json.loads(json.dumps(head)))
        kept = map(json.loads, whole[1:])
        losses.update({(of["batch"], of["router"], of["expert"]): of["nats"] for of in kept})
        with writing(file):
            if rest:
                os.truncate(file, sum(map(len, whole)) + len(whole))
            losses.file = opened.enter_context(file.open("ab"))
        if not whole:
            losses.append(head)
        yield losses


def _refuse_other(path: Path, found: Mapping[str, Any], head: Mapping[str, Any]) -> None:
    for name in head:
        if found.get(name) != head[name]:
            raise MoeInspectError(
                f"{path} holds losses of a different {name} ({found.get(name)!r}, now "
                f"{head[name]!r}): use another directory"
            )


def tables(
    batches: Mapping[int, Sequence[TokenSequence]],
    sites: Sequence[Site],
    asked: Sequence[tuple[int, int]],
    losses: Mapping[tuple[int, int, int], Sequence[float]],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row per expert, and a row per expert and domain: `tokens` predicted, `loss` of the whole
    model and `loss_without` the expert (nats per token), their `difference`, and the 95 % interval
    of it over documents (NaN where they are too few)."""
    domains, number, domain_U, tokens_U = documents_of(batches.values())
    nats_UA = np.zeros((len(number), len(asked) + 1))
    for b, rows in batches.items():
        for i, row in enumerate(rows):
            nats_UA[number[row.document]] += [losses[b, r, e][i] for r, e in (WHOLE, *asked)]
    first = pd.DataFrame(
        [
            {"layer": sites[r].layer, "router": r, "expert": e, "how": how_dropped(sites[r])}
            for r, e in asked
        ]
    )

    def judged(of_U: np.ndarray) -> pd.DataFrame:
        found = _judged(tokens_U[of_U], nats_UA[of_U], domain_U[of_U])
        return pd.concat([first, found], axis=1)

    by_domain = pd.concat(
        [
            judged(domain_U == d).assign(domain=name)
            for d, name in enumerate(domains)
            if (tokens_U[domain_U == d] > 0).any()
        ],
        ignore_index=True,
    )
    by_domain.insert(3, "domain", by_domain.pop("domain"))
    by_domain = by_domain.sort_values(["router", "expert", "domain"], ignore_index=True)
    return judged(np.ones(len(number), bool)), by_domain


def _judged(tokens_U: np.ndarray, nats_UA: np.ndarray, strata_U: np.ndarray) -> pd.DataFrame:
    T = tokens_U.sum()
    loss_A = nats_UA.sum(0) / T
    change_UA = nats_UA[:, 1:] - nats_UA[:, :1]
    low_A = high_A = np.full(change_UA.shape[1], np.nan)
    strata_U = np.unique(strata_U, return_inverse=True)[1]
    if (weights_RU := resample_weights(strata_U)) is not None:
        change_RA = weights_RU @ change_UA / (weights_RU @ tokens_U)[:, None]
        low_A, high_A = np.quantile(change_RA, [0.025, 0.975], axis=0)
    return pd.DataFrame(
        {
            "documents": len(tokens_U),
            "tokens": int(T),
            "loss": loss_A[0],
            "loss_without": loss_A[1:],
            "difference": loss_A[1:] - loss_A[0],
            "difference_low": low_A,
            "difference_high": high_A,
        }
    )
