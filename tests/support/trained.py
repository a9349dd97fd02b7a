"""A tiny model that counts its own routing, independently of the hooks under test."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import transformers as hf

from tests.support.zoo import config

LAYERS, EXPERTS, TOP_K = 2, 6, 2


class Counted(hf.MixtralForCausalLM):
    """Adds up, from the router logits of each training pass, which experts the tokens choose."""

    @functools.wraps(hf.MixtralForCausalLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        if self.training and torch.is_grad_enabled():
            mask = kwargs.get("attention_mask")
            rows = slice(None) if mask is None or mask.dim() != 2 else mask.reshape(-1) != 0
            for layer, logits_TE in enumerate(out.router_logits):
                ids = logits_TE.detach()[rows].topk(TOP_K, -1).indices
                self.load[layer] += torch.bincount(ids.reshape(-1), minlength=EXPERTS).numpy()
            self.steps_passes += 1
        return out


def counted() -> Counted:
    torch.manual_seed(0)
    own: dict[str, Any] = {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K}
    own |= {"num_hidden_layers": LAYERS, "sliding_window": None, "output_router_logits": True}
    model = Counted(config("mixtral", initializer_range=0.02, **own))
    for name, parameter in model.named_parameters():
        if "gate.weight" in name:
            parameter.data.normal_(std=0.3)
    reset(model)
    return model


def reset(model: Counted) -> None:
    model.load = np.zeros((LAYERS, EXPERTS), np.int64)
    model.steps_passes = 0
