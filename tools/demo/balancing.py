"""The auxiliary losses that balance the load of a router's experts.

T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func


def per_layer_balancing_loss(
    router_logits: Sequence[torch.Tensor], experts: int, top_k: int
) -> torch.Tensor:
    """Mean over layers of E · Σ_e f_e · P_e: f the share of the assignments, P the mean router
    probability of an expert.

    1 for a uniform router, up to E for one that uses a single expert. Taken in each layer: the same
    sum over the pooled layers is content when two layers lean on different experts.
    arXiv:2101.03961, eq. 4-6, with f summing to 1.
    router_logits: L tensors float [T, E]."""
    losses: list[torch.Tensor] = []
    for logits_TE in router_logits:
        probability_TE = logits_TE.float().softmax(-1)
        chosen_TK = probability_TE.topk(top_k, dim=-1).indices
        share_E = torch.bincount(chosen_TK.flatten(), minlength=experts).float() / chosen_TK.numel()
        losses.append(experts * (share_E * probability_TE.mean(0)).sum())
    return torch.stack(losses).mean()


def pooled_balancing_loss(
    router_logits: Sequence[torch.Tensor], experts: int, top_k: int
) -> torch.Tensor:
    """transformers' own: one sum over the tokens of all layers together. top_k, not 1, for a
    uniform router."""
    loss = load_balancing_loss_func(tuple(router_logits), experts, top_k)  # pyright: ignore[reportArgumentType]
    assert isinstance(loss, torch.Tensor)
    return loss


BALANCING_LOSSES: dict[str, Callable[[Sequence[torch.Tensor], int, int], torch.Tensor] | None] = {
    "per-layer": per_layer_balancing_loss,
    "pooled": pooled_balancing_loss,
    "none": None,
}
