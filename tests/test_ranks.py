"""Several processes of a torchrun share a corpus and write one trace; or they train one model, and logs
and history hold the sums of all."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import moe_inspect
from tests.conftest import Cli
from tests.support.damage import edit_manifest
from tests.support.families import build
from tests.support.ranks import Ranks
from tests.support.sweep import WHOLE
from tests.support.watched import waited
from tests.test_training import history


def traced(path: Path, ranks: int, *arguments: str) -> Ranks:
    """`trace` of the demo into `t`, without torchrun."""
    return Ranks(path, ranks, ["trace", "demo", "-o", "t", *arguments])


def rows(trace: moe_inspect.Trace) -> pd.DataFrame:
    facts = trace.tokens().drop(columns="phase")
    found = trace.routing().merge(facts, on="token").drop(columns="token")
    return found.sort_values(["router", "sequence", "position"]).reset_index(drop=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> moe_inspect.Trace:
    return moe_inspect.trace_model("demo", tmp_path_factory.mktemp("alone") / "t", batch_tokens=500)


def by_torchrun(path: Path) -> None:
    run = "-m torch.distributed.run --nproc-per-node 2 --standalone -m moe_inspect trace demo -o t"
    command = [sys.executable, *run.split(), "--batch-tokens", "500"]
    done = subprocess.run(command, cwd=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("9,254 tokens × 4 routers") == 1  # one of them speaks


def by_itself(path: Path) -> None:
    run = traced(path, 2, "--batch-tokens", "500")
    assert run.wait() == [0, 0], run.errors
    assert run.errors.count("9,254 tokens × 4 routers") == 1


@pytest.mark.parametrize("start", [by_itself, by_torchrun] if WHOLE else [by_itself])
def test_two_ranks_write_the_rows_of_one(
    start: Callable[[Path], None], alone: moe_inspect.Trace, tmp_path: Path
) -> None:
    """Also when one of them lacks what it wrote, and it is resumed."""
    start(tmp_path)
    check_equal(tmp_path / "t", alone)
    tokens = moe_inspect.open_trace(tmp_path / "t").tokens().token
    assert tokens.is_unique
    assert (tokens >= 2**40).any()
    (tmp_path / "t" / "shards-1.jsonl").write_text("")
    nothing = {"tokens": 0, "decisions": 0, "dropped": 0}
    edit_manifest(tmp_path / "t", status="interrupted", counts=nothing)
    assert traced(tmp_path, 2, "--batch-tokens", "500", "--resume").wait() == [0, 0]
    check_equal(tmp_path / "t", alone)


def check_equal(path: Path, alone: moe_inspect.Trace) -> None:
    trace = moe_inspect.open_trace(path)
    assert trace.status == "complete"
    assert trace.manifest["counts"] == alone.manifest["counts"]
    assert rows(trace).equals(rows(alone))
    a, b = (t.documents().set_index("document").sort_index() for t in (trace, alone))
    assert a.equals(b)


def test_more_ranks_than_batches(tmp_path: Path) -> None:
    run = traced(tmp_path, 3, "--max-tokens", "300")
    assert run.wait() == [0] * 3, run.errors
    trace = moe_inspect.open_trace(tmp_path / "t")
    assert (trace.status, trace.n_tokens) == ("complete", 300)


def test_killed_and_resumed_it_ends_with_the_same_rows(tmp_path: Path) -> None:
    slow, manifest = tmp_path / "long.txt", tmp_path / "t" / "trace.json"
    slow.write_text("the quick brown fox jumps over the lazy dog and then some. " * 2000)
    arguments = ("--batch-tokens", "500", "--data", f"a={slow}", "--max-length", "100")
    run = traced(tmp_path, 2, *arguments)
    waited(manifest.exists, most_s=120)
    run.signal(signal.SIGTERM)
    assert 0 not in run.wait()
    assert json.loads(manifest.read_text())["status"] in ("interrupted", "recording")
    run = traced(tmp_path, 2, *arguments, "--resume")
    assert run.wait() == [0, 0], run.errors
    options = {"batch_tokens": 500, "data": [f"a={slow}"], "max_length": 100}
    whole = moe_inspect.trace_model("demo", tmp_path / "whole", **options)
    trace = moe_inspect.open_trace(tmp_path / "t")
    assert trace.status == "complete"
    assert rows(trace).equals(rows(whole))
    # other ranks would plan otherwise
    run = traced(tmp_path, 3, *arguments, "--resume")
    assert run.wait() == [1] * 3
    assert "was made with ranks 2, not 3" in run.errors


def test_all_end_where_the_first_refuses(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "mine.txt").write_text("")
    run = traced(tmp_path, 2)
    assert run.wait() == [1, 1]
    assert "there is something at t" in run.errors
    assert [p.name for p in (tmp_path / "t").iterdir()] == ["mine.txt"]


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


SHARING = ["tp_size", "fsdp_size"]  # by an all-reduce, and all to all


@pytest.mark.parametrize("sharing", SHARING if WHOLE else SHARING[1:])
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


# --- training

LOOP = """
import json, sys, torch
import torch.distributed as dist
from pathlib import Path
from torch.nn.parallel import DistributedDataParallel
from moe_inspect.training import RoutingMonitor
from tests.test_training import batch
from tests.support.trained import counted
out, kind = Path(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo")
rank = dist.get_rank()
inner = counted().train()
inner.gradient_checkpointing_enable()
if kind == "ddp":
    model = DistributedDataParallel(inner, find_unused_parameters=True)
else:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh("cpu", (2,))
    for layer in inner.model.layers:
        fully_shard(layer, mesh=mesh)
    model = fully_shard(inner, mesh=mesh)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
logs, reduced = [], 0
with RoutingMonitor(model, out / "h", log_steps=2) as monitor:
    for step in range(4):
        for micro in range(2):
            inputs = batch(1000 * rank + 2 * step + micro)
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.profiler.profile() as profile:
            logs.append(monitor.step())
        reduced += sum(e.name == "c10d::allreduce_" for e in profile.events())
facts = {"load": inner.load.tolist(), "logs": logs, "reduced": reduced}
(out / f"rank-{rank}.json").write_text(json.dumps(facts))
dist.destroy_process_group()
"""

TRAINER = """
import json, sys, torch
import torch.distributed as dist
from pathlib import Path
from moe_inspect.training import RoutingCallback
from tests.test_training_trainer import trainer
out = Path(sys.argv[1])
it = trainer(out, RoutingCallback(out / "h"), gradient_accumulation_steps=2, max_steps=4,
             ddp_find_unused_parameters=True, gradient_checkpointing=True,
             gradient_checkpointing_kwargs={"use_reentrant": False})
it.train()
logs = [{k: v for k, v in row.items() if k.startswith("routing/")}
        for row in it.state.log_history if "loss" in row]
facts = {"load": it.accelerator.unwrap_model(it.model).load.tolist(), "logs": logs, "reduced": 2}
(out / f"rank-{dist.get_rank()}.json").write_text(json.dumps(facts))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("kind", ["trainer", "fsdp", "ddp"] if WHOLE else ["trainer", "fsdp"])
def test_two_ranks_log_and_write_the_sum(tmp_path: Path, kind: str) -> None:
    run = Ranks(tmp_path, 2, [tmp_path, kind], code=TRAINER if kind == "trainer" else LOOP)
    assert run.wait() == [0, 0], run.errors[-3000:]
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    loads = [np.array(rank["load"]) for rank in ranks]
    assert not (loads[0] == loads[1]).all()  # control: they saw different batches
    assert (history(tmp_path / "h") == loads[0] + loads[1]).all()
    logs = [[row for row in rank["logs"] if row] for rank in ranks]
    assert len(logs[0]) == 2
    for row, other in zip(*logs, strict=True):
        for name, value in row.items():
            assert value == pytest.approx(other[name], nan_ok=True)
    assert ranks[0]["reduced"] == 2  # one all-reduce per log
    assert moe_inspect.check(tmp_path / "h", quick=True).ok
