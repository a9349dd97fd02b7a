"""DeepSpeed's MoE layer and its TopKGate, which drops by capacity."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed", reason="make test-frameworks installs it")

import deepspeed
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from moe_inspect.model.custom import spec as frameworks
from tests.frameworks import ranks
from tests.frameworks.conftest import Check, free_port
from tests.frameworks.truth import Watch, assert_listed, compare, recorded, token_ids

EXPERTS, LAYERS = 8, 3
B, S, D = 3, 16, 32
DECISIONS = LAYERS * B * S
GATES: dict[str, dict[str, Any]] = {
    "k 1, capacity 1": {"k": 1, "min_capacity": 0},
    "k 2, capacity 1": {"k": 2, "min_capacity": 0},
    "k 3, capacity 0.5": {"k": 3, "min_capacity": 0, "capacity_factor": 0.5},
    "k 2, no drops": {"k": 2, "drop_tokens": False},
}


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self, ep_size: int = 1, **gate: Any):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(512, D)
        self.position = nn.Parameter(torch.randn(S, D) * 0.1)
        self.layers = nn.ModuleList(
            MoE(D, Expert(), num_experts=EXPERTS, ep_size=ep_size, **gate) for _ in range(LAYERS)
        )
        self.head = nn.Linear(D, 512)
        for layer in self.layers:
            layer.set_deepspeed_parallelism()

    def forward(self, ids_BS: Tensor) -> tuple[Tensor, Tensor]:
        x, loss = self.embedding(ids_BS) + self.position, torch.zeros(())
        for layer in self.layers:
            out, auxiliary, _ = layer(x)
            x, loss = x + out, loss + auxiliary
        return self.head(x), loss

    def loss(self, ids_BS: Tensor) -> Tensor:
        out, loss = self(ids_BS)
        return out.sum() + loss


def watch(model: Net, first_expert: int = 0) -> Watch:
    found = Watch()
    for n, layer in enumerate(model.layers):
        found.block(layer, n)
        found.experts(layer.deepspeed_moe.experts.deepspeed_experts, n, first_expert)
    return found


@pytest.fixture(autouse=True)
def process_group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in ranks.environment(0, free_port(), world=1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    deepspeed.init_distributed("gloo")
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("gate", GATES)
def test_training_steps(gate: str, tmp_path: Path, check: Check) -> None:
    model, ids_BS = Net(**GATES[gate]).train(), token_ids()
    watched = watch(model)
    trace = recorded(model, watched, tmp_path / "t", lambda: model.loss(ids_BS), steps=2)
    found = compare(trace, watched.passes, ids_BS)
    check("deepspeed", f"{gate}, 2 training steps", found, 2 * DECISIONS)
    assert_listed(trace, [0, 1, 2], GATES[gate]["k"], "softmax", shared=None)
    is_dropped = trace.routing().filter(regex="^expert_").isna().any(axis=None)
    assert bool(is_dropped) == ("no drops" not in gate)


def test_a_forward_pass_and_its_weights(tmp_path: Path, check: Check) -> None:
    model, ids_BS = Net(k=2, eval_capacity_factor=0.5, min_capacity=0).eval(), token_ids()
    watched = watch(model)
    trace = recorded(model, watched, tmp_path / "t", lambda: model(ids_BS))
    experts = [layer.deepspeed_moe.experts.deepspeed_experts for layer in model.layers]
    run = lambda layer, expert, rows: experts[layer][expert].forward(rows)  # noqa: E731
    found = compare(trace, watched.passes, ids_BS, run=run)
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


def train_on_rank(rank: int, port: int, path: Path) -> None:
    """A training step on one of two ranks, with half of the experts on each."""
    ranks.begin(rank, port, DS_ACCELERATOR="cpu")
    deepspeed.init_distributed("gloo")
    model = Net(ep_size=ranks.WORLD, k=2, min_capacity=0).train()
    ranks.share(model, lambda name: ".deepspeed_experts." in name)
    ids_BS = token_ids(seed=7 + rank)
    watched = watch(model, first_expert=rank * EXPERTS // ranks.WORLD)
    with ranks.recorded(model, watched, rank, path, ids_BS=ids_BS):
        with watched.forward():
            loss = model.loss(ids_BS)
        loss.backward()


def test_two_ranks(tmp_path: Path, check: Check) -> None:
    """Each rank has tokens of its own and half of the experts; ids are global."""
    run = "k 2, capacity 1, training step, 2 ranks, expert parallel"
    check("deepspeed", run, ranks.run(train_on_rank, tmp_path), ranks.WORLD * DECISIONS)
