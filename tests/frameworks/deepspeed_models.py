"""A small model of DeepSpeed's MoE layers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

import moe_inspect
from tests.frameworks import ranks
from tests.frameworks.truth import Watch

EXPERTS, LAYERS = 8, 3
B, S, D = 3, 16, 32


def start(rank: int, world: int, port: int, setenv: Callable[[str, str], None]) -> None:
    """DeepSpeed's process group on gloo."""
    for name, value in {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "DS_ACCELERATOR": "cpu",
    }.items():
        setenv(name, value)
    deepspeed.init_distributed("gloo")


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


def inputs(seed: int = 7) -> Tensor:
    return torch.randint(0, 512, (B, S), generator=torch.Generator().manual_seed(seed))


def watch(model: Net, first_expert: int = 0) -> Watch:
    found = Watch()
    for n, layer in enumerate(model.layers):
        found.block(layer, n)
        found.experts(layer.deepspeed_moe.experts.deepspeed_experts, n, first_expert)
    return found


def train_on_rank(rank: int, port: int, path: Path) -> None:
    """A training step on one of two ranks, with half of the experts on each."""
    torch.set_num_threads(1)
    start(rank, ranks.WORLD, port, os.environ.__setitem__)
    model = Net(ep_size=ranks.WORLD, k=2, min_capacity=0).train()
    for name, parameter in model.named_parameters():
        if ".deepspeed_experts." not in name:  # replicas
            dist.broadcast(parameter.data, 0)
    ids_BS = inputs(seed=7 + rank)
    watched = watch(model, first_expert=rank * EXPERTS // ranks.WORLD)
    with moe_inspect.record(model, ranks.trace_of(path, rank)):
        with watched.forward():
            out, loss = model(ids_BS)
        (out.sum() + loss).backward()
    ranks.save(path, rank, watched, ids_BS=ids_BS)
    dist.barrier()
    dist.destroy_process_group()
