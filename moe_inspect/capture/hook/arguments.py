"""Arguments of a model's calls. Those of a model that is not from transformers get the names that
transformers uses.

B batch rows, S positions.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import numpy as np
import torch
from torch import Tensor

from moe_inspect.capture.hook.numbering import CachedRows, CallInputs
from moe_inspect.capture.options import InputsOf
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.routers import Site, stacks_in

if TYPE_CHECKING:
    from torch.nn import Module

    from moe_inspect.model.choices import Args, Kwargs

Given: TypeAlias = Mapping[str, Any]  # the arguments of a call, by name
# names that an `InputsOf` may return
KEYS = (
    "input_ids",  # int [B, S], or [S] where a batch is one packed row
    "inputs_embeds",  # [B, S, ...], if there are no token ids
    "position_ids",  # int [B, S] or [S]; a position not above the one before begins a document
    "attention_mask",  # [B, S], true for tokens and false for padding
    "documents",  # a label for each row of the batch
    "domains",  # the same
    "sequences",  # a value for each row of the batch, or int [B, S]: the sequence of each token
)

TOKENS = ("input_ids", "tokens", "idx")
# where in the model's own cache a pass begins: a number, or the position of each token
IN_CACHE = ("input_pos", "cache_position", "start_pos")
POSITIONS = ("position_ids", "positions", *IN_CACHE)
PAST = ("past_key_values", "past_key_value", "past_kv", "past", "layer_past")
CACHES = (*PAST, "kv_caches", "cache")
PADDING = ("padding_mask", "key_padding_mask")  # true for padding
MASKS = ("attention_mask", "mask", "loss_mask")
LABELS = ("labels", "targets", "target")
PACKED = ("doc_lens", "cu_seqlens", "segment_ids", "token_type_ids")
# tensors of integers that are no token ids, which a later pipeline stage is given without them
NOT_TOKENS = {*POSITIONS, *PADDING, *MASKS, *LABELS, *PACKED}
OF_DECODER = re.compile(r"decoder|tgt|trg")  # in the name of an argument
SAY = "inputs=…, a function of the forward's arguments, must say what its routers are fed"


class CallReader:
    """Reads the inputs of a model, or of a stack of it, from the arguments of its calls. `told`: a
    caller's function that returns them. `sites`: the model's routers; empty if probes will show
    them. Raises MoeInspectError if the routers' rows are in different orders, and for a model with
    encoder and decoder in unknown code.

    row_order   see `RowOrder`; None is batch-first"""

    def __init__(self, model: Module, sites: Sequence[Site], told: InputsOf | None = None):
        self.inputs = _inputs_of(model, sites, told)
        self.row_order = _row_order_of(sites)
        modules = {s.stack: model.get_submodule(s.stack_path) for s in sites} or {"": model}
        self._names = {stack: _parameters(module) for stack, module in modules.items()}

    def read(self, stack: str, args: Args, kwargs: Kwargs) -> tuple[Given, Tensor]:
        """Return the arguments by name, and the token ids [B, S] or, if there are none, the
        embeddings [B, S, …]. MoeInspectError if there are neither."""
        given: Given = kwargs
        if self.inputs is not None:
            given = self.inputs(args, kwargs)
        elif args:
            given = {**dict(zip(self._names[stack], args, strict=False)), **kwargs}
        if stack == "decoder":  # some models call it with the names of their own arguments
            prefix = "decoder_"
            own = {n.removeprefix(prefix): v for n, v in given.items() if n.startswith(prefix)}
            given = {**given, **own}
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        fed = ids if ids is not None else embeds
        if fed is None:
            raise MoeInspectError(
                "record saw a forward pass with neither input_ids nor inputs_embeds: give the "
                "model one of them, or inputs=… a function that returns it"
            )
        return given, fed


def _inputs_of(model: Module, sites: Sequence[Site], told: InputsOf | None) -> InputsOf | None:
    """Return the function that reads the arguments: a caller's, or by their names; None for a model
    of transformers. MoeInspectError for a model with encoder and decoder in unknown code, if probes
    or a decoder's specs show its routers."""
    if told is not None:
        return partial(_as_told, told)
    of_decoder = [s.path for s in sites if s.told is not None and "decoder" in s.path.split(".")]
    if (of_decoder or not sites) and stacks_in(model):
        where = of_decoder[0] if of_decoder else type(model).__name__
        raise MoeInspectError(f"{where}: this model has an encoder and a decoder: {SAY}")
    if hasattr(getattr(model, "config", None), "get_text_config"):
        return None
    return by_name(_parameters(model), any(site.order == "sb" for site in sites))


