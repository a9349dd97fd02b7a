"""Single arguments of a model's call, and the cache among them.

B batch rows, S positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from moe_inspect.capture.hook.inputs.rows import CachedRows
from moe_inspect.errors import MoeInspectError


def cache_among(values: Iterable[Any]) -> Any:
    """The key-value cache among these values, under whatever name; None where there is none."""
    for value in values:
        if type(value) is not torch.Tensor and hasattr(value, "get_seq_length"):
            return value
    return None


def length_of(cache: Any, cached: CachedRows | None, S: int) -> int:
    """Positions in a cache. A static cache counts on its device, and reading that waits: for a step
    of one token our own count is used. A longer pass reads it, as the cache may have been reset or
    cropped."""
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
    ids: torch.Tensor | None, given: Mapping[str, Any], B: int, S: int, past: int
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Copies on the host, each None where there is none: token ids [B, S], the mask [B, S] (see
    `mask_of`) and positions [B, S] or [S]."""
    position = given.get("position_ids")
    # multimodal positions: of four planes the first is the text's; three are those of images
    if position is not None and position.dim() == 3:
        position = position[0] if len(position) == 4 else None
    if position is not None and position.shape == (B,) and S == 1 < B:
        position = position[:, None]
    mask = given.get("attention_mask")
    if mask is not None:
        mask = mask_of(mask, B, S, past)
    return (
        host_copy(ids) if ids is not None else None,
        host_copy(mask) if mask is not None else None,
        host_copy(position) if position is not None else None,
    )


def real_rows(given: Mapping[str, Any], stack: str = "") -> tuple[int, int, torch.Tensor | None]:
    """B, S and the mask [B, S] of a call with these arguments, on its own device: not 0 except for
    padding; None where there is no padding. Nothing is copied."""
    if stack == "decoder":
        given = {**given, **of_decoder(given)}
    ids = given.get("input_ids")
    fed = ids if ids is not None else given.get("inputs_embeds")
    if fed is None:
        raise MoeInspectError("a forward pass had neither input_ids nor inputs_embeds")
    B, S = fed.shape[:2]
    return B, S, mask_of(given.get("attention_mask"), B, S, 0)


def of_decoder(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a decoder that some models call with the names of their own arguments."""
    return {
        name.removeprefix("decoder_"): value
        for name, value in given.items()
        if name.startswith("decoder_")
    }


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
