"""Feeds a planned batch to a model: a prefill pass, a prefill pass and decode steps, or encoder and
decoder. The recorder gets the rows of each pass before it runs. A model that is not transformers'
is fed one sequence at a time, without padding, mask or key-value cache, which it may not have.

B rows, S positions, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from moe_inspect.capture.corpus.plan import TokenSequence
from moe_inspect.capture.corpus.tokenize import Tokenizer
from moe_inspect.capture.hook.arguments import POSITIONS, cache_among
from moe_inspect.capture.hook.numbering import Rows
from moe_inspect.capture.recorder import Recorder
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.own import OwnModel, positions_of
from moe_inspect.text import first_line
from moe_inspect.trace.writer import Document

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Batch:
    """Sequences that are fed together. `number`: of its first forward pass. `documents`: those
    whose first sequence is in this batch. `tokens`: how many are decoded and fed, at most;
    `temperature`: 0 is greedy; `end_ids`: token ids that end a row."""

    number: int
    sequences: list[TokenSequence]
    documents: list[Document]
    tokens: int = 0
    temperature: float = 0.0
    seed: int = 0
    end_ids: frozenset[int] = frozenset()


# --- the passes; each function returns the number of tokens fed, without padding


def prefill(
    network: PreTrainedModel, recorder: Recorder, batch: Batch, tokenizer: Tokenizer
) -> int:
    """One forward pass over right-padded rows."""
    ids_BS, mask_BS = padded(batch.sequences, tokenizer, network)
    fed = _announce(recorder, batch, ids_BS, mask_BS)
    # neither key-value cache nor logits of all positions: not needed
    usual = {"use_cache": False, **last_logits(network)}
    forward(network, torch.from_numpy(ids_BS), attention_mask=_attention(mask_BS, network), **usual)
    return fed


def decode(network: PreTrainedModel, recorder: Recorder, batch: Batch) -> int:
    """Prefill of rows of equal length, then one token per row and step, with a key-value cache and
    without padding. A row is no longer recorded after its end token."""
    ids_BS = np.stack([s.ids for s in batch.sequences])
    calls = _with_cache(network, "input_ids", last_logits(network))
    return _steps(recorder, batch, ids_BS, calls)


def encode_decode(
    network: PreTrainedModel, recorder: Recorder, batch: Batch, tokenizer: Tokenizer
) -> int:
    """The encoder on right-padded rows, then the decoder: its start tokens, then up to
    `batch.tokens` one per step, with a key-value cache. A row is no longer recorded after its end
    token."""
    ids_BS, mask_BS = padded(batch.sequences, tokenizer, network)
    of_pass = {"phase": "encode", "stack": "encoder", "group": batch.number}
    fed = _announce(recorder, batch, ids_BS, mask_BS, **of_pass)
    mask = _attention(mask_BS, network)
    encoded = forward(
        network.get_encoder(), torch.from_numpy(ids_BS), attention_mask=mask, return_dict=True
    )
    usual = {**last_logits(network), "attention_mask": mask, "encoder_outputs": encoded}
    calls = _with_cache(network, "decoder_input_ids", usual)
    started_BS = np.array([start_ids(network)] * len(ids_BS))
    return fed + _steps(recorder, batch, started_BS, calls, "decoder", first=1)


def feed_own(own: OwnModel, recorder: Recorder, batch: Batch) -> int:
    """A forward pass over a sequence, then up to `batch.tokens` decoded tokens. For each of them
    the model reads the whole sequence again, and only the last row of that pass is recorded."""
    ids_BS = np.stack([s.ids for s in batch.sequences])

    def logits(output: Any) -> Tensor:
        return logits_of(own, output, "trace it without --generate")

    return _steps(recorder, batch, ids_BS, (partial(forward_own, own), logits), whole=True)


# what runs a pass over token ids, and the logits [B, S, V] of what it returns
Calls = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


def _steps(
    recorder: Recorder,
    batch: Batch,
    ids_BS: np.ndarray,
    calls: Calls,
    stack: str = "",
    first: int = 0,
    whole: bool = False,
) -> int:
    """A pass over `ids_BS`, then one over a decoded token of each row per step. `first`: the number
    of the first pass, from that of the batch on. `whole`: each pass reads all positions again."""
    call, logits = calls
    generator = torch.Generator().manual_seed(batch.seed)
    running_B = np.ones(len(ids_BS), bool)
    row_BS, fed, known = torch.from_numpy(ids_BS.astype(np.int64)), 0, 0
    for step in range(batch.tokens + 1):
        begin, end = 0 if whole else known, row_BS.shape[1]
        given_BS = row_BS[:, begin:].contiguous()
        fed += _announce(
            recorder,
            batch,
            given_BS.numpy(),
            running_B[:, None] & (np.arange(begin, end) >= known),
            begin,
            first + step,
            phase="decode" if step else "prefill",
            stack=stack,
            group=batch.number if first + batch.tokens else None,
        )
        output, known = call(given_BS), end
        if step == batch.tokens:
            break
        next_B = chosen(logits(output)[:, -1].float().cpu(), batch.temperature, generator)
        running_B = running_B & ~np.isin(next_B.numpy(), list(batch.end_ids))
        if not running_B.any():
            break
        row_BS = torch.cat([row_BS, next_B[:, None]], 1)
    recorder.end_group()
    return fed


def _with_cache(network: PreTrainedModel, name: str, usual: dict[str, Any]) -> Calls:
    """Each goes on with the cache of the one before. `name`: of the argument that takes the token
    ids; `usual`: what each call has too."""
    options = {"use_cache": True, **usual}

    def logits(output: Any) -> Tensor:
        options.update(cache_of(network, output))
        return output.logits

    return lambda ids_BS: forward(network, ids_BS, name, **options), logits


def _announce(
    recorder: Recorder,
    batch: Batch,
    ids_BS: np.ndarray,
    real_BS: np.ndarray,
    position: int = 0,
    step: int = 0,
    **of_pass: Any,
) -> int:
    """Tells the recorder the rows of the next forward pass: number `step` of the batch, from
    `position` on. `of_pass`: phase, group and stack, as of `Rows`. Returns how many rows are no
    padding."""
    row_N, place_N = np.nonzero(real_BS)

    def of_rows(value_B: list[int]) -> np.ndarray:
        return np.array(value_B, np.int32)[row_N]

    recorder.expect(
        Rows(
            real=real_BS.reshape(-1),
            token_id=ids_BS[real_BS].astype(np.int32),
            document=of_rows([s.document for s in batch.sequences]),
            sequence=of_rows([s.sequence for s in batch.sequences]),
            position=(position + place_N).astype(np.int32),
            domain=of_rows([recorder.inputs.domain_code(s.domain) for s in batch.sequences]),
            documents=[] if step else batch.documents,
            number=batch.number + step,
            **of_pass,
        )
    )
    return len(row_N)


# --- a model's call


def padded(
    sequences: list[TokenSequence], tokenizer: Tokenizer, network: PreTrainedModel
) -> tuple[np.ndarray, np.ndarray]:
    """(ids int64, mask bool) [B, S] of right-padded rows. A padding token that the
    model has no embedding for is replaced by 0."""
    lengths = np.array([len(s.ids) for s in sequences])
    mask_BS = np.arange(lengths.max()) < lengths[:, None]
    pad, known = getattr(tokenizer, "pad_token_id", None) or 0, embeddings(network)
    ids_BS = np.full(mask_BS.shape, 0 if known is not None and pad >= known else pad, np.int64)
    ids_BS[mask_BS] = np.concatenate([s.ids for s in sequences])
    return ids_BS, mask_BS


def embeddings(network: PreTrainedModel) -> int | None:
    """Number of embeddings, None where the model does not tell."""
    try:
        return getattr(network.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # remote code may not implement it
        return None


def _attention(mask_BS: np.ndarray, network: PreTrainedModel) -> Tensor:
    return torch.from_numpy(mask_BS.astype(np.int64)).to(next(network.parameters()).device)


def forward(
    network: PreTrainedModel, ids_BS: Tensor, name: str = "input_ids", **options: Any
) -> Any:
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
        said = f"{device} is out of memory in a forward pass of {ids_BS.numel():,} tokens"
        raise MoeInspectError(f"{said}: lower --batch-tokens") from error


def last_logits(network: PreTrainedModel) -> dict[str, int]:
    """The option to compute logits of the last position only, if the model has it."""
    takes = inspect.signature(network.forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in takes else {}


def cache_of(network: PreTrainedModel, output: Mapping[str, object]) -> dict[str, object]:
    """The key-value cache in a model's output, as keyword argument of the next call."""
    cache = cache_among(output.values())
    if cache is None:
        raise MoeInspectError(
            f"{type(network).__name__} returns no key-value cache: trace without --generate"
        )
    takes = inspect.signature(network.forward).parameters
    return {"cache" if "cache" in takes else "past_key_values": cache}  # transformers 5.24: cache


