"""What watching costs: the CPU time of `moe-inspect watch` in a terminal, of one core, while a
trace of 61 layers of 256 experts grows, at one look per second.

    python -m benchmarks.watch -o benchmarks/results/watch-HARDWARE.json

CPU time, not the clock: what else the machine does is not in it. The start (imports, and what the
trace holds by then) is left out."""

from __future__ import annotations

import argparse
import json
import os
import pty
import select
import struct
import subprocess
import sys
import tempfile
import termios
import time
from fcntl import ioctl
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.measuring import ROOT, machine
from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer import Document, RoutedBatch, ShardLimits, TraceWriter

L, E, K = 61, 256, 8
BATCH_TOKENS = 500
START_S, MEASURED_S = 20, 60


def write(root: str, tokens_per_s: float, commit_every: float) -> None:
    """Writes a trace at this speed until it is killed."""
    rng = np.random.default_rng(0)
    listed = [Router(n, "gate", f"layers.{n}", E, K, slot_order="weight") for n in range(L)]
    words = pa.table({"token_id": range(50), "token": [f" word{n}" for n in range(50)]})
    ids = [np.argsort(rng.random((BATCH_TOKENS, E)), axis=1)[:, :K].astype(np.uint8)] * L
    row = np.arange(BATCH_TOKENS, dtype=np.int32)
    capture = {"pid": os.getpid(), "host": os.uname().nodename}
    with TraceWriter(
        root,
        {"capture": capture},
        listed,
        weights=False,
        vocabulary=words,
        limits=ShardLimits(commit_every=commit_every),
    ) as writer:
        began = time.monotonic()
        for n in range(10**6):
            text = rng.integers(0, 50, BATCH_TOKENS).astype(np.int32)
            document = [Document(n, "text", "made", BATCH_TOKENS)]
            of = row * 0 + n
            writer.write(RoutedBatch(n, text, of, of, row, row * 0, ["text"], ids, None, document))
            time.sleep(max(0.0, began + (n + 1) * BATCH_TOKENS / tokens_per_s - time.monotonic()))


def watched(root: str, width: int, height: int) -> dict[str, Any]:
    """CPU seconds of the watching process per second, after START_S."""
    ours, theirs = pty.openpty()
    ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
    command = [sys.executable, "-m", "moe_inspect", "watch", root]
    environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment)
    drain(ours, START_S)
    before = cpu_s(process.pid), time.monotonic()
    printed = drain(ours, MEASURED_S)
    after = cpu_s(process.pid), time.monotonic()
    process.kill()
    process.wait()
    os.close(ours)
    os.close(theirs)
    seconds = after[1] - before[1]
    return {
        "columns": width,
        "lines": height,
        "cpu_share": round((after[0] - before[0]) / seconds, 4),
        "bytes_per_s": round(printed / seconds),
        "seconds": round(seconds, 1),
    }


def drain(terminal: int, seconds: float) -> int:
    """Reads what is printed, as a terminal does. How many bytes came."""
    until, size = time.monotonic() + seconds, 0
    while (left := until - time.monotonic()) > 0:
        if select.select([terminal], [], [], left)[0]:
            size += len(os.read(terminal, 2**16))
    return size


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--write", nargs=3, help="ROOT TOKENS_PER_S COMMIT_EVERY (used inside)")
    chosen = parser.parse_args()
    if chosen.write:
        root, speed, every = chosen.write
        write(root, float(speed), float(every))
        return
    runs = []
    for speed, every in ((1_000, 5.0), (4_000, 5.0)):
        for size in ((80, 24), (200, 50)):
            with tempfile.TemporaryDirectory() as place:
                root = f"{place}/t"
                command = [sys.executable, "-m", "benchmarks.watch", "--write", root, str(speed)]
                writer = subprocess.Popen([*command, str(every)], cwd=ROOT)
                try:
                    found = watched(root, *size)
                finally:
                    writer.kill()
                    writer.wait()
            runs.append({"tokens_per_s": speed, "commit_every_s": every, **found})
            print(json.dumps(runs[-1]), flush=True)
    result = {"machine": machine(), "layers": L, "experts": E, "top_k": K, "runs": runs}
    if chosen.output:
        chosen.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
