"""A model and held-out text, and the model's loss on it.

B rows, S positions, V vocabulary, D documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from moe_inspect.capture.corpus.documents import find_sources
from moe_inspect.capture.corpus.plan import Plan, TokenSequence, longest_sequence
from moe_inspect.capture.feed import forward, forward_own, logits_of, padded
from moe_inspect.capture.load import unloaded
from moe_inspect.capture.options import TraceOptions
from moe_inspect.errors import MoeInspectError
from moe_inspect.interventions.intervene import Intervention
from moe_inspect.model.custom.spec import RouterSpec
from moe_inspect.model.find import find_routers
from moe_inspect.model.own import OwnModel
from moe_inspect.model.routers import Site


@dataclass(frozen=True)
class HeldOut:
    """`batches`: of sequences that are fed together. `record`: what determines losses, to tell
    whether two runs measure the same. `own`: what a loader returned. `routers`: see `intervene`."""

    network: Any
    tokenizer: Any
    batches: list[list[TokenSequence]]
    record: dict[str, Any]
    source: str
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
        sequences = self.batches[batch]
        if self.own is not None and not self.own.is_of_transformers:
            return np.array([self._own_loss(self.own, row) for row in sequences])
        ids_BS, mask_BS = padded(list(sequences), self.tokenizer, self.network)
        device = next(self.network.parameters()).device
        mask = torch.from_numpy(mask_BS.astype(np.int64)).to(device)
        ids = torch.from_numpy(ids_BS)
        logits = forward(self.network, ids, attention_mask=mask, use_cache=False).logits
        name = type(self.network).__name__
        # of the logits only one row at a time is held in float32
        return np.array([_loss(logits[b], row, name) for b, row in enumerate(sequences)])

    def _own_loss(self, own: OwnModel, row: TokenSequence) -> float:
        output = forward_own(own, torch.from_numpy(row.ids.astype(np.int64))[None])
        return _loss(logits_of(own, output, "its loss cannot be measured")[0], row, own.name)


def documents_of(
    batches: Iterable[Sequence[TokenSequence]],
) -> tuple[list[str], dict[int, int], np.ndarray, np.ndarray]:
    """The labels of domains; document → its number u, in order; of each document the number of its
    domain, and the tokens predicted. int64 [D] each"""
    rows = [row for batch in batches for row in batch]
    domains = sorted({row.domain for row in rows})
    number = {document: u for u, document in enumerate(sorted({row.document for row in rows}))}
    domain_D, tokens_D = np.zeros((2, len(number)), np.int64)
    for row in rows:
        domain_D[number[row.document]] = domains.index(row.domain)
        tokens_D[number[row.document]] += len(row.ids) - 1
    return domains, number, domain_D, tokens_D


def open_held_out(model: str, options: TraceOptions) -> HeldOut:
    """Loads a model and plans its passes over the text of `options.data` (default: the bundled
    corpus). MoeInspectError for a model without a loss on plain text."""
    sources = find_sources(options.data)
    found = unloaded(model, options)
    if found.is_encoder_decoder:
        raise MoeInspectError(
            f"{found.name} has an encoder and a decoder, and no loss on plain text: measure its "
            "own with moe_inspect.intervene(model, drop=…)"
        )
    plan = Plan(sources, options, longest_sequence(options.max_length, found.config, 0))
    batches = [sequences for sequences, _ in plan.batches(found.tokenizer)]
    source = ", ".join(options.data) or "the bundled corpus"
    if not any(len(s.ids) > 1 for batch in batches for s in batch):
        raise MoeInspectError(f"the held-out text is empty: no text in {source}")
    record = {**plan.record(), **found.record()}
    network = found.load()
    sites = find_routers(network, options.routers)
    if any(s.adapter is not None and s.adapter.alone for s in sites):
        batches = [[row] for batch in batches for row in batch]
    return HeldOut(network, found.tokenizer, batches, record, source, found.own, options.routers)


def _loss(logits_SV: torch.Tensor, row: TokenSequence, name: str) -> float:
    """The sum, in nats, of predicting each token of a sequence but the first. Positions of
    `logits_SV` behind its end are padding's."""
    n = len(row.ids)
    if len(logits_SV) < n or logits_SV.shape[1] <= row.ids.max():
        raise MoeInspectError(
            f"{name} returned logits {list(logits_SV.shape)} for {n} tokens with ids up to "
            f"{row.ids.max()}: it does not predict the next token, so there is no loss to measure"
        )
    wanted_S = torch.from_numpy(row.ids[1:].astype(np.int64)).to(logits_SV.device)
    nats_S = F.cross_entropy(logits_SV[: n - 1].float(), wanted_S, reduction="none")
    return float(nats_S.double().sum())
