"""Feeds a planned batch to a model that is not transformers': the tokens of one sequence at a time,
without padding, mask or key-value cache, which such a model may not have.

B rows, S positions, V vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_inspect.capture.feed import Announcer, Batch, Decoding, chosen
from moe_inspect.capture.hook.inputs.arguments import POSITIONS
from moe_inspect.capture.recorder import Recorder
from moe_inspect.capture.token_loss.head import logits_in
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.own import OwnModel, positions_of
from moe_inspect.text import first_line


def feed_own(own: OwnModel, recorder: Recorder, batch: Batch, decoding: Decoding) -> int:
    """A forward pass over a sequence, then up to `decoding.tokens` decoded tokens. For each of them
    the model reads the whole sequence again, and only the last row of that pass is recorded.
    Returns the number of tokens recorded."""
    steps = decoding.tokens
    announce = Announcer(recorder, batch, group=batch.number if steps else None)
    generator = torch.Generator().manual_seed(decoding.seed)
    ids_BS = torch.from_numpy(np.stack([s.ids for s in batch.sequences]).astype(np.int64))
    fed = 0
    for step in range(steps + 1):
        real_BS = np.ones(tuple(ids_BS.shape), bool)
        real_BS[:, : -1 if step else 0] = False
        fed += announce(
            ids_BS.numpy(),
            real_BS,
            step=step,
            phase="decode" if step else "prefill",
            documents=[] if step else batch.documents,
        )
        output = forward_own(own, ids_BS)
        if step == steps:
            break
        last_BV = logits_of(own, output, "trace it without --generate")[:, -1].float().cpu()
        next_B = chosen(last_BV, decoding.temperature, generator)
        if int(next_B[0]) in decoding.end_ids:
            break
        ids_BS = torch.cat([ids_BS, next_B[:, None]], 1)
    if steps:
        recorder.end_group()
    return fed


def forward_own(own: OwnModel, ids_BS: Tensor) -> Any:
    """What the model returns for these token ids; MoeInspectError where it fails on them."""
    parameter = next(own.model.parameters(), None)
    ids_BS = ids_BS.to(parameter.device) if parameter is not None else ids_BS
    try:
        if own.forward is not None:
            return own.forward(own.model, ids_BS)
        return own.model(ids_BS, **_positions(own.model, ids_BS))
    except MoeInspectError:
        raise
    except torch.OutOfMemoryError as error:
        raise MoeInspectError(
            f"out of memory in a forward pass of {ids_BS.numel():,} tokens: lower --max-length"
        ) from error
    # whatever the user's model raises
    except Exception as error:
        why = (
            "a model that takes more than token ids needs a loader that returns (model, tokenizer, "
            "forward)"
        )
        stated = positions_of(getattr(own.model, "config", None))
        if stated is None and isinstance(error, IndexError):
            why = (
                "no max_position_embeddings, block_size or the like in a config of the model says "
                "how many positions it has: give --max-length"
            )
        raise MoeInspectError(
            f"{own.name} failed on token ids {list(ids_BS.shape)}: {type(error).__name__}: "
            f"{first_line(error)} ({why})"
        ) from error


def _positions(model: Any, ids_BS: Tensor) -> dict[str, Tensor]:
    """Position ids, for a model that requires them."""
    parameters = inspect.signature(model.forward).parameters
    required = [n for n in POSITIONS if n in parameters and parameters[n].default is inspect._empty]
    position_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device).expand(ids_BS.shape)
    return dict.fromkeys(required, position_BS)


def logits_of(own: OwnModel, output: Any, instead: str) -> Tensor:
    """Logits [B, S or 1, V]: a tensor, `output.logits`, or the first of several outputs.
    MoeInspectError where there are none, with what to do `instead`."""
    found = logits_in(output)
    if found is None:
        raise MoeInspectError(
            f"{own.name} returned no logits [rows, positions, vocabulary]: {instead}, or have the "
            "loader return (model, tokenizer, forward)"
        )
    return found
