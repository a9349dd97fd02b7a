"""`python -m benchmarks.cluster [ASSIGNMENTS]`: passes over a trace on a dask.distributed cluster
of one worker and of two, each a process with one thread on this machine. Efficiency is time(1) ÷
(2 × time(2)): of the makespan, which needs two idle cores, and of the CPU time of all workers,
which says what sharing the work out adds to it. Every result is compared with this process's, to
the bit; then a worker is killed. Prints the tables of benchmarks/results/README.md; with SIZE
assignments or more, it writes them there, and to benchmarks/results/cluster-<machine>.json.

Workers have loaded their kernels before. What moves is measured on the loopback interface: between
workers, scheduler and client, with whatever else uses that.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import ROOT, machine, peak_memory_mib, write_results
from benchmarks.report import WANTS, make
from benchmarks.run import EXPERTS, LAYERS, TOP_K, stream
from moe_inspect.analysis.tasks import MOST_RUNS, runs_of
from moe_inspect.public import Trace, open_trace

PAGE = ROOT / "benchmarks/results/README.md"
BEGIN, END = "<!-- measured -->", "<!-- end of measured -->"
SIZE = 4e8  # assignments
PAPER = 1e12
MACHINES = (10, 100)  # threads of workers, on paper
SMALL = 2.5e7  # of the trace that workers warm up on
# of the workers: numpy's arrays from memory that they have, not from new pages (docs/import.md)
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
ROUTES_CHANGED = 0.02  # in the trace that is compared


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


def compare(trace: Trace, other: Trace) -> Any:
    from moe_inspect.comparison.charts import Decisions
    from moe_inspect.comparison.result import PairSettings

    return Decisions(trace, other, PairSettings(threads=1)).counts


@dataclass(frozen=True)
class Job:
    """`by`: how the work is shared out. `merged`: whether a task of many shards sends one sum, and
    not something of each shard."""

    by: str
    run: Callable[[Trace, Trace], Any]
    merged: bool = False


JOBS = {
    "report: all but token ids": Job("shards", counts, merged=True),
    "report: by token id": Job("routers", token_ids),
    "compare": Job("shards", compare, merged=True),
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
            add(of.__getstate__())

    add(value)
    return found.hexdigest()


# --- how


def moved_bytes() -> int:
    """Over the loopback interface, so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.strip().startswith("lo:"))


def on_workers(name: str, paths: dict[str, str], n: int, kill_after_s: float = 0) -> dict[str, Any]:
    from distributed import Client, LocalCluster

    options: dict[str, Any] = {"n_workers": n, "threads_per_worker": 1, "dashboard_address": None}
    with (
        LocalCluster(silence_logs=logging.CRITICAL, **options) as cluster,
        Client(cluster) as client,
    ):
        threads: Any = client.nthreads()
        addresses = list[str](threads)
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
        result = JOBS[name].run(trace, other)
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
    answers: Any = client.run(function)
    return list(answers.values())


def warm(name: str, paths: dict[str, str]) -> None:
    """A worker imports and loads what it needs."""
    JOBS[name].run(open_trace(paths["small"]), open_trace(paths["small b"]))


def here(name: str, paths: dict[str, str]) -> dict[str, Any]:
    warm(name, paths)
    wall, cpu = time.perf_counter(), time.process_time()
    result = JOBS[name].run(open_trace(paths["a"]), open_trace(paths["b"]))
    return {
        "makespan_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "digest": digest(result),
    }


def main(assignments: float = SIZE) -> None:
    os.environ.update(ENVIRONMENT)
    measured: dict[str, Any] = {"load_average_before": os.getloadavg()}
    with tempfile.TemporaryDirectory() as scratch:
        paths = {key: f"{scratch}/{key}" for key in ("a", "b", "small", "small b")}
        measured["assignments"] = make(paths["a"], assignments, "bf16")["assignments"]
        make_other(paths["b"], assignments)
        make(paths["small"], SMALL, "bf16")
        make_other(paths["small b"], SMALL)
        a = open_trace(paths["a"])
        measured |= {"shards": a.n_shards, "tokens": a.n_tokens, "routers": len(a.routers)}
        measured |= {
            f"tasks{key}": len(runs_of(open_trace(paths[of])))
            for key, of in (("", "a"), ("_small", "small"))
        }
        measured["bytes"] = sum(f.stat().st_size for f in Path(paths["a"]).rglob("*.parquet"))
        measured["list_mb"] = len(pickle.dumps(a, 5)) / 1e6
        measured["jobs"] = jobs = dict[str, Any]()
        for name in JOBS:
            found: dict[str, Any] = {"here": here(name, paths)}
            found |= {str(n): on_workers(name, paths, n) for n in (1, 2)}
            assert len({of.pop("digest") for of in found.values()}) == 1, f"{name}: other numbers"
            found["small"] = on_workers(
                name, paths | {"a": paths["small"], "b": paths["small b"]}, 2
            )
            one, two = found["1"], found["2"]
            found["efficiency"] = one["makespan_s"] / (2 * two["makespan_s"])
            found["efficiency_of_cpu"] = one["workers_cpu_s"] / two["workers_cpu_s"]
            jobs[name] = found
            print(f"{name}: efficiency {found['efficiency']:.2f}", flush=True)
        name = next(iter(JOBS))
        after_s = jobs[name]["2"]["makespan_s"] / 3
        killed = on_workers(name, paths, 2, kill_after_s=after_s)
        same = killed.pop("digest") == digest(JOBS[name].run(a, a))
        assert same, "a worker that dies changes the numbers"
        measured["a worker killed"] = killed
    measured["load_average_after"] = os.getloadavg()
    facts = machine()
    facts["command"] = f"python -m benchmarks.cluster {assignments:.1e}"
    facts["versions"] |= {name: version(name) for name in ("dask", "distributed")}
    said = page(facts, measured)
    print(said)
    if assignments >= SIZE:
        print(f"written to {write_results('cluster', facts, measured)} and {PAGE.name}")
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{said}{END}{rest.partition(END)[2]}")


