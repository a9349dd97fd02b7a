"""The loss of a model on held-out text, whole and without each of its experts. The blocks below a
layer are computed once; what was measured is kept, on disk if it is to be resumable.

B rows, S positions, V vocabulary, D or U documents, A (router, expert) pairs, R resamples.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, ClassVar

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module, ModuleList

from moe_inspect.analysis.metrics.uncertainty import resample_weights
from moe_inspect.capture.corpus.documents import find_sources
from moe_inspect.capture.corpus.plan import CorpusPlan, TokenSequence, longest_sequence
from moe_inspect.capture.feed import forward, forward_own, logits_of, padded
from moe_inspect.capture.hook.stack import replaced
from moe_inspect.capture.load import unloaded
from moe_inspect.capture.options import TraceOptions
from moe_inspect.errors import MoeInspectError, reading, writing
from moe_inspect.interventions.intervene import Intervention
from moe_inspect.interventions.rules import how_dropped
from moe_inspect.model.choices import Called
from moe_inspect.model.custom.spec import RouterSpec
from moe_inspect.model.families import LAYER, Config
from moe_inspect.model.find import find_routers
from moe_inspect.model.own import OwnModel
from moe_inspect.model.routers import Site, in_layers
from moe_inspect.reporting.shown import FIRST_ROWS, Shown
from moe_inspect.reporting.tables.registry import Excerpt
from moe_inspect.text import plural
from moe_inspect.trace.files.lock import hold
from moe_inspect.trace.manifest import refuse_within_trace

Progress = Callable[[int, int], None]  # (passes done, passes in all)
FORMAT = 1
WHOLE = (-1, -1)  # in place of a router and an expert: the whole model


@dataclass(frozen=True)
class HeldOut:
    """`batches`: of sequences that are fed together. `record`: what determines losses, to tell
    whether two runs measure the same. `own`: what a loader returned. `routers`: see `intervene`."""

    network: Called
    tokenizer: Called
    batches: list[list[TokenSequence]]
    record: Config
    own: OwnModel | None = None
    routers: Sequence[RouterSpec] | None = None

    @cached_property
    def sites(self) -> list[Site]:
        return find_routers(self.network, self.routers)

    @torch.inference_mode()
    def losses(self, batch: int, drop: Mapping[str, Sequence[int]] | None = None) -> np.ndarray:
        """The loss of each sequence of a batch: the sum, in nats, of predicting each of its tokens
        but the first. `drop`: path of a router → experts that it does without. float64 [B]"""
        if drop:
            with Intervention(self.network, drop={**drop}, routers=self.routers):
                return self.losses(batch)
        sequences, own = self.batches[batch], self.own
        if own is not None and not own.is_of_transformers:
            losses = list[float]()
            for row in sequences:
                output = forward_own(own, torch.from_numpy(row.ids.astype(np.int64))[None])
                (logits_SV,) = logits_of(own, output, "its loss cannot be measured")
                losses.append(_loss(logits_SV, row, own.name))
            return np.array(losses)
        ids_BS, mask_BS = padded(list(sequences), self.tokenizer, self.network)
        ids, mask = torch.from_numpy(ids_BS), torch.from_numpy(mask_BS.astype(np.int64))
        mask = mask.to(next(self.network.parameters()).device)
        logits = forward(self.network, ids, attention_mask=mask, use_cache=False).logits
        name = type(self.network).__name__
        # of the logits only one row at a time is held in float32
        return np.array([_loss(logits[b], row, name) for b, row in enumerate(sequences)])


def documents_of(
    batches: Iterable[Sequence[TokenSequence]],
) -> tuple[list[str], dict[int, int], np.ndarray, np.ndarray]:
    """Domains; document → its number; by document, its domain and tokens predicted, [D]."""
    rows = [row for batch in batches for row in batch]
    domains = sorted({row.domain for row in rows})
    number = {document: u for u, document in enumerate(sorted({row.document for row in rows}))}
    domain_D, tokens_D = np.zeros((2, len(number)), np.int64)
    for row in rows:
        domain_D[number[row.document]] = domains.index(row.domain)
        tokens_D[number[row.document]] += len(row.ids) - 1
    return domains, number, domain_D, tokens_D


def open_held_out(model: str, options: TraceOptions) -> HeldOut:
    """A model and its passes over `options.data`. MoeInspectError where it has no loss on text."""
    sources = find_sources(options.data)
    found = unloaded(model, options)
    if found.is_encoder_decoder:
        raise MoeInspectError(
            f"{found.name} has an encoder and a decoder, and no loss on plain text: measure its "
            "own with moe_inspect.intervene(model, drop=…)"
        )
    plan = CorpusPlan(sources, options, longest_sequence(options.max_length, found.config, 0))
    batches = [sequences for sequences, _ in plan.batches(found.tokenizer)]
    if not any(len(s.ids) > 1 for batch in batches for s in batch):
        source = ", ".join(options.data) or "the bundled corpus"
        raise MoeInspectError(f"the held-out text is empty: no text in {source}")
    record, network = {**plan.record(), **found.record()}, found.load()
    sites = find_routers(network, options.routers)
    if any(s.adapter is not None and s.adapter.alone for s in sites):
        batches = [[row] for batch in batches for row in batch]
    return HeldOut(network, found.tokenizer, batches, record, found.own, options.routers)


def _loss(logits_SV: torch.Tensor, row: TokenSequence, name: str) -> float:
    """Nats of predicting each token of a sequence but the first; behind its end is padding."""
    n = len(row.ids)
    if len(logits_SV) < n or logits_SV.shape[1] <= row.ids.max():
        raise MoeInspectError(
            f"{name} returned logits {list(logits_SV.shape)} for {n} tokens with ids up to "
            f"{row.ids.max()}: it does not predict the next token, so there is no loss to measure"
        )
    wanted_S = torch.from_numpy(row.ids[1:].astype(np.int64)).to(logits_SV.device)
    nats_S = F.cross_entropy(logits_SV[: n - 1].float(), wanted_S, reduction="none")
    return float(nats_S.double().sum())


# --- without an expert


@dataclass(repr=False)
class Ablation(Shown):
    """What experts are worth on held-out text, in nats of loss per token.

    experts    a row per expert: layer, router, expert, how, documents, tokens, loss, loss_without,
               difference, difference_low, difference_high
    domains    the same by domain
    measured   batches of text that were measured with every expert, of `batches`
    passes     forward passes of this run
    """

    rows: ClassVar[int] = 20

    experts: pd.DataFrame
    domains: pd.DataFrame
    measured: int
    batches: int
    passes: int

    def __post_init__(self) -> None:
        self.tables = {"experts": self.experts, "domains": self.domains}

    @property
    def title(self) -> str:
        return "ablate"

    @property
    def said(self) -> list[str]:
        first = self.experts.iloc[0]
        return [
            f"{plural(len(self.experts), 'expert')}, {first.tokens:,} tokens of "
            f"{plural(int(first.documents), 'document')}, {self.passes:,} forward passes: "
            f"the whole model has a loss of {first.loss:.3f} nats per token."
        ]

    @property
    def excerpts(self) -> dict[str, Excerpt]:
        return {"experts": FIRST_ROWS}


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
    wanted = {site.path for site in in_layers(sites, layers)}
    most = max(site.experts for site in sites)
    if experts is not None and max(experts, default=-1) >= most:
        has = f"this model has {most} in a layer (0 to {most - 1})"
        raise MoeInspectError(f"no expert {max(experts)}: {has}")
    numbers = range(most) if experts is None else sorted(set(experts))
    of = ((r, site.experts) for r, site in enumerate(sites) if site.path in wanted)
    return [(r, e) for r, E in of for e in numbers if e < E]


def measure(
    held_out: HeldOut,
    asked: Sequence[tuple[int, int]],
    losses: KeptLosses,
    most_passes: int | None = None,
    progress: Progress | None = None,
) -> tuple[list[int], int]:
    """Measures batches without each of the (router, expert) `asked`, up to `most_passes`. Returns
    those that were measured with every expert, and the forward passes of this run."""
    sites, every = held_out.sites, range(len(held_out.batches))
    below = Below(held_out.network, [sites[r] for r in sorted({r for r, _ in asked})])
    left = {b: [pair for pair in sorted(asked) if (b, *pair) not in losses] for b in every}
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
                below.check(held_out, b, [sites[r] for r in sorted({r for r, _ in pairs})], whole)
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


class Below:
    """`remembered` notes, in a pass of the whole model, what comes out of the block below each of
    `sites`. While `skipped` lasts for one of these, all blocks below return that at once. `usable`:
    whether a model allows this (one whose blocks hand on more than their output does not)."""

    def __init__(self, network: Module, sites: Sequence[Site]):
        found = {site.path: LAYER.search(site.path) for site in sites}
        # path of a module → the number of its block
        self._block_of = {path: int(at[1]) for path, at in found.items() if at is not None}
        lists = {path[: at.start(1) - 1] for path, at in found.items() if at is not None}
        blocks = network.get_submodule(lists.pop()) if len(lists) == 1 else None
        self._blocks = list(blocks) if isinstance(blocks, ModuleList) else []
        self.usable = bool(self._blocks) and self._block_of.keys() == found.keys()
        self._outputs: dict[int, Tensor] = {}

    @contextmanager
    def remembered(self) -> Iterator[None]:
        below = {n - 1 for n in self._block_of.values() if n > 0} if self.usable else set[int]()
        outputs: dict[int, list[Tensor]] = {n: [] for n in below}
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
        with ExitStack() as undo:
            if self.usable and n - 1 in self._outputs:
                output = self._outputs[n - 1]
                for block in self._blocks[:n]:
                    undo.callback(replaced(block, "forward", lambda own: lambda *a, **k: output))
            yield

    def check(self, held_out: HeldOut, b: int, sites: Sequence[Site], whole: np.ndarray) -> None:
        """Whether the losses of batch b stay to the bit wherever it begins, and again."""
        for site in [*sites, sites[-1]]:
            with self.skipped(site):
                self.usable = self.usable and np.array_equal(held_out.losses(b), whole)


class KeptLosses(dict[tuple[int, int, int], list[float]]):
    """(batch, router, expert) → the loss of each sequence. What is set goes into the `file`."""

    file: BinaryIO | None = None

    def __setitem__(self, at: tuple[int, int, int], nats: list[float]) -> None:
        super().__setitem__(at, nats)
        self.append(dict(zip(("batch", "router", "expert"), at, strict=True)) | {"nats": nats})

    def append(self, line: Mapping[str, object]) -> None:
        if self.file is not None:
            with writing(self.file.name):
                self.file.write(json.dumps(line).encode() + b"\n")
                self.file.flush()


@contextmanager
def kept_losses(path: Path | None, record: Mapping[str, object]) -> Iterator[KeptLosses]:
    """Those in the directory `path` (None: in memory), as `losses.jsonl`: a line that says what is
    measured, then one per forward pass. A line that was cut off is overwritten. MoeInspectError
    where it holds another measurement, or another process writes to it."""
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
            then, now = json.loads(whole[0]), json.loads(json.dumps(head))
            if other := [name for name in head if then.get(name) != now[name]]:
                raise MoeInspectError(
                    f"{path} holds losses of a different {other[0]} ({then.get(other[0])!r}, now "
                    f"{now[other[0]]!r}): use another directory"
                )
        kept = map(json.loads, whole[1:])
        losses.update({(of["batch"], of["router"], of["expert"]): of["nats"] for of in kept})
        with writing(file):
            if rest:
                os.truncate(file, sum(map(len, whole)) + len(whole))
            losses.file = opened.enter_context(file.open("ab"))
        if not whole:
            losses.append(head)
        yield losses


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
    hows = [how_dropped(sites[r]) for r, _ in asked]
    first = pd.DataFrame(asked, columns=["router", "expert"]).assign(how=hows)
    first.insert(0, "layer", [sites[r].layer for r, _ in asked])

    def judged(of_U: np.ndarray) -> pd.DataFrame:
        tokens, nats = tokens_U[of_U], nats_UA[of_U]
        loss_A, change_UA = nats.sum(0) / tokens.sum(), nats[:, 1:] - nats[:, :1]
        low_A = high_A = np.full(len(asked), np.nan)
        strata_U = np.unique(domain_U[of_U], return_inverse=True)[1]
        if (weights_RU := resample_weights(strata_U)) is not None:
            change_RA = weights_RU @ change_UA / (weights_RU @ tokens)[:, None]
            low_A, high_A = np.quantile(change_RA, [0.025, 0.975], axis=0)
        return first.assign(
            documents=len(tokens),
            tokens=int(tokens.sum()),
            loss=loss_A[0],
            loss_without=loss_A[1:],
            difference=loss_A[1:] - loss_A[0],
            difference_low=low_A,
            difference_high=high_A,
        )

    of_domains = [(name, domain_U == d) for d, name in enumerate(domains)]
    parts = [judged(of_U).assign(domain=n) for n, of_U in of_domains if (tokens_U[of_U] > 0).any()]
    by_domain = pd.concat(parts, ignore_index=True)
    by_domain.insert(3, "domain", by_domain.pop("domain"))
    by_domain = by_domain.sort_values(["router", "expert", "domain"], ignore_index=True)
    return judged(np.ones(len(number), bool)), by_domain
