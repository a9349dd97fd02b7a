"""NeMo-Automodel's own Qwen3-MoE on torch's grouped products."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("nemo_automodel", reason="make test-frameworks installs it")

import nemo_automodel.components.models.qwen3_moe.model as qwen3_moe
from nemo_automodel.components.models.common import BackendConfig
from nemo_automodel.components.moe.experts import GroupedExperts
from nemo_automodel.components.moe.layers import Gate, MoE
from nemo_automodel.components.moe.parallelizer import apply_ac
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import Qwen3MoeConfig

from tests.frameworks.conftest import Check
from tests.frameworks.truth import (
    SIZES,
    Watch,
    assert_listed,
    by_layer,
    compare,
    recorded,
    token_ids,
)

EXPERTS, LAYERS = 8, 4
B, S = 3, 16
DECISIONS = (LAYERS - 1) * B * S  # the first layer is dense
BF16 = 2**-7


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """It builds its rotary embedding on the current CUDA device."""
    rotary = qwen3_moe.RotaryEmbedding
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        qwen3_moe,
        "RotaryEmbedding",
        lambda *args, **kwargs: rotary(*args, **{**kwargs, "device": torch.device("cpu")}),
    )


def build() -> nn.Module:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **SIZES,
        num_hidden_layers=LAYERS,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=EXPERTS,
        mlp_only_layers=[0],
        norm_topk_prob=True,
        dtype=torch.bfloat16,
    )
    backend = BackendConfig(
        attn="sdpa",
        linear="torch",
        rms_norm="torch",
        experts="torch_mm",
        dispatcher="torch",
        enable_hf_state_dict_adapter=False,
        rope_fusion=False,
    )
    model = qwen3_moe.Qwen3MoeForCausalLM(config, backend=backend).to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.05)
        else:
            nn.init.ones_(parameter)
    for module in model.modules():
        if isinstance(module, Gate):
            nn.init.normal_(module.weight, std=0.5)
    return model


class Products(TorchFunctionMode):
    """The rows and the ends of the experts of each grouped product."""

    def __init__(self, seen: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = kwargs or {}
        if function is torch._grouped_mm:
            self.seen.append((args[0].detach().clone(), kwargs["offs"].clone()))
        return function(*args, **kwargs)


@pytest.fixture
def products() -> Iterator[list[tuple[Tensor, Tensor]]]:
    # not by another `torch._grouped_mm`: Dynamo would never know that of torch in this process
    seen = list[tuple[Tensor, Tensor]]()
    with Products(seen):
        yield seen


def watch(model: nn.Module, products: list[tuple[Tensor, Tensor]]) -> Watch:
    found = Watch()

    def after(_: nn.Module, args: object, output: object, layer: int) -> None:
        rows_RD, ends_E = products[0]  # the first of the two products of a layer
        found.grouped(layer, rows_RD, ends_E.diff(prepend=ends_E.new_zeros(1)))

    for layer, block in by_layer(model, MoE).items():
        found.block(block, layer)
        found.routed(block.experts, layer)
        assert isinstance(block.experts, GroupedExperts)
        block.experts.register_forward_pre_hook(lambda *_: products.clear())
        block.experts.register_forward_hook(partial(after, layer=layer))
    return found


def run_expert(model: nn.Module, layer: int, expert: int, rows_RD: Tensor) -> Tensor:
    """One expert, by the framework's own code: all rows of weight 1 to it."""
    experts, T = by_layer(model, MoE)[layer].experts, len(rows_RD)
    ids_TK = torch.full((T, 1), expert)
    weights_TK = torch.ones((T, 1), dtype=rows_RD.dtype)
    real_T = torch.ones(T, dtype=torch.bool)
    return type(experts).forward(experts, rows_RD, real_T, weights_TK, ids_TK)


@pytest.mark.parametrize("masked", [False, True])
def test_a_forward_pass(
    masked: bool, tmp_path: Path, check: Check, products: list[tuple[Tensor, Tensor]]
) -> None:
    model, ids_BS = build().eval(), token_ids()
    real_BS = torch.ones(B, S, dtype=torch.bool)
    if masked:
        real_BS[1, 12:] = False
    options = {"attention_mask": real_BS.long()} if masked else {}
    watched = watch(model, products)
    trace = recorded(model, watched, tmp_path / "t", lambda: model(ids_BS, **options))
    run = partial(run_expert, model)
    found = compare(trace, watched.passes, ids_BS, real_BS=real_BS, run=run)
    named = "Qwen3-MoE, forward" + ", padding" * masked
    check("nemo-automodel", named, found, (LAYERS - 1) * int(real_BS.sum()), BF16)
    assert_listed(trace, [1, 2, 3], 3, "softmax", shared=None)


AC: dict[str, dict[str, Any]] = {
    "checkpointed, gate kept": {"ignore_router": True},
    "checkpointed": {"ignore_router": False},
}


@pytest.mark.parametrize("kind", AC)
def test_training_steps(
    kind: str, tmp_path: Path, check: Check, products: list[tuple[Tensor, Tensor]]
) -> None:
    model, ids_BS = build().train(), token_ids()
    apply_ac(model, hidden_size=64, num_experts=EXPERTS, **AC[kind])
    watched = watch(model, products)
    loss = lambda: model(ids_BS).logits.float().logsumexp(-1).mean()  # noqa: E731
    found = compare(recorded(model, watched, tmp_path / "t", loss, 2), watched.passes, ids_BS)
    check("nemo-automodel", f"Qwen3-MoE, 2 training steps, {kind}", found, 2 * DECISIONS)
