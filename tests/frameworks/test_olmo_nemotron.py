"""OLMo-core's second router, MoERouterV2, in its Nemotron blocks: the only ones with it that run on
a CPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("olmo_core", reason="make test-frameworks installs it")

from olmo_core.config import DType
from olmo_core.nn.attention import AttentionBackendName
from olmo_core.nn.moe.v2.nemotron import NemotronMoE, build_nemotron3_nano_config
from torch import Tensor, nn

from tests.frameworks.conftest import Check
from tests.frameworks.truth import Watch, assert_listed, compare, recorded, token_ids

EXPERTS, MOE_LAYERS = 8, [1, 3]
B, S = 3, 16


def build() -> nn.Module:
    config = build_nemotron3_nano_config(
        vocab_size=512,
        d_model=64,
        n_layers=4,
        layers_block_type=("attention", "moe", "attention", "moe"),
        num_attention_heads=4,
        num_key_value_heads=4,
        attention_head_dim=16,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        n_group=4,
        topk_group=2,
        dtype=DType.float32,
        attention_backend=AttentionBackendName.torch,
    )
    model = config.build(init_device="cpu")
    model.init_weights(device=torch.device("cpu"))
    for layer in MOE_LAYERS:
        moe = block(model, layer)
        moe.routed_experts_router.score_bias.copy_(torch.linspace(-0.1, 0.1, EXPERTS).roll(layer))
    return model


def block(model: Any, layer: int) -> NemotronMoE:
    found = model.blocks[str(layer)].attention
    assert isinstance(found, NemotronMoE)
    return found


def watch(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Watch:
    """An expert is a product with its part of the weights."""
    found, linear = Watch(), nn.functional.linear
    expert_of = {
        weight.data_ptr(): (layer, e)
        for layer in MOE_LAYERS
        for e, weight in enumerate(block(model, layer).routed_experts.w_up_gate)
    }

    def watched(rows_RD: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        layer, expert = expert_of.get(weight.data_ptr(), (-1, -1))
        if layer >= 0 and (at := found.at(layer)) is not None:
            at.rows.append((expert, rows_RD.detach().clone(), None))
        return linear(rows_RD, weight, *bias)

    monkeypatch.setattr(nn.functional, "linear", watched)
    for layer in MOE_LAYERS:
        found.block(block(model, layer), layer)
        found.shared(block(model, layer).shared_experts, layer)
    return found


def run_expert(model: nn.Module, layer: int, expert: int, rows_RD: Tensor) -> Tensor:
    experts = block(model, layer).routed_experts
    hidden = torch.relu(rows_RD @ experts.w_up_gate[expert].T).square()
    return hidden @ experts.w_down[expert]


def test_training_steps(tmp_path: Path, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build().train()
    ids_BS, watched = token_ids(), watch(model, monkeypatch)
    loss = lambda: model(ids_BS, labels=ids_BS.roll(-1, 1)).loss  # noqa: E731
    trace = recorded(model, watched, tmp_path / "t", loss, steps=1)
    found = compare(trace, watched.passes, ids_BS, run=partial(run_expert, model))
    run = "Nemotron blocks (MoERouterV2), training step"
    check("ai2-olmo-core", run, found, len(MOE_LAYERS) * B * S)
    assert_listed(trace, MOE_LAYERS, 2, "sigmoid")
