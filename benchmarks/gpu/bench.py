"""What the sections share: their settings and results, and how a call is timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.sizes import Sizes


@dataclass
class Bench:
    """What a section is given, and what it adds to: figures for the JSON, failures, targets, what
    it had no time for."""

    device: Any
    sizes: Sizes
    sanitized: bool  # a few cases only: a sanitizer is watching, and slow
    deadline: float
    figures: dict[str, Any]
    failures: list[str]
    targets: list[tuple[str, float, str, str]]
    cut: list[str]

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.perf_counter()

    def over(self, what: str) -> bool:
        """Whether the section's time is up; then `what` is said to be left out."""
        if self.seconds_left > 0:
            return False
        self.cut.append(what)
        print(f"CUT, no time left: {what}")
        return True

    def expect(self, holds: bool, what: str) -> None:
        if not holds:
            self.failures.append(what)
            print(f"WRONG: {what}")

    def target(
        self,
        what: str,
        value: float,
        least: float | None = None,
        most: float | None = None,
        nearly: float | None = None,
    ) -> None:
        fine = (least is None or value >= least) and (most is None or value <= most)
        close = nearly is not None and value >= nearly
        bar = f"≤ {most:g}" if least is None else f"≥ {least:g}"
        self.targets.append(
            (
                what,
                value,
                bar,
                "yes" if fine else f"NO (the least, {nearly:g}, holds)" if close else "NO",
            )
        )


def median_us(bench: Bench, run: Callable[[], Any]) -> float:
    """Median microseconds of a call on the device."""
    device, found = bench.device, []
    run()
    for _ in range(bench.sizes.samples):
        start = device.mark()
        run()
        end = device.mark()
        device.sync()
        found.append(device.between_ms(start, end) * 1e3)
    return statistics.median(found)


def by_graph(bench: Bench, runs: Sequence[Callable[[], Any]], calls: int | None = None) -> float:
    """Microseconds per call, back to back in a graph, of several input sets in turn: neither the
    host nor the gaps count."""
    calls = calls or bench.sizes.calls
    for run in runs:
        run()
    return (
        median_us(bench, bench.device.graph(lambda: [runs[n % len(runs)]() for n in range(calls)]))
        / calls
    )


def host_us(bench: Bench, run: Callable[[], Any], calls: int = 100) -> float:
    """Microseconds that the host is busy with a call, in eager: few enough calls that it never
    waits for the device."""
    calls = 2 if bench.device.dry else calls
    run()
    bench.device.sync()
    began = time.perf_counter()
    for _ in range(calls):
        run()
    took = time.perf_counter() - began
    bench.device.sync()
    return took / calls * 1e6
