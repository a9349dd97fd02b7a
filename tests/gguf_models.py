"""Tiny models as llama.cpp's converter writes them in GGUF, with the bundled tokenizer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from moe_inspect.demo import MODEL_DIR
from tests.foreign import Tensor, gguf_file

# our name of a block's module → GGUF's, of Qwen's mixtures and of MiniMax
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.e_score_correction": "exp_probs_b",
}
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def _tensors(model: Any) -> dict[str, np.ndarray]:
    made: dict[str, np.ndarray] = {}
    for name, parameter in model.state_dict().items():
        value = parameter.float().numpy()
        block = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
        if block is None:
            stem, _, suffix = name.rpartition(".")
            made[f"{ENDS[stem]}.{suffix}"] = value
            continue
        n, inner = f"blk.{block[1]}", block[2]
        if inner.endswith("experts.gate_up_proj"):
            made[f"{n}.ffn_gate_exps.weight"], made[f"{n}.ffn_up_exps.weight"] = np.split(
                value, 2, axis=1
            )
        elif inner.endswith("experts.down_proj"):
            made[f"{n}.ffn_down_exps.weight"] = value
        elif inner.endswith("e_score_correction_bias"):
            made[f"{n}.exp_probs_b.bias"] = value
        else:
            stem, _, suffix = inner.rpartition(".")
            # (llama.cpp keeps the gate of the shared expert as a vector)
            value = value[0] if stem == "mlp.shared_expert_gate" else value
            made[f"{n}.{NAMES[stem]}.{suffix}"] = value
    return made


def q8_0(value: np.ndarray) -> Tensor:
    """ggml's Q8_0: of 32 values a float16 scale and 32 int8."""
    blocks = value.astype(np.float32).reshape(-1, 32)
    scale = np.abs(blocks).max(1, keepdims=True) / 127
    rounded = np.rint(blocks / np.where(scale, scale, 1)).astype(np.int8)
    data = np.concatenate([scale.astype(np.float16).view(np.int8).reshape(-1, 2), rounded], axis=1)
    return 8, value.shape[::-1], data.tobytes()


def write_model(path: Path, model: Any, architecture: str, quantise: bool = False) -> None:
    """The model as GGUF. `quantise`: experts in Q8_0."""
    config, tokenizer = model.config, json.loads((MODEL_DIR / "tokenizer.json").read_text())
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    pairs = tokenizer["model"]["merges"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
    of_model: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "expert_count": getattr(config, "num_experts", None) or config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": getattr(config, "moe_intermediate_size", None)
        or config.intermediate_size,
    }
    if shared := getattr(config, "shared_expert_intermediate_size", None):
        of_model["expert_shared_feed_forward_length"] = shared
    tensors: dict[str, Any] = dict(_tensors(model))
    if quantise:
        tensors = {name: q8_0(t) if "_exps" in name else t for name, t in tensors.items()}
    gguf_file(
        path,
        {
            "general.architecture": architecture,
            **{f"{architecture}.{key}": value for key, value in of_model.items()},
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "minimax-m2" if architecture == "minimax-m2" else "qwen2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1,
        },
        tensors,
    )
