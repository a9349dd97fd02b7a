"""The content of one router call: expert ids, and logits from the sidecar file.

T tokens, K slots, E experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.importers.megatron.passes import Call
from moe_inspect.importers.routed import checked_ids, repeats
from moe_inspect.importers.values import integer, integers
from moe_inspect.model.config import MOST_EXPERTS
from moe_inspect.trace.schema import Router


def checked(call: Call, T: int, router: Router, first: Call) -> np.ndarray:
    """The ids of a call as the writer takes them."""
    where, fields, ids_TK = f"{call.where}: top_indices", call.fields, call.ids_TK
    if integer(fields.get("num_tokens"), f"{call.where}: num_tokens") != T:
        raise MoeInspectError(
            f"{call.where}: num_tokens is {fields['num_tokens']}, {T} in {first.where}"
        )
    if integer(fields.get("topk"), f"{call.where}: topk") != router.top_k:
        raise MoeInspectError(
            f"{call.where}: topk is {fields['topk']}, {router.top_k} in the first pass"
        )
    if ids_TK.shape != (T, router.top_k) and (ids_TK.size or T):
        raise MoeInspectError(f"{where} has shape {list(ids_TK.shape)}, not {[T, router.top_k]}")
    load_E = np.bincount(ids_TK[ids_TK >= 0], minlength=router.experts)
    if ids_TK.size and load_E.min() == load_E.max() and repeats(ids_TK).any():
        raise MoeInspectError(
            f"{where} gives every expert {load_E[0]:,} assignments and tokens the same expert "
            "twice: the run filled experts up to their "
            "capacity (moe_pad_expert_input_to_capacity), and Megatron's tracer then writes no "
            "token's own experts"
        )
    return checked_ids(ids_TK, router, where)


def logits_shape(where: str, call: dict[str, Any]) -> tuple[int, int]:
    shape = integers(call.get("logit_shape"), f"{where}: logit_shape", (2,), 0, 2**26)
    return int(shape[0]), integer(int(shape[1]), f"{where}: logit_shape", 1, MOST_EXPERTS)


def logits_of(where: str, call: dict[str, Any], T: int, E: int) -> np.ndarray:
    """float16 [T, E], from the sidecar. What the line declares must fit the tokens and the file
    before anything is read."""
    if logits_shape(where, call) != (T, E):
        raise MoeInspectError(f"{where}: logit_shape is {call['logit_shape']}, not [{T}, {E}]")
    offset = integer(call.get("logit_offset"), f"{where}: logit_offset", 0, 2**62)
    size = integer(call.get("logit_bytes"), f"{where}: logit_bytes", 0, 2**62)
    path = Path(where.rpartition(" line ")[0]).parent / f"logits_rank{call['rank']}.bin"
    if not path.is_file():
        raise MoeInspectError(f"{where}: its logits are not there: no {path}")
    if size != 2 * T * E or offset + size > path.stat().st_size:
        raise MoeInspectError(
            f"{where}: logit_bytes is {size:,} at {offset:,}: [{T}, {E}] of bfloat16 is "
            f"{2 * T * E:,}, {path} has {path.stat().st_size:,}"
        )
    bits = np.fromfile(path, "<u2", T * E, offset=offset)
    with np.errstate(over="ignore"):
        values_TE = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float16).reshape(T, E)
    if np.isnan(values_TE).any():
        raise MoeInspectError(
            f"{where}: a router logit of token {int(np.isnan(values_TE).any(1).argmax())} is NaN"
        )
    return values_TE
