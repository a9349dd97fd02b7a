"""Megatron-Core's GPTModel on one process: its kinds of routers, drops, padding, recomputation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core", reason="make test-frameworks installs it")

import torch.distributed as dist

import moe_inspect
from moe_inspect.model.custom import spec as frameworks
from tests.frameworks import ranks
from tests.frameworks.conftest import Check, free_port
from tests.frameworks.megatron_models import (
    EXPERTS,
    MOE_LAYERS,
    B,
    S,
    blocks,
    build,
    inputs,
    pipeline_on_rank,
    sequence_parallel_on_rank,
    start,
    train_on_rank,
    watch,
    without_cuda,
)
from tests.frameworks.truth import compare

DECISIONS = len(MOE_LAYERS) * B * S
GROUPS = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_num_groups": 4,
    "moe_router_group_topk": 2,
}
DROPPED = {"moe_expert_capacity_factor": 0.5}
PADDED = {"moe_token_drop_policy": "position", "moe_pad_expert_input_to_capacity": True}
SINKHORN = {"moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": 0.0}
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax after top-k": {},
    "softmax before top-k": {"moe_router_pre_softmax": True},
    "sigmoid, groups, selection bias": GROUPS,
    "sinkhorn": SINKHORN,
    "capacity 0.5, drops the least probable": DROPPED,
    "capacity 0.5, drops the last, padded to capacity": DROPPED | PADDED,
}
RECOMPUTED: dict[str, dict[str, Any]] = {
    "recompute full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "recompute moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
}


@pytest.fixture(autouse=True)
def process_groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    without_cuda(monkeypatch.setattr)
    start(port=free_port())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("router", ROUTERS)
def test_a_training_step(router: str, tmp_path: Path, check: Check) -> None:
    model, (ids_BS, positions_BS, mask) = build(**ROUTERS[router]).train(), inputs()
    watched = watch(model)
    with moe_inspect.record(model, tmp_path / "t"):
        with watched.forward():
            out = model(ids_BS, positions_BS, mask)
        out.sum().backward()
    trace = moe_inspect.open_trace(tmp_path / "t")
    found = compare(trace, watched.passes, ids_BS)
    check("megatron-core", f"GPTModel, {router}, training step", found, DECISIONS)
    listed = trace.routers[0]
    assert [r.layer for r in trace.routers] == MOE_LAYERS
    assert (listed.experts, listed.top_k, listed.shared_experts) == (EXPERTS, 2, 1)
    assert listed.scoring == router.split(",")[0].split(" ")[0].replace("capacity", "softmax")
    slots = trace.routing(layer=1).filter(regex="^expert_").isna().to_numpy()
    assert bool(slots.any()) == ("capacity" in router)


@pytest.mark.parametrize("recompute", RECOMPUTED)
def test_recomputation(recompute: str, tmp_path: Path, check: Check) -> None:
    model, (ids_BS, positions_BS, mask) = build(**GROUPS, **RECOMPUTED[recompute]).train(), inputs()
    watched, optimizer = watch(model), torch.optim.SGD(model.parameters(), lr=0.1)
    with moe_inspect.record(model, tmp_path / "t"):
        for _ in range(2):
            with watched.forward():
                out = model(ids_BS, positions_BS, mask)
            out.sum().backward()
            optimizer.step()
    trace = moe_inspect.open_trace(tmp_path / "t")
    found = compare(trace, watched.passes, ids_BS)
    check("megatron-core", f"GPTModel, 2 training steps, {recompute}", found, 2 * DECISIONS)
    for layer, block in blocks(model).items():  # it does not count in a first pass without gradient
        rows = trace.routing(layer=layer).filter(regex="^expert_").to_numpy().astype("int64")
        counts_E = torch.bincount(torch.tensor(rows.flatten()), minlength=EXPERTS)
        assert torch.equal(counts_E, block.router.local_tokens_per_expert.long())


def test_padding_is_left_out(tmp_path: Path, check: Check) -> None:
    model, (ids_BS, positions_BS, mask) = build().train(), inputs()
    padding_BS = torch.zeros(B, S, dtype=torch.bool)
    padding_BS[1, 10:] = True
    watched = watch(model)
    with moe_inspect.record(model, tmp_path / "t"), watched.forward():
        model(ids_BS, positions_BS, mask, padding_mask=padding_BS)
    trace = moe_inspect.open_trace(tmp_path / "t")
    found = compare(trace, watched.passes, ids_BS, real_BS=~padding_BS)
    check("megatron-core", "GPTModel, padding_mask, forward", found, len(MOE_LAYERS) * (B * S - 6))


def test_rows_taken_as_batch_first_are_found_out(tmp_path: Path) -> None:
    """Control: the comparison sees decisions that stand at other tokens."""
    model, (ids_BS, positions_BS, mask) = build().eval(), inputs()
    watched = watch(model)
    (spec,) = [
        spec
        for spec in frameworks.SPECS
        if spec.module == "megatron.core.transformer.moe.router.TopKRouter"
    ]
    wrong = dataclasses.replace(spec, order="bs")
    recording = moe_inspect.record(model, tmp_path / "t", routers=[wrong])
    with recording, torch.no_grad(), watched.forward():
        model(ids_BS, positions_BS, mask)
    found = compare(moe_inspect.open_trace(tmp_path / "t"), watched.passes, ids_BS)
    assert found.total == DECISIONS
    assert found.equal < DECISIONS / 2


@pytest.mark.parametrize("parallel", ["data parallel", "expert parallel"])
def test_two_ranks(parallel: str, tmp_path: Path, check: Check) -> None:
    """Each rank has tokens of its own; ids are global whatever experts it holds."""
    ranks.run(train_on_rank, tmp_path, parallel)
    run = f"GPTModel, training step, 2 ranks, {parallel}"
    check("megatron-core", run, ranks.compare_all(tmp_path), ranks.WORLD * DECISIONS)


def test_sequence_parallelism(tmp_path: Path, check: Check) -> None:
    """The router of each rank sees its part of the positions."""
    ranks.run(sequence_parallel_on_rank, tmp_path)
    run = "GPTModel, forward, 2 ranks, tensor, sequence and expert parallel"
    check("megatron-core", run, ranks.compare_all(tmp_path), DECISIONS)


def test_pipeline_stages(tmp_path: Path, check: Check) -> None:
    """Each rank records its layers, by their numbers in the whole model; the second sees no token
    ids."""
    ranks.run(pipeline_on_rank, tmp_path)
    run = "GPTModel, forward, 2 ranks, pipeline stages"
    check("megatron-core", run, ranks.compare_all(tmp_path), DECISIONS)
