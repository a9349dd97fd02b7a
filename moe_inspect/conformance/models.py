"""Tiny models with random weights, one per way to route: of the bundled model's tokenizer and its
512 positions."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_inspect.errors import MoeInspectError, writing
from moe_inspect.text import no_such

BUNDLED = Path(__file__).parents[1] / "demo/model"
SEED = 0
# heads of 32 and large initial weights: engines' attention on a CPU takes no smaller ones, and
# logits are far enough apart for sums in another order
USUAL: Mapping[str, Any] = {
    "vocab_size": 3072,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 4,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_DEEPSEEK = {
    "num_hidden_layers": 4,
    "intermediate_size": 192,
    "moe_intermediate_size": 96,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}
# name → what is special about it; its family in transformers; its config beside USUAL
MODELS: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": (
        "softmax over the chosen",
        "mixtral",
        {
            "num_hidden_layers": 4,
            "intermediate_size": 96,
            "num_key_value_heads": 2,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "olmoe": (
        "softmax over all",
        "olmoe",
        {"num_hidden_layers": 4, "intermediate_size": 96, "num_experts": 16},
    ),
    "qwen3-moe": (
        "layers 0 and 2 are dense",
        "qwen3_moe",
        {
            "num_hidden_layers": 5,
            "intermediate_size": 192,
            "moe_intermediate_size": 96,
            "num_key_value_heads": 2,
            "num_experts": 16,
            "mlp_only_layers": [0, 2],
        },
    ),
    "deepseek-v2": (
        "shared experts, groups, latent attention",
        "deepseek_v2",
        {
            **_DEEPSEEK,
            "kv_lora_rank": 64,
            "q_lora_rank": None,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32,
            "v_head_dim": 32,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 1.0,
        },
    ),
    "glm4-moe": (
        "sigmoid with a bias that selects alone, groups, a shared expert",
        "glm4_moe",
        {**_DEEPSEEK, "num_key_value_heads": 2, "norm_topk_prob": True},
    ),
}


def save(name: str, directory: Path) -> Path:
    """Writes a model of MODELS with its tokenizer into a directory, which is returned.
    MoeInspectError for an unknown name, and where it cannot be written."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    if name not in MODELS:
        raise MoeInspectError(no_such("model", name, MODELS))
    _, family, settings = MODELS[name]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(SEED)
        config = AutoConfig.for_model(family, **{**USUAL, **settings})
        model = AutoModelForCausalLM.from_config(config)
        for which, bias in model.named_buffers():
            if which.endswith("e_score_correction_bias"):  # 0 otherwise: which would change nothing
                bias.normal_(0, 0.1)
    logging.disable_progress_bar()  # of a file
    with writing(directory):
        model.save_pretrained(directory)
        for file in BUNDLED.glob("tokenizer*"):
            shutil.copy(file, directory)
    return directory
