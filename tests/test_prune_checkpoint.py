"""The pruned checkpoint: it loads, and gives what dropping its experts gives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moe_inspect
from moe_inspect import MoeInspectError, intervene
from moe_inspect.analysis.scores import lowest, random_scores
from moe_inspect.demo import MODEL_DIR
from moe_inspect.interventions.pruning import checkpoint, run
from moe_inspect.interventions.pruning.checkpoint import Pruned
from moe_inspect.interventions.rules import beyond
from moe_inspect.model.config import groups_of
from moe_inspect.model.find import find_routers
from tests.conftest import Cli
from tests.support import zoo
from tests.support.damage import disk_of
from tests.test_intervene import with_experts

DROP = {layer: [0, 5] for layer in (1, 3)}
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
found = {}
for path in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        found[path] = model(torch.arange(2, 32).reshape(2, 15)).logits
torch.save(found, sys.argv[1])
"""


def saved(family: str, path: Path) -> Any:
    """A tiny model of 16 experts, and its checkpoint."""
    model = with_experts(family, 16)
    model.save_pretrained(path)
    return model


def written(source: Path, output: Path, drop: Any, beyond: int = 0) -> dict[str, Any]:
    """A pruned checkpoint, and its config."""
    checkpoint.write(source, output, Pruned(drop, 16, beyond), lambda draft: {})
    return json.loads((output / "config.json").read_text())


def dropped(model: Any) -> dict[int, list[int]]:
    sites = find_routers(model)
    groups, _, _ = groups_of(model.config.to_dict())
    gone = lowest(random_scores([s.experts for s in sites], 0), 0.75, groups)
    return {site.layer: experts for site, experts in zip(sites, gone, strict=True)}


def test_checkpoints_load_in_a_fresh_process_and_give_what_dropping_gives(tmp_path: Path) -> None:
    families = ["mixtral", "qwen3_moe", "deepseek_v3", "olmoe", "gpt_oss", "granitemoe"]
    # matrices of all experts in one; logits of shared experts, of identity experts, of skipping
    families += ["dbrx", "inkling", "longcat_flash", "zaya"]
    expected, whole, ids = {}, {}, torch.arange(2, 32).reshape(2, 15)
    for family in families:
        model = with_experts(family, 16)
        for name, buffer in model.named_buffers():
            if name.endswith("balancing_biases"):
                # of Zaya's choice to skip: transformers sets it so while loading
                buffer[-1] = -1.0
        model.save_pretrained(tmp_path / family)
        drop = dropped(model)
        path = tmp_path / f"{family}-pruned"
        written(tmp_path / family, path, drop, beyond(find_routers(model)[0].logits_module))
        with torch.no_grad():
            whole[str(path)] = model(ids).logits
            with intervene(model, drop=drop):
                expected[str(path)] = model(ids).logits
    command = [sys.executable, "-c", LOAD, tmp_path / "logits", *expected]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": ""})
    for path, found in torch.load(tmp_path / "logits").items():
        # a router's softmax over fewer experts differs more than products of another shape round
        rounding = 2e-6 if "deepseek_v3" in path else 2e-5
        assert (found - expected[path]).abs().max() <= rounding, path
        assert (found - whole[path]).abs().max() > 0.1, "control: the model is another"


