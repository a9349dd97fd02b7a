"""Ablation: the loss of a model without each of its experts, for `moe-inspect ablate` and
`moe_inspect.ablate`. The blocks below a layer are computed once; what was measured is kept, on disk
if it is to be resumable.

U documents, A (router, expert) pairs, R resamples.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
from torch.nn import Module, ModuleList

from moe_inspect.analysis.metrics.uncertainty import resample_weights
from moe_inspect.capture.corpus.plan import TokenSequence
from moe_inspect.errors import MoeInspectError, reading, writing
from moe_inspect.interventions.among import how_dropped
from moe_inspect.interventions.held_out import HeldOut
from moe_inspect.interventions.intervene import Intervention
from moe_inspect.model.families import LAYER
from moe_inspect.model.routers import Site, in_layers
from moe_inspect.trace.files.lock import hold
from moe_inspect.trace.manifest import refuse_within_trace

Progress = Callable[[int, int], None]  # (passes done, passes in all)


def measure(
    held_out: HeldOut,
    asked: Sequence[tuple[int, int]],
    store: Store,
    most_passes: int | None = None,
    progress: Progress | None = None,
) -> tuple[list[int], int]:
    """Measures each batch without each of the (router, expert) `asked`. With `most_passes` it stops
    before the batch that would exceed them. Returns the batches that were measured with every
    expert, and the forward passes of this run."""
    sites = held_out.sites
    below = Below(held_out.network, [sites[r] for r in sorted({r for r, _ in asked})])
    order = sorted(asked)
    left = {
        b: [pair for pair in order if not store.has(b, *pair)] for b in range(len(held_out.batches))
    }
    total = sum(len(pairs) + 1 for pairs in left.values() if pairs)
    batches, passes, checked = list[int](), 0, False
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
            if not checked:
                checked = True
                _check_below(below, held_out, b, pairs, whole)
            store.add(b, *WHOLE, whole.tolist())
            passes += 1
        for r, expert in pairs:
            dropped = Intervention(
                held_out.network, drop={sites[r].path: expert}, routers=held_out.routers
            )
            with dropped, below.skipped(sites[r]):
                store.add(b, r, expert, held_out.losses(b).tolist())
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
        self._of: dict[str, tuple[ModuleList, int]] = {}
        for site in sites:
            if (found := _block(network, site.path)) is not None:
                self._of[site.path] = found
        lists = {id(blocks) for blocks, _ in self._of.values()}
        self.usable = len(lists) == 1 and len(self._of) == len({s.path for s in sites})
        self._outputs: dict[int, Any] = {}

    @contextmanager
    def remembered(self) -> Iterator[None]:
        """A pass of the whole model runs."""
        self._outputs, hooks, calls = {}, [], 0

        def keep(n: int, module: Module, args: Any, output: Any) -> None:
            nonlocal calls
            calls += 1
            self._outputs[n] = output

        if self.usable:
            blocks = next(iter(self._of.values()))[0]
            wanted = {n - 1 for _, n in self._of.values() if n > 0}
            hooks = [blocks[n].register_forward_hook(partial(keep, n)) for n in sorted(wanted)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if calls != len(self._outputs):  # a block that runs several times in a pass
            self.usable = False

    @contextmanager
    def skipped(self, site: Site) -> Iterator[None]:
        """A pass runs from the block of this site on; all of it where that cannot be."""
        if not self.usable or self._of[site.path][1] - 1 not in self._outputs:
            yield
            return
        blocks, n = self._of[site.path]
        output = self._outputs[n - 1]
        below: list[Any] = list(blocks)[:n]
        before = [vars(block).get("forward") for block in below]
        for block in below:
            block.forward = lambda *args, **kwargs: output
        try:
            yield
        finally:
            for block, own in zip(below, before, strict=True):
                if own is not None:
                    block.forward = own
                else:
                    del block.forward


def _block(network: Any, path: str) -> tuple[ModuleList, int] | None:
    """The list of blocks that a module is in, and its place there."""
    found = LAYER.search(path)
    if found is None:
        return None
    blocks = network.get_submodule(path[: found.start(1) - 1])
    return (blocks, int(found.group(1))) if isinstance(blocks, ModuleList) else None


FORMAT = 1
WHOLE = (-1, -1)  # in place of a router and an expert: the whole model


class Store:
    """The losses of each batch by (router, expert), one float per sequence.

    On disk it is a directory with a file `losses.jsonl`: a line that says what is measured, then a
    line per forward pass, appended and flushed when it is done. A line that was cut off is ignored
    and overwritten. MoeInspectError where the directory holds another measurement, or another
    process writes to it."""

    def __init__(self, path: Path | None, record: dict[str, Any]):
        self._of: dict[int, dict[tuple[int, int], list[float]]] = {}
        self._file: BinaryIO | None = None
        self._lock = None
        if path is None:
            return
        refuse_within_trace(path)
        self._lock = hold(path)
        try:
            self._open(path / "losses.jsonl", {"format": FORMAT, **record})
        except BaseException:
            self.close()
            raise

    def has(self, batch: int, router: int, expert: int) -> bool:
        return (router, expert) in self._of.get(batch, {})

    def get(self, batch: int, router: int, expert: int) -> list[float]:
        """float [B]"""
        return self._of[batch][router, expert]

    def add(self, batch: int, router: int, expert: int, nats: list[float]) -> None:
        self._of.setdefault(batch, {})[router, expert] = nats
        if self._file is not None:
            line = {"batch": batch, "router": router, "expert": expert, "nats": nats}
            with writing(self._file.name):
                self._file.write(json.dumps(line).encode() + b"\n")
                self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._lock is not None:
            self._lock.release()

    def _open(self, path: Path, head: dict[str, Any]) -> None:
        with reading(path):
            lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        whole, rest = lines[:-1], lines[-1]  # what is behind the last line's end was cut off
        if whole:
            self._check(path, json.loads(whole[0]), json.loads(json.dumps(head)))
            for line in whole[1:]:
                of = json.loads(line)
                self._of.setdefault(of["batch"], {})[of["router"], of["expert"]] = of["nats"]
        with writing(path):
            if rest:
                os.truncate(path, sum(map(len, whole)) + len(whole))
            self._file = path.open("ab")
            if not whole:
                self._file.write(json.dumps(head).encode() + b"\n")
                self._file.flush()

    @staticmethod
    def _check(path: Path, found: dict[str, Any], head: dict[str, Any]) -> None:
        for name in head:
            if found.get(name) != head[name]:
                raise MoeInspectError(
                    f"{path.parent} holds losses of a different {name} ({found.get(name)!r}, now "
                    f"{head[name]!r}): use another directory"
                )


def tables(
    batches: Mapping[int, Sequence[TokenSequence]],
    sites: Sequence[Site],
    asked: Sequence[tuple[int, int]],
    store: Store,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row per expert, and a row per expert and domain: `tokens` predicted, `loss` of the whole
    model and `loss_without` the expert (nats per token), their `difference`, and the 95 % interval
    of it over documents (NaN where they are too few)."""
    rows = [(b, i, row) for b, of in batches.items() for i, row in enumerate(of)]
    names = sorted({row.domain for _, _, row in rows})
    number = {d: u for u, d in enumerate(sorted({row.document for _, _, row in rows}))}
    tokens_U, domain_U = np.zeros(len(number)), np.zeros(len(number), np.int64)
    nats_UA = np.zeros((len(number), len(asked) + 1))
    for b, i, row in rows:
        u = number[row.document]
        tokens_U[u] += len(row.ids) - 1
        domain_U[u] = names.index(row.domain)
        nats_UA[u] += [store.get(b, r, e)[i] for r, e in (WHOLE, *asked)]
    routers = pd.DataFrame(
        [
            {"layer": sites[r].layer, "router": r, "expert": e, "how": how_dropped(sites[r])}
            for r, e in asked
        ]
    )

    def judged(of: np.ndarray) -> pd.DataFrame:
        found = _judged(tokens_U[of], nats_UA[of], domain_U[of])
        return pd.concat([routers, found], axis=1)

    everything = np.ones(len(number), bool)
    by_domain = [
        judged(domain_U == d).assign(domain=name)
        for d, name in enumerate(names)
        if (tokens_U[domain_U == d] > 0).any()
    ]
    domains = pd.concat(by_domain, ignore_index=True)
    first = ["layer", "router", "expert", "domain"]
    domains = domains[[*first, *(c for c in domains if c not in first)]]
    domains = domains.sort_values(first[1:], ignore_index=True)
    return judged(everything), domains


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
    store = Store(resume, held_out.record)
    try:
        batches, passes = measure(held_out, asked, store, most_passes, progress)
    finally:
        store.close()
    of = {b: held_out.batches[b] for b in batches}
    by_expert, by_domain = tables(of, held_out.sites, asked, store)
    return Ablation(by_expert, by_domain, len(batches), len(held_out.batches), passes)


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
