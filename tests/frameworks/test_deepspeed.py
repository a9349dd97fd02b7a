"""DeepSpeed's MoE layer and its TopKGate, which drops by capacity."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed", reason="make test-frameworks installs it")

import torch.distributed as dist

import moe_inspect
from moe_inspect.model.custom import spec as frameworks
from tests.frameworks import ranks
from tests.frameworks.conftest import Check, free_port
from tests.frameworks.deepspeed_models import (
    EXPERTS,
    LAYERS,
    B,
    Net,
    S,
    inputs,
    start,
    train_on_rank,
    watch,
)
from tests.frameworks.truth import compare

DECISIONS = LAYERS * B * S
GATES: dict[str, dict[str, Any]] = {
    "k 1, capacity 1": {"k": 1, "min_capacity": 0},
    "k 2, capacity 1": {"k": 2, "min_capacity": 0},
    "k 3, capacity 0.5": {"k": 3, "min_capacity": 0, "capacity_factor": 0.5},
    "k 2, no drops": {"k": 2, "drop_tokens": False},
}


@pytest.fixture(autouse=True)
def process_group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    start(0, 1, free_port(), monkeypatch.setenv)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("gate", GATES)
def test_training_steps(gate: str, tmp_path: Path, check: Check) -> None:
    model, ids_BS = Net(**GATES[gate]).train(), inputs()
    watched, optimizer = watch(model), torch.optim.SGD(model.parameters(), lr=0.1)
    with moe_inspect.record(model, tmp_path / "t"):
        for _ in range(2):
            with watched.forward():
                out, loss = model(ids_BS)
            (out.sum() + loss).backward()
            optimizer.step()
    trace = moe_inspect.open_trace(tmp_path / "t")
    found = compare(trace, watched.passes, ids_BS)
    check("deepspeed", f"{gate}, 2 training steps", found, 2 * DECISIONS)
    listed = trace.routers[0]
    assert (listed.experts, listed.scoring) == (EXPERTS, "softmax")
    assert listed.top_k == GATES[gate]["k"]
    assert bool(trace.routing().filter(regex="^expert_").isna().any(axis=None)) == (
        "no drops" not in gate
    )


def test_a_forward_pass_and_its_weights(tmp_path: Path, check: Check) -> None:
    model, ids_BS = Net(k=2, eval_capacity_factor=0.5, min_capacity=0).eval(), inputs()
    watched = watch(model)
    with moe_inspect.record(model, tmp_path / "t"), torch.no_grad(), watched.forward():
        model(ids_BS)
    trace = moe_inspect.open_trace(tmp_path / "t")
    experts = [layer.deepspeed_moe.experts.deepspeed_experts for layer in model.layers]
    found = compare(
        trace,
        watched.passes,
        ids_BS,
        run=lambda layer, expert, rows: experts[layer][expert].forward(rows),
    )
    check("deepspeed", "k 2, capacity 0.5, forward", found, DECISIONS)


def test_the_form_before_0_19_says_the_same() -> None:
    gate = Net(k=2, min_capacity=0).layers[0].deepspeed_moe.gate
    rows_TD = torch.randn(B * S, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)  # the second expert is sampled
    sparse = gate(rows_TD, None, True)
    torch.manual_seed(1)
    dense = gate(rows_TD, None, False)
    ids_TK, weights_TK = frameworks.deepspeed(gate, (), {}, sparse)
    map_TE, weights_TE = frameworks.deepspeed(gate, (), {}, dense)
    assert map_TE.dtype == torch.bool
    for ids_K, weights_K, map_E, weights_E in zip(
        ids_TK, weights_TK, map_TE, weights_TE, strict=True
    ):
        kept = ids_K >= 0
        assert set(ids_K[kept].tolist()) == set(map_E.nonzero().flatten().tolist())
        assert torch.equal(weights_K[kept], weights_E[ids_K[kept].long()])


def test_two_ranks(tmp_path: Path, check: Check) -> None:
    """Each rank has tokens of its own and half of the experts; ids are global."""
    ranks.run(train_on_rank, tmp_path)
    run = "k 2, capacity 1, training step, 2 ranks, expert parallel"
    check("deepspeed", run, ranks.compare_all(tmp_path), ranks.WORLD * DECISIONS)
