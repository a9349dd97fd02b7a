"""Models in GGUF: traced as the model they were made of, or refused in a line."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer

from moe_inspect.demo import MODEL_DIR
from moe_inspect.errors import MoeInspectError
from moe_inspect.model import gguf
from moe_inspect.model.describe import describe
from moe_inspect.model.gguf import ARCHITECTURES, refuse_unless_loadable
from moe_inspect.model.load import load_config, load_model
from moe_inspect.reporting.tables.summary import quantization
from moe_inspect.trace.reader import Trace
from tests import zoo
from tests.conftest import Cli
from tests.families import FAMILIES
from tests.foreign import Field, gguf_file
from tests.gguf_models import write_model

FAMILY = dict(zip(ARCHITECTURES, ("qwen2_moe", "qwen3_moe", "minimax_m2"), strict=True))
needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="needs the gguf package")


def small(family: str, **options: Any) -> Any:
    options |= {"vocab_size": len(AutoTokenizer.from_pretrained(MODEL_DIR)), "num_hidden_layers": 2}
    return zoo.build(family, torch.float32, spread=0.5, **FAMILIES.get(family, {}) | options)


@needs_gguf
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_gguf_is_loaded_with_the_weights_it_was_made_of(architecture: str, tmp_path: Path):
    model, path = small(FAMILY[architecture]), tmp_path / "m.gguf"
    write_model(path, model, architecture)
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
    pd.testing.assert_frame_equal(a.routing(), b.routing())
    pd.testing.assert_frame_equal(a.tokens(), b.tokens())
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
    stored = {"quant_method": "gguf", "tensors": {"Q8_0": 6}}
    assert trace.manifest["model"]["dequantized_from"] == stored
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
    with pytest.raises(MoeInspectError, match=said):
        refuse_unless_loadable(tmp_path / "m.gguf")
    for command in (["trace", "m.gguf", "-o", "t"], ["describe", "m.gguf"]):
        assert "m.gguf" in cli_here(*command, check=1).stderr
    assert not (tmp_path / "t").exists()


def test_what_is_no_gguf_is_refused_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(MoeInspectError, match=r"no file .*m\.gguf"):
        load_config(str(tmp_path / "m.gguf"))
    (tmp_path / "m.gguf").write_text("{}" * 20)
    with pytest.raises(MoeInspectError, match=r"is not a GGUF file: it begins with b'{}{}'"):
        load_config(str(tmp_path / "m.gguf"))
    gguf_file(tmp_path / "m.gguf", {"general.architecture": "qwen3moe"}, {})
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(MoeInspectError, match=r"needs gguf: pip install 'moe-inspect\[gguf\]'"):
        load_config(str(tmp_path / "m.gguf"))
