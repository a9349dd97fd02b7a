"""Models in GGUF, as llama.cpp's converter writes them."""

from __future__ import annotations

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from moe_inspect.demo import MODEL_DIR
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.describe import describe
from moe_inspect.model.gguf import ARCHITECTURES
from moe_inspect.model.load import load_config, load_model
from moe_inspect.reporting.tables.summary import quantization
from moe_inspect.trace.reader import Trace
from tests.conftest import Cli
from tests.support import zoo
from tests.support.families import FAMILIES
from tests.support.foreign import Field, Tensor, gguf_file

FAMILY = dict(zip(ARCHITECTURES, ("qwen2_moe", "qwen3_moe", "minimax_m2"), strict=True))
needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="needs the gguf package")


def small(family: str, **options: Any) -> Any:
    options |= {"vocab_size": len(AutoTokenizer.from_pretrained(MODEL_DIR)), "num_hidden_layers": 2}
    return zoo.build(family, torch.float32, spread=0.5, **FAMILIES.get(family, {}) | options)


@needs_gguf
@pytest.mark.parametrize(
    ("architecture", "flat"), [*((name, True) for name in ARCHITECTURES), ("qwen2moe", False)]
)
def test_a_gguf_is_loaded_with_the_weights_it_was_made_of(
    architecture: str, flat: bool, tmp_path: Path
):
    model, path = small(FAMILY[architecture]), tmp_path / "m.gguf"
    write_model(path, model, architecture, flat=flat)
    config = load_config(str(path))
    found = load_model(str(path), config, device="cpu")
    for name, parameter in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], parameter), name
    tokens = zoo.token_batch([17, 9])
    with torch.inference_mode():
        assert torch.equal(found(**tokens).logits, model(**tokens).logits)
    described = describe(str(path))
    assert sum(described.total.values()) == sum(p.numel() for p in model.parameters())


@needs_gguf
def test_a_trace_of_a_gguf_is_that_of_the_model(cli_here: Cli, tmp_path: Path):
    model = small("qwen3_moe")
    write_model(tmp_path / "m.gguf", model, "qwen3moe")
    model.save_pretrained(tmp_path / "m")
    AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf").save_pretrained(tmp_path / "m")
    options = ["--max-tokens", "400", "--device", "cpu"]
    cli_here("trace", "m", "-o", "a", *options)
    cli_here("trace", "m.gguf", "-o", "b", *options)
    a, b = Trace(tmp_path / "a"), Trace(tmp_path / "b")
    assert a.routing().equals(b.routing())
    assert a.tokens().equals(b.tokens())
    assert quantization(b.manifest) == ""
    assert b.manifest["model"]["revision"] is None
    done = cli_here("trace", "m.gguf", "-o", "b", *options, "--resume")
    assert "complete" in done.stderr


@needs_gguf
def test_quantised_weights_are_dequantised_and_the_manifest_says_so(cli_here: Cli, tmp_path: Path):
    model = small("qwen3_moe", moe_intermediate_size=32)
    write_model(tmp_path / "m.gguf", model, "qwen3moe", quantise=True)
    options = ["--max-tokens", "200", "--device", "cpu"]
    cli_here("trace", "m.gguf", "-o", "t", *options)
    trace = Trace(tmp_path / "t")
    stored = trace.manifest["model"]["dequantized_from"]
    assert stored == {"quant_method": "gguf", "tensors": {"Q8_0": 6}}
    assert quantization(trace.manifest) == "gguf q8_0 dequantized to float32"
    experts = load_model(str(tmp_path / "m.gguf"), load_config(str(tmp_path / "m.gguf")))
    for name, parameter in model.state_dict().items():
        error = (experts.state_dict()[name] - parameter).abs().max() / parameter.abs().max()
        assert (0 < error < 1 / 127) if ".experts." in name else error == 0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "of architecture None, which cannot be loaded from GGUF: only qwen2moe, qwen3moe"),
        ({"general.architecture": "gpt-oss"}, "of architecture gpt-oss, which cannot be loaded"),
        ({"general.architecture": "qwen3moe", "split.count": 3}, "is one of 3 files"),
        (
            {"general.architecture": "qwen3moe", "qwen3moe.rope.scaling.type": "yarn"},
            r"scales positions \(yarn\), which is not read from GGUF",
        ),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_a_line(
    fields: dict[str, Field], said: str, tmp_path: Path, cli_here: Cli
):
    gguf_file(tmp_path / "m.gguf", fields, {"a": np.zeros((2, 2))})
    for command in (["trace", "m.gguf", "-o", "t"], ["describe", "m.gguf"]):
        assert re.search(f"m.gguf.*{said}", cli_here(*command, check=1).stderr)
    assert not (tmp_path / "t").exists()