# --- decoding


def chosen(logits_BV: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """The next token of each row, [B]."""
    if not temperature:
        return logits_BV.argmax(1)
    scores_BV = torch.softmax(logits_BV / temperature, 1)
    return torch.multinomial(scores_BV, 1, generator=generator)[:, 0]


def end_ids(network: PreTrainedModel, tokenizer: Tokenizer) -> frozenset[int]:
    """End-of-text token ids: of the generation config, else of the tokenizer."""
    stated = getattr(getattr(network, "generation_config", None), "eos_token_id", None)
    stated = stated if stated is not None else getattr(tokenizer, "eos_token_id", None)
    return frozenset([stated] if isinstance(stated, int) else stated or [])


def start_ids(network: PreTrainedModel) -> list[int]:
    """First token ids of a decoder: the start token, and the one that the generation config forces
    after it."""
    stated: dict[str, object] = {}
    for source in (network.config, getattr(network, "generation_config", None)):
        for name in ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id"):
            if (found := getattr(source, name, None)) is not None:
                stated[name] = found
    start = stated.get("decoder_start_token_id", stated.get("bos_token_id"))
    forced = stated.get("forced_bos_token_id")
    if not isinstance(start, int):
        raise MoeInspectError(
            f"the config of {type(network).__name__} has no decoder_start_token_id: cannot "
            "start decoding"
        )
    return [start, forced] if isinstance(forced, int) else [start]


def forward_own(own: OwnModel, ids_BS: Tensor) -> Any:
    """What the model returns for these token ids; MoeInspectError where it fails on them."""
    parameter = next(own.model.parameters(), None)
    ids_BS = ids_BS.to(parameter.device) if parameter is not None else ids_BS
    try:
        if own.forward is not None:
            return own.forward(own.model, ids_BS)
        takes = inspect.signature(own.model.forward).parameters
        required = [n for n in POSITIONS if n in takes and takes[n].default is inspect._empty]
        position_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device).expand(ids_BS.shape)
        return own.model(ids_BS, **dict.fromkeys(required, position_BS))
    except MoeInspectError:
        raise
    except torch.OutOfMemoryError as error:
        raise MoeInspectError(
            f"out of memory in a forward pass of {ids_BS.numel():,} tokens: lower --max-length"
        ) from error
    # whatever the user's model raises
    except Exception as error:
        needed = "a loader that returns (model, tokenizer, forward)"
        why = f"a model that takes more than token ids needs {needed}"
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


def logits_of(own: OwnModel, output: Any, instead: str) -> Tensor:
    """Logits [B, S or 1, V]: a tensor, `output.logits`, or the first of several outputs.
    MoeInspectError where there are none, with what to do `instead`."""
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if found is None:
        found = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(found, Tensor) or found.dim() != 3:
        raise MoeInspectError(
            f"{own.name} returned no logits [rows, positions, vocabulary]: {instead}, or have the "
            "loader return (model, tokenizer, forward)"
        )
    return found
