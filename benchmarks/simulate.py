"""Speed of the simulations, in million decisions a CPU-second: `python -m benchmarks.simulate [NAME …]`. A benchmark is a function.

"kernel" is the sweep alone, on decisions in memory; "trace" is the whole simulation of a trace on disk, reading included.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

SHAPES = ((8, 2), (64, 8), (128, 8), (256, 8))
TOKENS, ROUTERS = 65_536, 16
Rates = Iterator[tuple[str, float, float | None]]  # what, the rate, what it should reach
BENCHMARKS: dict[str, Callable[[], Rates]] = {}


def benchmark(function: Callable[[], Rates]) -> Callable[[], Rates]:
    BENCHMARKS[function.__name__] = function
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
    from tests.synthetic import write_trace

    ids = [zipf(4 * TOKENS, E, k, seed).astype(np.uint16) for seed in range(2)]
    document = np.arange(4 * TOKENS) // 512
    write_trace(root, [ids[r % 2] for r in range(ROUTERS)], E, document=document, batch_tokens=8192, shard_tokens=TOKENS)
    return root


@benchmark
def capacity() -> Rates:
    from moe_inspect.simulate import kernels
    from moe_inspect.simulate.capacity import capacity as room
    from moe_inspect.simulate.capacity import simulate_capacity

    start_G = np.arange(0, TOKENS + 1, 8192)
    for E, k in SHAPES:
        ids_KT = np.ascontiguousarray(zipf(TOKENS, E, k).T)
        room_GF = np.array([[room(f, 8192, k, E) for f in (1, 1.25, 2)]] * (len(start_G) - 1))
        places = (np.zeros(TOKENS, np.int64), np.zeros((2, TOKENS), np.uint8))

        def sweep(ids_KT: np.ndarray = ids_KT, room_GF: np.ndarray = room_GF, places: tuple = places, E: int = E) -> None:
            sums = (np.zeros((3, 1), np.int64), np.zeros((3, 2, 10), np.int64), np.zeros((len(start_G) - 1, E), np.int32))
            levels = (np.zeros(TOKENS, np.uint8), np.full(TOKENS, 255, np.uint8))
            kernels.overflow(ids_KT, start_G, room_GF, np.zeros(0, np.int64), False, E, *places, *sums, *levels)

        yield f"capacity, three factors, kernel, {k} of {E}", rate(sweep, TOKENS), 20
    for E, k in ((8, 2), (128, 8)):
        with tempfile.TemporaryDirectory() as directory:
            trace = on_disk(Path(directory) / "t", E, k)
            yield f"capacity, three factors, trace, {k} of {E}", rate(partial(simulate_capacity, trace), 4 * TOKENS * ROUTERS, 2), 20


@benchmark
def cache() -> Rates:
    from moe_inspect.simulate import kernels
    from moe_inspect.simulate.cache import POLICIES, Compiled, simulate_cache

    phase_T = np.zeros(TOKENS, np.uint8)
    for name in POLICIES:
        for E, k in SHAPES:
            ids_KT = np.ascontiguousarray(zipf(TOKENS, E, k).T)

            def sweep(ids_KT: np.ndarray = ids_KT, E: int = E, k: int = k, name: str = name) -> None:
                held = Compiled(E, [2 * k], [name])
                if name == "lru":
                    kernels.lru(ids_KT, phase_T, held.rank_E, held.touched_E, held.at_PE, held.cold_P)
                else:
                    getattr(kernels, name)(ids_KT, phase_T, 2 * k, *held.held[name, 2 * k], held.done[name, 2 * k])

            yield f"cache, {name}, kernel, {k} of {E}", rate(sweep, TOKENS), 20 if name == "lru" else None
    for E, k in ((8, 2), (128, 8)):
        with tempfile.TemporaryDirectory() as directory:
            trace = on_disk(Path(directory) / "t", E, k)
            yield f"cache, lru, trace, {k} of {E}", rate(partial(simulate_cache, trace, policies=["lru"]), 4 * TOKENS * ROUTERS, 2), 20


def measure(names: list[str]) -> dict[str, float]:
    """Prints a line a rate, in million decisions a CPU-second; returns them."""
    found = {}
    for name in names or BENCHMARKS:
        for label, reached, bar in BENCHMARKS[name]():
            found[label] = round(reached, 2)
            print(
                f"{label:<66}{reached:>10.1f}   {'' if bar is None else f'≥ {bar} ' + ('yes' if reached >= bar else 'NO')}".rstrip(),
                flush=True,
            )
    return found


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1:])), file=sys.stderr)
