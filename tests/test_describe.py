"""What a model is before it runs, against the parameter counts that real configurations are known
by."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import get_args

import pandas as pd
import pytest
import torch
import transformers

import moe_inspect
from moe_inspect.cli.describe import Hardware
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.describe import PEAK_FLOPS, describe_table
from moe_inspect.model.find import find_routers
from tests.conftest import ROOT, Cli, in_one_process
from tests.support import own, zoo
from tests.support.families import FAMILIES, build, config
from tests.support.sweep import sample

CONFIGS = ROOT / "docs" / "configs"
# from the safetensors indices of the released models; the active count of Mixtral is Mistral's
# "12.9B", OLMoE's "1.3B"
KNOWN = {
    "mixtral-8x7b": (46_702_792_704, 12_879_925_248),
    "olmoe-1b-7b": (6_919_161_856, 1_282_017_280),
    "deepseek-v3": (671_026_404_352, 37_552_282_624),
    "llama-2-7b": (6_738_415_616, 6_738_415_616),
}


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_to_the_digit(name: str) -> None:
    moe_inspect.describe(str(CONFIGS / "llama-2-7b.json"))  # imports
    began = time.process_time()
    made = moe_inspect.describe(str(CONFIGS / f"{name}.json"))
    assert (made.parameters, made.parameters_active) == KNOWN[name]
    # no weight was made: 3e10 parameters would have taken minutes
    assert time.process_time() - began < 30
    assert sum(made.total.values()) == made.parameters


def test_flops_by_hand() -> None:
    """Two for each entry of matrices, without embeddings; four for each key, head and dimension."""
    made = moe_inspect.describe(str(CONFIGS / "llama-2-7b.json"), context=1000)
    matrices = 6_738_415_616 - 131_072_000 - 65 * 4096
    assert made.flops_a_token(1000) == 2 * matrices + 4 * 1000 * 32 * 4096
    mixtral = moe_inspect.describe(str(CONFIGS / "mixtral-8x7b.json"))
    assert mixtral.flops_a_token(0) == 2 * (12_879_925_248 - 131_072_000 - 65 * 4096)
    assert mixtral.flops_a_token(0, dense=True) == 2 * (46_702_792_704 - 131_072_000 - 65 * 4096)
    deepseek = moe_inspect.describe(str(CONFIGS / "deepseek-v3.json"))
    assert deepseek.score_width == 61 * 128 * (192 + 128)


def test_training_and_its_inverse() -> None:
    made = moe_inspect.describe(str(CONFIGS / "llama-2-70b.json"))
    assert made.parameters == 68_976_648_192
    facts = {key: value for key, value, _ in made.training(2e12, "a100", 0.4, 1_720_320)}
    assert facts["training.flops"] == pytest.approx(6 * 68.7e9 * 2e12, rel=0.05)
    assert 0.40 < facts["training.mfu"] < 0.46
    assert facts["training.gpu_hours"] == pytest.approx(1_720_320 * facts["training.mfu"] / 0.4)
    assert set(PEAK_FLOPS) == set(get_args(Hardware))


@pytest.mark.parametrize("family", FAMILIES)
def test_it_counts_what_the_built_model_has(family: str, tmp_path: Path) -> None:
    """On the meta device as in memory; and of the routed experts k in E are active."""
    model = build(family)
    config(family).save_pretrained(tmp_path)
    made = moe_inspect.describe(str(tmp_path))
    assert made.parameters == sum(p.numel() for p in model.parameters())
    named = model.named_parameters()
    experts = sum(p.numel() for n, p in named if ".experts." in n and "shared" not in n)
    assert made.total["routed experts"] == experts
    k = {k for _, _, k in made.routers}.pop()
    assert made.active["routed experts"] == pytest.approx(experts * k / 8)
    assert made.parameters - made.parameters_active == experts - made.active["routed experts"]
    assert made.total["router"] > 0
    assert made.total["attention"] > 0


def test_every_family_is_described(tmp_path: Path) -> None:
    """With its towers too, where it has some: a sample, in `make test-families` all."""
    families = [family for family in zoo.FAMILIES if family not in zoo.WHY_NOT]
    made = {family: zoo.build(family) for family in sample(families, 5)}
    for family in sample(zoo.WITH_TOWERS, 3):
        made[f"{family}-towers"] = zoo.build_with_towers(family)
    tied = list[bool]()
    for name, model in made.items():
        model.config.save_pretrained(tmp_path / name)
        described = moe_inspect.describe(str(tmp_path / name))
        if described.kind == type(model).__name__:
            assert described.parameters == sum(p.numel() for p in model.parameters()), name
            assert [e for _, e, _ in described.routers] == [s.experts for s in find_routers(model)]
            tied.append(described.total["output head"] == 0)
        lines = str(described).splitlines()
        assert (len(lines) <= 20, max(map(len, lines)) <= 80) == (True, True), f"{described}"
    assert len(tied) > 0.8 * len(made)


def test_what_needs_no_torch_has_none(tmp_path: Path) -> None:
    """What a trace of a model of one's own tells, and that there is no model."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch is imported')")
    own.record_once(own.gpt(), tmp_path / "t")
    says = {
        "./none": "no model at ./none",
        "torch.py": "is not a model's config",
        CONFIGS / "mixtral-8x7b.json": "this needs",
    }
    commands = [("describe", model) for model in ("t", *says)]
    known, *unknown = in_one_process(tmp_path, *commands, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert "4 routers" in known.stdout
    for done, error in zip(unknown, says.values(), strict=True):
        assert done.returncode == 1
        assert error in done.stderr


def test_the_command(cli_here: Cli, tmp_path: Path) -> None:
    config, dense = CONFIGS / "mixtral-8x7b.json", CONFIGS / "llama-2-7b.json"
    said = cli_here("describe", config).stdout
    assert "46,702,792,704" in said
    assert "12,879,925,248 parameters: the same FLOPs, 1/3.63 of the memory" in said
    made = moe_inspect.describe(str(config))
    assert said == f"{made}\n" == f"{made!r}\n"
    assert (len(said.splitlines()) <= 20, max(map(len, said.splitlines())) <= 80) == (True, True)
    assert "this model needs 3.63x" in cli_here("describe", config, "--format", "table").stdout
    lines = cli_here("describe", config, "--format", "json").stdout.splitlines()
    active = {"key": "parameters.active", "value": 12_879_925_248, "text": "12,879,925,248"}
    assert active in map(json.loads, lines)
    training = "--train-tokens", "2e12", "--hardware", "a100", "--mfu", "0.4"
    cli_here("describe", config, *training, "-o", "facts.csv")
    assert pd.read_csv(tmp_path / "facts.csv").set_index("key").value["training.gpu_hours"] > 1e5
    of_dense = cli_here("describe", dense).stdout
    assert "no routers: a dense model" in of_dense
    assert "the same" not in of_dense
    for path, compared in ((config, 6), (dense, 0)):
        keys = [key for key, *_ in moe_inspect.describe(str(path)).facts()]
        assert sum(key.startswith("dense_of") for key in keys) == compared
    refused = cli_here("describe", config, "--mfu", "0.4", check=2)
    assert refused.stderr.strip().endswith("add --train-tokens")


def test_from_a_trace_and_the_bundled_model() -> None:
    demo, traced = map(moe_inspect.describe, ("demo", str(ROOT / "sample_traces" / "balanced")))
    assert demo.parameters == traced.parameters == 2_561_152
    assert describe_table(demo).equals(describe_table(traced))


def test_a_trace_of_a_model_of_ones_own_tells_its_routers(tmp_path: Path) -> None:
    own.record_once(own.gpt(), tmp_path / "t")
    made = moe_inspect.describe(str(tmp_path / "t"))
    assert made.routers == [(layer, 8, 2) for layer in range(4)]
    assert str(made).startswith("GPT\n4 routers in layers 0-3: 2 of 8 experts per token\n")
    assert "parameters and FLOPs are not known" in str(made)
    assert "parameters.total" not in set(describe_table(made)["key"])
    with pytest.raises(MoeInspectError, match="the FLOPs of GPT are not known"):
        made.training(1e9, "h100", None, None)


def test_bad_input_gets_one_line(tmp_path: Path) -> None:
    for text, message in (
        ("{", "is not a model's config"),
        ('{"a": 1}', "transformers does not know the model_type None"),
        ('{"model_type": "nothing"}', "transformers does not know the model_type 'nothing'"),
        ("[1]", "is not a model's config"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(MoeInspectError, match=message):
            moe_inspect.describe(str(tmp_path / "config.json"))
    with pytest.raises(MoeInspectError, match=r"cannot load model|no model at"):
        moe_inspect.describe(str(tmp_path / "nowhere"))
    transformers.ViTConfig().save_pretrained(tmp_path / "vit")
    with pytest.raises(MoeInspectError, match="cannot build a language model of"):
        moe_inspect.describe(str(tmp_path / "vit"))
    assert not any(p.is_meta for p in build("mixtral").parameters())
    assert torch.get_default_device() == torch.device("cpu")
