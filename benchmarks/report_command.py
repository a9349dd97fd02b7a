"""`python -m benchmarks.report_command`: what `moe-inspect report` costs as a user types it: CPU
time, wall time and peak memory of the whole command, imports included, and the size of the page it
writes. With `--against PATH`, a second checkout, it is measured too, in turn. Prints a table,
writes benchmarks/results/report-command-<machine>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import ROOT, in_a_process, machine, write_results

TABLE = "{:<60}{:<9}{:>9}{:>9}{:>12}{:>10}"
MEASURED = ("cpu_s", "wall_s", "peak_memory_mib", "page_mib")
PAGE = ("--html", "page.html")
CASES = {  # label → trace, arguments, rounds
    "report, 1e8 assignments": ("1e8", (), 1),
    "report --html, 1e8 assignments": ("1e8", PAGE, 1),
    "report --table balance, 1e8 assignments": ("1e8", ("--table", "balance"), 1),
    "report --table committee, 1e8 assignments": ("1e8", ("--table", "committee"), 1),
    "report --table signature, 1e8 assignments": ("1e8", ("--table", "signature"), 1),
    "report --table paths, 1e8 assignments": ("1e8", ("--table", "paths"), 1),
    "report --html --table verdict, 61 x 256, 2,000 tokens": (
        "2000",
        (*PAGE, "--table", "verdict"),
        3,
    ),
    "report --html --table verdict, 61 x 256, 20,000 tokens": (
        "20000",
        (*PAGE, "--table", "verdict"),
        3,
    ),
    "report, 1e9 assignments": ("1e9", (), 1),
}


def make_wide(root: str, tokens: int) -> None:
    """61 routers of 256 experts, 8 per token, four domains."""
    from moe_inspect.trace.schema import Router
    from moe_inspect.trace.writer import Document, RoutedBatch, TraceWriter

    L, E, k, rng = 61, 256, 8, np.random.default_rng(0)
    routers = [Router(layer, "gate", f"layers.{layer}", E, k) for layer in range(L)]
    row = np.arange(tokens, dtype=np.int32)
    ids = [
        ((rng.integers(0, E, (tokens, 1)) + np.arange(k) * rng.integers(1, 31, (tokens, 1))) % E)
        for _ in range(L)
    ]
    documents = [Document(d, "abcd"[d % 4], "made", 100) for d in range(tokens // 100)]
    batch = RoutedBatch(
        0,
        np.minimum(rng.zipf(1.2, tokens), 499).astype(np.int32),
        row // 100,
        row // 100,
        row % 100,
        row // 100 % 4,
        list("abcd"),
        [ids_TK.astype(np.uint8) for ids_TK in ids],
        None,
        documents=documents,
    )
    with TraceWriter(root, {"capture": {"weights": False}}, routers, weights=False) as writer:
        writer.write(batch)


def once(checkout: Path, arguments: list[str], page: Path) -> dict[str, float]:
    """One run of the command from a checkout. `page`: where its page goes, if it writes one."""
    page.unlink(missing_ok=True)
    began = time.perf_counter()
    command = [sys.executable, "-m", "moe_inspect", "report", *arguments]
    with open(os.devnull, "wb") as nothing:
        started = subprocess.Popen(command, cwd=checkout, stdout=nothing, stderr=nothing)
        _, status, used = os.wait4(started.pid, 0)
    assert status == 0, f"{command} failed"
    return {
        "cpu_s": used.ru_utime + used.ru_stime,
        "wall_s": time.perf_counter() - began,
        "peak_memory_mib": used.ru_maxrss / 1024,
    } | ({"page_mib": page.stat().st_size / 2**20} if page.exists() else {})


def make(scratch: str, trace: str, scale: float) -> None:
    if trace.startswith("1e"):
        root, size = f"{scratch}/{trace}", float(trace) * scale
        in_a_process("make", root, size, "bf16", module="benchmarks.report")
    else:
        make_wide(f"{scratch}/{trace}", int(trace))


def forget_slot_order(manifest: Path) -> None:
    """Older versions refuse what they do not know of a router."""
    found = json.loads(manifest.read_text())
    for router in found["routers"]:
        router.pop("slot_order", None)
    found.pop("digest", None)  # of the manifest as it was
    manifest.write_text(json.dumps(found))


def main(scale: float, against: Path | None, only: str) -> None:
    checkouts = {"now": ROOT} | ({"before": against.resolve()} if against else {})
    measured: dict[str, Any] = {"scale": scale}
    print(TABLE.format("", "", "CPU s", "wall s", "peak MiB", "page MiB"))
    with tempfile.TemporaryDirectory() as scratch:
        for label, (trace, arguments, rounds) in CASES.items():
            if only not in label:
                continue
            if not Path(f"{scratch}/{trace}").exists():
                make(scratch, trace, scale)
                if against:
                    forget_slot_order(Path(scratch, trace, "trace.json"))
            page = Path(scratch, "page.html")
            written = [str(page) if a == page.name else a for a in arguments]
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
            # in turn: the machine may be busier at one time than at another
            for _ in range(rounds):
                for name, checkout in checkouts.items():
                    runs[name].append(once(checkout, [f"{scratch}/{trace}", *written], page))
            for name, found in runs.items():
                least = min(found, key=lambda run: run["cpu_s"])
                shown = [f"{least[n]:.1f}" if n in least else "" for n in MEASURED]
                print(TABLE.format(label, name, *shown), flush=True)
            measured[label] = runs
    command = " ".join(["python -m benchmarks.report_command", *sys.argv[1:]])
    facts = machine() | {"command": command}
    print("written to", write_results("report-command", facts, measured))


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--scale", type=float, default=1.0)
    options.add_argument("--against", type=Path, help="a second checkout to measure too")
    options.add_argument("--only", default="", help="the cases whose label holds this")
    main(**vars(options.parse_args()))
