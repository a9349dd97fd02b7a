"""DeepSeek's own modelling code. It is read from a folder that holds configuration_deepseek.py and
modeling_deepseek.py, of the repository deepseek-ai/ESFT: DEEPSEEK_CODE=path/to/ESFT/deepseek."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_inspect
from tests.frameworks.conftest import Check
from tests.frameworks.truth import SIZES, Watch, compare

CODE = os.environ.get("DEEPSEEK_CODE", "")
pytestmark = pytest.mark.skipif(
    not CODE, reason="DEEPSEEK_CODE names no folder with modeling_deepseek.py (deepseek-ai/ESFT)"
)
EXPERTS, LAYERS = 8, 4
B, S = 3, 16
DECISIONS = (LAYERS - 1) * B * S  # the first layer is dense


def causal_mask(
    mask_BS: Tensor | None, shape: tuple[int, int], embeds: Tensor, past: int, **_: Any
) -> Tensor:
    B, S = shape
    masked = torch.ones(S, S, dtype=torch.bool).triu(1).expand(B, 1, S, S)
    if mask_BS is not None:
        masked = masked | (mask_BS[:, None, None] == 0)
    return torch.zeros(B, 1, S, S).masked_fill(masked, torch.finfo(embeds.dtype).min)


@pytest.fixture(scope="module")
def code() -> Any:
    """The module, with what it imports from transformers 4 and transformers 5 has no more."""
    import transformers.pytorch_utils
    import transformers.utils.import_utils

    patch = pytest.MonkeyPatch()
    utils = transformers.utils.import_utils
    patch.setattr(utils, "is_torch_fx_available", lambda: False, raising=False)
    name = "is_torch_greater_or_equal_than_1_13"
    patch.setattr(transformers.pytorch_utils, name, True, raising=False)
    masks: Any = types.ModuleType("transformers.modeling_attn_mask_utils")
    masks.AttentionMaskConverter = masks._prepare_4d_attention_mask = None
    masks._prepare_4d_causal_attention_mask = causal_mask
    patch.setitem(sys.modules, masks.__name__, masks)
    package: Any = types.ModuleType("deepseek_code")
    package.__path__ = [CODE]
    patch.setitem(sys.modules, package.__name__, package)
    yield importlib.import_module("deepseek_code.modeling_deepseek")
    for name in [name for name in sys.modules if name.startswith("deepseek_code")]:
        del sys.modules[name]
    patch.undo()


def build(code: Any) -> nn.Module:
    torch.manual_seed(0)
    config = code.DeepseekV2Config(
        **SIZES,
        num_hidden_layers=LAYERS,
        num_key_value_heads=4,
        n_shared_experts=1,
        n_routed_experts=EXPERTS,
        first_k_dense_replace=1,
        moe_layer_freq=1,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        norm_topk_prob=False,
        routed_scaling_factor=2.5,
        scoring_func="softmax",
        aux_loss_alpha=0.001,
        seq_aux=True,
        q_lora_rank=None,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
        attention_dropout=0.0,
        bos_token_id=0,
        eos_token_id=1,
    )
    config._attn_implementation, config.rope_scaling, config.pretraining_tp = "eager", None, 1
    model = code.DeepseekV2ForCausalLM(config)
    for parameter in model.parameters():  # some are left as they were allocated
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.05)
    return model


def inputs() -> tuple[Tensor, Tensor]:
    """Token ids and a mask, 0 for padding, [B, S] each."""
    ids_BS = torch.randint(0, 512, (B, S), generator=torch.Generator().manual_seed(7))
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[1, 12:] = 0
    return ids_BS, mask_BS


def blocks(model: nn.Module) -> dict[int, Any]:
    """Layer → MoE block."""
    found = {path: m for path, m in model.named_modules() if type(m).__name__ == "DeepseekV2MoE"}
    return {int(path.split("layers.")[1].split(".")[0]): m for path, m in found.items()}


def watch(model: nn.Module) -> Watch:
    found = Watch()
    for layer, block in blocks(model).items():
        found.block(block, layer)
        found.experts(block.experts, layer)
        found.shared(block.shared_experts, layer)
    return found


def test_a_forward_pass(code: Any, tmp_path: Path, check: Check) -> None:
    model, (ids_BS, mask_BS) = build(code).eval(), inputs()
    watched = watch(model)
    with moe_inspect.record(model, tmp_path / "t"), torch.no_grad(), watched.forward():
        model(ids_BS, attention_mask=mask_BS, use_cache=False)
    trace = moe_inspect.open_trace(tmp_path / "t")
    experts = {layer: block.experts for layer, block in blocks(model).items()}
    found = compare(
        trace,
        watched.passes,
        ids_BS,
        real_BS=mask_BS.bool(),
        run=lambda layer, expert, rows: experts[layer][expert].forward(rows),
    )
    check("DeepSeek", "DeepseekV2ForCausalLM, forward, padding", found, DECISIONS - 3 * 4)
    listed = trace.routers[0]
    assert [r.layer for r in trace.routers] == [1, 2, 3]
    assert (listed.experts, listed.top_k, listed.shared_experts) == (EXPERTS, 3, 1)
    assert listed.scoring == "softmax"


@pytest.mark.parametrize("checkpointed", [False, True])
def test_training_steps(code: Any, checkpointed: bool, tmp_path: Path, check: Check) -> None:
    model, (ids_BS, _) = build(code).train(), inputs()
    if checkpointed:
        model.gradient_checkpointing_enable()
    watched, optimizer = watch(model), torch.optim.SGD(model.parameters(), lr=0.1)
    with moe_inspect.record(model, tmp_path / "t"):
        for _ in range(2):
            with watched.forward():
                out = model(ids_BS, use_cache=False)
            out.logits.sum().backward()
            optimizer.step()
    found = compare(moe_inspect.open_trace(tmp_path / "t"), watched.passes, ids_BS)
    run = "DeepseekV2ForCausalLM, 2 training steps" + ", checkpointed" * checkpointed
    check("DeepSeek", run, found, 2 * DECISIONS)
