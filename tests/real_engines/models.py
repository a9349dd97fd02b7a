"""What is served: the bundled model and tiny random ones of other families, all with its tokenizer
and its 512 positions; and the corpus."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from tests.conftest import ROOT

DEMO = ROOT / "moe_inspect/demo"
POSITIONS = 512
# heads of 32 and large initial weights: engines' attention on a CPU takes no smaller ones, and
# logits are far enough apart for sums in another order
USUAL: dict[str, Any] = {
    "vocab_size": 3072,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": POSITIONS,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
SIZES = {"intermediate_size": 192, "moe_intermediate_size": 96}
# name → (family, its config beside USUAL); an entry without a family is the bundled model
MODELS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "bundled Mixtral": (None, {}),
    "OLMoE": ("olmoe", {"num_hidden_layers": 4, "intermediate_size": 96, "num_key_value_heads": 4}),
    "Qwen3-MoE, layers 0 and 2 dense": (
        "qwen3_moe",
        {"num_hidden_layers": 5, **SIZES, "mlp_only_layers": [0, 2]},
    ),
    "Qwen3-MoE": ("qwen3_moe", {"num_hidden_layers": 3, **SIZES}),
}
# for vLLM alone, with the rotary embedding in torch: vLLM's kernel for CPUs rotates queries wrongly
# that come as [tokens, heads, size], as those of a DeepSeek do
DEEPSEEK: dict[str, tuple[str | None, dict[str, Any]]] = {
    "DeepSeek-V2": (
        "deepseek_v2",
        {
            **SIZES,
            "num_hidden_layers": 4,
            "n_routed_experts": 16,
            "n_shared_experts": 1,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 64,
            "q_lora_rank": None,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32,
            "v_head_dim": 32,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
        },
    )
}
# of llama.cpp, which of a Qwen3-MoE always makes the weights of a token sum to 1
CONVERTED: dict[str, tuple[str | None, dict[str, Any]]] = {
    "Qwen3-MoE, normalised": ("qwen3_moe", {**MODELS["Qwen3-MoE"][1], "norm_topk_prob": True}),
    "Qwen2-MoE": (
        "qwen2_moe",
        {"num_hidden_layers": 3, **SIZES, "shared_expert_intermediate_size": 192},
    ),
    "gpt-oss": (
        "gpt_oss",
        {
            "num_hidden_layers": 4,
            "intermediate_size": 96,
            "num_local_experts": 16,
            "sliding_window": 128,
            # llama.cpp always rounds the bounds of YaRN
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "truncate": True,
            },
        },
    ),
}
# pairs that are not compared: SGLang takes no layer of Qwen3-MoE for dense
OTHERWISE = {("sglang", "Qwen3-MoE, layers 0 and 2 dense")}


def save(name: str, directory: Path, tied: bool = True) -> Path:
    """The directory of a model. The bundled one has its output matrix twice where not `tied`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, settings = (MODELS | CONVERTED | DEEPSEEK)[name]
    if family is None and tied:
        return DEMO / "model"
    if family is None:
        model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    else:
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **{**USUAL, **settings})
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory)
    for file in (DEMO / "model").glob("tokenizer*"):
        shutil.copy(file, directory)
    return directory


def write_corpus(path: Path) -> Path:
    """Half of the bundled texts, and of each domain these texts as one document, longer than the
    model's positions."""
    documents = []
    for domain in sorted(p for p in (DEMO / "corpus").iterdir() if p.is_dir()):
        texts = [file.read_text() for file in sorted(domain.glob("*.txt"))[:5]]
        documents += [{"text": text, "domain": domain.name} for text in (*texts, "\n".join(texts))]
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


def texts(corpus: Path) -> list[str]:
    return [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