def _parameters(module: Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _as_told(inputs: InputsOf, args: Args, kwargs: Kwargs) -> Given:
    """Return what a caller's function returns, checked."""
    given = inputs(args, kwargs)
    if not isinstance(given, Mapping):
        raise MoeInspectError(
            f"inputs must return a dict with any of {', '.join(KEYS)}, not a {type(given).__name__}"
        )
    if unknown := sorted(set(given) - set(KEYS)):
        raise MoeInspectError(f"inputs returned {unknown[0]!r}: it may return {', '.join(KEYS)}")
    return _in_one_shape(dict(given))


def by_name(names: Sequence[str], sequence_first: bool) -> InputsOf:
    """Return a function that reads arguments by their names and types, as training frameworks give
    them. `names`: of the forward's arguments, in their order. `sequence_first`: hidden states,
    which later pipeline stages get in place of tokens, are [S, B, ...]."""
    return partial(_by_name, names, sequence_first)


def _by_name(names: Sequence[str], sequence_first: bool, args: Args, kwargs: Kwargs) -> Given:
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    # arguments in *args have no names
    loose = [*given.items(), *((f"argument {n}", v) for n, v in enumerate(args[len(names) :]))]
    loose = [(name, value) for name, value in loose if name not in NOT_TOKENS]
    read: dict[str, Any] = {"input_ids": _token_ids(loose)}
    if read["input_ids"] is None:
        hidden = next((v for _, v in loose if _is_float(v) and v.dim() == 3), None)
        if hidden is not None and sequence_first:
            hidden = hidden.transpose(0, 1)
        if hidden is None:  # these tell how many tokens there are
            hidden = _first(given, (*POSITIONS, *LABELS), lambda v: _is_integer(v, 2))
        read["inputs_embeds"] = hidden
    read["position_ids"] = _first(given, POSITIONS, lambda v: type(v) is int or _is_integer(v, 0))
    read["past_key_values"] = _first(given, CACHES, lambda v: v is not None)
    read["resumes"] = any(given.get(name) is not None for name in IN_CACHE)
    read = _in_one_shape(read)
    fed = read["input_ids"] if read["input_ids"] is not None else read.get("inputs_embeds")
    if fed is None:
        return read
    B, S = fed.shape[:2]
    read["position_ids"] = _from_start(read["position_ids"], B, S)
    read["attention_mask"] = _mask(given, B, S)
    if read["position_ids"] is None:
        read["position_ids"] = _packed(given, B, S)
    return read


def _token_ids(loose: Sequence[tuple[str, object]]) -> Tensor | None:
    """Return the integers of a known name, else the first of two dimensions, else the first of one.
    MoeInspectError if other integers may be the token ids, or if these may be one number per
    sample."""

    integers = [(n, v) for n, v in loose if _is_integer(v) and (v.dim() <= 2 or n in TOKENS)]
    if not integers:
        return None
    (name, ids), *others = sorted(
        integers, key=lambda one: ((*TOKENS, one[0]).index(one[0]), -one[1].dim())
    )
    is_known = name in TOKENS
    for other, value in others:
        if value.shape == ids.shape and (not is_known or OF_DECODER.search(other)):
            raise MoeInspectError(
                f"{name} and {other}, integers {list(ids.shape)}, may both be token ids: {SAY}"
            )
    if ids.dim() == 1 and not is_known:
        for other, value in loose:
            if _is_float(value) and value.dim() > 1 and len(value) == len(ids):
                raise MoeInspectError(
                    f"{name}, integers {list(ids.shape)}, may be a number for each sample of "
                    f"{other} {list(value.shape)} instead of token ids: {SAY}"
                )
    return ids


def _first(given: Given, names: Sequence[str], fits: Callable[[Any], bool]) -> Any:
    return next((given[name] for name in names if fits(given.get(name))), None)


def _is_integer(value: object, dims: int = 1) -> TypeGuard[Tensor]:
    """Return whether it is a tensor of integers with `dims` dimensions or more."""
    return (
        isinstance(value, Tensor)
        and value.dim() >= dims
        and not value.dtype.is_floating_point
        and value.dtype != torch.bool
    )


def _is_float(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.dtype.is_floating_point


def _from_start(position: Tensor | int | None, B: int, S: int) -> Tensor | None:
    """Return the positions of S tokens, given the first one's: one for all rows, or [B]."""
    if isinstance(position, int):
        return position + torch.arange(S)
    if position is not None:
        if position.dim() == 0:
            return position + torch.arange(S, device=position.device)
        if position.shape in {(B,), (1,)} and S > 1:
            return position[:, None] + torch.arange(S, device=position.device)
    return position


def _in_one_shape(given: dict[str, Any]) -> dict[str, Any]:
    """Return a packed row [S] as a batch of one."""
    if (ids := given.get("input_ids")) is not None and ids.dim() == 1:
        given["input_ids"] = ids[None]
        for name in ("position_ids", "attention_mask"):
            if isinstance(value := given.get(name), Tensor) and value.dim() == 1:
                given[name] = value[None]
    return given


def _mask(given: Given, B: int, S: int) -> Tensor | None:
    """Return the mask [B, S], true for tokens. A mask of another shape states which positions a
    token attends to, and is not read."""
    padding = _first(given, PADDING, lambda v: isinstance(v, Tensor))
    if padding is not None and padding.shape == (B, S):
        return ~padding.bool()
    mask = given.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != (B, S):
        return None
    if B == S > 1:
        raise MoeInspectError(
            f"attention_mask is [{B}, {S}] in a batch of {B} rows of {S} positions: record cannot "
            "tell padding from a causal mask: give inputs=…, a function of the forward's "
            "arguments that returns it"
        )
    if mask.dtype.is_floating_point and mask.numel():  # added to scores, it is 0 for tokens
        return torch.where(mask.max() <= 0, mask == 0, mask != 0)
    return mask


def _packed(given: Given, B: int, S: int) -> Tensor | None:
    """Return the positions [B, S] in packed documents, given their lengths (`doc_lens` int [B, n],
    0 if a row has fewer) or their ends (`cu_seqlens` int [n + 1], over all rows)."""
    lengths, ends = given.get("doc_lens"), given.get("cu_seqlens")
    if _is_integer(lengths):
        lengths = lengths.reshape(-1, lengths.shape[-1])  # [n]: of a single row
        ends = lengths.cumsum(1)
        return _since_start(torch.cat([torch.zeros_like(ends[:, :1]), ends], 1), S).expand(B, S)
    if _is_integer(ends):
        return _since_start(ends.reshape(1, -1), B * S).reshape(B, S)
    return None


def _since_start(bounds: Tensor, S: int) -> Tensor:
    """Return for each of S positions its distance from the beginning of its document. bounds: of
    the documents, [B, n + 1]; positions after the last bound are one more document."""
    at = torch.arange(S, device=bounds.device).expand(len(bounds), S).contiguous()
    document = torch.searchsorted(bounds.long().contiguous(), at, right=True) - 1
    return at - bounds.long().gather(1, document)


# (B, S) → int [T]: the token b·S + s of each row; None if rows are all tokens in that order
RowOrder = Callable[[int, int], "np.ndarray | None"]


def _row_order_of(sites: Sequence[Site]) -> RowOrder | None:
    """Return the order that the specs of these routers state; None if all are batch-first.
    MoeInspectError if they differ: a forward pass has its rows in one order."""
    if not sites or all(site.order == "bs" and site.rows is None for site in sites):
        return None
    first = sites[0]
    other = next((s for s in sites if (s.order, s.rows) != (first.order, first.rows)), None)
    if other is not None:
        raise MoeInspectError(
            f"{first.path} and {other.path} have their rows in different orders: record them "
            "one after the other"
        )
    return partial(_rows_of_part, first) if first.rows is not None else _sequence_first


def _rows_of_part(site: Site, B: int, S: int) -> np.ndarray | None:
    """Return the order of the rows that `site.rows` states."""
    assert site.rows is not None
    part = site.rows(site.module, B, S)
    if part is None:
        return _sequence_first(B, S) if site.order == "sb" else None
    order = np.asarray(part)
    if (
        order.ndim != 1
        or not np.issubdtype(order.dtype, np.integer)
        or len(np.unique(order)) < len(order)
        or (len(order) and not 0 <= order.min() <= order.max() < B * S)
    ):
        raise MoeInspectError(
            f"RouterSpec(rows=…) of {site.path} must return different token numbers from 0 to "
            f"{B * S - 1}, one for each row"
        )
    return order


def _sequence_first(B: int, S: int) -> np.ndarray | None:
    return np.arange(B * S).reshape(B, S).T.reshape(-1) if B > 1 and S > 1 else None


def cache_among(values: Iterable[Any]) -> Any:
    """Return the key-value cache among these values, under whatever name; None if there is none."""
    caches = (v for v in values if type(v) is not Tensor and hasattr(v, "get_seq_length"))
    return next(caches, None)


def length_of(cache: Any, cached: CachedRows | None, S: int) -> int:
    """Return the number of positions in a cache. A static cache counts on its device, and reading
    that waits, so a step of one token uses our own count. A longer pass reads it, because the cache
    may have been reset or cropped."""
    length = cache.get_seq_length()
    if S == 1 and cached is not None and getattr(length, "is_cuda", False):
        return cached.length
    return int(length)


def host_copy(tensor: Tensor) -> Tensor:
    """Return a copy on the host, made without waiting: it is complete once the work launched so far
    has run."""
    if not tensor.is_cuda:
        return tensor.detach().clone() if tensor.requires_grad else tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def copies_of(
    given: Given, B: int, S: int, past: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return host copies of token ids [B, S], `mask_of` [B, S] and positions [B, S] or [S]; None
    for what is not given."""
    position, mask = given.get("position_ids"), mask_of(given.get("attention_mask"), B, S, past)
    # multimodal positions: of four planes the first is the text's; three are those of images
    if position is not None and position.dim() == 3:
        position = position[0] if len(position) == 4 else None
    if position is not None and position.shape == (B,) and S == 1 < B:
        position = position[:, None]
    ids, mask, position = (
        host_copy(tensor) if tensor is not None else None
        for tensor in (given.get("input_ids"), mask, position)
    )
    return ids, mask, position


def mask_of(mask: Any, B: int, S: int, past: int) -> Tensor | None:
    """Return the mask [B, S], True except for padding; None if there is no padding."""
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


def keys_told(sequences: Any, codes: dict[Hashable, int], B: int, S: int) -> Tensor:
    """Return keys int [2, B, S], the same before and after each token. `sequences`: a value for
    each batch row, or for each token. `codes`: numbers of the values that are not integers."""
    if isinstance(sequences, Tensor):
        keys = host_copy(sequences)
    else:
        values = np.asarray(sequences)
        if not np.issubdtype(values.dtype, np.integer):
            flat = [codes.setdefault(value, len(codes)) for value in values.reshape(-1).tolist()]
            values = np.array(flat, np.int64).reshape(values.shape)
        keys = torch.from_numpy(values)
    if keys.shape == (B,) and not (B == 1 and S > 1):
        keys = keys[:, None]
    if keys.shape not in {(B, S), (B, 1), (S,), (1,)} or keys.dtype.is_floating_point:
        raise MoeInspectError(
            f"inputs returned sequences of shape {list(keys.shape)} for a batch of {B} rows of "
            f"{S} positions: return one for each row, or for each token"
        )
    return keys.expand(2, B, S)


def slots_of(given: Given) -> tuple[Tensor, Tensor] | None:
    """Return of a call by `generate_batch`, with R requests, int [2, 1, S]: the slot of the cache
    of the token before (−1 for none) and of each token; and bool [1, S], False for padding. None
    for another call."""
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
    """Return positions int [B, S]: each sequence continues at its next position."""
    of_tokens, places = call.keys
    assert of_tokens is not None
    assert places is not None
    key_BS, real_BS = of_tokens.numpy()[1], call.real_BS()
    position_BS, reached = np.zeros(key_BS.shape, np.int64), dict[int, int]()
    for b, s in zip(*np.nonzero(real_BS), strict=True):
        key = int(key_BS[b, s])
        if key not in reached:
            before = places.get(key)
            reached[key] = before.last if before is not None else -1
        position_BS[b, s] = reached[key] = reached[key] + 1
    return position_BS


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in([*value.values()])
    elif is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in([getattr(value, field.name) for field in fields(value)])
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from tensors_in(one)