def page(facts: dict[str, Any], measured: dict[str, Any]) -> str:
    """Tables of the measurements, and of their projection to PAPER assignments."""
    A, jobs, versions = measured["assignments"], measured["jobs"], facts["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("dask", "numpy", "numba", "pyarrow"))
    busy = max(measured["load_average_before"][0], measured["load_average_after"][0]) > 2.5
    lines = [
        f"{A:.1e} assignments, {measured['tokens']:,} tokens at {measured['routers']} routers, "
        f"{measured['shards']} shards, {measured['bytes'] / 1e9:.2f} GB; {facts['cores']} cores of "
        f"an {facts['processor']}, Python {facts['python']}, {named}; `{facts['command']}`"
        + (
            "; other programs were running, so that makespans say little: look at the CPU time."
            if busy
            else "; nothing else was running."
        ),
        "",
        "| pass | shared out by | here, CPU s | 1 worker, s (CPU s) | 2 workers, s (CPU s) | "
        "efficiency (of CPU) | client, CPU s | moved, MB | peak of a worker, MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in jobs.items():
        one, two = found["1"], found["2"]
        lines.append(
            f"| {name} | {JOBS[name].by} | {found['here']['cpu_s']:.1f} "
            f"| {one['makespan_s']:.1f} ({one['workers_cpu_s']:.1f}) "
            f"| {two['makespan_s']:.1f} ({two['workers_cpu_s']:.1f}) "
            f"| {found['efficiency']:.2f} ({found['efficiency_of_cpu']:.2f}) "
            f"| {two['client_cpu_s']:.1f} | {two['moved_mb']:.0f} | {two['worker_peak_mib']:.0f} |"
        )
    factor = PAPER / A
    shards = round(measured["shards"] * factor)
    tasks, listed_mb = MOST_RUNS, measured["list_mb"] / measured["shards"] * shards
    lines += [
        "",
        f"The same trace of {PAPER:.0e} assignments, on paper: {measured['tokens'] * factor:.1e} "
        f"tokens, {shards:,} shards, {measured['bytes'] * factor / 1e12:.2f} TB; {tasks} tasks by "
        f"shards; {listed_mb:.0f} MB of a list of shards for each worker.",
        "",
        "| pass | CPU time, hours | "
        + " | ".join(f"{n} threads, minutes" for n in MACHINES)
        + " | moved, GB | client, CPU minutes |",
        "|---|---|" + "---|" * len(MACHINES) + "---|---|",
    ]
    for name, found in jobs.items():
        job, one, two = JOBS[name], found["1"], found["2"]
        hours = one["workers_cpu_s"] * factor / 3600
        most = measured["routers"] if job.by == "routers" else tasks
        # beyond what does not grow with the trace, nor with its tasks
        size, small, at = (
            (measured["tasks"], measured["tasks_small"], tasks) if job.merged else (A, SMALL, PAPER)
        )
        client_s, sent_mb = (
            two[of] + max(0.0, two[of] - found["small"][of]) * (at - size) / max(1, size - small)
            for of in ("client_cpu_s", "moved_mb")
        )
        each = 60 * hours / min(1, found["efficiency_of_cpu"])
        times = [max(each / min(n, most), client_s / 60) for n in MACHINES]
        lines.append(
            f"| {name} | {hours:.1f} | "
            + " | ".join(f"{minutes:.0f}" for minutes in times)
            + f" | {sent_mb / 1e3:.1f} | {client_s / 60:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else SIZE)
