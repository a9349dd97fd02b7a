"""How decisions are made other than the router made them: by a router that chooses among fewer
experts, by its own code, as its logits are masked while it runs; or by changing its choice, and
putting that into its experts' call or into its own output. Of a choice that is changed, a gate
weight stays the same to the bit where its expert stays, and slots keep their order.

T rows, K slots, E experts, C logits (of experts, then of what is no routed expert). Ids are int
[T, K]; one outside 0…E−1 goes to no expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.overrides import TorchFunctionMode

from moe_inspect.errors import MoeInspectError
from moe_inspect.model.choices import Args, Called, Choice, Kwargs, ModuleCall
from moe_inspect.model.families import BEYOND
from moe_inspect.model.routers import Site

RESELECTED, SHARED_OUT = "chose among the rest", "weights shared out"
PRODUCTS = {"linear", "matmul", "mm", "addmm", "__matmul__"}


def logits_seen(site: Site) -> Module | None:
    """The module that makes the router logits of this site by one matrix with a row per expert, so
    that they can be masked; None where there is none."""
    module = site.logits_module
    # a table of token ids chooses, and logits only weigh (the hashed layers of DeepSeek-V4)
    tables = (b for b in (module.buffers() if module is not None else ()) if b.dim() == 2)
    if any(not b.dtype.is_floating_point for b in tables):
        return None
    if module is None and site.told and site.adapter is not None and not site.adapter.at_call:
        module = site.module
    if module is None or (site.adapter is not None and not site.adapter.by_logits):
        return None
    C = site.experts + beyond(module)
    rows = [p for p in module.parameters() if p.dim() == 2 and len(p) == C]
    return module if len(rows) == 1 else None


def beyond(router: Module | None) -> int:
    """How many logits a router has behind those of its routed experts."""
    of = BEYOND.get(type(router).__name__)
    return of(router) if of is not None else 0


def how_dropped(site: Site) -> str:
    among = site.adapter is not None and site.adapter.among is not None
    return RESELECTED if among or logits_seen(site) is not None else SHARED_OUT


class Among(TorchFunctionMode):
    """While it is active, what is computed as router logits is the lowest number for the experts of
    `dropped_E` (bool [E]), and no `topk` chooses them, whatever a selection bias adds. `beyond`:
    how many logits are behind those of the experts."""

    def __init__(self, dropped_E: Tensor, beyond: int = 0):
        super().__init__()
        self.dropped_E = dropped_E
        self.dropped_C = torch.cat([dropped_E, dropped_E.new_zeros(beyond)])

    def __torch_function__(
        self, func: Called, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> Called:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "topk":
            return self._top_k(func, *args, **kwargs)
        output = func(*args, **kwargs)
        if name not in PRODUCTS:
            return output
        # (a finite number: sparsemixer divides by it)
        return _masked(output, self.dropped_C, torch.finfo(output.dtype).min)

    def _top_k(
        self, top_k: Called, input: Tensor, k: int, dim: int = -1, *args: Called, **kwargs: Called
    ) -> Called:
        """`torch.topk`, which chooses no dropped expert while there are others."""
        if input.dim() > 2 and input.shape[-2] * input.shape[-1] == len(self.dropped_E):
            # values [T, groups, E / groups], by which groups are compared, by their k best: where
            # fewer than k of a group are left, a dropped expert adds nothing to it
            dropped_GE = self.dropped_E.to(input.device).view(input.shape[-2:])
            left_G = (~dropped_GE).sum(1)
            few_G1 = ((left_G > 0) & (left_G < k)).unsqueeze(1)
            masked = input.masked_fill(dropped_GE & ~few_G1, float("-inf"))
            return top_k(masked.masked_fill(dropped_GE & few_G1, 0), k, dim, *args, **kwargs)
        of_C = input.shape[-1:] == self.dropped_C.shape
        dropped = self.dropped_C if of_C else self.dropped_E
        output = top_k(_masked(input, dropped, float("-inf")), k, dim, *args, **kwargs)
        if input.shape[-1:] != dropped.shape or dim not in (-1, input.dim() - 1):
            return output
        # with fewer than k left, a dropped expert has its own score, which its logit made 0: a
        # weight of -inf would be one that no sum of weights survives
        return type(output)((input.gather(-1, output.indices), output.indices))


def _masked(values: Tensor, dropped: Tensor, fill: float) -> Tensor:
    """Values [T, C] or [T, E], where they are as many as `dropped` says."""
    if not values.dtype.is_floating_point or values.shape[-1:] != dropped.shape:
        return values
    return values.masked_fill(dropped.to(values.device), fill)


# --- of a choice


class Changed(NamedTuple):
    """A choice, and int [T] each: assignments that went to another expert, and those whose gate
    weight is not the router's own for their expert."""

    ids_TK: Tensor
    weights_TK: Tensor
    moved_T: Tensor
    given_T: Tensor


