"""An adapter of PEFT, traced by its directory: transformers loads it with its base model. Both are
named, and compared when a trace is resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import import_utils

import moe_inspect
from tests.conftest import Cli, Put
from tests.test_cli_trace import save, write_jsonl
from tests.test_wrapped import TARGETS, lora


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> Path:
    return save("olmoe", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: Any) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "c.jsonl", documents=12, words=60)


def adapter_in(path: Path, base: Path, target: str = "attention") -> Path:
    lora(AutoModelForCausalLM.from_pretrained(base), target).save_pretrained(path)
    return path


def experts_of(path: Path) -> np.ndarray:
    """Of the routers one after the other."""
    frame = moe_inspect.open_trace(path).routing().sort_values(["router", "token"])
    return frame.filter(like="expert_").to_numpy()


@pytest.mark.parametrize("target", TARGETS)
def test_an_adapter_is_traced(
    target: str, base: Path, corpus: Path, cli_here: Cli, tmp_path: Path
) -> None:
    adapter = adapter_in(tmp_path / "lora", base, target)
    for model, name in ((adapter, "t"), (base, "base")):
        cli_here("trace", model, "-o", name, "--data", corpus, "--logits")
    trace = moe_inspect.open_trace(tmp_path / "t")
    # the truth: its weights merged into the base model's, given the same tokens
    import peft

    plain = AutoModelForCausalLM.from_pretrained(base)
    merged = peft.PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload()
    tokens = trace.tokens()
    with moe_inspect.record(merged.eval(), tmp_path / "merged"), torch.no_grad():
        for _, rows in tokens.groupby("sequence", sort=False):
            merged(input_ids=torch.tensor([rows.token_id.tolist()]))
    found, whole, bare = (
        experts_of(tmp_path / name).reshape(len(trace.routers), len(tokens), -1)
        for name in ("t", "merged", "base")
    )
    by_sequence = np.concatenate(
        [np.flatnonzero(tokens.sequence == s) for s in tokens.sequence.drop_duplicates()]
    )
    assert (found[:, by_sequence] == whole).mean() > 0.999  # sums in another order
    assert (found != bare).any()
    about = trace.manifest["model"]
    assert (about["id"], about["class"]) == (str(adapter), "OlmoeForCausalLM")
    assert about["adapter"]["base"] == str(base)
    assert about["adapter"]["config"]["peft_type"] == "LORA"
    said = " ".join(cli_here("report", "t").stdout.split())
    assert f"weights: LORA adapter of {base}." in said


def test_another_does_not_resume(base: Path, corpus: Path, cli_here: Cli, tmp_path: Path) -> None:
    adapter = adapter_in(tmp_path / "lora", base)
    arguments = ("trace", adapter, "-o", "t", "--data", corpus)
    cli_here(*arguments)
    assert "complete already" in cli_here(*arguments, "--resume").stderr
    weights = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in weights if "lora_B" in name)
    save_file(weights | {name: weights[name] * 2}, adapter / "adapter_model.safetensors")
    assert "was made with adapter" in cli_here(*arguments, "--resume", check=1).stderr
    save_file(weights, adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 99}))
    assert "was made with adapter" in cli_here(*arguments, "--resume", check=1).stderr


def config_in(path: Path, **config: Any) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def test_what_cannot_be_traced_is_refused_by_name(
    base: Path, corpus: Path, cli_here: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(adapter: Path, *options: object) -> str:
        done = cli_here("trace", adapter, "-o", "t", "--data", corpus, *options, check=1)
        assert "Traceback" not in done.stderr
        return done.stderr

    broken = config_in(tmp_path / "b")
    (broken / "adapter_config.json").write_text("[")
    assert f"cannot load adapter {str(broken)!r}" in said(broken)
    adapter = adapter_in(tmp_path / "d", base)
    with monkeypatch.context() as without:
        without.setattr(import_utils, "is_peft_available", lambda: False)
        assert "needs peft: pip install 'moe-inspect[peft]'" in said(adapter)
    assert "needs weights, and --random-init reads none" in said(adapter, "--random-init", 0)
    gone = config_in(tmp_path / "e", peft_type="LORA", base_model_name_or_path="./gone")
    assert "no model at ./gone" in said(gone)
    (adapter / "adapter_model.safetensors").unlink()
    assert f"cannot load model {str(adapter)!r}" in said(adapter)


def test_an_adapter_of_the_hub_is_traced_from_the_cache(
    base: Path, corpus: Path, cli_here: Cli, tmp_path: Path, put: Put
) -> None:
    snapshot = tmp_path / "hub" / "models--some--lora" / "snapshots" / ("a" * 40)
    adapter_in(snapshot, base)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("a" * 40)
    put(constants, HF_HUB_CACHE=str(tmp_path / "hub"))
    cli_here("trace", "some/lora", "-o", "t", "--data", corpus)
    about = moe_inspect.open_trace(tmp_path / "t").manifest["model"]
    assert (about["id"], about["revision"]) == ("some/lora", "a" * 40)
    assert about["adapter"]["base"] == str(base)