def test_what_is_no_gguf_is_refused_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "m.gguf"

    def refused(match: str) -> None:
        with pytest.raises(MoeInspectError, match=match):
            load_config(str(path))

    refused(r"no file .*m\.gguf")
    path.write_text("{}" * 20)
    refused(r"is not a GGUF file: it begins with b'{}{}'")
    gguf_file(path, {"general.architecture": "qwen3moe"}, {})
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(r"needs gguf: pip install 'moe-inspect\[gguf\]'")


# --- tiny models, with the bundled tokenizer


# our name of a module → GGUF's, of Qwen's mixtures and of MiniMax
NAMES = {
    **{f"self_attn.{n}_proj": f"attn_{'output' if n == 'o' else n}" for n in "qkvo"},
    **{f"self_attn.{n}_norm": f"attn_{n}_norm" for n in "qk"},
    **{"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    **{"mlp.gate": "ffn_gate_inp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp"},
    **{f"mlp.shared_expert.{n}_proj": f"ffn_{n}_shexp" for n in ("gate", "up", "down")},
    **{"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"},
}


def _tensors(model: Any, flat: bool) -> dict[str, np.ndarray]:
    made: dict[str, np.ndarray] = {}
    for name, parameter in model.state_dict().items():
        value, block = parameter.float().numpy(), re.match(r"model\.layers\.(\d+)\.", name)
        n, inner = f"blk.{block[1]}." if block else "", name[block.end() if block else 0 :]
        if inner.endswith("experts.gate_up_proj"):
            gate, up = np.split(value, 2, axis=1)
            made |= {f"{n}ffn_gate_exps.weight": gate, f"{n}ffn_up_exps.weight": up}
        elif inner.endswith("experts.down_proj"):
            made[f"{n}ffn_down_exps.weight"] = value
        elif inner.endswith("e_score_correction_bias"):
            made[f"{n}exp_probs_b.bias"] = value
        else:
            stem, _, suffix = inner.rpartition(".")
            is_row = flat and "shared_expert_gate" in stem
            made[f"{n}{NAMES[stem]}.{suffix}"] = value[0] if is_row else value
    return made


def q8_0(value: np.ndarray) -> Tensor:
    """ggml's Q8_0: of 32 values a float16 scale and 32 int8."""
    blocks = value.astype(np.float32).reshape(-1, 32)
    scale = np.abs(blocks).max(1, keepdims=True) / 127
    rounded = np.rint(blocks / np.where(scale, scale, 1)).astype(np.int8)
    data = np.concatenate([scale.astype(np.float16).view(np.int8).reshape(-1, 2), rounded], axis=1)
    return 8, value.shape[::-1], data.tobytes()


def write_model(
    path: Path, model: Any, architecture: str, quantise: bool = False, flat: bool = True
) -> None:
    """The model as GGUF. `quantise`: experts in Q8_0. `flat`: the gate of the shared expert as a
    vector, as llama.cpp's converter wrote it once."""
    config, tokenizer = model.config, json.loads((MODEL_DIR / "tokenizer.json").read_text())
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    pairs = tokenizer["model"]["merges"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    heads = config.num_attention_heads
    of_model: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "expert_count": getattr(config, "num_experts", None) or config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": width,
    }
    if shared := getattr(config, "shared_expert_intermediate_size", None):
        of_model["expert_shared_feed_forward_length"] = shared
    pre = "minimax-m2" if architecture == "minimax-m2" else "qwen2"
    of_tokenizer = {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": merges}
    fields = {
        "general.architecture": architecture,
        **{f"{architecture}.{key}": value for key, value in of_model.items()},
        **{f"tokenizer.ggml.{key}": value for key, value in of_tokenizer.items()},
        **{"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1},
    }
    tensors = _tensors(model, flat).items()
    of_type = {name: q8_0(t) if quantise and "_exps" in name else t for name, t in tensors}
    gguf_file(path, fields, of_type)
