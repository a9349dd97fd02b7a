"""The arguments of a model's calls, and of a model that is not transformers' under the names that
transformers gives them.

B batch rows, S positions.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import numpy as np
import torch
from torch import Tensor

from moe_inspect.capture.options import InputsOf
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.routers import Site, stacks_in

if TYPE_CHECKING:
    from torch.nn import Module

    from moe_inspect.model.choices.read import Args, Kwargs

Given: TypeAlias = Mapping[str, Any]  # the arguments of a call, by name

# of what an `InputsOf` returns
KEYS = (
    "input_ids",  # int [B, S], or [S] where a batch is one packed row
    "inputs_embeds",  # [B, S, ...], where there are no token ids
    "position_ids",  # int [B, S] or [S]; one that is not above the one before begins a document
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
    """Reads what a model is fed, or a stack of it, from the arguments of its calls. `told`: what
    says it in place of their names. `sites`: of its routers; none where probes will show them.
    Raises MoeInspectError where the routers' rows are in different orders, and for an encoder with
    a decoder in code that we do not know.

    row_order   see `RowOrder`; None is batch-first"""

    def __init__(self, model: Module, sites: Sequence[Site], told: InputsOf | None = None):
        self.inputs = _inputs_of(model, sites, told)
        self.row_order = _row_order_of(sites)
        modules = {s.stack: model.get_submodule(s.stack_path) for s in sites} or {"": model}
        self._names = {
            stack: list(inspect.signature(module.forward).parameters)
            for stack, module in modules.items()
        }

    def read(self, stack: str, args: Args, kwargs: Kwargs) -> tuple[Given, Tensor]:
        """The arguments by name, and the token ids [B, S] or, where there are none, the embeddings
        [B, S, …]. MoeInspectError where there is neither."""
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
    """As a caller told; None for a model of transformers, by its names. MoeInspectError for a model
    with encoder and decoder that we do not know, where probes or a decoder's specs show routers."""
    if told is not None:
        return partial(_as_told, told)
    of_decoder = [s.path for s in sites if s.told is not None and "decoder" in s.path.split(".")]
    if (of_decoder or not sites) and stacks_in(model):
        where = of_decoder[0] if of_decoder else type(model).__name__
        raise MoeInspectError(f"{where}: this model has an encoder and a decoder: {SAY}")
    if hasattr(getattr(model, "config", None), "get_text_config"):
        return None
    names = list(inspect.signature(model.forward).parameters)
    return by_name(names, any(site.order == "sb" for site in sites))


def _as_told(inputs: InputsOf, args: Args, kwargs: Kwargs) -> Given:
    """What a caller's function says, checked."""
    given = inputs(args, kwargs)
    if not isinstance(given, Mapping):
        raise MoeInspectError(
            f"inputs must return a dict with any of {', '.join(KEYS)}, not a {type(given).__name__}"
        )
    if unknown := sorted(set(given) - set(KEYS)):
        raise MoeInspectError(f"inputs returned {unknown[0]!r}: it may return {', '.join(KEYS)}")
    return _in_one_shape(dict(given))


def by_name(names: Sequence[str], sequence_first: bool) -> InputsOf:
    """Read by the names and types of the arguments, as training frameworks give them. `names`: of
    the forward's arguments, in their order. `sequence_first`: hidden states, which later pipeline
    stages are given in place of tokens, are [S, B, ...]."""
    return partial(_by_name, names, sequence_first)


