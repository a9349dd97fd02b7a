"""Two processes on gloo, each with tokens of its own: each records its own trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

import moe_inspect
from tests.frameworks.conftest import free_port
from tests.frameworks.truth import Block, Compared, Pass, Watch, bits, compare

WORLD = 2
Work = Callable[..., None]  # rank, port, path, further arguments


def run(work: Work, path: Path, *arguments: Any) -> None:
    """Runs `work` in each process; it ends with `save`."""
    torch.multiprocessing.spawn(work, (free_port(), path, *arguments), nprocs=WORLD)


def trace_of(path: Path, rank: int) -> Path:
    return path / f"rank-{rank}"


def save(path: Path, rank: int, watched: Watch, **inputs: Any) -> None:
    """Keeps what the experts of this rank were given, and the arguments of `compare`."""
    torch.save((watched.passes, inputs), path / f"given-{rank}.pt")


def compare_all(path: Path) -> Compared:
    """Compares the traces of all ranks with what the experts of all ranks were given."""
    saved = [torch.load(path / f"given-{r}.pt", weights_only=False) for r in range(WORLD)]
    given = [passes for passes, _ in saved]
    if given[0][0].keys() == given[1][0].keys():  # else stages of a pipeline
        given = _by_tokens(given)
    found = Compared()
    for rank, (_, inputs) in enumerate(saved):
        trace = moe_inspect.open_trace(trace_of(path, rank))
        found += compare(trace, given[rank], **inputs)
    return found


def _by_tokens(passes_of: list[list[Pass]]) -> list[list[Pass]]:
    """Gives each rank the rows of its own tokens, on whatever rank the expert is."""
    for passes in zip(*passes_of, strict=True):
        for layer in passes[0]:
            blocks = [of_rank[layer] for of_rank in passes]
            _share_rows(blocks)
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
