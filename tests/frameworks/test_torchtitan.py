"""torchtitan's debug models: qwen3, deepseek_v3 and gpt_oss."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("torchtitan", reason="make test-frameworks installs it")

from torchtitan.components.optimizer import register_moe_load_balancing_hook
from torchtitan.distributed import activation_checkpoint

import moe_inspect
from moe_inspect.training import audit_loss
from tests.frameworks import ranks
from tests.frameworks.conftest import Check, Row
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
from tests.frameworks.truth import (
    assert_chosen_by_logits,
    assert_listed,
    compare,
    counted,
    recorded,
    text,
    token_ids,
    uneven,
)

MOE_LAYERS = {"qwen3": LAYERS, "deepseek_v3": LAYERS - 1, "gpt_oss": LAYERS}
# its grouped products are in bfloat16, which has 8 bits
BF16 = 2**-7


@pytest.mark.parametrize("name", MODELS)
def test_a_forward_pass(name: str, tmp_path: Path, check: Check) -> None:
    model, (ids_BS, positions_BS) = build(name).eval(), inputs()
    watched, call = watch(model), lambda: model(ids_BS, positions_BS)
    trace = recorded(model, watched, tmp_path / "t", call, logits=True)
    fed = {"positions_BS": positions_BS, "run": partial(run_expert, model)}
    found = compare(trace, watched.passes, ids_BS, **fed)
    check("torchtitan", f"{name}, forward", found, MOE_LAYERS[name] * B * S, BF16)
    assert trace.tokens().document.nunique() == B + 1  # the second row holds two
    if name == "qwen3":  # of which no bias changes the choice
        assert_chosen_by_logits(trace)
    moe = next(iter(blocks(model).values())).router
    shared, layers = int(name == "deepseek_v3"), list(blocks(model))
    assert_listed(trace, layers, moe.top_k, moe.score_func, shared, moe.num_experts)


@pytest.mark.parametrize("checkpointing", [None, "FullAC", "SelectiveAC"])
@pytest.mark.parametrize("name", MODELS)
def test_training_steps(name: str, checkpointing: str | None, tmp_path: Path, check: Check) -> None:
    model, (ids_BS, positions_BS) = build(name).train(), inputs()
    if checkpointing:
        kind = getattr(activation_checkpoint, checkpointing)
        kind(kind.Config()).apply(model)
    watched, loads = watch(model), {}

    def loss() -> torch.Tensor:
        out = model(ids_BS, positions_BS)
        if not loads:  # a recomputation counts again
            loads.update({n: moe.tokens_per_expert_E.long() for n, moe in blocks(model).items()})
        return torch.nn.functional.cross_entropy(out.flatten(0, 1), ids_BS.flatten())

    trace = recorded(model, watched, tmp_path / "t", loss, steps=2)
    found = compare(trace, watched.passes, ids_BS, positions_BS=positions_BS)
    run = f"{name}, 2 training steps" + f", {checkpointing}" * bool(checkpointing)
    check("torchtitan", run, found, 2 * MOE_LAYERS[name] * B * S)
    tokens = trace.tokens()
    first = tokens.token[tokens.batch == 0]
    for layer, counts_E in loads.items():
        assert torch.equal(counted(trace, layer, len(counts_E), first), counts_E)


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
    found = ranks.run(train_on_rank, tmp_path, parallel)
    run = f"deepseek_v3, training step, 2 ranks, {parallel}"
    check("torchtitan", run, found, ranks.WORLD * MOE_LAYERS["deepseek_v3"] * B * S)


# --- the balancing of torchtitan, by audit_loss


@pytest.mark.parametrize("rate", [1e-3, -1e-3])
@pytest.mark.parametrize("name", MODELS)
def test_the_update_of_the_selection_bias(name: str, rate: float, audit_row: Row) -> None:
    """There is no balancing loss. The update is a hook before a step of the optimizer."""
    model = uneven(build(name).train())
    for moe in blocks(model).values():
        moe.load_balance_coeff = rate
    alone: Any = SimpleNamespace(ep_enabled=False, tp=1, get_optional_mesh=lambda _: None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    register_moe_load_balancing_hook(optimizer, [model], alone)
    ids_BS = token_ids(most=2048, B=6, S=24)
    given = (ids_BS, torch.arange(24).expand(6, 24).clone())
    audit = audit_loss(model, given, update=optimizer.step)
    assert "The model reports no balancing loss" in text(audit, "loss_none")
    assert "steers the choice, and no gate weight" in text(audit, "loss_bias")
    (found,) = [f for f in audit.findings if f.kind == "loss_bias_update"]
    assert ("its sign is wrong" in found.text) == (rate < 0)
    if rate > 0:
        # of each layer the mean of the steps, which are ± the rate, is taken from all of them
        low, high = found.values["low"], found.values["high"]
        assert 0 < low < 1.001 * rate < 1.002 * high < 2 * rate
        assert (high > 1.1 * rate) == (name != "deepseek_v3")  # half of its experts are idle
        audit_row("torchtitan", f"{name}: selection bias alone", audit)
