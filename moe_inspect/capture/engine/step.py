"""A step of an engine, as the process that writes gets it, which imports no torch.

L routers, N rows of a step, P physical experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from itertools import accumulate, compress

import numpy as np

Arrays = dict[str, list[np.ndarray]]  # rows of steps, by name: [N, …] for each router


def edges_of(sizes: Iterable[int]) -> list[int]:
    """Return where parts of these sizes begin that follow each other, and where the last one
    ends."""
    return list(accumulate(sizes, initial=0))


@dataclass(frozen=True)
class Schedule:
    """The requests of a step, in the order of its rows.

    requests  their names
    edges     where the rows of each request begin, and where those of the last one end
    prompts   tokens of each prompt
    drafts    how many of each request's rows, the last ones, are drafts; empty if none are
    ends      the position at which each answer ends at the latest; empty if there are no drafts
    """

    requests: Sequence[str]
    edges: Sequence[int]
    prompts: Sequence[int]
    drafts: Sequence[int] = ()
    ends: Sequence[int] = ()

    @property
    def rows(self) -> int:
        return self.edges[-1]

    def rows_of(self, chosen: Sequence[bool]) -> np.ndarray:
        """Return the indices of the rows of the chosen requests."""
        return np.flatnonzero(np.repeat(chosen, np.diff(self.edges)))

    def only(self, chosen: Sequence[bool]) -> Schedule:
        """Return the schedule of the chosen requests alone."""
        return Schedule(
            list(compress(self.requests, chosen)),
            edges_of(compress(np.diff(self.edges).tolist(), chosen)),
            list(compress(self.prompts, chosen)),
            list(compress(self.drafts, chosen)),
            list(compress(self.ends, chosen)),
        )


@dataclass(frozen=True)
class Step:
    """A step of which rows are recorded.

    number    of the step, from 1 on
    ended     requests that have ended before it
    sampled   how many tokens each request was given after the step, one more than the accepted
              drafts [requests]; if drafts are a tree, the rows of the answer, then −1
              [requests, rows]; None if neither is known
    replicas  the expert that each physical expert is a replica of [L, P]; None if experts have no
              replicas, or the same ones as in the recorded step before
    """

    number: int
    schedule: Schedule
    ended: Set[str]
    sampled: np.ndarray | None
    replicas: np.ndarray | None

    def accepted(self, request: int) -> np.ndarray:
        """Return which of the request's rows are not rejected drafts."""
        edges = self.schedule.edges
        rows = edges[request + 1] - edges[request]
        drafts = self.schedule.drafts[request]
        if not drafts or self.sampled is None:
            return np.arange(rows - drafts)
        sampled = self.sampled[request]
        if sampled.ndim:
            return sampled[sampled >= 0]
        return np.arange(min(rows - drafts + max(int(sampled) - 1, 0), rows))