def test_a_command_writes_it_and_measures_what_it_loses(tmp_path: Path, cli_here: Cli) -> None:
    cli_here("trace", "demo", "-o", "t", "--output-norms", "--max-tokens", 1500)
    arguments = ["prune", "demo", "--trace", "t", "--max-tokens", 1500, "--draws", 1]
    done = cli_here(*arguments, "-o", "pruned", "--format", "json")
    assert "wrote pruned; reloaded, it has this loss" in done.stderr
    assert "warning: " in done.stderr
    assert "without 8 experts of 32 the loss is" in done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    record = json.loads((tmp_path / "pruned/pruning.json").read_text())
    assert record["losses"] == rows
    assert (record["experts"], record["experts_kept"], record["by"]) == (8, 6, "reap")
    assert json.loads((tmp_path / "pruned/config.json").read_text())["num_local_experts"] == 6
    made = {f.name for f in (tmp_path / "pruned").iterdir()}
    assert made == {"pruning.json", *(f.name for f in MODEL_DIR.iterdir())}
    # what is kept is the same to the bit, in bf16
    before, after = (load_file(p / "model.safetensors") for p in (MODEL_DIR, tmp_path / "pruned"))
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    kept = {n: [e for e in range(8) if e not in gone] for n, gone in record["dropped"].items()}
    for name, tensor in after.items():
        layer, _, part = name.removeprefix("model.layers.").partition(".block_sparse_moe.")
        if part == "gate.weight":
            assert torch.equal(tensor, before[name][kept[layer]])
            continue
        if part:
            e = int(part.split(".")[1])
            name = name.replace(f"experts.{e}.", f"experts.{kept[layer][e]}.")
        assert torch.equal(tensor, before[name])
    assert len(after) == len(before) - 4 * 2 * 3

    # the same, measured on the checkpoint alone
    again = moe_inspect.ablate(str(tmp_path / "pruned"), layers=[0], experts=[0], max_tokens=1500)
    loss = {(row["plan"], row["domain"]): row["loss"] for row in rows}
    assert again.experts.loss[0] == pytest.approx(loss["reap", "(all)"], abs=0.01)

    there = cli_here(*arguments, "-o", "pruned", check=1)
    assert "error: pruned exists: give a new directory" in there.stderr
    assert "give -o DIR" in cli_here(*arguments, check=2).stderr
    dry = cli_here(*arguments, "--dry-run", "--table", "scores", "--format", "csv")
    assert dry.stdout.splitlines()[0] == "layer,router,expert,score,assignments,dropped"


