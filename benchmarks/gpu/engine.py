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
from moe_inspect.capture.engine.rows import EngineRows
from moe_inspect.capture.engine.settings import Settings
from moe_inspect.capture.engine.step import Schedule
from moe_inspect.capture.engine.steps import StepRecorder
from moe_inspect.capture.rows import TakenPass


def engine(bench: Bench) -> None:
    """A serving engine's rows, by graph replay, beside copies by torch; the host's time."""
    for T, n, E, K, L in bench.sizes.engine:
        name = f"{n} of {T} rows, L{L} E{E} k{K}"
        if not bench.over(name):
            measure(bench, name, T, n, E, K, L)


def measure(bench: Bench, name: str, T: int, n: int, E: int, K: int, L: int) -> None:
    kind, found = bench.device.type, dict[str, list[float]]()
    rows = EngineRows((L, T, K), E, torch.device(kind), compiled=True)
    fed = [a_choice(bench, T, E, K) for _ in range(L)]

    def ours() -> None:
        for router, (ids, weights) in enumerate(fed):
            rows.keep(router, ids, weights, weights)

    def plain() -> None:
        (ids_LTK,), (weights_LTK,) = rows.written(T).values()
        for router, (ids, weights) in enumerate(fed):
            ids_LTK[router].copy_(ids)
            weights_LTK[router].copy_(weights)

    check(bench, name, rows, fed, ours, n)
    for _ in range(2):
        for way, run in (("ours", ours), ("torch", plain)):
            us = by_graph(bench, [run], 1) / L
            found.setdefault(f"kept per router, {way}", []).append(us)
        count = functools.partial(rows.load.add, rows.written(n)["ids"][0])
        found.setdefault("counted", []).append(by_graph(bench, [count], 5))
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
    rows: EngineRows,
    fed: list[tuple[Tensor, Tensor]],
    forward: Callable[[], None],
    n: int,
) -> None:
    """Replays a graph of the routers with other choices, padded, and compares what is taken."""
    forward()
    replay = bench.device.graph(forward)
    _, before_LE = rows.load.so_far()
    load_LE = before_LE.copy()
    for turn in range(bench.sizes.repeats):
        for ids, weights in fed:
            ids.copy_(ids.roll(turn + 1, 0))
            weights.uniform_()
        replay()
        picked = None if turn % 2 else np.arange(n - 1, -1, -3)
        places = torch.arange(2 * n, device=rows.device).flip(0)
        values = rows.written(n)
        rows.load.add(values["ids"][0])
        taken = rows.take(values, picked, places.int(), places, None)
        at = np.arange(n) if picked is None else picked
        wanted = {
            "positions": places[None, at],
            "ids": torch.stack([ids[at] for ids, _ in fed]),
            "weights": torch.stack([weights[at] for _, weights in fed]).half(),
        }
        for r, (ids, _) in enumerate(fed):
            load_LE[r] += np.bincount(ids[:n].reshape(-1).cpu().numpy(), minlength=rows.E)
        same = is_taken(taken, wanted)
        bench.expect(same, f"rows taken behind a replayed graph, {name}, turn {turn}")
    same = bool((rows.load.so_far()[1] == load_LE).all())
    bench.expect(same, f"counts of replayed graphs, {name}")


def is_taken(taken: TakenPass, wanted: dict[str, Tensor]) -> bool:
    taken.has_arrived(wait=True)
    pairs = [(taken.values[name][0], want.cpu()) for name, want in wanted.items()]
    return all(torch.equal(values, want.to(values.dtype)) for values, want in pairs)


def steps(rows: EngineRows, n: int, settings: Settings) -> Callable[[], Any]:
    """A step as the engine's thread sees it; what is queued is thrown away."""
    link: Any = SimpleNamespace(error=None)
    recorder = StepRecorder(rows, settings, lambda _: link)
    tokens = torch.zeros(n, dtype=torch.int32, device=rows.device)
    schedule = Schedule([f"r{i}" for i in range(n)], range(n + 1), [0] * n)

    def step() -> None:
        recorder.after_step(n, set(), lambda: (schedule, tokens, tokens.long()))
        recorder.queue.release(recorder.queue.take())

    return step