def without(ids_TK: Tensor, weights_TK: Tensor, dropped_E: Tensor) -> Changed:
    """No expert of `dropped_E` (bool [E]): the gate weights of its slots are shared out among the
    token's other slots in proportion to theirs. An emptied slot goes, with weight 0, to an expert
    that is neither dropped nor among the token's others (where there are none, to a dropped one),
    so that none is twice in a decision. A token of dropped experts alone gets nothing."""
    E = len(dropped_E)
    there = (ids_TK >= 0) & (ids_TK < E)
    gone = there & dropped_E[ids_TK.clamp(0, E - 1)]
    kept_TK = weights_TK.masked_fill(gone, 0)
    total_T1 = weights_TK.masked_fill(~there, 0).sum(1, keepdim=True)
    left_T1 = kept_TK.masked_fill(~there, 0).sum(1, keepdim=True)
    scale_T1 = torch.where(left_T1 > 0, total_T1 / left_T1.clamp(min=1e-30), 1.0)
    shared_TK = (kept_TK * scale_T1.to(kept_TK.dtype)).to(weights_TK.dtype)
    # (what lost nothing keeps its weights to the bit)
    weights_TK = torch.where(gone.any(1, keepdim=True), shared_TK, weights_TK)
    # the slots that are gone go to the lowest-numbered experts which are free, then to dropped ones
    taken_TE = dropped_E.to(torch.int8).repeat(len(ids_TK), 1)
    taken_TE = torch.cat([taken_TE, taken_TE[:, :1]], 1)
    taken_TE = taken_TE.scatter_(1, ids_TK.masked_fill(~there | gone, E), 2)[:, :E]
    # free experts first, in their order, then dropped ones, then the token's own
    free_TE = taken_TE.argsort(dim=1, stable=True)
    rank_TK = (gone.cumsum(1) - 1).clamp(0, E - 1)
    ids_TK = torch.where(gone, free_TE.gather(1, rank_TK).to(ids_TK.dtype), ids_TK)
    moved_T = gone.sum(1)
    return Changed(ids_TK, weights_TK, moved_T, moved_T)


def forced(ids_TK: Tensor, weights_TK: Tensor, experts: Tensor) -> Changed:
    """`experts` (int [F], F ≤ K) in every decision: one that is not takes over the slot, and the
    gate weight, of the token's least choice that is not forced, and of one to no expert last."""
    forced_TK = torch.isin(ids_TK, experts)
    # slots by weight from the least, then those that go to no expert, forced ones last
    by_TK = weights_TK.float().masked_fill(ids_TK < 0, torch.finfo(torch.float32).max)
    order_TK = by_TK.masked_fill(forced_TK, float("inf")).argsort(dim=1, stable=True)
    missing_TF = ~(ids_TK.unsqueeze(2) == experts).any(1)
    F = len(experts)
    # missing experts first, in their order
    wanted_TF = experts[(~missing_TF).to(torch.int8).argsort(dim=1, stable=True)]
    moved_T = missing_TF.sum(1)
    sorted_TK = ids_TK.gather(1, order_TK)
    change_TF = torch.arange(F, device=ids_TK.device) < moved_T.unsqueeze(1)
    new_TF = torch.where(change_TF, wanted_TF.to(ids_TK.dtype), sorted_TK[:, :F])
    new_TK = torch.cat([new_TF, sorted_TK[:, F:]], 1)
    return Changed(
        torch.empty_like(ids_TK).scatter_(1, order_TK, new_TK), weights_TK, moved_T, moved_T * 0
    )


