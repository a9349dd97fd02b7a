"""The batches of the next shard, in memory until it is committed."""

from __future__ import annotations

import time

import numpy as np

from moe_inspect.trace.runs import run_edges
from moe_inspect.trace.writer.batches import RoutedBatch

SHARD_TOKENS = 65_536
SHARD_BYTES = 60 * 2**20  # of decisions in memory, at most: shards of deep models hold fewer tokens
SHARD_SECONDS = 60.0  # age at which a shard is committed: decisions of a slow model are safe then
# factor on the limits while the next batch continues sequences of the shard
CONTINUED = 8


class PendingShard:
    """`batches` of decisions, all of which become one shard."""

    def __init__(self, shard_tokens: int, shard_seconds: float):
        self.shard_tokens, self.shard_seconds = shard_tokens, shard_seconds
        self._clear()

    def _clear(self) -> None:
        self.batches: list[RoutedBatch] = []
        self._tokens = self._bytes = 0
        self._since = time.monotonic()
        self._reached: dict[tuple[int, int], int] = {}  # (document, sequence) → its last position

    def add(self, batch: RoutedBatch) -> None:
        if not self.batches:
            self._since = time.monotonic()
        self.batches.append(batch)
        self._reached.update((key, last) for key, (_, last) in _reached(batch).items())
        self._tokens += len(batch.token_id)
        self._bytes += batch.nbytes

    def take(self) -> list[RoutedBatch]:
        """All batches; none are pending then."""
        batches = self.batches
        self._clear()
        return batches

    def drop_open_group(self) -> None:
        """Drops the passes of the last group: more of them may be missing."""
        if self.batches and (group := self.batches[-1].group) is not None:
            self.batches = [b for b in self.batches if b.group != group]

    def of_closed_groups(self) -> int:
        """How many batches may be committed before the next one comes."""
        if not self.batches or (group := self.batches[-1].group) is None:
            return len(self.batches)
        return sum(b.group != group for b in self.batches)

    def ends_before(self, batch: RoutedBatch) -> bool:
        """Whether the shard is to be committed before `batch` joins it."""
        if not self.batches or not self.is_due(batch):
            return False
        if batch.group is not None and batch.group == self.batches[-1].group:
            return False
        # what is counted of consecutive tokens is counted shard by shard: a sequence stays in one,
        # as far as memory allows
        continued = any(
            self._reached.get(key) == first - 1 for key, (first, _) in _reached(batch).items()
        )
        return not continued or self.is_due(batch, CONTINUED)

    def is_due(self, batch: RoutedBatch, times: int = 1) -> bool:
        """Whether the shard would grow too large with `batch`, or has waited too long."""
        return (
            self._tokens + len(batch.token_id) > times * self.shard_tokens
            or self._bytes + batch.nbytes > times * SHARD_BYTES
            or time.monotonic() - self._since > times * self.shard_seconds
        )


def _reached(batch: RoutedBatch) -> dict[tuple[int, int], tuple[int, int]]:
    """(document, sequence) → its first and its last position; the decoder's, where a sequence has
    rows of both an encoder and a decoder."""
    encoded_T = np.arange(len(batch.document)) < batch.encoded
    edges = run_edges(batch.document, batch.sequence, encoded_T)
    first, last = edges[:-1], edges[1:] - 1
    keys = list(zip(batch.document[first].tolist(), batch.sequence[first].tolist(), strict=True))
    begins = list(zip(keys, batch.position[first].tolist(), strict=True))
    begin_of = dict(begins if batch.encoded else reversed(begins))
    end_of = dict(zip(keys, batch.position[last].tolist(), strict=True))
    return {key: (begin_of[key], end) for key, end in end_of.items()}
