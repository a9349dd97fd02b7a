"""Feeds a planned batch to a model: a prefill pass, a prefill pass and decode steps, or encoder and
decoder. The recorder gets the rows of each pass before it runs. A model that is not transformers'
is fed one sequence at a time, without padding, mask or key-value cache, which it may not have.

B rows, S positions, V vocabulary.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_inspect.capture.corpus.plan import TokenSequence
from moe_inspect.capture.hook.inputs.arguments import POSITIONS
from moe_inspect.capture.hook.inputs.call_arguments import cache_among
from moe_inspect.capture.hook.inputs.rows import Rows
from moe_inspect.capture.recorder import Recorder
from moe_inspect.capture.token_loss import logits_in
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.own import OwnModel, positions_of
from moe_inspect.text import first_line
from moe_inspect.trace.writer import Document


@dataclass(frozen=True)
class Batch:
    """Sequences that are fed together. `number`: of its first forward pass. `documents`: those
    whose first sequence is in this batch."""

    number: int
    sequences: list[TokenSequence]
    documents: list[Document]


@dataclass(frozen=True)
class Decoding:
    """`tokens`: maximum number of decoded tokens fed. `temperature`: 0 is greedy. `end_ids`: token
    ids that end a row."""

    tokens: int
    temperature: float
    seed: int
    end_ids: frozenset[int]


# --- the passes; each returns the number of tokens fed, without padding


def prefill(network: Any, recorder: Recorder, batch: Batch, tokenizer: Any) -> int:
    """One forward pass over right-padded rows."""
    ids_BS, mask_BS = padded(batch.sequences, tokenizer, network)
    fed = Announcer(recorder, batch)(ids_BS, mask_BS, documents=batch.documents)
    mask = torch.from_numpy(mask_BS.astype(np.int64)).to(next(network.parameters()).device)
    # neither key-value cache nor logits of all positions: not needed
    forward(
        network,
        torch.from_numpy(ids_BS),
        attention_mask=mask,
        use_cache=False,
        **last_logits(network, recorder),
    )
    return fed


def decode(network: Any, recorder: Recorder, batch: Batch, decoding: Decoding) -> int:
    """Prefill of rows of equal length, then one token per row and step, with a key-value cache and
    without padding. A row is no longer recorded after its end token."""
    announce = Announcer(recorder, batch, group=batch.number)
    generator = torch.Generator().manual_seed(decoding.seed)
    ids_BS = torch.from_numpy(np.stack([s.ids for s in batch.sequences]).astype(np.int64))
    running_B = np.ones(len(ids_BS), bool)
    usual, cache = {"use_cache": True, **last_logits(network, recorder)}, {}
    fed = position = 0
    for step in range(decoding.tokens + 1):
        fed += announce(
            ids_BS.numpy(),
            np.broadcast_to(running_B[:, None], tuple(ids_BS.shape)),
            position=position,
            step=step,
            phase="decode" if step else "prefill",
            documents=[] if step else batch.documents,
        )
        output = forward(network, ids_BS, **usual, **cache)
        position += ids_BS.shape[1]
        cache = cache_of(network, output)
        next_B = chosen(output.logits[:, -1].float().cpu(), decoding.temperature, generator)
        running_B = running_B & ~np.isin(next_B.numpy(), list(decoding.end_ids))
        if not running_B.any():
            break
        ids_BS = next_B[:, None]
    recorder.end_group()
    return fed


def encode_decode(
    network: Any, recorder: Recorder, batch: Batch, tokenizer: Any, decoding: Decoding
) -> int:
    """The encoder on right-padded rows, then the decoder: its start tokens, then up to
    `decoding.tokens` one per step, with a key-value cache. A row is no longer recorded after its
    end token."""
    announce = Announcer(recorder, batch, group=batch.number)
    generator = torch.Generator().manual_seed(decoding.seed)
    ids_BS, mask_BS = padded(batch.sequences, tokenizer, network)
    mask = torch.from_numpy(mask_BS.astype(np.int64)).to(next(network.parameters()).device)
    fed = announce(ids_BS, mask_BS, phase="encode", stack="encoder", documents=batch.documents)
    usual: dict[str, Any] = {"attention_mask": mask, "use_cache": True}
    usual |= last_logits(network, recorder)
    usual["encoder_outputs"] = forward(
        network.get_encoder(), torch.from_numpy(ids_BS), attention_mask=mask, return_dict=True
    )
    decoded_BS = torch.tensor([start_ids(network)] * len(ids_BS))
    running_B, cache, position = np.ones(len(ids_BS), bool), {}, 0
    for step in range(decoding.tokens + 1):
        fed += announce(
            decoded_BS.numpy(),
            np.broadcast_to(running_B[:, None], tuple(decoded_BS.shape)),
            position=position,
            step=1 + step,
            phase="decode" if step else "prefill",
            stack="decoder",
        )
        output = forward(network, decoded_BS, "decoder_input_ids", **usual, **cache)
        position += decoded_BS.shape[1]
        if step == decoding.tokens:
            break
        cache = cache_of(network, output)
        next_B = chosen(output.logits[:, -1].float().cpu(), decoding.temperature, generator)
        running_B = running_B & ~np.isin(next_B.numpy(), list(decoding.end_ids))
        if not running_B.any():
            break
        decoded_BS = next_B[:, None]
    recorder.end_group()
    return fed


class Announcer:
    """Passes the rows of the next forward pass to the recorder; returns the number of tokens."""

    def __init__(self, recorder: Recorder, batch: Batch, group: int | None = None):
        self.recorder, self.number, self.group = recorder, batch.number, group
        sequences = batch.sequences
        self.document_B = np.array([s.document for s in sequences], np.int32)
        self.sequence_B = np.array([s.sequence for s in sequences], np.int32)
        codes = [recorder.inputs.domain_code(s.domain) for s in sequences]
        self.domain_B = np.array(codes, np.int32)

    def __call__(
        self,
        ids_BS: np.ndarray,
        real_BS: np.ndarray,
        *,
        position: int = 0,
        step: int = 0,
        phase: str = "prefill",
        stack: str = "",
        documents: list[Document] | None = None,
    ) -> int:
        B, S = ids_BS.shape
        position_S = np.arange(position, position + S, dtype=np.int32)

        def of_real(values: np.ndarray) -> np.ndarray:
            return np.broadcast_to(values, (B, S))[real_BS]

        rows = Rows(
            real=real_BS.reshape(-1),
            token_id=ids_BS[real_BS].astype(np.int32),
            document=of_real(self.document_B[:, None]),
            sequence=of_real(self.sequence_B[:, None]),
            position=of_real(position_S),
            domain=of_real(self.domain_B[:, None]),
            documents=documents or [],
            phase=phase,
            number=self.number + step,
            group=self.group,
            stack=stack,
        )
        self.recorder.expect(rows)
        return len(rows.token_id)


# --- a model's call


def padded(
    sequences: list[TokenSequence], tokenizer: Any, network: Any
) -> tuple[np.ndarray, np.ndarray]:
    """(ids int64, mask bool) [B, S] of right-padded rows. A padding token that the
    model has no embedding for is replaced by 0."""
    lengths = np.array([len(s.ids) for s in sequences])
    mask_BS = np.arange(lengths.max()) < lengths[:, None]
    known = embeddings(network)
    pad = tokenizer.pad_token_id
    ids_BS = np.full(
        mask_BS.shape, 0 if pad is None or (known is not None and pad >= known) else pad, np.int64
    )
    ids_BS[mask_BS] = np.concatenate([s.ids for s in sequences])
    return ids_BS, mask_BS


def embeddings(network: Any) -> int | None:
    """Number of embeddings, None where the model does not tell."""
    try:
        return getattr(network.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # remote code may not implement it
        return None


def forward(network: Any, ids_BS: torch.Tensor, name: str = "input_ids", **options: Any) -> Any:
    """The model's output for these tokens; MoeInspectError where the device runs out of memory or
    an id has no embedding."""
    if (known := embeddings(network)) is not None and (highest := int(ids_BS.max())) >= known:
        raise MoeInspectError(
            f"the tokenizer gives token id {highest}, but the model has {known:,} embeddings: "
            "it is the tokenizer of another model"
        )
    device = next(network.parameters()).device
    try:
        return network(**{name: ids_BS.to(device)}, **options)
    except torch.OutOfMemoryError as error:
        tokens = ids_BS.numel()
        raise MoeInspectError(
            f"{device} is out of memory in a forward pass of {tokens:,} tokens: lower "
            "--batch-tokens"
        ) from error


def last_logits(network: Any, recorder: Recorder | None = None) -> dict[str, Any]:
    """The option to compute logits of the last position only, where the model has it and the
    recorder does not need the others."""
    losses = recorder.losses if recorder is not None else None
    if losses is not None and losses.head is None:
        return {}
    takes = inspect.signature(network.forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in takes else {}


def cache_of(network: Any, output: Any) -> dict[str, Any]:
    """The key-value cache in a model's output, as keyword argument of the next call."""
    cache = cache_among(output.values())
    if cache is None:
        raise MoeInspectError(
            f"{type(network).__name__} returns no key-value cache: trace without --generate"
        )
    takes = inspect.signature(network.forward).parameters
    return {"cache" if "cache" in takes else "past_key_values": cache}  # transformers 5.24: cache


