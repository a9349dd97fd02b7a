"""Early shards: what is pending is committed every few seconds, so that others can read it. The
shard that is due later holds the same batches, and replaces them."""

from __future__ import annotations

import time
from pathlib import Path

from moe_inspect.trace.files.atomic import append, write_atomically
from moe_inspect.trace.files.location import Remote

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

    def append(self, lines: bytes) -> None:
        """Adds lines to the list of shards. On disk when this returns."""
        append(self.shard_list, lines)

    def add(
        self, lines: bytes, files: list[Path | Remote], batches: int, tokens: int, decisions: int
    ) -> None:
        """Commits an early shard."""
        if not self.batches:
            self._list_bytes = len(self.shard_list.read_bytes())
        self.append(lines)
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
            self.append(lines)
        self.tried()

    def remove_replaced(self, older_than_s: float = KEPT_SECONDS) -> None:
        """Deletes files of early shards that no line names any more."""
        until = time.monotonic() - older_than_s
        while self._replaced and self._replaced[0][0] <= until:
            for file in self._replaced.pop(0)[1]:
                file.unlink(missing_ok=True)
