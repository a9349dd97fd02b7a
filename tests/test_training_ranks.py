"""Several processes that train one model: logs and history hold the sums of all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import moe_inspect
from tests.support.ranks import Ranks
from tests.test_training import history

pytestmark = pytest.mark.slow

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
logs = []
reduced = 0
all_reduce = dist.all_reduce
def counting(*args, **kwargs):
    global reduced
    reduced += 1
    return all_reduce(*args, **kwargs)
with RoutingMonitor(model, out / "h", log_steps=2) as monitor:
    for step in range(4):
        for micro in range(2):
            inputs = batch(1000 * rank + 2 * step + micro)
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce = counting
        logs.append(monitor.step())
        dist.all_reduce = all_reduce
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


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "trainer"])
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
    assert moe_inspect.verify(tmp_path / "h").ok