# --- decoding


def chosen(logits_BV: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """The next token of each row, [B]."""
    if not temperature:
        return logits_BV.argmax(1)
    scores_BV = torch.softmax(logits_BV / temperature, 1)
    return torch.multinomial(scores_BV, 1, generator=generator)[:, 0]


def end_ids(network: Any, tokenizer: Any) -> frozenset[int]:
    """End-of-text token ids: of the generation config, else of the tokenizer."""
    stated = getattr(getattr(network, "generation_config", None), "eos_token_id", None)
    stated = stated if stated is not None else tokenizer.eos_token_id
    return frozenset([stated] if isinstance(stated, int) else stated or [])


def start_ids(network: Any) -> list[int]:
    """First token ids of a decoder: the start token, and the one that the generation config forces
    after it."""
    generation = getattr(network, "generation_config", None)

    def stated(name: str) -> Any:
        found = getattr(generation, name, None)
        return found if found is not None else getattr(network.config, name, None)

    start, forced = stated("decoder_start_token_id"), stated("forced_bos_token_id")
    start = start if start is not None else stated("bos_token_id")
    if not isinstance(start, int):
        raise MoeInspectError(
            f"the config of {type(network).__name__} has no decoder_start_token_id: cannot "
            "start decoding"
        )
    return [start, forced] if isinstance(forced, int) else [start]


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
