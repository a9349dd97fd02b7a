"""torchtitan's debug models: qwen3, deepseek_v3 and gpt_oss."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchtitan", reason="make test-frameworks installs it")

from torchtitan.distributed import activation_checkpoint

import moe_inspect
from tests.frameworks import ranks
from tests.frameworks.conftest import Check
from tests.frameworks.torchtitan_models import (
    LAYERS,
    MODELS,
    B,
    S,
    blocks,
    build,
    inputs,
    run_expert,
    train_on_rank,
    watch,
)
from tests.frameworks.truth import compare

MOE_LAYERS = {"qwen3": LAYERS, "deepseek_v3": LAYERS - 1, "gpt_oss": LAYERS}
# its grouped products are in bfloat16, which has 8 bits
BF16 = 2**-7


@pytest.mark.parametrize("name", MODELS)
def test_a_forward_pass(name: str, tmp_path: Path, check: Check) -> None:
    model, (ids_BS, positions_BS) = build(name).eval(), inputs()
    watched = watch(model)
    with moe_inspect.record(model, tmp_path / "t"), torch.no_grad(), watched.forward():
        model(ids_BS, positions_BS)
    trace = moe_inspect.open_trace(tmp_path / "t")
    found = compare(
        trace,
        watched.passes,
        ids_BS,
        positions_BS=positions_BS,
        run=partial(run_expert, model),
    )
    check("torchtitan", f"{name}, forward", found, MOE_LAYERS[name] * B * S, BF16)
    assert trace.tokens().document.nunique() == B + 1  # the second row holds two
    router, moe = trace.routers[0], next(iter(blocks(model).values()))
    assert (router.experts, router.top_k) == (moe.router.num_experts, moe.router.top_k)
    assert router.scoring == moe.router.score_func
    assert router.shared_experts == (name == "deepseek_v3")


@pytest.mark.parametrize("checkpointing", [None, "FullAC", "SelectiveAC"])
@pytest.mark.parametrize("name", MODELS)
def test_training_steps(name: str, checkpointing: str | None, tmp_path: Path, check: Check) -> None:
    model, (ids_BS, positions_BS) = build(name).train(), inputs()
    if checkpointing:
        kind = getattr(activation_checkpoint, checkpointing)
        kind(kind.Config()).apply(model)
    watched, optimizer = watch(model), torch.optim.SGD(model.parameters(), lr=0.1)
    counted = {}
    with moe_inspect.record(model, tmp_path / "t"):
        for step in range(2):
            with watched.forward():
                out = model(ids_BS, positions_BS)
            if step == 0:  # a recomputation counts again
                counted = {n: moe.tokens_per_expert_E.long() for n, moe in blocks(model).items()}
            torch.nn.functional.cross_entropy(out.flatten(0, 1), ids_BS.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    trace = moe_inspect.open_trace(tmp_path / "t")
    found = compare(trace, watched.passes, ids_BS, positions_BS=positions_BS)
    run = f"{name}, 2 training steps" + f", {checkpointing}" * bool(checkpointing)
    check("torchtitan", run, found, 2 * MOE_LAYERS[name] * B * S)
    tokens = trace.tokens()
    first = tokens.token[tokens.batch == 0]
    for layer, counts_E in counted.items():
        rows = trace.routing(layer=layer).set_index("token").loc[first].filter(regex="^expert_")
        ids = torch.tensor(rows.to_numpy().astype("int64").flatten())
        assert torch.equal(torch.bincount(ids, minlength=len(counts_E)), counts_E)


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3"])
@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_compiled_blocks(name: str, tmp_path: Path, check: Check) -> None:
    """As torchtitan compiles them: each block by itself, without a graph break. The truth is that
    of an uncompiled copy."""
    model, copy, (ids_BS, positions_BS) = build(name).eval(), build(name).eval(), inputs()
    watched = watch(copy)
    for block in model.layers.values():
        block.compile(backend="eager", fullgraph=True)
    with torch.no_grad():
        model(ids_BS, positions_BS)  # compiled before it is recorded
        with moe_inspect.record(model, tmp_path / "t"):
            for _ in range(3):
                model(ids_BS, positions_BS)
                with watched.forward():
                    copy(ids_BS, positions_BS)
    trace = moe_inspect.open_trace(tmp_path / "t")
    found = compare(trace, watched.passes, ids_BS, positions_BS=positions_BS)
    run = f"{name}, 3 forward passes, blocks compiled"
    check("torchtitan", run, found, 3 * MOE_LAYERS[name] * B * S)


@pytest.mark.parametrize("parallel", ["FSDP2", "expert parallel"])
def test_two_ranks(parallel: str, tmp_path: Path, check: Check) -> None:
    """Each rank has tokens of its own; ids are global whatever experts it holds."""
    ranks.run(train_on_rank, tmp_path, parallel)
    run = f"deepseek_v3, training step, 2 ranks, {parallel}"
    check(
        "torchtitan",
        run,
        ranks.compare_all(tmp_path),
        ranks.WORLD * MOE_LAYERS["deepseek_v3"] * B * S,
    )