def _by_name(names: Sequence[str], sequence_first: bool, args: Args, kwargs: Kwargs) -> Given:
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    # what is more than the names, by *args, has none
    loose = [*given.items(), *((f"argument {n}", v) for n, v in enumerate(args[len(names) :]))]
    loose = [(name, value) for name, value in loose if name not in NOT_TOKENS]
    found: dict[str, Any] = {"input_ids": _token_ids(loose)}
    if found["input_ids"] is None:
        hidden = next((v for _, v in loose if _is_float(v) and v.dim() == 3), None)
        if hidden is not None and sequence_first:
            hidden = hidden.transpose(0, 1)
        if hidden is None:  # these tell how many tokens there are
            hidden = _first(given, (*POSITIONS, *LABELS), lambda v: _is_integer(v, 2))
        found["inputs_embeds"] = hidden
    found["position_ids"] = _first(given, POSITIONS, lambda v: type(v) is int or _is_integer(v, 0))
    found["past_key_values"] = _first(given, CACHES, lambda v: v is not None)
    found["resumes"] = any(given.get(name) is not None for name in IN_CACHE)
    found = _in_one_shape(found)
    fed = found["input_ids"] if found["input_ids"] is not None else found.get("inputs_embeds")
    if fed is None:
        return found
    B, S = fed.shape[:2]
    found["position_ids"] = _from_start(found["position_ids"], B, S)
    found["attention_mask"] = _mask(given, B, S)
    if found["position_ids"] is None:
        found["position_ids"] = _packed(given, B, S)
    return found


def _token_ids(loose: Sequence[tuple[str, object]]) -> Tensor | None:
    """Those of a known name, the first integers of two dimensions, the first of one.
    MoeInspectError where others may be as well, or where they may be one number per sample."""

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
    """Whether it is a tensor of integers, of that many dimensions or more."""
    return (
        isinstance(value, Tensor)
        and value.dim() >= dims
        and not value.dtype.is_floating_point
        and value.dtype != torch.bool
    )


def _is_float(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.dtype.is_floating_point


def _from_start(position: Tensor | int | None, B: int, S: int) -> Tensor | None:
    """The positions of S tokens, of which the first one's is given: one for all rows or [B]."""
    if isinstance(position, int):
        return position + torch.arange(S)
    if position is not None:
        if position.dim() == 0:
            return position + torch.arange(S, device=position.device)
        if position.shape in {(B,), (1,)} and S > 1:
            return position[:, None] + torch.arange(S, device=position.device)
    return position


def _in_one_shape(given: dict[str, Any]) -> dict[str, Any]:
    """A packed row [S] as a batch of one."""
    if (ids := given.get("input_ids")) is not None and ids.dim() == 1:
        given["input_ids"] = ids[None]
        for name in ("position_ids", "attention_mask"):
            if isinstance(value := given.get(name), Tensor) and value.dim() == 1:
                given[name] = value[None]
    return given


def _mask(given: Given, B: int, S: int) -> Tensor | None:
    """True for tokens. A mask of another shape says which positions a token attends to."""
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
    """The positions [B, S] in packed documents, of which the lengths are given (`doc_lens` int
    [B, n], 0 where a row has fewer) or the ends (`cu_seqlens` int [n + 1], over all rows)."""
    lengths, ends = given.get("doc_lens"), given.get("cu_seqlens")
    if _is_integer(lengths):
        lengths = lengths.reshape(-1, lengths.shape[-1])  # [n]: of a single row
        ends = lengths.cumsum(1)
        return _since_start(torch.cat([torch.zeros_like(ends[:, :1]), ends], 1), S).expand(B, S)
    if _is_integer(ends):
        return _since_start(ends.reshape(1, -1), B * S).reshape(B, S)
    return None


def _since_start(bounds: Tensor, S: int) -> Tensor:
    """bounds [B, n + 1]: where documents begin, and the end of the last → for each of S positions
    the distance from the beginning of its document. What follows the last is one more."""
    at = torch.arange(S, device=bounds.device).expand(len(bounds), S).contiguous()
    document = torch.searchsorted(bounds.long().contiguous(), at, right=True) - 1
    return at - bounds.long().gather(1, document)


# (B, S) → int [T]: the token b·S + s of each row; None: row b·S + s, all of them
RowOrder = Callable[[int, int], "np.ndarray | None"]


def _row_order_of(sites: Sequence[Site]) -> RowOrder | None:
    """The order of the rows as the specs of these routers state it; None for all batch-first.
    MoeInspectError where they differ: a forward pass has its rows in one order."""
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
    """The order of the rows that `site.rows` says."""
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
