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
from tests.frameworks.truth import Watch, compare

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
    for layer, block in blocks(model).items():
        if config.n_expert_groups:
            nn.init.normal_(block.gate.weight, std=0.1)
            bias = torch.linspace(-0.1, 0.1, EXPERTS).roll(layer)
            block.gate.e_score_correction_bias.copy_(bias)
    return model


def blocks(model: nn.Module) -> dict[int, LLaMAMoE]:
    """Layer → MoE block."""
    found = {path: m for path, m in model.named_modules() if isinstance(m, LLaMAMoE)}
    return {int(path.split(".h.")[1].split(".")[0]): m for path, m in found.items()}


def watch(model: nn.Module) -> Watch:
    found = Watch()
    for layer, block in blocks(model).items():
        found.block(block, layer)
        found.experts(block.experts, layer)
        if block.config.n_shared_expert:
            found.shared(block.shared_experts, layer)
    return found


def inputs() -> Tensor:
    return torch.randint(0, 512, (B, S), generator=torch.Generator().manual_seed(7))


def test_the_grouped_router(tmp_path: Path, check: Check) -> None:
    model, ids_BS = build(**GROUPED).eval(), inputs()
    watched = watch(model)
    with moe_inspect.record(model, tmp_path / "t"), torch.no_grad(), watched.forward():
        model(ids_BS)
    trace = moe_inspect.open_trace(tmp_path / "t")
    experts = {layer: block.experts for layer, block in blocks(model).items()}
    found = compare(
        trace,
        watched.passes,
        ids_BS,
        run=lambda layer, expert, rows: experts[layer][expert].forward(rows),
    )
    check("litgpt", "grouped router, forward", found, 3 * B * S)
    assert [r.layer for r in trace.routers] == [1, 2, 3]
    listed = trace.routers[0]
    assert (listed.experts, listed.top_k, listed.shared_experts) == (EXPERTS, 2, 1)
    assert listed.scoring == "sigmoid"


def test_the_grouped_router_in_training(tmp_path: Path, check: Check) -> None:
    model, ids_BS = build(**GROUPED).train(), inputs()
    watched = steps(model, ids_BS, tmp_path / "t")
    found = compare(moe_inspect.open_trace(tmp_path / "t"), watched.passes, ids_BS)
    check("litgpt", "grouped router, 2 training steps, checkpointed", found, 2 * 3 * B * S)


def steps(model: nn.Module, ids_BS: Tensor, path: Path, **options: Any) -> Watch:
    """Two training steps, recorded, with checkpointing as Lightning's strategies do it."""
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    watched, optimizer = watch(model), torch.optim.SGD(model.parameters(), lr=0.1)
    with moe_inspect.record(model, path, **options):
        for _ in range(2):
            with watched.forward():
                out = model(ids_BS)
            out.sum().backward()
            optimizer.step()
    return watched


def test_a_linear_gate_by_a_router_spec(tmp_path: Path, check: Check) -> None:
    model, ids_BS = build().train(), inputs()

    def choice(
        gate: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], logits_TE: Tensor
    ) -> tuple[Tensor, Tensor]:
        values_TK, ids_TK = logits_TE.topk(model.config.n_expert_per_token)
        return ids_TK, values_TK.softmax(dim=1)

    spec = moe_inspect.RouterSpec(module="**.mlp.gate", choice=choice, experts=EXPERTS)
    watched = steps(model, ids_BS, tmp_path / "t", routers=[spec])
    found = compare(moe_inspect.open_trace(tmp_path / "t"), watched.passes, ids_BS)
    run = "linear gate by RouterSpec, 2 training steps, checkpointed"
    check("litgpt", run, found, 2 * LAYERS * B * S)


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
    model, ids_BS = build().train(), inputs()
    for layer, block in blocks(model).items():
        block.layer = layer
    watched = steps(model, ids_BS, tmp_path / "t")
    found = compare(moe_inspect.open_trace(tmp_path / "t"), watched.passes, ids_BS)
    run = "linear gate by probe, 2 training steps, checkpointed"
    check("litgpt", run, found, 2 * LAYERS * B * S)
