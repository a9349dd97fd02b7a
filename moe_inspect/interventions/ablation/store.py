"""What an ablation has measured so far, in memory and, if it is to be resumable, on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from moe_inspect.errors import MoeInspectError, reading, writing
from moe_inspect.trace.files.lock import hold
from moe_inspect.trace.manifest import refuse_within_trace

FORMAT = 1
WHOLE = (-1, -1)  # in place of a router and an expert: the whole model


class Store:
    """The losses of each batch by (router, expert), one float per sequence.

    On disk it is a directory with a file `losses.jsonl`: a line that says what is measured, then a
    line per forward pass, appended and flushed when it is done. A line that was cut off is ignored
    and overwritten. MoeInspectError where the directory holds another measurement, or another
    process writes to it."""

    def __init__(self, path: Path | None, record: dict[str, Any]):
        self._of: dict[int, dict[tuple[int, int], list[float]]] = {}
        self._file: BinaryIO | None = None
        self._lock = None
        if path is None:
            return
        refuse_within_trace(path)
        self._lock = hold(path)
        try:
            self._open(path / "losses.jsonl", {"format": FORMAT, **record})
        except BaseException:
            self.close()
            raise

    def has(self, batch: int, router: int, expert: int) -> bool:
        return (router, expert) in self._of.get(batch, {})

    def get(self, batch: int, router: int, expert: int) -> list[float]:
        """float [B]"""
        return self._of[batch][router, expert]

    def add(self, batch: int, router: int, expert: int, nats: list[float]) -> None:
        self._of.setdefault(batch, {})[router, expert] = nats
        if self._file is not None:
            line = {"batch": batch, "router": router, "expert": expert, "nats": nats}
            with writing(self._file.name):
                self._file.write(json.dumps(line).encode() + b"\n")
                self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._lock is not None:
            self._lock.release()

    def _open(self, path: Path, head: dict[str, Any]) -> None:
        with reading(path):
            lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        whole, rest = lines[:-1], lines[-1]  # what is behind the last line's end was cut off
        if whole:
            self._check(path, json.loads(whole[0]), json.loads(json.dumps(head)))
            for line in whole[1:]:
                of = json.loads(line)
                self._of.setdefault(of["batch"], {})[of["router"], of["expert"]] = of["nats"]
        with writing(path):
            if rest:
                os.truncate(path, sum(map(len, whole)) + len(whole))
            self._file = path.open("ab")
            if not whole:
                self._file.write(json.dumps(head).encode() + b"\n")
                self._file.flush()

    @staticmethod
    def _check(path: Path, found: dict[str, Any], head: dict[str, Any]) -> None:
        for name in head:
            if found.get(name) != head[name]:
                raise MoeInspectError(
                    f"{path.parent} holds losses of a different {name} ({found.get(name)!r}, now "
                    f"{head[name]!r}): use another directory"
                )
