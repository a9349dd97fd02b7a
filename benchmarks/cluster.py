"""`python -m benchmarks.cluster [ASSIGNMENTS]`: passes over a trace on a dask.distributed cluster
of one worker and of two, each a process with one thread on this machine. Efficiency is time(1) ÷
(2 × time(2)): of the makespan, which needs two idle cores, and of the CPU time of all workers,
which says what sharing the work out adds to it. Every result is compared with this process's, to
the bit; then a worker is killed. Prints a table, writes benchmarks/results/cluster-<machine>.json.

Workers have loaded their kernels before. What moves is measured on the loopback interface: between
workers, scheduler and client, with whatever else uses that.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import machine, peak_memory_mib, write_results
from benchmarks.report import WANTS, make
from benchmarks.run import EXPERTS, LAYERS, TOP_K, stream
from moe_inspect.trace.reader import Trace, open_trace

SIZE = 4e8  # assignments
SMALL = 2.5e7  # of the trace that workers warm up on
ROUTES_CHANGED = 0.02  # in the trace that is compared
LEAST = 0.8


def make_other(root: str, assignments: float) -> None:
    """The same tokens, of which some have the routes of others."""
    from moe_inspect.trace.schema import Router
    from moe_inspect.trace.writer import TraceWriter

    rng = np.random.default_rng(2)
    routers = [
        Router(r, "experts", f"layers.{r}.mlp.experts", EXPERTS, TOP_K) for r in range(LAYERS)
    ]
    with TraceWriter(root, {}, routers) as writer:
        for batch in stream(round(assignments), "bf16"):
            rows = np.flatnonzero(rng.random(len(batch.token_id)) < ROUTES_CHANGED)
            ids = [of.copy() for of in batch.ids]
            for of in ids:
                of[rows] = of[np.roll(rows, 1)]
            writer.write(replace(batch, ids=ids))


# --- what is measured; each returns what must be the same


def counts(trace: Trace, other: Trace) -> Any:
    from moe_inspect.analysis.counting.engine import count_trace
    from moe_inspect.analysis.counting.select import select

    return count_trace(trace, select(trace), WANTS, threads=1)


def token_ids(trace: Trace, other: Trace) -> Any:
    from moe_inspect.analysis.counting.engine import count_trace
    from moe_inspect.analysis.counting.select import select

    return count_trace(trace, select(trace), {"token_ids"}, threads=1)


def capacity(trace: Trace, other: Trace) -> Any:
    from moe_inspect.simulate.capacity.capacity import simulate_capacity

    return simulate_capacity(trace).tables


def placement(trace: Trace, other: Trace) -> Any:
    from moe_inspect.simulate.placement.placement import simulate_placement

    return simulate_placement(trace, policies=["eplb"]).tables


def cache(trace: Trace, other: Trace) -> Any:
    from moe_inspect.simulate.cache.cache import simulate_cache

    return simulate_cache(trace, policies=["lru"]).tables


def compare(trace: Trace, other: Trace) -> Any:
    from moe_inspect.comparison.data import Options, PairData

    counted = PairData(trace, other, Options(threads=1)).counts
    return {r: [of.mismatch_UX, of.moved_UE, of.flips_EE] for r, of in counted.of.items()}


JOBS: dict[str, tuple[str, Callable[[Trace, Trace], Any]]] = {
    "report: the counting pass": ("shards", counts),
    "report: the pass by token id": ("routers", token_ids),
    "simulate capacity": ("shards", capacity),
    "simulate placement": ("shards", placement),
    "simulate cache": ("routers", cache),
    "compare": ("shards", compare),
}


def digest(value: Any) -> str:
    """Of all numbers in it."""
    found = hashlib.sha256()

    def add(of: Any) -> None:
        if hasattr(of, "to_csv"):
            found.update(of.to_csv().encode())
        elif isinstance(of, np.ndarray):
            kind = np.float64 if of.dtype.kind == "f" else np.int64
            found.update(of.astype(kind).tobytes())
        elif isinstance(of, dict):
            for key in sorted(of, key=repr):
                found.update(repr(key).encode())
                add(of[key])
        elif isinstance(of, (list, tuple)):
            for one in of:
                add(one)
        elif isinstance(of, (int, float, str, type(None))):
            found.update(repr(of).encode())
        elif isinstance(of, frozenset | set):
            add(sorted(map(repr, of)))
        else:
            add(vars(of))

    add(value)
    return found.hexdigest()


# --- how


def moved_bytes() -> int:
    """Over the loopback interface, so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.strip().startswith("lo:"))


