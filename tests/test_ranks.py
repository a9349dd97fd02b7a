"""Several processes of a torchrun share a corpus and write one trace."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

import moe_inspect
from tests.conftest import Cli
from tests.support.damage import edit_manifest
from tests.support.families import build
from tests.support.ranks import Ranks

pytestmark = pytest.mark.slow


def torchrun(path: Path, ranks: int, *arguments: str) -> subprocess.Popen[str]:
    run = f"-m torch.distributed.run --nproc-per-node {ranks} --standalone -m moe_inspect"
    command = [sys.executable, *run.split(), "trace", "demo", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=path, stdout=pipe, stderr=pipe, text=True)


def traced(path: Path, ranks: int, *arguments: str) -> Ranks:
    """The same without torchrun."""
    return Ranks(path, ranks, ["trace", "demo", *arguments])


def rows(trace: moe_inspect.Trace) -> pd.DataFrame:
    facts = trace.tokens().drop(columns="phase")
    found = trace.routing().merge(facts, on="token").drop(columns="token")
    return found.sort_values(["router", "sequence", "position"]).reset_index(drop=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> moe_inspect.Trace:
    return moe_inspect.trace_model("demo", tmp_path_factory.mktemp("alone") / "t", batch_tokens=500)


def test_two_ranks_write_the_rows_of_one(alone: moe_inspect.Trace, tmp_path: Path) -> None:
    process = torchrun(tmp_path, 2, "-o", "t", "--batch-tokens", "500")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out == ""
    assert err.count("9,254 tokens × 4 routers") == 1  # one of them speaks
    trace = moe_inspect.open_trace(tmp_path / "t")
    assert trace.status == "complete"
    assert trace.manifest["counts"] == alone.manifest["counts"]
    assert rows(trace).equals(rows(alone))
    a, b = (t.documents().set_index("document").sort_index() for t in (trace, alone))
    assert a.equals(b)
    tokens = trace.tokens().token
    assert tokens.is_unique
    assert (tokens >= 2**40).any()
    balance = [moe_inspect.report(t).tables["balance"] for t in (trace, alone)]
    pd.testing.assert_frame_equal(*balance, rtol=1e-6)


def test_more_ranks_than_batches(alone: moe_inspect.Trace, tmp_path: Path) -> None:
    run = traced(tmp_path, 3, "-o", "t", "--max-tokens", "300")
    assert run.wait() == [0] * 3, run.errors
    trace = moe_inspect.open_trace(tmp_path / "t")
    assert (trace.status, trace.n_tokens) == ("complete", 300)


def test_killed_and_resumed_it_ends_with_the_same_rows(
    alone: moe_inspect.Trace, tmp_path: Path
) -> None:
    arguments = ("--batch-tokens", "500", "--data", f"a={slow(tmp_path)}", "--max-length", "100")
    run = traced(tmp_path, 2, "-o", "t", *arguments)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (tmp_path / "t" / "trace.json").exists():
        time.sleep(0.01)
    run.signal(signal.SIGTERM)
    assert 0 not in run.wait()
    status = json.loads((tmp_path / "t" / "trace.json").read_text())["status"]
    assert status in ("interrupted", "recording")
    run = traced(tmp_path, 2, "-o", "t", *arguments, "--resume")
    assert run.wait() == [0, 0], run.errors
    options = {"batch_tokens": 500, "data": [f"a={slow(tmp_path)}"], "max_length": 100}
    whole = moe_inspect.trace_model("demo", tmp_path / "whole", **options)
    trace = moe_inspect.open_trace(tmp_path / "t")
    assert trace.status == "complete"
    assert rows(trace).equals(rows(whole))
    # other ranks would plan otherwise
    run = traced(tmp_path, 3, "-o", "t", *arguments, "--resume")
    assert run.wait() == [1] * 3
    assert "was made with ranks 2, not 3" in run.errors


def slow(path: Path) -> Path:
    """A text that takes a while."""
    text = path / "long.txt"
    if not text.exists():
        text.write_text("the quick brown fox jumps over the lazy dog and then some. " * 4000)
    return text


def test_all_end_where_the_first_refuses(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "mine.txt").write_text("")
    run = traced(tmp_path, 2, "-o", "t")
    assert run.wait() == [1, 1]
    assert "there is something at t" in run.errors
    assert [p.name for p in (tmp_path / "t").iterdir()] == ["mine.txt"]


def test_what_one_rank_lacks_is_resumed_though_the_first_has_all(
    alone: moe_inspect.Trace, tmp_path: Path
) -> None:
    assert traced(tmp_path, 2, "-o", "t", "--batch-tokens", "500").wait() == [0, 0]
    (tmp_path / "t" / "shards-1.jsonl").write_text("")
    nothing = {"tokens": 0, "decisions": 0, "dropped": 0}
    edit_manifest(tmp_path / "t", status="interrupted", counts=nothing)
    assert traced(tmp_path, 2, "-o", "t", "--batch-tokens", "500", "--resume").wait() == [0, 0]
    trace = moe_inspect.open_trace(tmp_path / "t")
    assert trace.status == "complete"
    assert trace.manifest["counts"] == alone.manifest["counts"]
    assert rows(trace).equals(rows(alone))


def test_half_a_launcher_is_none(cli_here: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    error = cli_here("trace", "demo", "-o", "t", check=1).stderr
    says = "WORLD_SIZE is 2, but RANK is not set: start the processes with torchrun"
    assert error == f"error: {says}\n"
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("RANK", "1")
    cli_here("trace", "demo", "-o", "u", "--max-tokens", "100")


EXPERT_PARALLEL = """
import sys
import torch
from torch import distributed
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
import moe_inspect
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], distributed_config=DistributedConfig(ep_size=2, **{sys.argv[2]: 2}))
rank = distributed.get_rank()
assert next(m for n, m in model.named_modules() if n.endswith("experts")).num_experts == 4
ids = torch.arange(2, 26).reshape(2, 12)
with moe_inspect.record(model, f"{sys.argv[2]}-{rank}") as recorder, torch.no_grad():
    assert recorder.mode == "tap"
    model(input_ids=ids, attention_mask=torch.ones_like(ids))
distributed.barrier()
distributed.destroy_process_group()
"""


@pytest.mark.parametrize("sharing", ["tp_size", "fsdp_size"], ids=["all-reduce", "all-to-all"])
def test_experts_of_other_ranks_are_recorded_by_their_global_ids(
    sharing: str, tmp_path: Path
) -> None:
    """transformers' own expert parallelism, two ranks, each with half the experts."""
    from transformers.distributed import DistributedConfig

    if "ep_size" not in DistributedConfig.__dataclass_fields__:
        pytest.skip("this release of transformers hands over local ids, and is refused")
    build("qwen3_moe").save_pretrained(tmp_path / "model")
    run = Ranks(tmp_path, 2, ["model", sharing], code=EXPERT_PARALLEL)
    assert run.wait() == [0, 0], run.errors
    with moe_inspect.record(build("qwen3_moe"), tmp_path / "whole") as recorder, torch.no_grad():
        recorder.model(input_ids=torch.arange(2, 26).reshape(2, 12))
    whole = moe_inspect.open_trace(tmp_path / "whole").routing().filter(like="expert_")
    for rank in (0, 1):
        trace = moe_inspect.open_trace(tmp_path / f"{sharing}-{rank}")
        assert [r.experts for r in trace.routers] == [8, 8]
        assert trace.routing().filter(like="expert_").equals(whole)
