"""A step of an engine, as its worker hands it to the process that writes: that imports no torch.

L routers, n tokens, K slots, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from itertools import accumulate, compress
from typing import Any

import numpy as np

OF_SLOTS = "ids", "weights", "logits", "physicals"


def edges_of(sizes: Iterable[int]) -> list[int]:
    """Where parts of these sizes begin that follow each other, and where the last one ends."""
    return list(accumulate(sizes, initial=0))


@dataclass
class Step:
    """Whose rows a step has, and, once it is recorded, the rows. `edges`: where each request's
    begin, and the end. `prompts`: tokens of each prompt. Where something is speculated, `drafts`:
    how many of each request's rows, its last ones, are; `ends`: the position at which each request
    ends at the latest. `tokens`, `positions`: the engine's own tensors, until it is recorded. What
    came from a GPU is on its way until `arrive`."""

    requests: Sequence[str]
    edges: Sequence[int]
    prompts: Sequence[int]
    drafts: Sequence[int]  # none where nothing is speculated
    ends: Sequence[int]
    tokens: Any  # [n] or longer
    positions: Any  # [n] or longer
    # what follows is no part of __init__, which runs in each step
    rows: Any = field(init=False, default=None)  # as `Rows.take` returns them, then joined
    number: int = field(init=False, default=0)
    ended: Set[str] = field(init=False, default=frozenset())  # requests that ended before it
    bytes: int = field(init=False, default=0)
    copied: Any = field(init=False, default=None)  # an event
    # where some of a request's rows are drafts, how many tokens it was given behind the step, one
    # more than were accepted, [requests of the engine's step, until `arrive`: those recorded];
    # where they are a tree, which of its rows are the answer's, and −1, [requests, rows]; None
    # where that is unknown
    sampled: Any = field(init=False, default=None)
    wanted: Any = field(init=False, default=None)  # which requests are recorded, if not all
    # where experts have replicas, the expert that each of a router is a replica of, [L, P]; None as
    # it is handed over where that has not changed
    replicas: Any = field(init=False, default=None)

    def only(self, wanted: Sequence[bool]) -> tuple[Step, np.ndarray]:
        """Of some requests; and which rows these are."""
        sizes = np.diff(self.edges)
        rows = np.flatnonzero(np.repeat(wanted, sizes))
        requests, sizes, prompts, drafts, ends = (
            list(compress(of, wanted))
            for of in (self.requests, sizes.tolist(), self.prompts, self.drafts, self.ends)
        )
        edges = edges_of(sizes)
        return Step(requests, edges, prompts, drafts, ends, self.tokens, self.positions), rows

    def arrive(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()
            self.copied = None
        if self.replicas is not None:
            self.replicas = np.asarray(self.replicas)
        if self.sampled is not None:
            rows = slice(None) if self.wanted is None else np.array(self.wanted)
            self.sampled, self.wanted = np.asarray(self.sampled)[rows], None

    def accepted(self, request: int) -> np.ndarray:
        """Which of the request's rows are no rejected drafts."""
        rows = self.edges[request + 1] - self.edges[request]
        drafts = self.drafts[request]
        if not drafts or self.sampled is None:
            return np.arange(rows - drafts)
        sampled = self.sampled[request]
        if sampled.ndim:
            return sampled[sampled >= 0]
        return np.arange(min(rows - drafts + max(int(sampled) - 1, 0), rows))
