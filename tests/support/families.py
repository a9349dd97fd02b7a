"""Tiny random models of the main families, of two layers, and what their experts are handed."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from tests.support import zoo

# family → what its config has other than in `zoo`, where every family's is; two layers each
GROUPS = {"n_group": 1, "topk_group": 1}
GROUP_LIMITED = {"n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"}
NARROW = {"intermediate_size": 24}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_experts_per_tok": 2, "sliding_window": None},
    "olmoe": {**NARROW, "num_experts_per_tok": 4},
    "qwen2_moe": {"decoder_sparse_step": 1},
    "qwen3_moe": {"decoder_sparse_step": 1, "num_experts_per_tok": 4, "norm_topk_prob": True},
    "deepseek_v2": {**GROUP_LIMITED, "routed_scaling_factor": 1.5},
    "deepseek_v3": {},
    "gpt_oss": {**NARROW, "layer_types": ["full_attention"] * 2},
    "granitemoe": NARROW,
    "phimoe": {**NARROW, "num_experts_per_tok": 2, "sliding_window": None},
    "glm4_moe": GROUPS,
    "dots1": GROUPS,
    "ernie4_5_moe": {},
    "flex_olmo": NARROW,
    "hunyuan_v1_moe": NARROW,
    "llama4": {**NARROW, "num_experts_per_tok": 2, "interleave_moe_layer_step": 1},
}
# layer 0 has no router
DENSE_FIRST = {"deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "glm4_moe"}
NO_INTERFACE = {"llama4"}


def config(family: str) -> Any:
    return zoo.config(family, num_hidden_layers=2, **FAMILIES[family])


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """As `zoo.build`, of two layers, with selection biases that change many choices."""
    return zoo.build(family, dtype, seed, spread=0.5, num_hidden_layers=2, **FAMILIES[family])


def shallow(family: str) -> Any:
    """Of one layer, for compilers."""
    model = build(family)
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    return model


def moe_layers(family: str) -> list[int]:
    return [1] if family in DENSE_FIRST else [0, 1]


def handed_over(
    model: Any, layer: int, inputs: dict[str, torch.Tensor]
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, weights) [T, K] as the experts' own function receives them."""
    block = model.model.layers[layer]
    if type(model).__name__.startswith("Llama4"):
        router = block.feed_forward.router
        logits: list[torch.Tensor] = []
        hook = router.register_forward_pre_hook(lambda m, a: logits.append(a[0] @ m.weight.T))
        zoo.outputs(model, inputs)
        hook.remove()
        top = logits[0].topk(router.top_k, dim=1)
        return top.indices.numpy(), top.values.sigmoid().numpy()
    experts = next(m for n, m in block.named_modules() if n.endswith("experts"))
    received, stock = list[tuple[np.ndarray, np.ndarray]](), experts.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        _, ids, weights = [*args, *kwargs.values()]
        received.append((ids.numpy().copy(), weights.float().numpy().copy()))
        return stock(*args, **kwargs)

    with patch.object(experts, "forward", watched):
        zoo.outputs(model, inputs)
    return received[0]
