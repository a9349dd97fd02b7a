"""The experts implementation `moe_inspect`: hands the router's choice to the recorder, groups the slots by expert (a stable
sort: `kernels.dispatch`), then the grouped matrix products. What is recorded is what executed.

T tokens, K slots, S = T·K, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_linear

from moe_inspect.capture.kernels import dispatch

NAME = "moe_inspect"
SINK = "_moe_inspect_sink"  # set on an experts module while it is recorded: a function of (ids, weights)


def experts_forward(self: Any, hidden_TH: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """What transformers calls in place of its `grouped_mm`; the flags on `self` say what this family's experts have."""
    T, K = top_k_index.shape
    sink = getattr(self, SINK, None)
    if sink is not None:
        sink(top_k_index, top_k_weights)
    offsets, permutation, inverse = dispatch(top_k_index, self.num_experts)
    ends, token_S = offsets[1:], permutation // K
    biased_S = top_k_index.reshape(-1)[permutation].clamp(max=self.num_experts - 1) if self.has_bias else None
    up, up_bias = (self.gate_up_proj, "gate_up_proj_bias") if self.has_gate else (self.up_proj, "up_proj_bias")

    h_SI = _grouped_linear(
        hidden_TH[token_S], up, ends, bias=getattr(self, up_bias)[biased_S] if self.has_bias else None, is_transposed=self.is_transposed
    )
    h_SI = self._apply_gate(h_SI) if self.has_gate else self.act_fn(h_SI)
    y_SH = _grouped_linear(
        h_SI, self.down_proj, ends, bias=self.down_proj_bias[biased_S] if self.has_bias else None, is_transposed=self.is_transposed
    )
    if getattr(self, "has_post_expert_norm", False):  # a flag of later releases
        y_SH = self.post_expert_norm(y_SH)
    y_SH = y_SH * top_k_weights.reshape(-1)[permutation].unsqueeze(-1)
    return y_SH[inverse].view(T, K, -1).sum(1).to(hidden_TH.dtype)


def register() -> None:
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