def on_workers(name: str, paths: dict[str, str], n: int, kill_after_s: float = 0) -> dict[str, Any]:
    from distributed import Client, LocalCluster

    _, job = JOBS[name]
    with (
        LocalCluster(
            n_workers=n, threads_per_worker=1, dashboard_address=None, silence_logs=logging.CRITICAL
        ) as cluster,
        Client(cluster) as client,
    ):
        addresses: list[str] = list(client.nthreads())
        warmed = [
            client.submit(warm, name, paths, workers=[address], pure=False) for address in addresses
        ]
        for future in warmed:
            future.result()
        trace, other = (open_trace(paths[key], scheduler=client) for key in ("a", "b"))
        if kill_after_s:
            pid = of_each(client, os.getpid)[0]
            threading.Timer(kill_after_s, os.kill, (pid, signal.SIGKILL)).start()
        used = 0.0 if kill_after_s else sum(of_each(client, time.process_time))
        moved, wall, cpu = moved_bytes(), time.perf_counter(), time.process_time()
        result = job(trace, other)
        found = {
            "makespan_s": time.perf_counter() - wall,
            "client_cpu_s": time.process_time() - cpu,
            "moved_mb": (moved_bytes() - moved) / 1e6,
            "digest": digest(result),
        }
        if not kill_after_s:
            found["workers_cpu_s"] = sum(of_each(client, time.process_time)) - used
            found["worker_peak_mib"] = max(of_each(client, peak_memory_mib))
    return found


def of_each(client: Any, function: Callable[[], Any]) -> list[Any]:
    """What a function returns on each worker."""
    return list(client.run(function).values())


def warm(name: str, paths: dict[str, str]) -> None:
    """A worker imports and loads what it needs."""
    JOBS[name][1](open_trace(paths["small"]), open_trace(paths["small b"]))


def here(name: str, paths: dict[str, str]) -> dict[str, Any]:
    warm(name, paths)
    wall, cpu = time.perf_counter(), time.process_time()
    result = JOBS[name][1](open_trace(paths["a"]), open_trace(paths["b"]))
    return {
        "makespan_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "digest": digest(result),
    }


def main(assignments: float = SIZE) -> None:
    measured: dict[str, Any] = {"load_before": os.getloadavg()}
    header = (
        "pass",
        "by",
        "here",
        "1 worker",
        "2 workers",
        "efficiency",
        "of CPU",
        "moved",
        "peak",
    )
    print("{:<30}{:<9}{:>8}{:>10}{:>11}{:>12}{:>8}{:>9}{:>9}".format(*header))
    with tempfile.TemporaryDirectory() as scratch:
        paths = {key: f"{scratch}/{key}" for key in ("a", "b", "small", "small b")}
        measured["assignments"] = make(paths["a"], assignments, "bf16")["assignments"]
        make_other(paths["b"], assignments)
        make(paths["small"], SMALL, "bf16")
        make_other(paths["small b"], SMALL)
        a = open_trace(paths["a"])
        measured |= {"shards": a.n_shards, "tokens": a.n_tokens, "routers": len(a.routers)}
        measured["bytes"] = sum(f.stat().st_size for f in Path(paths["a"]).rglob("*.parquet"))
        for name, (by, _) in JOBS.items():
            found = {"here": here(name, paths)} | {n: on_workers(name, paths, n) for n in (1, 2)}
            assert len({of.pop("digest") for of in found.values()}) == 1, f"{name}: other numbers"
            one, two = found[1], found[2]
            found["efficiency"] = one["makespan_s"] / (2 * two["makespan_s"])
            found["efficiency_of_cpu"] = one["workers_cpu_s"] / two["workers_cpu_s"]
            measured[name] = found
            print(
                f"{name:<30}{by:<9}{found['here']['cpu_s']:>7.1f}s{one['makespan_s']:>9.1f}s"
                f"{two['makespan_s']:>10.1f}s{found['efficiency']:>12.2f}"
                f"{found['efficiency_of_cpu']:>8.2f}{two['moved_mb']:>7.0f}MB"
                f"{two['worker_peak_mib']:>6.0f}MiB",
                flush=True,
            )
        name = next(iter(JOBS))
        after_s = measured[name][2]["makespan_s"] / 3
        killed = on_workers(name, paths, 2, kill_after_s=after_s)
        same = killed.pop("digest") == digest(JOBS[name][1](a, a))
        assert same, "a worker that dies changes the numbers"
        measured["a worker killed"] = killed
        print(f"{name}, a worker killed after {after_s:.1f} s: the same numbers")
    measured["load_after"] = os.getloadavg()
    reached = all(measured[name]["efficiency"] >= LEAST for name in JOBS)
    print(f"efficiency ≥ {LEAST} everywhere: {'yes' if reached else 'NO'}")
    facts = machine()
    facts["command"] = "python -m benchmarks.cluster"
    facts["versions"] |= {name: version(name) for name in ("dask", "distributed")}
    print(f"written to {write_results('cluster', facts, measured)}")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else SIZE)