def replayed(
    ids_TK: Tensor, weights_TK: Tensor, wanted_TK: Tensor, given_TK: Tensor | None, experts: int
) -> Changed:
    """The experts `wanted_TK` (-1: to no expert). Where the router's own choice holds an expert,
    slot and gate weight stay its own; the others take the slots that are left, with the weights
    `given_TK` of the same shape, or where there are none, with the weights of these slots. A slot
    that goes to none of them gets id -1 and weight 0, unless it went to none before."""
    K = ids_TK.shape[1]
    wanted_TK = wanted_TK.to(ids_TK.dtype)
    nowhere_TK, to_none_TK = (ids_TK < 0) | (ids_TK >= experts), wanted_TK < 0
    same_TKK = (ids_TK.unsqueeze(2) == wanted_TK.unsqueeze(1)) & ~to_none_TK.unsqueeze(1)
    held_TK, found_TK = same_TKK.any(2), same_TKK.any(1)
    # slots and experts that are left, what goes to no expert behind the others
    slot_TK = (nowhere_TK.to(torch.int8) + 2 * held_TK.to(torch.int8)).argsort(dim=1, stable=True)
    want_TK = (to_none_TK.to(torch.int8) + 2 * found_TK.to(torch.int8)).argsort(dim=1, stable=True)
    left_TK = torch.arange(K, device=ids_TK.device) < (~held_TK).sum(1, keepdim=True)
    own_ids_TK, own_TK = ids_TK.gather(1, slot_TK), weights_TK.gather(1, slot_TK)
    new_TK = wanted_TK.gather(1, want_TK)
    take_TK = left_TK & (new_TK >= 0)
    empty_TK = left_TK & (new_TK < 0) & ~nowhere_TK.gather(1, slot_TK)
    values_TK = given_TK.to(weights_TK).gather(1, want_TK) if given_TK is not None else own_TK
    new_ids_TK = torch.where(take_TK, new_TK, own_ids_TK).masked_fill(empty_TK, -1)
    new_weights_TK = torch.where(take_TK, values_TK, own_TK).masked_fill(empty_TK, 0)
    moved_T = (take_TK | empty_TK).sum(1)
    return Changed(
        torch.empty_like(ids_TK).scatter(1, slot_TK, new_ids_TK),
        torch.empty_like(weights_TK).scatter(1, slot_TK, new_weights_TK),
        moved_T,
        moved_T if given_TK is not None else moved_T * 0,
    )


def exchanged(ids_TK: Tensor, weights_TK: Tensor, row_T: Tensor) -> Changed:
    """Row t gets the choice of row `row_T[t]`."""
    new_TK, new_weights_TK = ids_TK[row_T], weights_TK[row_T]
    same_TKK = new_TK.unsqueeze(2) == ids_TK.unsqueeze(1)
    own_TK = (weights_TK.unsqueeze(1) * same_TKK).sum(2)
    moved_TK = ~same_TKK.any(2)
    given_TK = moved_TK | (own_TK != new_weights_TK)
    return Changed(new_TK, new_weights_TK, moved_TK.sum(1), given_TK.sum(1))


# --- in the place of a router's choice


