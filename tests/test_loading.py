"""What a model is loaded from: code that its repository brings, a revision, kernels of the hub in
place of its experts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moe_inspect
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.config import read_config, read_facts
from tests.conftest import ROOT, Cli, in_one_process
from tests.support import zoo
from tests.support.families import build
from tests.test_cli_trace import save, save_tokenizer, write_jsonl

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


def test_code_of_a_repository_runs_only_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli, cli_here: Cli
) -> None:
    """A model of a type that transformers does not know, with the code it is written in."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    cache = "transformers.dynamic_module_utils.HF_MODULES_CACHE"  # in this process
    monkeypatch.setattr(cache, str(tmp_path / "modules"))
    path = save("olmoe", tmp_path / "mine")
    # by the names they have in memory
    save_file(build("olmoe").state_dict(), path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    causal = {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    config["auto_map"] = {"AutoConfig": "configuration_mine.MineConfig", **causal}
    config |= {"model_type": "mine", "architectures": ["MineForCausalLM"]}
    (path / "config.json").write_text(json.dumps(config))
    (path / "configuration_mine.py").write_text(CONFIGURATION)
    (path / "modeling_mine.py").write_text(MODELING)
    data = write_jsonl(tmp_path / "data.jsonl", documents=4, words=9)
    command = "trace", path, "-o", "t", "--data", data
    assert cli_here(*command, check=1).stderr == (
        f"error: model {str(path)!r} needs to run code from its own repository: review it, "
        "then give --trust-remote-code\n"
    )
    assert not (tmp_path / "t").exists()
    assert not list(tmp_path.glob("modules/**/modeling_mine.py"))
    cli(*command, "--trust-remote-code")
    trace = moe_inspect.open_trace(tmp_path / "t")
    assert trace.manifest["model"]["class"] == "MineForCausalLM"
    assert trace.manifest["model"]["trust_remote_code"] is True


def test_a_revision_is_pinned_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two commits of one repository, in the cache of a hub that is out of reach."""
    old, new = "0" * 39 + "a", "0" * 39 + "b"
    repository = tmp_path / "hub" / "models--who--what"
    for commit, family in ((old, "olmoe"), (new, "qwen3_moe")):
        save(family, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(new)
    (repository / "refs" / "v1").write_text(old)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    data = write_jsonl(tmp_path / "data.jsonl", documents=4, words=9)
    command = ("trace", "who/what", "--data", data)
    *made, missing = in_one_process(
        tmp_path,
        (*command, "-o", "a", "--revision", "v1"),
        (*command, "-o", "b", "--revision", old),
        (*command, "-o", "c"),
        (*command, "-o", "d", "--revision", "v9"),
    )
    assert [done.returncode for done in made] == [0, 0, 0], made
    for name, commit, kind in (("a", old, "Olmoe"), ("b", old, "Olmoe"), ("c", new, "Qwen3Moe")):
        model = moe_inspect.open_trace(tmp_path / name).manifest["model"]
        assert (model["revision"], model["class"]) == (commit, f"{kind}ForCausalLM")
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: cannot load model 'who/what'")
    assert missing.stderr.count("\n") == 1


def test_kernels_of_the_hub_that_bypass_the_experts_are_refused(tmp_path: Path) -> None:
    """`use_kernels=True` gives a block a forward that calls neither of them."""
    model, batch = build("qwen3_moe"), {"input_ids": torch.arange(3, 17).view(2, 7)}

    def fused(self: Any, hidden_BSC: torch.Tensor) -> torch.Tensor:
        return hidden_BSC @ self.experts.down_proj[0] @ self.experts.down_proj[0].T

    block = model.model.layers[1].mlp
    block.forward = MethodType(fused, block)
    with pytest.raises(MoeInspectError, match=r"layers\.1\.mlp\.experts.*use_kernels"):
        zoo.recorded(model, tmp_path / "t", batch)
    assert not (tmp_path / "t").exists() or moe_inspect.open_trace(tmp_path / "t").n_tokens == 0
    del block.forward
    assert zoo.recorded(model, tmp_path / "u", batch).n_tokens == 14  # control


# --- models with towers


def test_text_goes_through_a_multimodal_model(tmp_path: Path, cli_here: Cli) -> None:
    """Qwen3-VL-MoE as its checkpoint is: `architectures` says ForConditionalGeneration."""
    path, model, kind = (
        tmp_path / "vl",
        zoo.build("qwen3_vl_moe"),
        "Qwen3VLMoeForConditionalGeneration",
    )
    model.save_pretrained(path)
    assert json.loads((path / "config.json").read_text())["architectures"] == [kind]
    cli_here("describe", path)  # which needs no tokenizer
    save_tokenizer(path)
    data = write_jsonl(tmp_path / "data.jsonl", documents=4, words=9)
    for options in ([], ["--random-init", "1"], ["--generate", "2"]):
        cli_here("trace", path, "-o", "t", "--data", data, "--overwrite", *options)
        trace = moe_inspect.open_trace(tmp_path / "t")
        assert trace.manifest["model"]["class"] == kind
        assert all("language_model" in r.path for r in trace.routers)
        assert len(trace.routing()) == trace.n_tokens * len(trace.routers)
    facts = {key: value for key, value, _ in moe_inspect.describe(str(path)).facts()}
    towers = sum(p.numel() for name, p in model.named_parameters() if ".visual." in name)
    assert facts["parameters.vision_and_audio.total"] == towers > 0
    assert facts["parameters.vision_and_audio.active"] == 0
    assert facts["parameters.total"] == sum(p.numel() for p in model.parameters())


def test_of_a_model_that_speaks_the_part_that_reads_is_traced(
    tmp_path: Path, cli_here: Cli
) -> None:
    """Qwen3-Omni as its checkpoint is: thinker and talker in one."""
    omni, thinker = tmp_path / "omni", zoo.build("qwen3_omni_moe")
    whole: dict[str, Any] = {"model_type": "qwen3_omni_moe"}
    whole["architectures"] = ["Qwen3OmniMoeForConditionalGeneration"]
    whole["thinker_config"] = json.loads(thinker.config.to_json_string())
    thinker.save_pretrained(omni)
    (omni / "config.json").write_text(json.dumps(whole))
    tensors = load_file(omni / "model.safetensors")
    named = {f"thinker.{name}": tensor for name, tensor in tensors.items()}
    named["talker.model.norm.weight"] = torch.ones(3)
    save_file(named, omni / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(omni)
    data = write_jsonl(tmp_path / "data.jsonl", documents=2, words=9)
    cli_here("trace", omni, "-o", "t", "--data", data)
    of_model = moe_inspect.open_trace(tmp_path / "t").manifest["model"]
    described = moe_inspect.describe(str(omni))
    assert of_model["class"] == described.kind == "Qwen3OmniMoeThinkerForConditionalGeneration"


def test_tokens_without_an_embedding(tmp_path: Path, cli_here: Cli) -> None:
    """Of a padding token nothing is fed; text of such tokens is refused."""
    from transformers import AutoTokenizer

    model = save("olmoe", tmp_path / "m")
    data = write_jsonl(tmp_path / "data.jsonl", documents=4, words=9)
    cli_here("trace", model, "-o", "as-it-was", "--data", data)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(model)
    assert tokenizer.pad_token_id == 300
    cli_here("trace", model, "-o", "padded", "--data", data)
    padded, before = (moe_inspect.open_trace(tmp_path / n) for n in ("padded", "as-it-was"))
    assert padded.routing().equals(before.routing())
    (tmp_path / "odd.txt").write_text("the cat [PAD] sat")
    for options in ([], ["--generate", "2"]):
        odd = ("-o", "odd", "--data", tmp_path / "odd.txt", *options)
        refused = cli_here("trace", model, *odd, check=1)
        assert "token id 300, but the model has 300 embeddings" in refused.stderr.splitlines()[-1]


# --- sizes that no model has


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000{}4,096"),
        ({"n_routed_experts": 10**9}, "n_routed_experts is 1000000000{}65,535"),
        ({"vocab_size": 10**40}, "vocab_size is 10000000000000000000{}4,194,304"),
        ({"text_config": {"hidden_size": 10**9}}, "hidden_size is 1000000000{}16,777,216"),
        ({"num_hidden_layers": float("inf")}, "num_hidden_layers is inf{}4,096"),
        ({"num_experts_per_tok": 300}, "300 experts per token, but only 256 experts"),
        ('{"a": ' + "[" * 10**5, "it is nested too deeply"),
        ('{"a": "' + "a" * 2**24 + '"}', "bytes, over 16,777,216"),
    ],
)
def test_impossible_sizes_are_refused_before_anything_is_built(
    changed: Any, says: str, tmp_path: Path, cli_here: Cli
) -> None:
    config = tmp_path / "m" / "config.json"
    config.parent.mkdir()
    save_tokenizer(config.parent)
    known = json.loads((ROOT / "docs" / "configs" / "deepseek-v3.json").read_text())
    config.write_text(changed if isinstance(changed, str) else json.dumps(known | changed))
    data = write_jsonl(tmp_path / "data.jsonl", documents=2, words=9)
    for command in (
        ("describe", config.parent),
        ("describe", config),
        ("trace", config.parent, "-o", "t", "--data", data, "--random-init", 0),
        ("import", "counts", data, "-o", "t", "--config", config),
    ):
        refused = cli_here(*command, check=1)
        assert re.fullmatch("error: .*\n", refused.stderr)
        assert says.replace("{}", ", and no model has more than ") in refused.stderr
    assert not (tmp_path / "t").exists()


def test_sizes_that_models_have_are_not(tmp_path: Path) -> None:
    for path in (ROOT / "docs" / "configs").glob("*.json"):
        assert read_config(path)
    assert read_facts(ROOT / "docs" / "configs" / "deepseek-v3.json").layers == 61
    for family in zoo.FAMILIES:
        config = zoo.model_class(family).config_class().to_json_string()
        (tmp_path / "config.json").write_text(config)
        assert read_config(tmp_path / "config.json")
