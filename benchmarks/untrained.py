"""`python -m benchmarks.untrained`: how much the domain tells of the expert in models that were
never trained: what a report's threshold for "specialised" has to exceed. Prints a line an
architecture, writes benchmarks/results/untrained.json.

Each is a model of 4 layers with random weights over the bundled corpus; of each seed the router
counts that shows most, as domain_mi_bits less its null by shuffled documents.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.measuring import RESULTS, machine

if TYPE_CHECKING:
    from moe_inspect import Trace

SEEDS = range(5)
WIDTH = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


def configs() -> Iterator[tuple[str, Any]]:
    import transformers as hf

    grouped = {"num_key_value_heads": 2, "head_dim": 64}
    yield (
        "mixtral, 2 of 8",
        hf.MixtralConfig(
            **WIDTH, **grouped, intermediate_size=256, num_local_experts=8, num_experts_per_tok=2
        ),
    )
    yield (
        "gpt_oss, 4 of 32",
        hf.GptOssConfig(
            **WIDTH, **grouped, intermediate_size=256, num_local_experts=32, num_experts_per_tok=4
        ),
    )
    yield (
        "olmoe, 8 of 64",
        hf.OlmoeConfig(**WIDTH, intermediate_size=128, num_experts=64, num_experts_per_tok=8),
    )
    for E in (64, 128):
        narrow = {
            "intermediate_size": 256,
            "moe_intermediate_size": 64,
            "num_experts": E,
            "num_experts_per_tok": 8,
        }
        yield f"qwen3_moe, 8 of {E}", hf.Qwen3MoeConfig(**WIDTH, **grouped, **narrow)
    routed = {
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_group": 8,
        "topk_group": 3,
        "first_k_dense_replace": 0,
    }
    ranks = {
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
    }
    yield (
        "deepseek_v3, 6 of 64",
        hf.DeepseekV3Config(
            **WIDTH, **routed, **ranks, intermediate_size=256, moe_intermediate_size=64
        ),
    )


def traced(config: Any, seed: int, model: Path, trace: Path) -> Trace:
    """The trace over the bundled corpus of a model with this config and random weights. `model`: a
    directory that is replaced."""
    from transformers import AutoTokenizer

    from moe_inspect import trace_model
    from moe_inspect.demo import MODEL_DIR

    config.vocab_size, config.architectures = len(AutoTokenizer.from_pretrained(MODEL_DIR)), None
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(
        MODEL_DIR,
        model,
        ignore=shutil.ignore_patterns("*.safetensors", "config.json", "generation_config.json"),
    )
    config.save_pretrained(model)
    return trace_model(str(model), trace, random_init=seed, overwrite=True)


def effects(config: Any, seed: int, scratch: Path) -> np.ndarray:
    """Bits beyond shuffled documents, of every router."""
    import moe_inspect

    trace = traced(config, seed, scratch / "model", scratch / "trace")
    table = moe_inspect.report(trace).tables["specialization"]
    return (table["domain_mi_bits"] - table["domain_mi_null_bits"]).to_numpy()


def main() -> None:
    measured = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, config in configs():
            most = [float(effects(config, seed, Path(scratch)).max()) for seed in SEEDS]
            measured[name] = [round(bits, 3) for bits in most]
            print(f"{name:<24}{min(most):>8.3f} to {max(most):.3f} bits", flush=True)
    facts = machine() | {"command": "python -m benchmarks.untrained"}
    (RESULTS / "untrained.json").write_text(
        json.dumps({"machine": facts, "domain_mi_beyond_null_bits": measured}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
