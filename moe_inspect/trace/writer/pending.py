"""The batches of the next shard, in memory until it is committed. Early shards: what is pending is
committed every few seconds, so that others can read it; the shard that is due later holds the same
batches, and replaces them."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from moe_inspect.trace.files.atomic import append, write_atomically
from moe_inspect.trace.files.location import Remote
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


# a report that has begun to read early shards is given this long after they were replaced
KEPT_SECONDS = 30.0


class EarlyShards:
    """Those of the pending shard. `batches`, `tokens`, `decisions`: what they hold, the first of
    the pending shard's. `every_s`: None for none."""

    def __init__(self, shard_list: Path | Remote, every_s: float | None):
        self.shard_list, self.every_s = shard_list, every_s
        self.batches = self.tokens = self.decisions = 0
        self._files: list[Path | Remote] = []
        self._last = time.monotonic()
        self._list_bytes = 0  # of the list before the first of them
        self._replaced: list[tuple[float, list[Path | Remote]]] = []

    def wait_s(self, pending: int) -> float | None:
        """How long to wait until the `pending` batches are to be committed; None for ever."""
        if self.every_s is None or pending <= self.batches:
            return None
        return max(0.0, self._last + self.every_s - time.monotonic())

    def tried(self) -> None:
        """The next early shard is due `every_s` from now."""
        self._last = time.monotonic()

    def add(
        self, lines: bytes, files: list[Path | Remote], batches: int, tokens: int, decisions: int
    ) -> None:
        """Commits an early shard."""
        if not self.batches:
            self._list_bytes = len(self.shard_list.read_bytes())
        append(self.shard_list, lines)
        self._files += files
        self.batches += batches
        self.tokens += tokens
        self.decisions += decisions

    def replace(self, lines: bytes) -> None:
        """Commits the shard that holds what they hold: readers see its lines or theirs."""
        if self.batches:
            kept = self.shard_list.read_bytes()[: self._list_bytes]
            write_atomically(self.shard_list, kept + lines)
            self._replaced.append((time.monotonic(), self._files))
            self.batches = self.tokens = self.decisions = 0
            self._files = []
        else:
            append(self.shard_list, lines)
        self.tried()

    def remove_replaced(self, older_than_s: float = KEPT_SECONDS) -> None:
        """Deletes files of early shards that no line names any more."""
        until = time.monotonic() - older_than_s
        while self._replaced and self._replaced[0][0] <= until:
            for file in self._replaced.pop(0)[1]:
                file.unlink(missing_ok=True)
