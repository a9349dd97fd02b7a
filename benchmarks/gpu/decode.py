"""Eager decoding of a deep model, where launching takes the host longer than the device needs: time
of the host and of the device apart."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.rivals import OFF, ON, TAP, Workload, a_model, running

STOCK = "batched_mm"  # what `generate` decodes with
RIVALS = (STOCK, TAP, OFF, ON)


def decode(bench: Bench) -> None:
    """48 layers, eager, one token per sequence: wall time per step, how long the host is busy with
    it, how long the device."""
    model = a_model(bench, "Qwen3-MoE", bench.sizes.deep)
    layers = model.config.num_hidden_layers
    for B in bench.sizes.decode[:2]:
        work = Workload(f"decode {B}", B, 1, STOCK)
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in RIVALS}
        for n in range(bench.sizes.rounds[0]):
            for name in RIVALS[n % 4 :] + RIVALS[: n % 4]:
                if not bench.over(f"{layers} layers, {work.name}, {name}, round {n + 1}"):
                    with running(bench, model, name, work, captured=False) as step:
                        rounds[name].append(one_round(bench, step))
        found = {
            name: {what: statistics.median(row[what] for row in rows) for what in rows[0]}
            for name, rows in rounds.items()
            if rows
        }
        bench.figures[work.name] = {"layers": layers, "rounds": rounds}
        report(bench, f"{layers} layers, decode {B}, eager", layers, found)


def one_round(bench: Bench, step: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds per step. Host: until a step is launched, on an idle device. Device: sum of its
    kernels and copies."""
    device, host_ms = bench.device, []
    for _ in range(bench.sizes.decode_steps):
        device.sync()
        began = time.perf_counter()
        step()
        host_ms.append((time.perf_counter() - began) * 1e3)
    device.sync()
    began = time.perf_counter()
    for _ in range(bench.sizes.decode_steps):
        step()
    device.sync()
    wall_ms = (time.perf_counter() - began) * 1e3 / bench.sizes.decode_steps
    launches = device.launches(step)
    return {
        "wall_ms": wall_ms,
        "host_ms": statistics.median(host_ms),
        "device_ms": sum(us for _, us in launches) / 1e3,
        "launches": len(launches),
    }


def report(bench: Bench, title: str, layers: int, found: dict[str, dict[str, float]]) -> None:
    print(
        f"{title:<40}{'wall ms':>10}{'host ms':>10}{'device ms':>11}{'launches':>10}"
        "   µs per layer beyond stock: host, device"
    )
    stock = found.get(STOCK)
    for name, row in found.items():
        beyond = ""
        if stock is not None:
            host, device = (
                (row[what] - stock[what]) * 1e3 / layers for what in ("host_ms", "device_ms")
            )
            beyond = f"   {host:+.1f}, {device:+.1f}"
        print(
            f"  {name:<38}{row['wall_ms']:>10.3f}{row['host_ms']:>10.3f}{row['device_ms']:>11.3f}"
            f"{row['launches']:>10.0f}{beyond}"
        )
    for name in (ON, TAP):
        if stock is not None and name in found:
            ratio = stock["wall_ms"] / found[name]["wall_ms"]
            bench.target(f"{name} ÷ stock: {title}", ratio, least=1.0, nearly=0.97)
