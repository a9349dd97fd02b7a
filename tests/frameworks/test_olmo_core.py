"""OLMo-core's MoETransformer: dropless, and the default that drops by capacity."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("olmo_core", reason="make test-frameworks installs it")

from olmo_core.nn.moe.router import MoERouterConfig, MoERouterGatingFunction
from olmo_core.nn.transformer.config import TransformerActivationCheckpointingMode

import moe_inspect
from tests.frameworks import ranks
from tests.frameworks.conftest import Check
from tests.frameworks.olmo_core_models import (
    LAYERS,
    B,
    S,
    blocks,
    build,
    inputs,
    on_a_cpu,
    routers,
    run_expert,
    train_on_rank,
    watch,
)
from tests.frameworks.truth import compare

DECISIONS = LAYERS * B * S
SIGMOID = MoERouterConfig(
    top_k=2,
    gating_function=MoERouterGatingFunction.sigmoid,
    normalize_expert_weights=1.0,
    bias_gamma=1e-3,
)
MODELS: dict[str, dict[str, Any]] = {
    "dropless, softmax": {"dropless": True},
    "dropless, sigmoid, selection bias": {"dropless": True, "router": SIGMOID},
    "capacity 8, softmax": {"dropless": False, "capacity_factor": 8.0},
}
CHECKPOINTED: dict[str, list[str]] = {
    "attention": ["blocks.*.attention"],
    "router": ["blocks.*.feed_forward_moe.router"],
}


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_cpu(monkeypatch.setattr)


@pytest.mark.parametrize("name", MODELS)
def test_training_steps(name: str, tmp_path: Path, check: Check) -> None:
    model, ids_BS = build(**MODELS[name]).train(), inputs()
    watched, optimizer = watch(model), torch.optim.SGD(model.parameters(), lr=0.1)
    with moe_inspect.record(model, tmp_path / "t"):
        for _ in range(2):
            with watched.forward():
                out = model(ids_BS, labels=ids_BS.roll(-1, 1))
            out.loss.backward()
            optimizer.step()
    trace = moe_inspect.open_trace(tmp_path / "t")
    found = compare(trace, watched.passes, ids_BS)
    check("ai2-olmo-core", f"{name}, 2 training steps", found, 2 * DECISIONS)
    listed = trace.routers[0]
    assert (listed.experts, listed.top_k, listed.shared_experts) == (8, 2, 1)
    assert listed.scoring == name.split(", ")[1]
    for layer, router in routers(model).items():
        rows = trace.routing(layer=layer).filter(regex="^expert_").to_numpy().astype("int64")
        counts_E = torch.bincount(torch.tensor(rows.flatten()), minlength=8)
        assert torch.equal(counts_E, router.batch_size_per_expert.long())


def test_a_forward_pass_and_its_weights(tmp_path: Path, check: Check) -> None:
    model, ids_BS = build(dropless=True).eval(), inputs()
    watched = watch(model)
    with moe_inspect.record(model, tmp_path / "t"), torch.no_grad(), watched.forward():
        model(ids_BS)
    trace = moe_inspect.open_trace(tmp_path / "t")
    found = compare(trace, watched.passes, ids_BS, run=partial(run_expert, model))
    check("ai2-olmo-core", "dropless, forward", found, DECISIONS)


@pytest.mark.parametrize("part", CHECKPOINTED)
def test_checkpointing(part: str, tmp_path: Path, check: Check) -> None:
    """OLMo-core refuses to checkpoint a whole MoE block."""
    model, ids_BS = build(dropless=True).train(), inputs()
    mode = TransformerActivationCheckpointingMode.selected_modules
    model.apply_activation_checkpointing(mode, modules=CHECKPOINTED[part])
    watched = watch(model)
    with moe_inspect.record(model, tmp_path / "t"):
        with watched.forward():
            out = model(ids_BS, labels=ids_BS.roll(-1, 1))
        out.loss.backward()
    found = compare(moe_inspect.open_trace(tmp_path / "t"), watched.passes, ids_BS)
    check("ai2-olmo-core", f"dropless, training step, {part} checkpointed", found, DECISIONS)


def test_documents_of_doc_lens(tmp_path: Path, check: Check) -> None:
    model, ids_BS = build(dropless=True).eval(), inputs()
    doc_lens = torch.tensor([[6, 10]] * B)
    watched = watch(model)
    with moe_inspect.record(model, tmp_path / "t"), torch.no_grad(), watched.forward():
        model(ids_BS, doc_lens=doc_lens, max_doc_lens=[10] * B)
    trace = moe_inspect.open_trace(tmp_path / "t")
    positions_S = torch.cat([torch.arange(6), torch.arange(10)])
    found = compare(trace, watched.passes, ids_BS, positions_BS=positions_S.expand(B, S))
    check("ai2-olmo-core", "dropless, doc_lens, forward", found, DECISIONS)
    assert trace.tokens().document.nunique() == 2 * B


def test_what_capacity_drops_is_in_the_trace(tmp_path: Path) -> None:
    """The experts drop it, after the router has handed it over: a trace shows the router's
    choice."""
    model, ids_BS = build(dropless=False, capacity_factor=1.0).eval(), inputs()
    watched = watch(model)
    with moe_inspect.record(model, tmp_path / "t"), torch.no_grad(), watched.forward():
        model(ids_BS)
    trace = moe_inspect.open_trace(tmp_path / "t")
    kept = dropped = 0
    for layer, block in watched.passes[0].items():
        rows = trace.routing(layer=layer).filter(regex="^expert_").to_numpy().astype("int64")
        for chosen, routed in zip(block.chosen(), rows, strict=True):
            assert chosen.keys() <= set(routed.tolist())
            kept += len(chosen)
        capacity = blocks(model)[layer].experts.expert_capacity(B * S)
        load_E = torch.bincount(torch.tensor(rows.flatten()), minlength=8)
        dropped += int((load_E - capacity).clamp(min=0).sum())
    assert dropped > 0
    assert kept + dropped == DECISIONS * 2


@pytest.mark.parametrize("parallel", ["FSDP2", "DDP"])
def test_two_ranks(parallel: str, tmp_path: Path, check: Check) -> None:
    """Each rank has tokens of its own; ids are global whatever experts it holds."""
    ranks.run(train_on_rank, tmp_path, parallel)
    run = f"dropless, training step, 2 ranks, {parallel}"
    check("ai2-olmo-core", run, ranks.compare_all(tmp_path), ranks.WORLD * DECISIONS)
