"""Speed of the simulations, in million decisions a CPU-second, and what placement comes to: `python
-m benchmarks.simulate [NAME …]`. A benchmark is a function. Prints a table, writes
benchmarks/results/simulate-[NAME-…]<machine>.json.

"kernel" is the sweep alone, on decisions in memory; "trace" is the whole simulation of a trace on
disk, reading included.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

SHAPES = ((8, 2), (64, 8), (128, 8), (256, 8))
TOKENS, ROUTERS = 65_536, 16
Rates = Iterator[tuple[str, float, float | None]]  # what, the rate, what it should reach
# what, the figure, what it should be, whether it is
Figures = Iterator[tuple[str, float, str, bool | None]]
BENCHMARKS: dict[str, Callable[[], Figures]] = {}


def figures(function: Callable[[], Figures]) -> Callable[[], Figures]:
    """Registers what yields figures of any kind."""
    BENCHMARKS[function.__name__] = function
    return function


def benchmark(function: Callable[[], Rates]) -> Callable[[], Rates]:
    """Registers what yields rates, in million decisions a CPU-second."""

    def judged() -> Figures:
        for label, reached, bar in function():
            yield label, reached, f"≥ {bar}" if bar else "", reached >= bar if bar else None

    BENCHMARKS[function.__name__] = judged
    return function


def zipf(T: int, E: int, k: int, seed: int = 0) -> np.ndarray:
    """k distinct experts a token, the load of expert e as 1/√(e+1). int16 [T, K]"""
    noise_TE = np.random.default_rng(seed).gumbel(size=(T, E))
    return np.argsort(0.5 * np.log(np.arange(1, E + 1)) - noise_TE, axis=1)[:, :k].astype(np.int16)


def rate(run: Callable[[], object], decisions: int, times: int = 5) -> float:
    """Million decisions a CPU-second, the best of some runs after one that loads and compiles."""
    run()
    best = float("inf")
    for _ in range(times):
        began = time.process_time()
        run()
        best = min(best, time.process_time() - began)
    return decisions / best / 1e6


def on_disk(root: Path, E: int, k: int) -> Path:
    from tests.support.synthetic import write_trace

    ids = [zipf(4 * TOKENS, E, k, seed).astype(np.uint16) for seed in range(2)]
    document = np.arange(4 * TOKENS) // 512
    write_trace(
        root,
        [ids[r % 2] for r in range(ROUTERS)],
        E,
        document=document,
        batch_tokens=8192,
        shard_tokens=TOKENS,
    )
    return root


def on_traces(name: str, simulate: Callable[..., object], **options: Any) -> Rates:
    """Rates of a simulation of traces on disk."""
    for E, k in ((8, 2), (128, 8)):
        with tempfile.TemporaryDirectory() as directory:
            trace = on_disk(Path(directory) / "t", E, k)
            reached = rate(partial(simulate, trace, **options), 4 * TOKENS * ROUTERS, 2)
        yield f"{name}, trace, {k} of {E}", reached, 20


@benchmark
def capacity() -> Rates:
    from moe_inspect.simulate import kernels_numba
    from moe_inspect.simulate.capacity import levels
    from moe_inspect.simulate.routing import simulate_routing
    from moe_inspect.simulate.shards import expert_capacity

    start_G = np.arange(0, TOKENS + 1, 8192)
    of_G = np.zeros(len(start_G) - 1, np.int64)
    for E, k in SHAPES:
        ids_KT = np.ascontiguousarray(zipf(TOKENS, E, k).T)
        level_SC = levels(np.array([[expert_capacity(f, 8192, k, E) for f in (1, 1.25, 2)]]), 8192)

        def sweep(ids_KT: np.ndarray = ids_KT, level_SC: np.ndarray = level_SC, E: int = E) -> None:
            filled = np.zeros((len(of_G), E), np.int32), np.empty(ids_KT.shape, np.uint8)
            kernels_numba.queue(
                ids_KT, start_G, of_G, level_SC, np.zeros(0, np.int64), False, *filled
            )

        yield f"capacity, three factors, kernel, {k} of {E}", rate(sweep, TOKENS), 20
    yield from on_traces("capacity, three factors", simulate_routing)


@benchmark
def cache() -> Rates:
    from moe_inspect.simulate.cache import POLICIES, Cache, simulate_cache

    phase_T = np.zeros(TOKENS, np.uint8)
    for name in POLICIES:
        for E, k in SHAPES:
            ids_KT = np.ascontiguousarray(zipf(TOKENS, E, k).T)

            def sweep(
                ids_KT: np.ndarray = ids_KT, E: int = E, k: int = k, name: str = name
            ) -> None:
                Cache(E, [2 * k], [name]).feed(ids_KT, phase_T)

            yield (
                f"cache, {name}, kernel, {k} of {E}",
                rate(sweep, TOKENS),
                20 if name == "lru" else None,
            )
    yield from on_traces("cache, lru", simulate_cache, policies=["lru"])


@benchmark
def decode() -> Rates:
    from moe_inspect.simulate.decode import DecodeSteps, simulate_decode

    position_T, before_T = np.arange(TOKENS) % 512, np.full(TOKENS, -1)
    for E, k in SHAPES:
        ids_KT = np.ascontiguousarray(zipf(TOKENS, E, k).T)
        sweep = partial(
            lambda ids_KT, E: DecodeSteps(E, [1, 8, 32, 128]).add(ids_KT, position_T, before_T),
            ids_KT,
            E,
        )
        yield f"decode, four batch sizes, kernel, {k} of {E}", rate(sweep, TOKENS), 20
    yield from on_traces("decode, four batch sizes", simulate_decode)


@benchmark
def placement() -> Rates:
    """Evaluation: the load of every expert in every window, and the GPUs that every token
    reaches."""
    from moe_inspect.simulate.placement.placement import POLICIES, simulate_placement
    from moe_inspect.simulate.placement.policies import Layout, shares
    from moe_inspect.simulate.placement.windows import reached, window_loads

    window_T = np.arange(TOKENS) // 4096
    for E, k in SHAPES:
        ids_KT, layout = np.ascontiguousarray(zipf(TOKENS, E, k).T), Layout(E * 9 // 8 // 4 * 4, 4)
        load_E = np.bincount(ids_KT.ravel(), minlength=E)
        plan = shares(POLICIES["local-search"](load_E, layout), E, 4)

        def sweep(ids_KT: np.ndarray = ids_KT, plan: np.ndarray = plan, E: int = E) -> None:
            window_loads(ids_KT, window_T, E)
            reached([plan], ids_KT)

        yield f"placement, a plan evaluated, kernel, {k} of {E}", rate(sweep, TOKENS), 20
    how: dict[str, Any] = {"gpus": 4, "policies": ["eplb"]}
    yield from on_traces("placement, a plan evaluated", simulate_placement, **how)


@figures
def plans() -> Figures:
    """58 layers of 256 experts into 288 slots on 32 GPUs in 4 nodes."""
    from moe_inspect.simulate.placement.placement import POLICIES
    from moe_inspect.simulate.placement.policies import Layout

    load_LE = np.random.default_rng(0).zipf(1.2, (58, 256)).clip(max=10**5)
    spent = {}
    for name, most in (("eplb", 1), ("local-search", 10)):
        began = time.process_time()
        for load_E in load_LE:
            POLICIES[name](load_E, Layout(288, 32, 4, 8))
        spent[name] = time.process_time() - began
        yield (
            f"{name}, 58 x 256 experts into 288 slots, CPU-seconds",
            spent[name],
            f"≤ {most}",
            spent[name] <= most,
        )
    try:  # eplb.py of github.com/deepseek-ai/EPLB, where it is on the path: no package index has it
        import torch
        from eplb import rebalance_experts  # pyright: ignore[reportMissingImports]
    except ImportError:
        return
    began = time.process_time()
    rebalance_experts(torch.tensor(load_LE, dtype=torch.float32), 288, 8, 4, 32)
    ratio = spent["eplb"] / (time.process_time() - began)
    yield "eplb, CPU time ÷ that of the reference on torch", ratio, "≤ 1", ratio <= 1


@figures
def balance() -> Figures:
    """local-search against the better EPLB, on the loads that both are fitted to: 1,000 random
    Zipf loads in random layouts."""
    from moe_inspect.simulate.placement.placement import POLICIES
    from moe_inspect.simulate.placement.policies import Layout, colocated, shares
    from tests.support.exact import fits_apart

    rng = np.random.default_rng(2026)
    cannot = "heavier, as all apart is"  # every placement that keeps replicas apart was tried
    count = dict.fromkeys(("lighter", "equal", "heavier", cannot, "replicas on one GPU"), 0)
    for _ in range(1_000):
        E, gpus = int(rng.choice([8, 16, 32, 64, 128, 256])), int(rng.choice([2, 4, 8, 16, 32]))
        room = -(-E // gpus)
        layout = Layout(gpus * int(rng.integers(room, room + 3)), gpus, 2, 4)
        share_E = rng.permutation(np.arange(1, E + 1) ** -rng.uniform(0.1, 2.0))
        load_E = rng.multinomial(100_000, share_E / share_E.sum())
        plan_of = {
            name: POLICIES[name](load_E, layout) for name in ("local-search", "eplb", "eplb-global")
        }
        most = {
            name: float((load_E @ shares(plan, E, gpus)).max()) for name, plan in plan_of.items()
        }
        lighter = min(("eplb", "eplb-global"), key=most.__getitem__)
        how = "lighter" if most["local-search"] < most[lighter] * (1 - 1e-6) else "equal"
        if most["local-search"] > most[lighter] * (1 + 1e-9):
            how = (
                cannot
                if E == 8 and not fits_apart(load_E, layout.slots, gpus, most[lighter] * (1 + 1e-9))
                else "heavier"
            )
        count[how] += 1
        if layout.slots // gpus < E:  # else every GPU has every expert
            count["replicas on one GPU"] += colocated(plan_of["local-search"], gpus)
    for name, number in count.items():
        bar = name in ("heavier", "replicas on one GPU")
        yield (
            f"local-search against EPLB, 1,000 Zipf loads: {name}",
            number,
            "≤ 0" if bar else "",
            number == 0 if bar else None,
        )


@figures
def drift() -> Figures:
    """Placements of 256 experts in 288 slots on 32 GPUs, fitted to 32 windows and judged on the
    next 32: the mean over windows and layers of busiest ÷ mean GPU."""
    from benchmarks.flashlb import flashlb
    from moe_inspect.simulate.placement.placement import POLICIES
    from moe_inspect.simulate.placement.policies import Layout
    from tests.support.drift import CASES, drifting, mean_over_windows

    layers, windows, gpus, layout, spent = 60, 32, 32, Layout(288, 32), 0.0
    ahead = dict.fromkeys(("eplb", "flashlb"), 0.0)
    for case, how in CASES.items():
        judged, static = {name: [] for name in ("eplb", "flashlb", "local-search")}, []
        for layer in range(layers):
            load_WE = drifting(layer, 256, 2 * windows, *how)
            seen_WE, later_WE = load_WE[:windows], load_WE[windows:]
            plans = {
                "eplb": POLICIES["eplb-global"](seen_WE, layout),
                "flashlb": flashlb(seen_WE, layout.slots, gpus),
            }
            began = time.process_time()
            plans["local-search"] = POLICIES["local-search"](seen_WE, layout)
            spent += time.process_time() - began
            for name, plan in plans.items():
                judged[name].append(mean_over_windows(plan, later_WE, gpus))
            static.append(
                [
                    mean_over_windows(plans[name], seen_WE.sum(0, keepdims=True), gpus)
                    for name in ("local-search", "eplb")
                ]
            )
        mean = {name: float(np.mean(found)) for name, found in judged.items()}
        error = float(np.std(np.subtract(judged["local-search"], judged["flashlb"])) / layers**0.5)
        for name, found in judged.items():
            fine = None
            if name == "local-search":
                fine = (
                    mean["local-search"] <= mean["eplb"]
                    and mean["local-search"] <= mean["flashlb"] + error
                )
            yield (
                f"{case}, held out: {name}",
                mean[name],
                "≤ eplb, ≤ flashlb + its standard error" if name == "local-search" else "",
                fine,
            )
            if name != "local-search":
                won = float(np.mean(np.less(judged["local-search"], found)))
                ahead[name] += won / len(CASES)
                yield (
                    f"{case}, held out: layers on which local-search is ahead of {name}",
                    won,
                    "",
                    None,
                )
        lighter = float(np.mean([searched <= eplb * (1 + 1e-9) for searched, eplb in static]))
        yield (
            f"{case}, fitted part: layers on which local-search ≤ eplb",
            lighter,
            "≥ 0.99",
            lighter >= 0.99,
        )
    for name, share in ahead.items():
        yield (
            f"all four, held out: layers on which local-search is ahead of {name}",
            share,
            "≥ 0.6" if name == "eplb" else "",
            share >= 0.6 if name == "eplb" else None,
        )
    spent = spent / layers / len(CASES) * 58
    yield "local-search on 32 windows of 58 x 256 experts, CPU-seconds", spent, "≤ 10", spent <= 10


def measure(names: Sequence[str] = ()) -> dict[str, float]:
    """Prints a line a figure; returns them."""
    found = {}
    for name in names or BENCHMARKS:
        for label, figure, bar, fine in BENCHMARKS[name]():
            found[label] = round(figure, 3)
            verdict = "" if fine is None else "yes" if fine else "NO"
            print(f"{label:<66}{figure:>10.4g}   {bar} {verdict}".rstrip(), flush=True)
    return found


def main(names: Sequence[str]) -> None:
    from benchmarks.measuring import RESULTS, machine

    measured, facts = (
        measure(names),
        machine() | {"command": " ".join(["python -m benchmarks.simulate", *names])},
    )
    name = "-".join(
        f"{facts['processor']} {facts['cores']} cores".lower().replace("(r)", "").split()
    )
    RESULTS.mkdir(parents=True, exist_ok=True)
    machine = "".join(c for c in name if c.isalnum() or c == "-")
    target = RESULTS / f"{'-'.join(['simulate', *names])}-{machine}.json"
    target.write_text(
        json.dumps({"machine": facts, "measured": measured}, indent=1, ensure_ascii=False) + "\n"
    )
    print(f"written to {target}")


if __name__ == "__main__":
    main(sys.argv[1:])
