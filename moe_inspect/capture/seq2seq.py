"""Feeds an encoder-decoder: the text to its encoder, then its start token and what it decodes to
its decoder.

B rows, S positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from moe_inspect.capture.corpus import Sequence_
from moe_inspect.capture.hook.call_inputs import Rows
from moe_inspect.capture.hook.recorder import Recorder
from moe_inspect.capture.run import Decoding, cache_of, chosen, forward, last_logits, padded
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.writer import Document


def start_ids(network: Any) -> list[int]:
    """What the decoder is fed before it decodes: the start token, and the one that its generation
    config forces to be next."""
    generation = getattr(network, "generation_config", None)

    def stated(name: str) -> Any:
        found = getattr(generation, name, None)
        return found if found is not None else getattr(network.config, name, None)

    start, forced = stated("decoder_start_token_id"), stated("forced_bos_token_id")
    start = start if start is not None else stated("bos_token_id")
    if not isinstance(start, int):
        raise MoeInspectError(
            f"the config of {type(network).__name__} states no decoder_start_token_id: nothing "
            "to begin decoding with"
        )
    return [start, forced] if isinstance(forced, int) else [start]


def translate(
    network: Any,
    recorder: Recorder,
    batch: list[Sequence_],
    documents: list[Document],
    tokenizer: Any,
    number: int,
    decoding: Decoding,
) -> int:
    """The encoder over right-padded rows (forward pass `number`), then the decoder: its start, and
    up to `decoding.tokens` one at a time, with a key-value cache; a row that has met an end token
    is fed nothing that is recorded. Returns the tokens fed."""
    generator = torch.Generator().manual_seed(decoding.seed)
    of_row = {
        "document": np.array([s.document for s in batch], np.int32),
        "sequence": np.array([s.sequence for s in batch], np.int32),
        "domain": np.array([recorder.reader.domain_code(s.domain) for s in batch], np.int32),
    }

    def expect(
        stack: str, ids_BS: np.ndarray, real_BS: np.ndarray, first: int, step: int, phase: str
    ) -> int:
        shape = ids_BS.shape
        recorder.expect(
            Rows(
                real=real_BS.reshape(-1),
                token_id=ids_BS[real_BS].astype(np.int32),
                position=np.broadcast_to(np.arange(first, first + shape[1], dtype=np.int32), shape)[
                    real_BS
                ],
                document=np.broadcast_to(of_row["document"][:, None], shape)[real_BS],
                sequence=np.broadcast_to(of_row["sequence"][:, None], shape)[real_BS],
                domain=np.broadcast_to(of_row["domain"][:, None], shape)[real_BS],
                documents=documents if step == 0 else [],
                phase=phase,
                number=number + step,
                group=number,
                stack=stack,
            )
        )
        return int(real_BS.sum())

    ids_BS, mask_BS = padded(batch, tokenizer, network)
    mask = torch.from_numpy(mask_BS.astype(np.int64)).to(next(network.parameters()).device)
    fed = expect("encoder", ids_BS, mask_BS, 0, 0, "encode")
    usual: dict[str, Any] = {"attention_mask": mask, "use_cache": True, **last_logits(network)}
    usual["encoder_outputs"] = forward(
        network.get_encoder(), torch.from_numpy(ids_BS), attention_mask=mask, return_dict=True
    )
    decoded_BS = torch.tensor([start_ids(network)] * len(batch))
    running_B, cache, position = np.ones(len(batch), bool), {}, 0
    for step in range(decoding.tokens + 1):
        real_BS = np.broadcast_to(running_B[:, None], tuple(decoded_BS.shape))
        fed += expect(
            "decoder",
            decoded_BS.numpy(),
            real_BS,
            position,
            1 + step,
            "decode" if step else "prefill",
        )
        output = forward(network, decoded_BS, "decoder_input_ids", **usual, **cache)
        position += decoded_BS.shape[1]
        if step == decoding.tokens:
            break
        cache = cache_of(network, output)
        next_B = chosen(output.logits[:, -1].float().cpu(), decoding.temperature, generator)
        running_B = running_B & ~np.isin(next_B.numpy(), list(decoding.ends))
        if not running_B.any():
            break
        decoded_BS = next_B[:, None]
    recorder.end_group()
    return fed
