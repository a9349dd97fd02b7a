"""`python -m benchmarks.mismatch_speed [DECISIONS]`: what comparing two traces costs on this
machine, by ids alone and with weights, beside Polars' join on the same answer. Traces of 8 of 128
experts in which one decision in 200 has another expert. Each measurement has a process of its own;
CPU time is that of all threads and includes neither imports nor the making of the traces, and is
the least of some rounds. Prints a table, writes benchmarks/results/mismatch-<machine>.json.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import in_a_process, machine, peak_memory_mib, write_results

EXPERTS, TOP_K, LAYERS = 128, 8, 16
BATCH, SEQUENCE = 16_384, 512
FLIPPED = 0.005
SIZE = 1e8  # decisions
JOINED = 4e6  # decisions of the traces that Polars joins
ROUNDS = 3


def make(root: str, decisions: float, weights: bool, changed: bool) -> None:
    from moe_inspect.trace.schema import Router
    from moe_inspect.trace.writer import Document, RoutedBatch, TraceWriter

    routers = [
        Router(n, "experts", f"layers.{n}", EXPERTS, TOP_K, slot_order="weight")
        for n in range(LAYERS)
    ]
    manifest = {"capture": {"weights": weights}}
    batches = round(decisions / LAYERS / BATCH) or 1
    with TraceWriter(root, manifest, routers, weights=weights) as writer:
        for b, ids in enumerate(_routes(batches, changed)):
            rng = np.random.default_rng([b, 7])
            document = (np.arange(BATCH) // SEQUENCE + b * BATCH // SEQUENCE).astype(np.int32)
            raw = -np.sort(-rng.random((LAYERS, BATCH, TOP_K), np.float32), axis=2)
            writer.write(
                RoutedBatch(
                    b,
                    rng.integers(0, 100_000, BATCH, np.int32),
                    document,
                    document,
                    (np.arange(BATCH) % SEQUENCE).astype(np.int32),
                    (document % 6).astype(np.int32),
                    [f"domain {d}" for d in range(6)],
                    list(ids),
                    list(raw.astype(np.float16).astype(np.float32)) if weights else None,
                    documents=[
                        Document(int(d), f"domain {d % 6}", "synthetic", SEQUENCE)
                        for d in np.unique(document)
                    ],
                )
            )


def _routes(batches: int, changed: bool) -> Iterator[np.ndarray]:
    """uint8 [L, T, K]: a batch; the next ones are it with the experts numbered otherwise."""
    rng = np.random.default_rng(0)
    base = np.argsort(rng.random((LAYERS, BATCH, EXPERTS), np.float32), axis=2)[..., :TOP_K]
    for b in range(batches):
        ids = (base + 5 * b) % EXPERTS
        if changed:
            of_batch = np.random.default_rng([b, 1])
            flip = of_batch.random(ids.shape[:2]) < FLIPPED
            ids[flip, -1] = (ids[flip, -1] + 1) % EXPERTS
        yield ids.astype(np.uint8)


def ours(a: str, b: str, threads: int) -> dict[str, Any]:
    """Every table but those of single experts' load, and their load."""
    import moe_inspect
    from moe_inspect.comparison.charts import Decisions
    from moe_inspect.comparison.result import PairSettings

    first, second = moe_inspect.open_trace(a), moe_inspect.open_trace(b)
    spent = []
    for _ in range(ROUNDS):
        began, cpu = time.perf_counter(), time.process_time()
        data = Decisions(first, second, PairSettings(threads=threads))
        mismatched = data.mismatched
        spent.append((time.perf_counter() - began, time.process_time() - cpu))
    wall, cpu = (min(column) for column in zip(*spent, strict=True))
    return {
        "decisions": data.decisions,
        "mismatched": mismatched,
        "wall_s": wall,
        "cpu_s": cpu,
        "decisions_per_cpu_s": data.decisions / cpu,
        "peak_memory_mib": peak_memory_mib(),
    }


def reading(a: str, b: str, weights: bool) -> dict[str, Any]:
    """What reading the columns of both takes with pyarrow alone, on one thread."""
    import pyarrow.parquet as pq

    columns = [f"expert_{j}" for j in range(TOP_K)]
    columns += [f"weight_{j}" for j in range(TOP_K)] if weights else []
    cpus, rows = [], 0
    for _ in range(ROUNDS):
        cpu, rows = time.process_time(), 0
        for root in (a, b):
            for path in sorted(Path(root, "routing").glob("*.parquet")):
                file = pq.ParquetFile(path, memory_map=True)
                for group in range(file.num_row_groups):
                    rows += len(file.read_row_group(group, columns, use_threads=False))
        cpus.append(time.process_time() - cpu)
    return {"decisions_per_cpu_s": rows / 2 / min(cpus)}


def polars_join(a: str, b: str) -> dict[str, Any]:
    """Decisions with another set of experts, by joining on token and router."""
    import polars as pl

    columns = [f"expert_{j}" for j in range(TOP_K)]
    cpus, mismatched, rows = [], 0, 0
    for _ in range(ROUNDS):
        cpu = time.process_time()
        sides = [
            pl.scan_parquet(f"{root}/routing/*.parquet").select(
                "token", "router", pl.concat_list(columns).list.sort().alias("set")
            )
            for root in (a, b)
        ]
        found = (
            sides[0]
            .join(sides[1], on=["token", "router"])
            .select((pl.col("set") != pl.col("set_right")).sum().alias("mismatched"), pl.len())
            .collect()
        )
        mismatched, rows = found.row(0)
        cpus.append(time.process_time() - cpu)
    return {
        "mismatched": mismatched,
        "decisions_per_cpu_s": rows / min(cpus),
        "peak_memory_mib": peak_memory_mib(),
    }


def main() -> None:
    size = float(sys.argv[1]) if len(sys.argv) > 1 else SIZE
    module, measured = "benchmarks.mismatch_speed", dict[str, Any]()
    for kind, weights in (("ids", False), ("weights", True)):
        with tempfile.TemporaryDirectory() as root:
            for decisions, of in ((min(size, JOINED), "small"), (size, "large"))[weights:]:
                paths = [f"{root}/{of}-{side}" for side in "ab"]
                for path, changed in zip(paths, (False, True), strict=True):
                    in_a_process("make", path, decisions, weights, changed, module=module)
                if of == "small":
                    measured["polars join"] = in_a_process("polars_join", *paths, module=module)
                    measured["ids, small"] = in_a_process("ours", *paths, 1, module=module)
                    same = {measured[x]["mismatched"] for x in ("polars join", "ids, small")}
                    assert len(same) == 1, same
            measured[kind] = in_a_process("ours", *paths, 2, module=module)
            measured[f"{kind}, reading alone"] = in_a_process(
                "reading", *paths, weights, module=module
            )
    for name, row in measured.items():
        rate, peak = row["decisions_per_cpu_s"] / 1e6, row.get("peak_memory_mib")
        print(f"{name:24} {rate:8.2f} M decisions/CPU s", f"{peak:8.0f} MiB" if peak else "")
    facts = machine() | {
        "command": " ".join(["python -m benchmarks.mismatch_speed", *sys.argv[1:]])
    }
    print(f"wrote {write_results('mismatch', facts, measured)}")


if __name__ == "__main__":
    main()
