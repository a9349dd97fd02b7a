"""How the report names a model's weights: quantisation and adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

import moe_inspect
from moe_inspect.reporting.tables.summary import adapter, quantization
from tests.conftest import Cli
from tests.support.planted import uniform

NAMES: dict[str, dict[str, Any]] = {
    "mxfp4": transformers.Mxfp4Config().to_dict(),
    "fp8": transformers.FineGrainedFP8Config().to_dict(),
    "bitsandbytes 4 bit": transformers.BitsAndBytesConfig(load_in_4bit=True).to_dict(),
    "bitsandbytes 8 bit": transformers.BitsAndBytesConfig(load_in_8bit=True).to_dict(),
    **{
        name: {"quant_method": "torchao", "quant_type": kind}
        for name, kind in (
            (
                "torchao int8",
                {"default": {"_type": "Int8WeightOnlyConfig", "_data": "int4"}},
            ),
            ("torchao int4", {"default": {"_type": "Int8DynamicActivationInt4WeightConfig"}}),
            ("torchao float8", "float8_weight_only"),
            ("torchao", {"default": 3}),
        )
    },
    "gptq 4 bit": {"quant_method": "gptq", "bits": 4},
    "awq 4 bit": {"quant_method": "awq", "bits": 4},
    "compressed-tensors int4": {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}},
    },
    "fbgemm_fp8": {"quant_method": "fbgemm_fp8"},
    "": {},
}


@pytest.mark.parametrize("name", NAMES)
def test_quantization_is_named(name: str) -> None:
    config = {"quantization_config": json.loads(json.dumps(NAMES[name], default=str))}
    for of_model in (config, {"text_config": config}):
        assert quantization({"model": {"config": of_model}}) == name


@pytest.mark.parametrize("odd", [None, 3, [], "mxfp4", {"quant_method": None}, {"bits": "4"}])
def test_what_is_no_quantization_is_not_named(odd: Any) -> None:
    assert quantization({"model": {"config": {"quantization_config": odd}}}) == ""
    assert quantization({"model": odd}) == ""
    assert adapter({"model": odd}) == ""
    assert adapter({"model": {"adapter": None}}) == ""


WEIGHTS: dict[str, dict[str, Any]] = {
    "; weights: bitsandbytes 4 bit.": {
        "config": {"quantization_config": NAMES["bitsandbytes 4 bit"]}
    },
    "; weights: mxfp4 dequantized to bfloat16.": {"dequantized_from": NAMES["mxfp4"], "config": {}},
    "; weights: fp8, LORA adapter of some/base.": {
        "config": {"quantization_config": NAMES["fp8"]},
        "adapter": {"kind": "LORA", "base": "some/base"},
    },
    "routers.": {"config": {}},
}


@pytest.mark.parametrize("said", WEIGHTS)
def test_the_data_line_says_so_in_every_output(said: str, cli_here: Cli, tmp_path: Path) -> None:
    uniform(tmp_path / "t")
    path = tmp_path / "t"
    manifest = json.loads((path / "trace.json").read_text())
    model = json.loads(json.dumps(WEIGHTS[said], default=str))
    manifest["model"] = {**manifest.get("model", {}), **model}
    manifest["capture"]["dtype"] = "bfloat16"
    manifest.pop("digest")
    (path / "trace.json").write_text(json.dumps(manifest))
    made = moe_inspect.report(path)
    (line,) = [f.text for f in made.verdict() if f.text.startswith("Judged on")]
    assert line.endswith(said)
    cli_here("report", path, "--html", tmp_path / "page.html")
    texts = [
        cli_here("report", path).stdout,
        cli_here("report", path, "--table", "verdict", "--format", "csv").stdout,
        (tmp_path / "page.html").read_text(),
        made._repr_html_(),
    ]
    assert all(line in " ".join(text.split()) for text in texts)
    facts = dict(made.facts())
    assert ("quantization" in facts) == ("weights" in said)
    assert facts.get("adapter") == ("LORA adapter of some/base" if "adapter" in said else None)
