"""What watching a training run costs: `python -m benchmarks.training`.

A step of the bundled recipe (18 windows of 128 tokens, forward, backward, optimizer) with and
without RoutingMonitor, a history on disk and a log every ten steps, in turns in one process on one
thread; CPU time of all its threads. The share of the monitor's own code is measured beside it, as
the ratio of two noisy times says little below one percent.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measuring import machine, write_results
from moe_inspect.training.monitor import RoutingMonitor
from moe_inspect.training.sums import RECENT, DeviceSums, RoutingSums
from tools.demo import train as recipe
from tools.demo.balancing import per_layer_balancing_loss

ROUNDS, STEPS = 8, 10  # rounds of each side; steps per round
EVERY = (1, 10)
LARGE = (61, 256)  # routers and experts of DeepSeek-V3


class Recipe:
    """The recipe's training step, on random tokens."""

    def __init__(self) -> None:
        self.model = recipe.new_model(recipe.VOCABULARY, seed=0).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        rng = np.random.default_rng(0)
        shape = (recipe.WINDOWS_PER_DOMAIN * 6, recipe.WINDOW)
        self.token_WS = torch.from_numpy(rng.integers(2, recipe.VOCABULARY, shape))

    def step(self) -> None:
        output = self.model(input_ids=self.token_WS, output_router_logits=True, use_cache=False)
        loss = recipe.token_losses(output.logits, self.token_WS).mean()
        balance = per_layer_balancing_loss(output.router_logits, recipe.EXPERTS, recipe.TOP_K)
        (loss + recipe.BALANCE_COEFFICIENT * balance).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


@contextlib.contextmanager
def timed_inside(spent: list[float]) -> Iterator[None]:
    """Adds up, in `spent`, the CPU time of the monitor's own functions on the training thread."""
    methods: list[tuple[type, str]] = [(RoutingSums, n) for n in ("begin", "feed", "take", "end")]
    methods.append((RoutingMonitor, "step"))
    kept = {(owner, name): getattr(owner, name) for owner, name in methods}

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[0] += time.thread_time() - started

        return run

    for (owner, name), function in kept.items():
        setattr(owner, name, timed(function))
    try:
        yield
    finally:
        for (owner, name), function in kept.items():
            setattr(owner, name, function)


def steps(of: Recipe, monitor: RoutingMonitor | None) -> float:
    """CPU seconds per step, of all threads of the process."""
    started = time.process_time()
    for _ in range(STEPS):
        of.step()
        if monitor is not None:
            monitor.step()
    return (time.process_time() - started) / STEPS


def measure() -> dict[str, Any]:
    torch.set_num_threads(1)
    of, plain = Recipe(), list[float]()
    watched: dict[int, list[float]] = {every: [] for every in EVERY}
    inside: dict[int, list[float]] = {every: [] for every in EVERY}
    with tempfile.TemporaryDirectory() as folder:
        for n in range(ROUNDS + 1):
            for every in (0, *EVERY) if n % 2 else (*reversed(EVERY), 0):
                if not every:
                    plain.append(steps(of, None))
                    continue
                path = Path(folder) / f"{every}-{n}"
                with RoutingMonitor(of.model, path, every=every, rules=()) as monitor:
                    of.model.zero_grad()
                    watched[every].append(steps(of, monitor))
                spent = [0.0]
                with (
                    timed_inside(spent),
                    RoutingMonitor(of.model, Path(folder) / f"i{every}-{n}", every=every) as again,
                ):
                    steps(of, again)
                inside[every].append(spent[0] / STEPS)
    # the first round loads kernels
    base = statistics.median(plain[1:])
    found: dict[str, Any] = {"plain_s": base}
    for every in EVERY:
        ratios = [w / p for w, p in zip(watched[every][1:], plain[1:], strict=True)]
        own = statistics.median(inside[every][1:])
        found[f"every_{every}"] = {
            "ratio_median": statistics.median(ratios),
            "ratio_quartiles": statistics.quantiles(ratios, n=4),
            "own_ms_per_step": 1000 * own,
            "own_share": own / base,
        }
    return found


def device_bytes(routers: int, experts: int) -> int:
    """Bytes of all sums on a device that holds these routers."""
    sums = vars(DeviceSums(torch.device("cpu"), [experts] * routers)).values()
    flat = [t for value in sums for t in (value if isinstance(value, list) else [value])]
    return sum(t.numel() * t.element_size() for t in flat if isinstance(t, torch.Tensor))


def main() -> None:
    measured = measure()
    measured["device_bytes_61x256"] = device_bytes(*LARGE)
    measured["settings"] = {"rounds": ROUNDS, "steps": STEPS, "recent_steps": RECENT}
    facts = {**machine(), "command": "python -m benchmarks.training"}
    print(measured)
    print(f"wrote {write_results('training', facts, measured)}")


if __name__ == "__main__":
    main()
