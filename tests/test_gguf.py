"""Models in GGUF, as llama.cpp's converter writes them."""

from __future__ import annotations

import json
import re
import struct
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
from moe_inspect.model.gguf import ARCHITECTURES, layer_experts
from moe_inspect.model.load import stated_config
from tests.conftest import Cli
from tests.support import zoo
from tests.support.families import FAMILIES
from tests.support.foreign import Field, gguf_file

FAMILY = dict(zip(ARCHITECTURES, ("qwen2_moe", "qwen3_moe", "minimax_m2"), strict=True))
NAME = "blk.0.ffn_up_exps.weight"
needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="needs the gguf package")


def small(family: str) -> Any:
    vocabulary = len(AutoTokenizer.from_pretrained(MODEL_DIR))
    options = {"vocab_size": vocabulary, "num_hidden_layers": 2}
    return zoo.build(family, torch.float32, **FAMILIES.get(family, {}) | options)


@needs_gguf
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_gguf_is_described_as_the_model_it_was_made_of(architecture: str, tmp_path: Path):
    model, path = small(FAMILY[architecture]), tmp_path / "m.gguf"
    write_model(path, model, architecture)
    model.save_pretrained(tmp_path / "m")
    found = describe(str(path))
    assert found == describe(str(tmp_path / "m"))
    assert sum(found.total.values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "of architecture None, whose config cannot be read from GGUF: only that of qwen2moe"),
        ({"general.architecture": "gpt-oss"}, "of architecture gpt-oss, whose config cannot be"),
    ],
)
def test_what_cannot_be_described_is_refused_in_a_line(
    fields: dict[str, Field], said: str, tmp_path: Path, cli_here: Cli
):
    gguf_file(tmp_path / "m.gguf", fields, {"a": np.zeros((2, 2))})
    assert re.search(f"m.gguf.*{said}", cli_here("describe", "m.gguf", check=1).stderr)


def test_what_is_no_gguf_is_refused_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "m.gguf"

    def refused(match: str) -> None:
        with pytest.raises(MoeInspectError, match=match):
            stated_config(str(path))

    refused(r"no file .*m\.gguf")
    path.write_text("{}" * 20)
    refused(r"is not a GGUF file: it begins with b'{}{}'")
    gguf_file(path, {"general.architecture": "qwen3moe"}, {})
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(r"needs gguf: pip install 'moe-inspect\[gguf\]'")


# where a header of one field and one tensor says what, and what it may not say
BROKEN = {
    "is GGUF of version 9: 2 and 3": (struct.pack("<II", 0x46554747, 3), 9),
    "type 99 of a metadata value is unknown": (b"an.odd.key" + struct.pack("<I", 4), 99),
    "has 9 dimensions": (NAME.encode() + struct.pack("<I", 3), 9),
    "ends within its header": (struct.pack("<Q", len(NAME)) + NAME.encode()[:1], None),
}


@pytest.mark.parametrize("said", BROKEN)
def test_a_broken_header_is_refused_in_a_line(said: str, tmp_path: Path):
    path, (before, value) = tmp_path / "m.gguf", BROKEN[said]
    gguf_file(path, {"an.odd.key": 7}, {NAME: np.zeros((2, 3, 4))})
    assert layer_experts(path) == {0: (2, 3 * 4 * 4)}
    whole = path.read_bytes()
    assert whole.count(before) == 1
    at = whole.index(before) + len(before)
    other = whole[: at - 8] if value is None else before[:-4] + struct.pack("<I", value)
    path.write_bytes(other if value is None else whole.replace(before, other))
    with pytest.raises(MoeInspectError, match=said):
        layer_experts(path)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"a": np.zeros((2, 2))}, "no tensors of experts"),
        ({NAME: np.zeros((0, 3, 4))}, f"{NAME} is of 0 experts"),
        (
            {NAME: np.zeros((2, 3, 4)), NAME.replace("up", "down"): np.zeros((5, 3, 4))},
            "is of 5 experts, another tensor of its layer of 2",
        ),
    ],
)
def test_tensors_of_no_experts_are_refused(tensors: dict[str, Any], said: str, tmp_path: Path):
    gguf_file(tmp_path / "m.gguf", {}, tensors)
    with pytest.raises(MoeInspectError, match=said):
        layer_experts(tmp_path / "m.gguf")


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


def _tensors(model: Any) -> dict[str, np.ndarray]:
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
            made[f"{n}{NAMES[stem]}.{suffix}"] = value
    return made


def write_model(path: Path, model: Any, architecture: str) -> None:
    """The model as GGUF."""
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
    gguf_file(path, fields, _tensors(model))