def replaced(
    site: Site, args: Args, kwargs: Kwargs, output: Called, own: Choice, new: Choice
) -> Called:
    """(args, kwargs) of a call that is read before it runs, else its output, with the choice `new`
    instead of `own`. MoeInspectError where the site does not show how."""
    call = ModuleCall(site.module, args, kwargs, output)
    if site.adapter is not None and site.adapter.replace is not None:
        return site.adapter.replace(call, *new)
    at_call = site.adapter is None or site.adapter.at_call
    outputs = [*output] if isinstance(output, tuple | list) else [output]
    values = call.values if at_call else outputs
    ids_TK, weights_TK = new
    nowhere = ids_TK < 0  # which experts take as expert 0 with weight 0
    new = ids_TK.masked_fill(nowhere, 0), weights_TK.masked_fill(nowhere, 0)
    found = _with_tensors(values, own, new) or _with_map(values, site.experts, *new)
    kind = type(site.module).__name__
    if found is None and site.told:
        raise MoeInspectError(
            f"the choice of {site.path} cannot be replaced, as what RouterSpec(choice=…) returns "
            f"is not a part of what {kind} takes or returns: give RouterSpec(replace=…), or a "
            "RouterSpec of the module in it that makes the logits"
        )
    if found is None:
        raise MoeInspectError(
            f"{site.path}: the experts that {kind} runs cannot be replaced in its call, so nothing "
            "can be dropped, forced or replayed there"
        )
    if at_call:
        return call.having(found)
    return type(output)(*found) if hasattr(output, "_fields") else type(output)(found)


def _with_tensors(values: list[Called], own: Choice, new: Choice) -> list[Called] | None:
    """`values` with the tensors of `own` replaced; None where they are not among them."""
    tensors = {n: v for n, v in enumerate(values) if isinstance(v, Tensor)}

    def is_same(one: Tensor, other: Tensor) -> bool:
        alike = (one.dtype, one.numel()) == (other.dtype, other.numel())
        return one is other or (alike and one.data_ptr() == other.data_ptr())

    of_ids, of_weights = (
        next((n for n, v in tensors.items() if is_same(v, part)), None) for part in own
    )
    if of_ids is None:  # an adapter marks the slots that go nowhere in a copy of the ids
        like = [n for n, v in tensors.items() if v.shape == own[0].shape and v.element_size() > 1]
        like = [n for n in like if not tensors[n].is_floating_point()]
        of_ids = like[0] if len(like) == 1 else None
    if of_ids is None or of_weights is None:
        return None
    found = list(values)
    for n, part in zip((of_ids, of_weights), new, strict=True):
        found[n] = part.to(found[n].dtype).reshape(found[n].shape)
    return found


def _with_map(
    values: list[Called], E: int, ids_TK: Tensor, weights_TK: Tensor
) -> list[Called] | None:
    """The same of a bool map of the experts chosen [..., E] and their weights [..., E]."""
    of_E = {n: v for n, v in enumerate(values) if isinstance(v, Tensor) and v.shape[-1:] == (E,)}
    of_E = {n: v for n, v in of_E.items() if v.dim() > 1}
    maps = [n for n, v in of_E.items() if v.dtype == torch.bool]
    shape = of_E[maps[0]].shape if maps else torch.Size()
    weights = [n for n, v in of_E.items() if v.is_floating_point() and v.shape == shape]
    if (len(maps), len(weights)) != (1, 1):
        return None
    zeros_TE = of_E[weights[0]].new_zeros((len(ids_TK), E))
    weights_TE = zeros_TE.scatter_add(1, ids_TK, weights_TK.to(zeros_TE.dtype))
    chosen_TE = zeros_TE.scatter_add(1, ids_TK, (weights_TK != 0).to(zeros_TE.dtype)) > 0
    found = list(values)
    found[weights[0]], found[maps[0]] = weights_TE.view(shape), chosen_TE.view(shape)
    return found
