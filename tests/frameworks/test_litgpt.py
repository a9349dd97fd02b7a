"""litgpt's LLaMAMoE: with a linear gate, whose choice no module shows, and a grouped router."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("litgpt", reason="make test-frameworks installs it")

from litgpt import model as litgpt_model
from litgpt.config import Config
from litgpt.model import GPT, Block, LLaMAMoE
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)

import moe_inspect
from tests.frameworks.conftest import Check
from tests.frameworks.truth import Watch, assert_listed, by_layer, compare, recorded, token_ids

EXPERTS, LAYERS = 8, 4
B, S = 3, 16
GROUPED: dict[str, Any] = {
    "n_expert_groups": 4,
    "n_topk_groups": 2,
    "n_topk_scores_per_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "n_shared_expert": 1,
    "first_k_dense_replace": 1,
}


def build(**options: Any) -> GPT:
    torch.manual_seed(0)
    config = Config(
        block_size=64,
        vocab_size=512,
        padded_vocab_size=512,
        n_layer=LAYERS,
        n_head=4,
        n_embd=64,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMoE",
        intermediate_size=128,
        moe_intermediate_size=32,
        n_expert=EXPERTS,
        n_expert_per_token=2,
        **options,
    )
    model = GPT(config)
    for layer, block in by_layer(model, LLaMAMoE).items():
        if config.n_expert_groups:
            nn.init.normal_(block.gate.weight, std=0.1)
            bias = torch.linspace(-0.1, 0.1, EXPERTS).roll(layer)
            block.gate.e_score_correction_bias.copy_(bias)
    return model


def watch(model: nn.Module) -> Watch:
    found = Watch()
    for layer, block in by_layer(model, LLaMAMoE).items():
        found.block(block, layer)
        found.experts(block.experts, layer)
        if block.config.n_shared_expert:
            found.shared(block.shared_experts, layer)
    return found


def test_the_grouped_router(tmp_path: Path, check: Check) -> None:
    model, ids_BS = build(**GROUPED).eval(), token_ids()
    watched = watch(model)
    trace = recorded(model, watched, tmp_path / "t", lambda: model(ids_BS))
    blocks = by_layer(model, LLaMAMoE)
    run = lambda layer, expert, rows: blocks[layer].experts[expert].forward(rows)  # noqa: E731
    found = compare(trace, watched.passes, ids_BS, run=run)
    check("litgpt", "grouped router, forward", found, 3 * B * S)
    assert_listed(trace, [1, 2, 3], 2, "sigmoid")


def check_training(
    check: Check, run: str, model: nn.Module, path: Path, layers: int = LAYERS, **options: Any
) -> None:
    """Two training steps, with checkpointing as Lightning's strategies do it."""
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    watched, ids_BS = watch(model), token_ids()
    trace = recorded(model, watched, path, lambda: model(ids_BS).sum(), 2, **options)
    found = compare(trace, watched.passes, ids_BS)
    check("litgpt", f"{run}, 2 training steps, checkpointed", found, 2 * layers * B * S)


def test_the_grouped_router_in_training(tmp_path: Path, check: Check) -> None:
    check_training(check, "grouped router", build(**GROUPED).train(), tmp_path / "t", layers=3)


def test_a_linear_gate_by_a_router_spec(tmp_path: Path, check: Check) -> None:
    model = build().train()

    def choice(
        gate: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], logits_TE: Tensor
    ) -> tuple[Tensor, Tensor]:
        values_TK, ids_TK = logits_TE.topk(model.config.n_expert_per_token)
        return ids_TK, values_TK.softmax(dim=1)

    spec = moe_inspect.RouterSpec(module="**.mlp.gate", choice=choice, experts=EXPERTS)
    check_training(check, "linear gate by RouterSpec", model, tmp_path / "t", routers=[spec])


def test_a_linear_gate_by_a_probe(
    tmp_path: Path, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line that a user adds to LLaMAMoE.forward."""
    code = textwrap.dedent(inspect.getsource(LLaMAMoE.forward))
    line = "    masks = indices.unsqueeze(-1)"
    assert code.count(line) == 1
    probe = "    moe_inspect.probe(indices, probs, layer=self.layer, experts=len(self.experts))\n"
    made: dict[str, Any] = {}
    names = {**vars(litgpt_model), "moe_inspect": moe_inspect}
    exec(compile(code.replace(line, probe + line), "<probed>", "exec"), names, made)
    monkeypatch.setattr(LLaMAMoE, "forward", made["forward"])
    model = build().train()
    for layer, block in by_layer(model, LLaMAMoE).items():
        block.layer = layer
    check_training(check, "linear gate by probe", model, tmp_path / "t")
