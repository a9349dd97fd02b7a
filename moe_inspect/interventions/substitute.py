"""Puts another choice in the place of a router's: into the arguments of its experts' call, or into
its own output.

T rows, K slots, E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_inspect.errors import MoeInspectError
from moe_inspect.model.routers import Site

if TYPE_CHECKING:
    from moe_inspect.model.choices.read import Choice


def replaced(
    site: Site, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, own: Choice, new: Choice
) -> Any:
    """(args, kwargs) of a call that is read before it runs, else its output, with the choice `new`
    instead of `own`. MoeInspectError where the site does not show how."""
    adapter, at_call = site.adapter, site.adapter is None or site.adapter.at_call
    if adapter is not None and adapter.replace is not None:
        return adapter.replace(site.module, args, kwargs, output, *new)
    new = _to_none(*new)
    if at_call:
        values = [*args, *kwargs.values()]
        values = _with_tensors(values, own, new) or _with_map(values, site.experts, new)
        if values is None:
            raise _not_shown(site)
        return tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True))
    parts = list(output) if isinstance(output, tuple | list) else [output]
    parts = _with_tensors(parts, own, new) or _with_map(parts, site.experts, new)
    if parts is None:
        raise _not_shown(site)
    kind: Any = type(output)
    return kind(*parts) if hasattr(output, "_fields") else kind(parts)


def _to_none(ids_TK: Tensor, weights_TK: Tensor) -> Choice:
    """A slot that goes to no expert, as experts take it: expert 0 with weight 0."""
    nowhere = ids_TK < 0
    return ids_TK.masked_fill(nowhere, 0), weights_TK.masked_fill(nowhere, 0)


def _with_tensors(values: list[Any], own: Choice, new: Choice) -> list[Any] | None:
    """`values` with the tensors of `own` replaced; None where they are not among them."""
    at = [next((n for n, v in enumerate(values) if _same(v, part)), None) for part in own]
    # an adapter marks the slots that go nowhere in a copy of the ids
    if at[0] is None and at[1] is not None:
        like = [n for n, v in enumerate(values) if _could_be_ids(v, own[0])]
        at[0] = like[0] if len(like) == 1 else None
    if None in at:
        return None
    found = list(values)
    for n, part in zip(at, new, strict=True):
        assert n is not None
        found[n] = part.to(found[n].dtype).reshape(found[n].shape)
    return found


def _with_map(values: list[Any], E: int, new: Choice) -> list[Any] | None:
    """`values` with a bool map of the experts chosen [..., E] and their weights [..., E]
    replaced."""
    maps = [n for n, v in enumerate(values) if _is_map(v, E) and v.dtype == torch.bool]
    if len(maps) != 1:
        return None
    of_map = values[maps[0]]
    weights = [
        n
        for n, v in enumerate(values)
        if _is_map(v, E) and v.dtype.is_floating_point and v.shape == of_map.shape
    ]
    if len(weights) != 1:
        return None
    ids_TK, weights_TK = new
    zeros_TE = values[weights[0]].new_zeros((len(ids_TK), E))
    found = list(values)
    weights_TE = zeros_TE.scatter_add(1, ids_TK, weights_TK.to(zeros_TE.dtype))
    chosen_TE = zeros_TE.scatter_add(1, ids_TK, (weights_TK != 0).to(zeros_TE.dtype)) > 0
    found[weights[0]] = weights_TE.view(of_map.shape)
    found[maps[0]] = chosen_TE.view(of_map.shape)
    return found


def _is_map(value: Any, E: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 1 and value.shape[-1] == E


def _same(value: Any, part: Tensor) -> bool:
    return isinstance(value, Tensor) and (
        value is part
        or (
            value.dtype == part.dtype
            and value.numel() == part.numel()
            and value.data_ptr() == part.data_ptr()
        )
    )


def _could_be_ids(value: Any, ids: Tensor) -> bool:
    return (
        isinstance(value, Tensor)
        and not value.dtype.is_floating_point
        and value.shape == ids.shape
        and value.element_size() > 1
    )


def _not_shown(site: Site) -> MoeInspectError:
    kind = type(site.module).__name__
    if site.told:
        return MoeInspectError(
            f"the choice of {site.path} cannot be replaced, as what RouterSpec(choice=…) returns "
            f"is not a part of what {kind} takes or returns: give RouterSpec(replace=…), or a "
            "RouterSpec of the module in it that makes the logits"
        )
    return MoeInspectError(
        f"{site.path}: the experts that {kind} runs cannot be replaced in its call, so nothing can "
        "be dropped, forced or replayed there"
    )
