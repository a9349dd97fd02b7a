"""What vLLM's communicator for CPUs lacks to run a MoE model in several engines: a gather of rows
and a sum that is scattered, of as many rows as each rank has. A plugin of vLLM."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def register() -> None:
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    CpuCommunicator.all_gatherv = all_gatherv
    CpuCommunicator.reduce_scatterv = reduce_scatterv


def all_gatherv(self: Any, input_: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
    if isinstance(input_, list):
        return [all_gatherv(self, one, dim, sizes) for one in input_]
    assert dim == 0
    sizes = sizes or [len(input_)] * self.world_size
    padded = input_.new_zeros((max(sizes), *input_.shape[1:]))
    padded[: len(input_)] = input_
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=self.device_group)
    return torch.cat([rows[:n] for rows, n in zip(gathered, sizes, strict=True)])


def reduce_scatterv(
    self: Any, input_: torch.Tensor, dim: int = 0, sizes: list[int] | None = None
) -> torch.Tensor:
    assert dim in (0, -input_.dim())
    sizes = sizes or [len(input_) // self.world_size] * self.world_size
    summed = input_.contiguous()
    dist.all_reduce(summed, group=self.device_group)
    return summed.split(sizes)[self.rank_in_group].clone()
