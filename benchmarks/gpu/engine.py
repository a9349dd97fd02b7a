"""The rows of a serving engine: what its routers keep, and what is taken behind each step."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, by_graph, host_us
from benchmarks.gpu.micro import a_choice
from moe_inspect.capture.engine import rows as code
from moe_inspect.capture.engine.settings import Settings
from moe_inspect.capture.engine.step import Step
from moe_inspect.capture.engine.steps import StepRecorder


def engine(bench: Bench) -> None:
    """A serving engine's rows, by graph replay, beside torch's operators; the host's time."""
    for T, n, E, K, L in bench.sizes.engine:
        name = f"{n} of {T} rows, L{L} E{E} k{K}"
        if not bench.over(name):
            measure(bench, name, T, n, E, K, L)


def measure(bench: Bench, name: str, T: int, n: int, E: int, K: int, L: int) -> None:
    kind, found = bench.device.type, dict[str, list[float]]()
    rows = code.Rows((L, T, K), E, False, torch.device(kind), buffers=True)
    fed = [a_choice(bench, T, E, K) for _ in range(L)]
    tokens = torch.arange(T, device=kind, dtype=torch.int32)
    some = torch.arange(0, n, 100, device=kind)

    def ours() -> None:
        for router, (ids, weights) in enumerate(fed):
            rows.keep(router, ids, weights, weights)

    def plain() -> None:
        for router, of in enumerate(fed):
            code.keep_torch(rows.ids[router], rows.weights[router], *of)

    check(bench, name, rows, fed, ours, n)
    takes = {"counts": (0, None), "counts, every 100th row": (len(some), some), "all": (n, None)}
    for _ in range(2):
        for way, run in (("ours", ours), ("torch", plain)):
            us = by_graph(bench, [run], 1) / L
            found.setdefault(f"kept per router, {way}", []).append(us)
        for what, (m, picked) in takes.items():
            given = n, m, picked, *((tokens, tokens) if m else (None, None))
            take = {"ours": rows.take, "torch": functools.partial(code.take_torch, rows)}
            for way, run in take.items():
                us = by_graph(bench, [functools.partial(run, *given)], 5)
                found.setdefault(f"taken, {what}, {way}", []).append(us)
    bench.figures[name] = {"us": found, "MiB": rows.nbytes / 2**20}
    print(f"{name}: {rows.nbytes / 2**20:.1f} MiB of device memory")
    for what, us in found.items():
        print(f"  {what:<40}" + "".join(f"{u:>10.2f}" for u in us) + "   µs")
        if what.endswith("ours"):
            other = statistics.mean(found[what.replace("ours", "torch")])
            bench.target(
                f"torch ÷ ours: {what[:-6]}, {name}", other / max(1e-9, max(us)), least=1.0
            )
    for what, most, settings in (
        ("counts", 50.0, Settings(metrics=True)),
        ("everything", 150.0, Settings(Path("unused"), metrics=True)),
    ):
        us = host_us(bench, steps(rows, n, settings))
        bench.figures[name][f"host_us, {what}"] = us
        bench.target(f"the engine's thread per step, {what}, µs: {name}", us, most=most)


def check(
    bench: Bench,
    name: str,
    rows: code.Rows,
    fed: list[tuple[Tensor, Tensor]],
    forward: Callable[[], None],
    n: int,
) -> None:
    """Replays a graph of the routers with other choices, padded, and compares what is taken."""
    forward()
    replay = bench.device.graph(forward)
    load_LE, L = np.zeros((len(fed), rows.E), np.int64), len(fed)
    rows.sums.zero_()
    for turn in range(bench.sizes.repeats):
        for ids, weights in fed:
            ids.copy_(ids.roll(turn + 1, 0))
            weights.uniform_()
        replay()
        picked = None if turn % 2 else torch.arange(n - 1, -1, -3, device=rows.device)
        m = n if picked is None else len(picked)
        places = torch.arange(2 * n, device=rows.device).flip(0)
        taken = rows.take(n, m, picked, places.int(), places)
        at = slice(0, n) if picked is None else picked
        wanted = (
            places[at].int(),
            places[at].int(),
            torch.stack([ids[at] for ids, _ in fed]).short(),
            torch.stack([weights[at] for _, weights in fed]).half(),
        )
        for r, (ids, _) in enumerate(fed):
            load_LE[r] += np.bincount(ids[:n].reshape(-1).cpu().numpy(), minlength=rows.E)
        same = all(torch.equal(a, b) for a, b in zip(taken, wanted, strict=False))
        bench.expect(same, f"rows taken behind a replayed graph, {name}, turn {turn}")
    counted = rows.counted()[1].view(L, rows.E).cpu().numpy()
    bench.expect((counted == load_LE).all(), f"counts of replayed graphs, {name}")


def steps(rows: code.Rows, n: int, settings: Settings) -> Callable[[], Any]:
    """A step as the engine's thread sees it; what is queued is thrown away."""
    link: Any = SimpleNamespace(error=None)
    recorder = StepRecorder(rows, settings, lambda _: link)
    tokens = torch.zeros(n, dtype=torch.int32, device=rows.device)
    requests = [f"r{i}" for i in range(n)]
    of = requests, range(n + 1), [0] * n, (), (), tokens, tokens.long()

    def step() -> None:
        recorder.after_step(n, set(), lambda: Step(*of))
        while not recorder.queue.empty():
            recorder.sent += recorder.queue.get().bytes

    return step
