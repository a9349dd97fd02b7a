"""Tiny random models of the main families, and what routes where in them, found without the hook
under test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers as hf

VOCABULARY = 300
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
DEEPSEEK = {
    **BASE,
    **MLA,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 24,
}
GLM = {
    **BASE,
    "head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}

FAMILIES: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: hf.MixtralConfig(
        **BASE, intermediate_size=48, num_local_experts=8, num_experts_per_tok=2
    ),
    "olmoe": lambda: hf.OlmoeConfig(
        **BASE, intermediate_size=24, num_experts=8, num_experts_per_tok=4
    ),
    "qwen2_moe": lambda: hf.Qwen2MoeConfig(
        **BASE,
        intermediate_size=48,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        num_experts=8,
        num_experts_per_tok=3,
    ),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(
        **BASE,
        head_dim=8,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_experts=8,
        num_experts_per_tok=4,
        norm_topk_prob=True,
    ),
    "deepseek_v2": lambda: hf.DeepseekV2Config(
        **DEEPSEEK,
        intermediate_size=48,
        n_group=2,
        topk_group=1,
        topk_method="group_limited_greedy",
        routed_scaling_factor=1.5,
    ),
    "deepseek_v3": lambda: hf.DeepseekV3Config(
        **DEEPSEEK, intermediate_size=48, n_group=4, topk_group=2, routed_scaling_factor=2.5
    ),
    "gpt_oss": lambda: hf.GptOssConfig(
        **BASE,
        head_dim=8,
        intermediate_size=24,
        num_local_experts=8,
        num_experts_per_tok=3,
        layer_types=["full_attention"] * 2,
    ),
    "granitemoe": lambda: hf.GraniteMoeConfig(
        **BASE, intermediate_size=24, num_local_experts=8, num_experts_per_tok=3
    ),
    "phimoe": lambda: hf.PhimoeConfig(
        **BASE, intermediate_size=24, num_local_experts=8, num_experts_per_tok=2
    ),
    "glm4_moe": lambda: hf.Glm4MoeConfig(**GLM),
    "dots1": lambda: hf.Dots1Config(**GLM, n_group=1, topk_group=1),
    "ernie4_5_moe": lambda: hf.Ernie4_5_MoeConfig(
        **BASE,
        intermediate_size=48,
        moe_intermediate_size=24,
        moe_num_experts=8,
        moe_k=3,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
    ),
    "flex_olmo": lambda: hf.FlexOlmoConfig(
        **BASE, intermediate_size=24, num_experts=8, num_experts_per_tok=3
    ),
    "hunyuan_v1_moe": lambda: hf.HunYuanMoEV1Config(
        **BASE, head_dim=8, intermediate_size=24, num_experts=8, moe_topk=3
    ),
    "llama4": lambda: hf.Llama4TextConfig(
        **BASE,
        head_dim=8,
        intermediate_size=24,
        intermediate_size_mlp=48,
        num_local_experts=8,
        num_experts_per_tok=2,
        interleave_moe_layer_step=1,
    ),
}
DENSE_FIRST = {
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "ernie4_5_moe",
    "glm4_moe",
}  # layer 0 has no router
NO_INTERFACE = {"llama4"}


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A tiny random model in eval mode whose routers do choose: selection biases are not left at
    zero."""
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data.normal_(std=0.5)
    return model.eval()


def moe_layers(family: str) -> list[int]:
    return [1] if family in DENSE_FIRST else [0, 1]


def causal_routing(model: Any, layer: int, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    """bool [T, E]: whether expert e of this layer had a part in a position's output, found by
    disturbing one expert's down projection at a time and seeing which positions change. No router
    and no experts call is looked at."""
    block = model.model.layers[layer]
    down = next(p for n, p in block.named_parameters() if n.endswith("experts.down_proj"))
    seen: list[torch.Tensor] = []
    hook = block.register_forward_hook(
        lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    try:
        with torch.no_grad():
            model(**inputs)
            for e in range(len(down)):
                kept = down[e].clone()
                down[e] *= -3
                model(**inputs)
                down[e] = kept
    finally:
        hook.remove()
    undisturbed = seen[0].flatten(0, 1)
    return np.stack([(x.flatten(0, 1) != undisturbed).any(-1).numpy() for x in seen[1:]], 1)


def handed_over(
    model: Any, layer: int, inputs: dict[str, torch.Tensor]
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, weights) [T, K] as the experts' own function receives them, by replacing that function
    for one call."""
    block = model.model.layers[layer]
    if type(model).__name__.startswith("Llama4"):
        router = block.feed_forward.router
        logits: list[torch.Tensor] = []
        hook = router.register_forward_pre_hook(
            lambda m, a: logits.append(torch.nn.functional.linear(a[0], m.weight))
        )
        with torch.no_grad():
            model(**inputs)
        hook.remove()
        top = logits[0].topk(router.top_k, dim=1)
        return top.indices.numpy(), top.values.sigmoid().numpy()
    experts = next(m for n, m in block.named_modules() if n.endswith("experts"))
    received: list[tuple[np.ndarray, np.ndarray]] = []
    kind, stock = type(experts), type(experts).forward

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is experts:
            _, ids, weights = [*args, *kwargs.values()]
            received.append((ids.numpy().copy(), weights.float().numpy().copy()))
        return stock(self, *args, **kwargs)

    kind.forward = watched
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        kind.forward = stock
    return received[0]


def token_batch(lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Right-padded random token ids."""
    rng = np.random.default_rng(seed)
    ids = np.full((len(lengths), max(lengths)), 1)
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    ids[mask] = rng.integers(2, VOCABULARY, mask.sum())
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask.astype(np.int64)),
    }
