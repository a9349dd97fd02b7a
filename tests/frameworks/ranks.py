"""Two processes on gloo, each with tokens of its own: each records its own trace."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

import moe_inspect
from tests.frameworks.conftest import free_port
from tests.frameworks.truth import Block, Compared, Pass, Watch, bits, compare

WORLD = 2
Work = Callable[..., None]  # rank, port, path, further arguments


def run(work: Work, path: Path, *arguments: Any) -> Compared:
    """Runs `work` in each process, which keeps what its experts were given (`recorded`); compares
    the traces of all ranks with what the experts of all ranks were given."""
    torch.multiprocessing.spawn(work, (free_port(), path, *arguments), nprocs=WORLD)
    saved = [torch.load(path / f"given-{r}.pt", weights_only=False) for r in range(WORLD)]
    given = [passes for passes, _ in saved]
    if given[0][0].keys() == given[1][0].keys():  # else stages of a pipeline
        given = _by_tokens(given)
    found = Compared()
    for rank, (_, inputs) in enumerate(saved):
        found += compare(moe_inspect.open_trace(path / f"rank-{rank}"), given[rank], **inputs)
    return found


def environment(rank: int, port: int, world: int = WORLD) -> dict[str, str]:
    """As torchrun sets it."""
    values = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
    values |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    return {name: str(value) for name, value in values.items()}


def begin(rank: int, port: int, **more: str) -> None:
    os.environ |= environment(rank, port) | more
    torch.set_num_threads(1)


def share(model: nn.Module, is_own: Callable[[str], bool]) -> None:
    """Gives the replicas of parameters the values of rank 0: all but those of experts that are this
    rank's own."""
    for name, parameter in model.named_parameters():
        if not is_own(name):
            dist.broadcast(parameter.data, 0)


@contextmanager
def recorded(model: Any, watched: Watch, rank: int, path: Path, **inputs: Any) -> Iterator[None]:
    """Records what a block of code does, and keeps what the experts of this rank were given, and
    `inputs`, the arguments of `compare`. Then the process group ends."""
    with moe_inspect.record(model, path / f"rank-{rank}"):
        yield
    torch.save((watched.passes, inputs), path / f"given-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _by_tokens(passes_of: list[list[Pass]]) -> list[list[Pass]]:
    """Gives each rank the rows of its own tokens, on whatever rank the expert is."""
    for passes in zip(*passes_of, strict=True):
        for layer in passes[0]:
            _share_rows([of_rank[layer] for of_rank in passes])
    return passes_of


def _share_rows(blocks: list[Block]) -> None:
    rows = [row for block in blocks for row in block.rows]
    of_rank = [{bits(row) for row in block.hidden()} for block in blocks]
    known = set().union(*of_rank)
    for _, rows_RD, _ in rows:
        assert all(bits(row) in known or not row.any() for row in rows_RD)
    for block, own in zip(blocks, of_rank, strict=True):
        block.rows = []
        for expert, rows_RD, weights_R in rows:
            keep_R = torch.tensor([bits(row) in own for row in rows_RD], dtype=torch.bool)
            kept_R = None if weights_R is None else weights_R[keep_R]
            block.rows.append((expert, rows_RD[keep_R], kept_R))
