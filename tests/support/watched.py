"""A trace that is written slowly, in a process of its own, for those who watch it.

    python -m tests.support.watched ROOT LAYERS EXPERTS BATCHES SECONDS

Expert 1 of layer 3 takes ever more, expert 2 there gets nothing from batch 3 on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from moe_inspect.public import Trace
from moe_inspect.trace.files.lock import process_start
from moe_inspect.trace.writer import CountedBatches, Document, RoutedBatch, TraceWriter
from moe_inspect.trace.writer.batches import SHARD_TOKENS, ShardLimits
from tests.support.synthetic import a_pass, routers

WORDS = ["the", "cat", "sat", "on", "a", "mat", "<b>", "\x1b[31m"]
K, TOKENS = 2, 256


def batches(layers: int, experts: int, n: int) -> Iterator[RoutedBatch]:
    rng = np.random.default_rng(0)
    for b in range(n):
        ids = []
        for layer in range(layers):
            wish = rng.random((TOKENS, experts))
            if layer == 3:
                wish[:, 1] += min(0.9, 0.1 * b)
                if b >= 3:
                    wish[:, 2] = -1
            ids.append(np.argsort(-wish, axis=1)[:, :K].astype(np.uint8))
        token_id, document = rng.integers(0, len(WORDS), TOKENS), np.full(TOKENS, b, np.int32)
        documents = [Document(b, "text", "made", TOKENS)]
        yield a_pass(b, ids, token_id=token_id, document=document, documents=documents)


def writer(
    root: Path,
    layers: int,
    experts: int,
    shard_tokens: int = SHARD_TOKENS,
    commit_every: float | None = None,
    **options: Any,
) -> TraceWriter:
    capture: dict[str, Any] = {"mode": "tap", "dtype": "float32", "host": socket.gethostname()}
    capture |= {"pid": os.getpid(), "process_start": process_start(os.getpid())}
    listed = [replace(r, slot_order="weight") for r in routers(layers, experts, K)]
    vocabulary = pa.table({"token_id": range(len(WORDS)), "token": [f" {w}" for w in WORDS]})
    manifest = {"model": {"id": "made"}, "capture": capture}
    options["limits"] = ShardLimits(shard_tokens, commit_every=commit_every)
    return TraceWriter(root, manifest, listed, weights=False, vocabulary=vocabulary, **options)


def waited(until: Callable[[], Any], most_s: float = 60) -> Any:
    """What `until` returns, once that is true."""
    end = time.monotonic() + most_s
    while not (found := until()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
    return found


def committed(
    root: Path,
    writer: TraceWriter,
    batches: Iterable[RoutedBatch | CountedBatches],
    T: int = TOKENS,
) -> Iterator[int]:
    """Writes batches of T tokens, and gives how many are written once these can be read."""
    for n, batch in enumerate(batches, 1):
        writer.write(batch)
        waited(lambda n=n: Trace(root).n_tokens == n * T)
        yield n


def written(
    root: Path, L: int, E: int, n: int, first: int = 0, pause_s: float = 0, **options: Any
) -> Path:
    """A trace of n batches; but for the first ones, if it has them."""
    with writer(root, L, E, **options) as open_writer:
        for batch in islice(batches(L, E, n), first, None):
            open_writer.write(batch)
            time.sleep(pause_s)
    return root


def started(root: Path, *arguments: float) -> subprocess.Popen[bytes]:
    """The process that writes it."""
    command = [sys.executable, "-m", "tests.support.watched", str(root), *map(str, arguments)]
    return subprocess.Popen(command)


if __name__ == "__main__":
    place, *counts, seconds = sys.argv[1:]
    written(Path(place), *map(int, counts), pause_s=float(seconds), commit_every=0.1)