def test_a_signal_cleans_up(tmp_path: Path, cli_here: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a second one, while the first is obeyed."""
    cli_here("trace", "demo", "-o", "t", "--max-tokens", 60)
    drafts: list[Path] = []

    def interrupted(draft: Path, *_: object) -> None:
        assert (draft / "model.safetensors").exists(), "control: it is written"
        drafts.append(draft)
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)  # a signal is seen between two instructions
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(run, "check_loss", interrupted)
    arguments = ["prune", "demo", "--trace", "t", "--by", "frequency", "--max-tokens", 60]
    done = cli_here(*arguments, "--draws", 1, "-o", "pruned", check=130)
    assert done.stderr == "interrupted: no checkpoint was written\n"
    assert len(drafts) == 1
    assert [f.name for f in tmp_path.iterdir()] == ["t"]


def test_file_by_file_and_blocks_beyond(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved("qwen3_moe", tmp_path / "a")
    weights = load_file(tmp_path / "a/model.safetensors")
    extra = {n.replace("layers.3.", "layers.4."): t for n, t in weights.items() if "layers.3." in n}
    config = json.loads((tmp_path / "a/config.json").read_text())
    (tmp_path / "a/config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    copied = {name: tensor.clone() for name, tensor in extra.items()}
    save_file({**weights, **copied}, tmp_path / "a/model.safetensors")
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 100_000)
    made = written(tmp_path / "a", tmp_path / "b", DROP)
    index = json.loads((tmp_path / "b/model.safetensors.index.json").read_text())
    files = sorted(f.name for f in (tmp_path / "b").glob("*.safetensors"))
    assert len(files) > 2
    of_file = {file: load_file(tmp_path / "b" / file) for file in files}
    assert index["weight_map"] == {name: file for file in files for name in of_file[file]}
    size = sum(t.numel() * 4 for tensors in of_file.values() for t in tensors.values())
    assert index["metadata"]["total_size"] == size
    assert not any("layers.4." in name for name in index["weight_map"])
    assert made["num_nextn_predict_layers"] == 0
    # and from there, once more
    again = Pruned({layer: [1] for layer in (1, 3)}, 14)
    checkpoint.write(tmp_path / "b", tmp_path / "c", again, lambda draft: {})
    model = zoo.model_class("qwen3_moe").from_pretrained(tmp_path / "c")
    assert {site.experts for site in find_routers(model)} == {13}


def test_only_the_model_that_was_traced_is_pruned(tmp_path: Path) -> None:
    """Blocks that predict further tokens go, a talker stays, and of two none is pruned."""
    saved("qwen3_moe", tmp_path / "a")
    file, config = tmp_path / "a/model.safetensors", tmp_path / "a/config.json"
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    block = {name: tensor for name, tensor in weights.items() if ".layers.1." in name}
    talker = {f"talker.{name}": tensor.clone() for name, tensor in block.items()}
    mtp = {name.replace("model.", "mtp."): tensor.clone() for name, tensor in block.items()}
    mtp["mtp.fc.weight"] = torch.ones(2, 2)
    save_file(weights | talker | mtp, file, metadata={"format": "pt"})
    stated = {"mtp_num_hidden_layers": 1, "num_mtp_layers": 1}
    config.write_text(json.dumps(json.loads(config.read_text()) | stated))
    made = written(tmp_path / "a", tmp_path / "b", DROP)
    found = load_file(tmp_path / "b/model.safetensors")
    assert not [name for name in found if "mtp" in name]
    assert {name for name in found if "talker" in name} == set(talker)
    assert all(torch.equal(found[name], tensor) for name, tensor in talker.items())
    assert len(found["model.layers.1.mlp.gate.weight"]) == 14
    assert {name: made[name] for name in stated} == dict.fromkeys(stated, 0)

    two = {f"talker.{name}": tensor.clone() for name, tensor in weights.items()}
    save_file(weights | two, file, metadata={"format": "pt"})
    with pytest.raises(MoeInspectError, match=r"model\.layers and talker\.model\.layers of"):
        written(tmp_path / "a", tmp_path / "c", DROP)


def test_the_weights_that_transformers_loads(tmp_path: Path) -> None:
    """Beside an index that is no longer of them; with the other chat templates of a tokenizer."""
    model = saved("mixtral", tmp_path / "a")
    model.save_pretrained(tmp_path / "a", max_shard_size="100KB")
    assert (tmp_path / "a" / checkpoint.INDEX).exists()
    weights = {name: tensor.detach().clone() + 1 for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights)
    model.save_pretrained(tmp_path / "new")
    (tmp_path / "new/model.safetensors").rename(tmp_path / "a/model.safetensors")
    (tmp_path / "a" / checkpoint.TEMPLATES).mkdir()
    (tmp_path / "a" / checkpoint.TEMPLATES / "tools.jinja").write_text("{{ tools }}")
    loaded = type(model).from_pretrained(tmp_path / "a")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight), "control: the new ones"
    written(tmp_path / "a", tmp_path / "b", dropped(model))
    made = type(model).from_pretrained(tmp_path / "b")
    assert torch.equal(made.lm_head.weight, model.lm_head.weight)
    assert (tmp_path / "b" / checkpoint.TEMPLATES / "tools.jinja").read_text() == "{{ tools }}"


def test_nothing_is_left_where_it_fails(tmp_path: Path) -> None:
    model = saved("mixtral", tmp_path / "a")
    drop = dropped(model)

    def fails(draft: Path) -> dict[str, Any]:
        assert (draft / "model.safetensors").exists()
        raise MoeInspectError("another loss")

    with pytest.raises(MoeInspectError, match="another loss"):
        checkpoint.write(tmp_path / "a", tmp_path / "b", Pruned(drop, 16), fails)
    with pytest.raises(MoeInspectError, match=r"does not state the number of experts \(12\)"):
        checkpoint.write(tmp_path / "a", tmp_path / "b", Pruned(drop, 12), lambda draft: {})
    with pytest.raises(MoeInspectError, match="are known by name in layer 7"):
        written(tmp_path / "a", tmp_path / "b", {**drop, 7: [0, 1, 2, 3]})
    # safetensors raises an error of its own for a full disk
    said = r"^cannot write \S+/b: File too large \(os"
    with disk_of(20_000), pytest.raises(MoeInspectError, match=said):
        written(tmp_path / "a", tmp_path / "b", drop)
    weights = (tmp_path / "a/model.safetensors").read_bytes()
    (tmp_path / "a/model.safetensors").write_bytes(weights[:-1])
    with pytest.raises(MoeInspectError, match=r"^cannot read \S+/a/model\.safetensors: "):
        written(tmp_path / "a", tmp_path / "b", drop)
    assert [f.name for f in tmp_path.iterdir()] == ["a"]
    config = json.loads((tmp_path / "a/config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    with pytest.raises(MoeInspectError, match="quantised: prune the original model"):
        checkpoint.directory_of(str(tmp_path / "a"), None)
    (tmp_path / "a/model.safetensors").rename(tmp_path / "a/pytorch_model.bin")
    with pytest.raises(MoeInspectError, match="not in safetensors"):
        checkpoint.directory_of(str(tmp_path / "a"), None)
