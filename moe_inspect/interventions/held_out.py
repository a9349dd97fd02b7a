"""A model and held-out text, and the model's loss on it.

B rows, S positions, V vocabulary, D documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from moe_inspect.capture.corpus.plan import Plan, TokenSequence, longest_sequence
from moe_inspect.capture.corpus.sources import find_sources
from moe_inspect.capture.feed import forward, padded
from moe_inspect.capture.options import TraceOptions
from moe_inspect.capture.resume import comparable
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.find import find_routers
from moe_inspect.model.load import load_config, load_model, load_tokenizer, weights_fingerprint
from moe_inspect.model.routers import Site
from moe_inspect.model.vocabulary import tokenizer_fingerprint
from moe_inspect.trace import schema


@dataclass(frozen=True)
class HeldOut:
    """`batches`: of sequences that are fed together. `record`: what determines losses, to tell
    whether two runs measure the same."""

    network: Any
    tokenizer: Any
    batches: list[list[TokenSequence]]
    record: dict[str, Any]
    source: str

    @cached_property
    def sites(self) -> list[Site]:
        return find_routers(self.network)

    def losses(self, batch: int) -> np.ndarray:
        """The loss of each sequence of a batch: the sum, in nats, of predicting each of its tokens
        but the first. float64 [B]"""
        return row_losses(self.network, self.batches[batch], self.tokenizer)


def open_held_out(model: str, options: TraceOptions) -> HeldOut:
    """Loads a model of transformers and plans its passes over the text of `options.data` (default:
    the bundled corpus)."""
    sources = find_sources(options.data)
    config = load_config(
        model, revision=options.revision, trust_remote_code=options.trust_remote_code
    )
    if getattr(config, "is_encoder_decoder", False):
        raise MoeInspectError(f"{model} has an encoder: its loss on plain text means nothing")
    tokenizer = load_tokenizer(
        model, revision=options.revision, trust_remote_code=options.trust_remote_code
    )
    plan = Plan(sources, options, longest_sequence(options.max_length, config, 0))
    batches = [sequences for sequences, _ in plan.batches(tokenizer)]
    source = ", ".join(options.data) or "the bundled corpus"
    if not any(len(s.ids) > 1 for batch in batches for s in batch):
        raise MoeInspectError(f"the held-out text is empty: no text in {source}")
    record = {
        **plan.record(),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "model": model,
        "revision": options.revision,
        "config": schema.fingerprint(comparable(config)),
        "weights": weights_fingerprint(model, options.revision),
        "dtype": options.dtype,
    }
    network = load_model(
        model,
        config,
        revision=options.revision,
        dtype=options.dtype,
        device=options.device,
        device_map=options.device_map,
        trust_remote_code=options.trust_remote_code,
    )
    if any(s.adapter is not None and s.adapter.alone for s in find_routers(network)):
        batches = [[row] for batch in batches for row in batch]
    return HeldOut(network, tokenizer, batches, record, source)


@torch.inference_mode()
def row_losses(network: Any, sequences: Sequence[TokenSequence], tokenizer: Any) -> np.ndarray:
    """See `HeldOut.losses`. Of the logits only one row at a time is held in float32."""
    ids_BS, mask_BS = padded(list(sequences), tokenizer, network)
    ids = torch.from_numpy(ids_BS)
    device = next(network.parameters()).device
    mask = torch.from_numpy(mask_BS.astype(np.int64)).to(device)
    logits_BSV = forward(network, ids, attention_mask=mask, use_cache=False).logits
    sums: list[torch.Tensor] = []
    for b, row in enumerate(sequences):
        n = len(row.ids)
        wanted_S = ids[b, 1:n].to(logits_BSV.device)
        nats_S = F.cross_entropy(logits_BSV[b, : n - 1].float(), wanted_S, reduction="none")
        sums.append(nats_S.double().sum())
    return torch.stack(sums).cpu().numpy()
