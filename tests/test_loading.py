"""What a model is loaded from: code that its repository brings, a revision, kernels of the hub in place of its experts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import moe_inspect
from moe_inspect.errors import MoeInspectError
from tests.conftest import Cli
from tests.families import build
from tests.test_cli_trace import save, write_jsonl

CONFIGURATION = """
from transformers import OlmoeConfig
class MineConfig(OlmoeConfig):
    model_type = "mine"
"""
MODELING = """
from transformers import OlmoeForCausalLM
from .configuration_mine import MineConfig
class MineForCausalLM(OlmoeForCausalLM):
    config_class = MineConfig
"""


@pytest.fixture
def with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of a type that transformers does not know, with the code it is written in."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = save("olmoe", tmp_path / "mine")
    save_file(build("olmoe").state_dict(), path / "model.safetensors")  # by the names they have in memory
    config = json.loads((path / "config.json").read_text())
    classes = {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    (path / "config.json").write_text(
        json.dumps({**config, "model_type": "mine", "architectures": ["MineForCausalLM"], "auto_map": classes})
    )
    (path / "configuration_mine.py").write_text(CONFIGURATION)
    (path / "modeling_mine.py").write_text(MODELING)
    return path


def test_code_of_a_repository_runs_only_when_asked_for(with_code: Path, tmp_path: Path, cli: Cli) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", documents=4, words=9)
    refused = cli("trace", with_code, "-o", "t", "--data", data, check=1)
    assert (
        refused.stderr
        == f"error: model {str(with_code)!r} brings code of its own, which runs here: read it, then give --trust-remote-code\n"
    )
    assert not (tmp_path / "t").exists()
    assert not (tmp_path / "modules").exists() or not list((tmp_path / "modules").rglob("modeling_mine.py"))
    cli("trace", with_code, "-o", "t", "--data", data, "--trust-remote-code")
    trace = moe_inspect.open_trace(tmp_path / "t")
    assert trace.manifest["model"]["class"] == "MineForCausalLM"
    assert trace.manifest["model"]["trust_remote_code"] is True


def test_a_revision_is_pinned_and_told(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two commits of one repository, in the cache of a hub that cannot be reached: the trace is of the one asked for."""
    old, new = "0" * 39 + "a", "0" * 39 + "b"
    repository = tmp_path / "hub" / "models--who--what"
    for commit, family in ((old, "olmoe"), (new, "qwen3_moe")):
        save(family, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(new)
    (repository / "refs" / "v1").write_text(old)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    data = write_jsonl(tmp_path / "data.jsonl", documents=4, words=9)
    for revision, commit, kind in (("v1", old, "Olmoe"), (old, old, "Olmoe"), (None, new, "Qwen3Moe")):
        cli("trace", "who/what", "-o", "t", "--data", data, "--overwrite", *(["--revision", revision] if revision else []))
        model = moe_inspect.open_trace(tmp_path / "t").manifest["model"]
        assert (model["revision"], model["class"]) == (commit, f"{kind}ForCausalLM")
    missing = cli("trace", "who/what", "-o", "u", "--data", data, "--revision", "v9", check=1)
    assert missing.stderr.startswith("error: cannot load model 'who/what'")
    assert missing.stderr.count("\n") == 1
    shutil.rmtree(repository)  # control: it was read from there
    cli("trace", "who/what", "-o", "u", "--data", data, check=1)


def test_kernels_of_the_hub_that_bypass_the_experts_are_refused(tmp_path: Path) -> None:
    """`use_kernels=True` gives a block the forward pass of a fused layer, which calls neither router nor experts."""
    model, batch = build("qwen3_moe"), torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))

    def fused(self: Any, hidden_BSC: torch.Tensor) -> torch.Tensor:
        return hidden_BSC @ self.experts.down_proj[0] @ self.experts.down_proj[0].T

    block = model.model.layers[1].mlp
    block.forward = MethodType(fused, block)
    with pytest.raises(MoeInspectError, match=r"layers\.1\.mlp\.experts") as refused, moe_inspect.record(model, tmp_path / "t"):
        model(batch)
    assert "use_kernels" in str(refused.value)
    assert not (tmp_path / "t").exists() or moe_inspect.open_trace(tmp_path / "t").n_tokens == 0
    del block.forward
    with moe_inspect.record(model, tmp_path / "u"):  # control
        model(batch)
    assert moe_inspect.open_trace(tmp_path / "u").n_tokens == batch.numel()
