"""Single arguments of a model's call, and the cache among them.

B batch rows, S positions.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from moe_inspect.capture.hook.inputs.rows import CachedRows, CallInputs
from moe_inspect.errors import MoeInspectError

if TYPE_CHECKING:
    from moe_inspect.capture.hook.inputs.arguments import Given


def cache_among(values: Iterable[Any]) -> Any:
    """The key-value cache among these values, under whatever name; None where there is none."""
    for value in values:
        if type(value) is not torch.Tensor and hasattr(value, "get_seq_length"):
            return value
    return None


def length_of(cache: Any, cached: CachedRows | None, S: int) -> int:
    """Positions in a cache. A static one counts on its device, and reading that waits: for a step
    of one token our own count does. A longer pass reads it: it may have been reset or cropped."""
    length = cache.get_seq_length()
    return (
        cached.length
        if S == 1 and cached is not None and getattr(length, "is_cuda", False)
        else int(length)
    )


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host, made without waiting: complete once the work launched so far has run."""
    if not tensor.is_cuda:
        return tensor.detach().clone() if tensor.requires_grad else tensor.clone()
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True).copy_(
        tensor, non_blocking=True
    )


def copies_of(
    given: Given, B: int, S: int, past: int
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Copies on the host, each None where there is none: token ids [B, S], the mask [B, S] (see
    `mask_of`) and positions [B, S] or [S]."""
    position = given.get("position_ids")
    # multimodal positions: of four planes the first is the text's; three are those of images
    if position is not None and position.dim() == 3:
        position = position[0] if len(position) == 4 else None
    if position is not None and position.shape == (B,) and S == 1 < B:
        position = position[:, None]
    mask = mask_of(given.get("attention_mask"), B, S, past)
    ids, mask, position = (
        host_copy(tensor) if tensor is not None else None
        for tensor in (given.get("input_ids"), mask, position)
    )
    return ids, mask, position


def mask_of(mask: Any, B: int, S: int, past: int) -> torch.Tensor | None:
    """[B, S], True except for padding; None where there is no padding."""
    by_layer: dict[str, Any] = mask if hasattr(mask, "get") else {}  # one per kind of layer
    if "full_attention" in by_layer or (by_layer and all(m is None for m in by_layer.values())):
        return mask_of(by_layer.get("full_attention"), B, S, past)
    ndim = getattr(mask, "ndim", None)
    if mask is None or (B == 1 and ndim != 2):  # a single row needs no padding
        return None
    if ndim == 4 and mask.shape[2] == S and mask.shape[3] >= past + S:
        # made for a static cache, [B, 1, S, keys]: the last position of a row attends to all of the
        # row but its padding
        last = mask[:, 0, -1, past : past + S]
        return (last if last.dtype == torch.bool else last == 0).expand(B, S)
    if ndim != 2:
        kind = f"{ndim}-D" if ndim is not None else type(mask).__name__
        raise MoeInspectError(
            f"record cannot tell padding from a {kind} attention mask: give the model the [rows, "
            "positions] one"
        )
    return mask[:, -S:]


def keys_told(sequences: Any, codes: dict[Hashable, int], B: int, S: int) -> torch.Tensor:
    """int [2, B, S], the same before and after each token. `sequences`: a value for each batch row,
    or for each token. `codes`: the numbers of values that are no integers."""
    if isinstance(sequences, torch.Tensor):
        found = host_copy(sequences)
    else:
        values = np.asarray(sequences)
        if not np.issubdtype(values.dtype, np.integer):
            flat = [codes.setdefault(value, len(codes)) for value in values.reshape(-1).tolist()]
            values = np.array(flat, np.int64).reshape(values.shape)
        found = torch.from_numpy(values)
    if found.shape == (B,) and not (B == 1 and S > 1):
        found = found[:, None]
    if found.shape not in {(B, S), (B, 1), (S,), (1,)} or found.dtype.is_floating_point:
        raise MoeInspectError(
            f"inputs returned sequences of shape {list(found.shape)} for a batch of {B} rows of "
            f"{S} positions: return one for each row, or for each token"
        )
    return found.expand(2, B, S)


def slots_of(given: Given) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Of a call by `generate_batch`, of R requests: int [2, 1, S], the place in the cache of the
    token before (−1 for none) and of each token; and bool [1, S], False for padding. Else None."""
    if not isinstance(given.get("write_index"), list) or given.get("cu_seq_lens_q") is None:
        return None
    if given.get("block_table") is not None:
        raise MoeInspectError(
            "this step of generate_batch does not say which requests it goes on with: call it with "
            "continuous_batching_config=ContinuousBatchingConfig(max_blocks_per_request=0)"
        )
    ends, position_S = given["cu_seq_lens_q"].long(), given["position_ids"].reshape(-1)
    is_some = ends[1:] > ends[:-1]
    first_R, size_R = ends[:-1][is_some], (ends[1:] - ends[:-1])[is_some]
    # of the layers that hold all of a sequence, where there are such; transformers 5.17 gives the
    # ends alone where all layers are of one kind
    told = given["cu_seq_lens_k"]
    ends_of = dict(told) if isinstance(told, Mapping) else {"": told}
    kind = "full_attention" if "full_attention" in ends_of else next(iter(ends_of))
    n = list(ends_of).index(kind)
    read, slot_S = given["read_index"][n].long(), given["write_index"][n].long()
    back_S = slot_S.roll(1)
    back_S[first_R] = -1
    if len(read):
        ends_R = ends_of[kind].long()[1:][is_some]
        back_R = read[(ends_R - size_R - 1).clamp(min=0)]
        back_S[first_R] = torch.where(position_S[first_R] > 0, back_R, -1)
    real_S = torch.arange(len(slot_S), device=slot_S.device) < ends[-1]
    return host_copy(torch.stack([back_S, slot_S])[:, None]), real_S[None]


def positions_told(call: CallInputs) -> np.ndarray:
    """int [B, S]: each sequence goes on where it was left."""
    of_tokens, places, _ = call.keys
    assert of_tokens is not None
    assert places is not None
    key_BS, real_BS = of_tokens.numpy()[1], call.real_BS()
    position_BS, reached = np.zeros(key_BS.shape, np.int64), dict[int, int]()
    for b, s in zip(*np.nonzero(real_BS), strict=True):
        key = int(key_BS[b, s])
        if key not in reached:
            before = places.get(key)
            reached[key] = before[-1].last if before else -1
        position_BS[b, s] = reached[key] = reached[key] + 1
    return position_BS


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in tuples, lists, dicts and dataclasses."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    if isinstance(value, Mapping):
        value = value.values()
    elif is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in fields(value)]
    elif not isinstance(value, (list, tuple)):
        return
    for one in value:
        yield from tensors_in(one)


def start_of(tensor: torch.Tensor) -> Hashable:
    """Where a tensor begins in memory: a slice of its first positions begins there too, one of its
    last does not. None where it has no memory of its own. The memory is not kept alive."""
    if type(tensor) is not torch.Tensor or tensor.layout != torch.strided:
        return None
    return StorageWeakRef(tensor.untyped_storage()), tensor.storage_offset()


def length_by_shape(cache: torch.Tensor, before: CachedRows) -> int:
    """How many positions a layer's cache holds, [B, heads, positions, …] or [B, positions, heads,
    …], up to the end of the pass before, or within it; 0 where the shape does not tell."""
    found = {n for n in cache.shape[1:-1] if before.length - before.fed < n <= before.length}
    if before.length in found:
        return before.length
    return found.pop() if len(found) == 1 else 0
