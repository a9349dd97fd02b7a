"""A trace on an S3 server, written by processes that are killed by SIGKILL in the middle: after
each kill the trace is verified, then resumed; in the end it is compared with one that was written
to a disk at once. And the CPU time of writing there and to the disk, the process's start included.

The server is moto's, a process beside this one. Needs `pip install s3fs 'moto[server]'`.

    python -m benchmarks.object_storage [--rounds 3] [--kills 5]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import machine, write_results
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.files.location import output_location
from moe_inspect.trace.files.lock import hold
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.schema import Router
from moe_inspect.trace.verify import verify
from moe_inspect.trace.writer import Document, RoutedBatch, TraceWriter, resume_point

T, L, E, K = 4096, 16, 64, 8
BATCHES = 24
SHARD_TOKENS = 2 * T
WRITING = [sys.executable, "-m", "benchmarks.object_storage", "--write"]


def batches(start: int) -> Iterator[RoutedBatch]:
    """Passes from `start` on: each of a document, the same at every call."""
    position = np.arange(T, dtype=np.int32)
    for number in range(start, BATCHES):
        rng = np.random.default_rng(number)
        document = np.full(T, number, np.int32)
        ids = [np.argsort(rng.random((T, E)), axis=1)[:, :K].astype(np.uint8) for _ in range(L)]
        weights = [np.sort(rng.random((T, K)).astype(np.float16))[:, ::-1] for _ in range(L)]
        yield RoutedBatch(
            number,
            rng.integers(0, 50_000, T).astype(np.int32),
            document,
            document,
            position,
            np.zeros(T, np.int32),
            ["text"],
            ids,
            weights,
            documents=[Document(number, "text", "made", T)],
        )


def write(place: str) -> None:
    """Writes the trace, or goes on with what is there."""
    root = output_location(place)
    listed = [Router(layer, "gate", f"layers.{layer}", E, K, "softmax") for layer in range(L)]
    manifest = {"model": {"id": "made"}, "capture": {}, "corpus": {"plan": {}}}
    there = (root / "trace.json").exists()
    with hold(root) if there else nullcontext() as lock:
        start = resume_point(root) if there else None
        with TraceWriter(
            root, manifest, listed, shard_tokens=SHARD_TOKENS, resume=start, lock=lock
        ) as writer:
            for batch in batches(start.next_batch if start else 0):
                writer.write(batch)


def cpu_seconds(place: str) -> float:
    """User and system time of a process that writes the trace."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "benchmarks.object_storage", "--write", place], check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def killed(place: str, kills: int, rng: random.Random) -> list[int]:
    """Writes a trace by processes that are killed; the tokens that each kill left."""
    left = list[int]()
    for n in range(kills + 1):
        process = subprocess.Popen([*WRITING, place])
        if n < kills:
            # after it has begun, which is when a shard more is there
            wait_until = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < wait_until:
                if tokens_at(place) > (left[-1] if left else 0):
                    break
                time.sleep(0.05)
            time.sleep(rng.random() * 0.5)
            process.send_signal(signal.SIGKILL)
        process.wait()
        found = verify(place)
        assert found.ok, found
        if process.returncode == 0:
            break
        assert found.status == "interrupted", found
        assert found.resumable
        left.append(found.tokens)
    return left


def tokens_at(place: str) -> int:
    try:
        return Trace(output_location(place)).n_tokens
    except MoeInspectError:
        return 0


@contextmanager
def s3_server() -> Iterator[None]:
    """The server; environment variables make s3fs use it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    os.environ |= {
        "FSSPEC_S3_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                urllib.request.urlopen(address, timeout=1)
                break
            except (OSError, urllib.error.URLError):
                time.sleep(0.2)
        request = urllib.request.Request(f"{address}/traces", method="PUT")
        urllib.request.urlopen(request, timeout=10)
        yield
    finally:
        server.terminate()
        server.wait()


def same(a: Trace, b: Trace) -> bool:
    return all(
        getattr(a, name)().equals(getattr(b, name)()) for name in ("routing", "tokens", "documents")
    )


def measure(rounds: int, kills: int) -> dict[str, Any]:
    rng, left = random.Random(0), list[list[int]]()
    costs: dict[str, list[float]] = {"disk": [], "s3": []}
    with tempfile.TemporaryDirectory() as folder, s3_server():
        for n in range(rounds):
            costs["disk"].append(cpu_seconds(f"{folder}/{n}"))
            costs["s3"].append(cpu_seconds(f"s3://traces/whole-{n}"))
            left.append(killed(f"s3://traces/killed-{n}", kills, rng))
            assert same(Trace(f"s3://traces/killed-{n}"), Trace(f"{folder}/{n}"))
        stored = sum(f.stat().st_size for f in Path(folder, "0").rglob("*") if f.is_file())
    return {
        "tokens": BATCHES * T,
        "assignments": BATCHES * T * L * K,
        "bytes": stored,
        "shards": BATCHES * T // SHARD_TOKENS,
        "kills": sum(map(len, left)),
        "tokens left by each kill": left,
        "CPU seconds of writing": {k: [round(s, 2) for s in v] for k, v in costs.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="A trace on an S3 server: kills, and costs.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--write", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.write:
        write(given.write)
        return
    found = measure(given.rounds, given.kills)
    print(json.dumps(found, indent=1))
    write_results("object-storage", machine(), found)


if __name__ == "__main__":
    main()
