"""Choices made other than the router made them. All functions keep a gate weight to the bit where
they keep its expert, and slots in their order.

T rows, K slots, E experts. Ids are int [T, K]; one outside 0…E−1 goes to no expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
    moved_T = gone.sum(1)
    return Changed(_refilled(ids_TK, gone, dropped_E), weights_TK, moved_T, moved_T)


def _refilled(ids_TK: Tensor, gone_TK: Tensor, dropped_E: Tensor) -> Tensor:
    """The slots that are gone at the lowest-numbered experts which are free, then at dropped
    ones."""
    T, E = len(ids_TK), len(dropped_E)
    elsewhere_TK = (ids_TK < 0) | (ids_TK >= E) | gone_TK
    taken_TE = dropped_E.to(torch.int8).repeat(T, 1)
    taken_TE = torch.cat([taken_TE, taken_TE[:, :1]], 1)
    taken_TE = taken_TE.scatter_(1, ids_TK.masked_fill(elsewhere_TK, E), 2)[:, :E]
    # free experts first, in their order, then dropped ones, then the token's own
    free_TE = taken_TE.argsort(dim=1, stable=True)
    rank_TK = (gone_TK.cumsum(1) - 1).clamp(0, E - 1)
    return torch.where(gone_TK, free_TE.gather(1, rank_TK).to(ids_TK.dtype), ids_TK)


def forced(ids_TK: Tensor, weights_TK: Tensor, experts: Tensor) -> Changed:
    """`experts` (int [F], F ≤ K) in every decision: one that is not takes over the slot, and the
    gate weight, of the token's least choice that is not forced."""
    forced_TK = torch.isin(ids_TK, experts)
    # slots by weight from the least, forced ones last
    order_TK = weights_TK.float().masked_fill(forced_TK, float("inf")).argsort(dim=1, stable=True)
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
