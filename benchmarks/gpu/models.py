"""Few-layer models: ours against what transformers runs, and other ways to get the decisions."""

from __future__ import annotations

import functools
import statistics
import time
import traceback
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

from benchmarks.gpu.bench import Bench, by_graph, host_us
from benchmarks.gpu.micro import a_choice
from benchmarks.gpu.rivals import CAPTURABLE, HOOK, LOGITS, OFF, ON, Workload, a_model, running
from moe_inspect.capture.hook import experts
from moe_inspect.model.find import find_routers


def timed(bench: Bench, step: Callable[[], Any], steps: int) -> tuple[float, list[float]]:
    """Seconds per step by the host's clock, and milliseconds of each step by the device's."""
    device = bench.device
    device.sync()
    began = time.perf_counter()
    marks = [device.mark()]
    for _ in range(steps):
        step()
        marks.append(device.mark())
    device.sync()
    return (time.perf_counter() - began) / steps, [
        device.between_ms(a, b) for a, b in pairwise(marks)
    ]


def contest(
    bench: Bench, model: Any, work: Workload, captured: bool, until: float
) -> dict[str, dict[str, Any]]:
    """Every rival in each round, another one first each time; rounds until the time is up."""
    device, sizes = bench.device, bench.sizes
    names = [r for r in work.rivals if r in CAPTURABLE or not captured]
    found: dict[str, dict[str, Any]] = {
        n: {"s_per_step": [], "step_ms": [], "close_s": []} for n in names
    }
    done = 0
    while done < sizes.rounds[0] or (done < sizes.rounds[1] and time.perf_counter() < until):
        for name in names[done % len(names) :] + names[: done % len(names)]:
            row = found[name]
            if "failed" in row:
                continue
            step = None  # the last one's graph holds memory
            device.free()
            try:
                with running(bench, model, name, work, captured) as step:
                    if "steps" not in row:
                        once, _ = timed(bench, step, 1)
                        row["steps"] = max(
                            sizes.steps, min(sizes.cache - 20, int(sizes.turn_s / once))
                        )
                        row["launches"] = None if captured else len(device.launches(step))
                    seconds, each_ms = timed(bench, step, row["steps"])
                    began = time.perf_counter()
                row["close_s"].append(time.perf_counter() - began)
                row["s_per_step"].append(seconds)
                row["step_ms"] += each_ms
                row["peak_mib"] = max(row.get("peak_mib", 0.0), device.peak_mib())
            except torch.OutOfMemoryError:
                row["failed"] = "out of memory"
            except Exception as error:  # the other rivals' figures are worth having
                traceback.print_exc()
                row["failed"] = f"{type(error).__name__}: {error}"
                bench.expect(False, f"{name}, {work.name}: {row['failed']}")
        done += 1
    for row in found.values():  # of the steps of all rounds
        row["step_ms"] = {
            f"p{q}": float(np.percentile(row["step_ms"], q))
            for q in (0, 25, 50, 75, 99, 100)
            if row["step_ms"]
        }
    return found


def ratios(found: dict[str, dict[str, Any]], ours: str, theirs: str) -> list[float]:
    """Tokens per second of one ÷ of the other, round by round; empty where one of them failed."""
    if any("failed" in found.get(name, {"failed": ""}) for name in (ours, theirs)):
        return []
    return [
        b / a for a, b in zip(found[ours]["s_per_step"], found[theirs]["s_per_step"], strict=True)
    ]


def report_contest(
    bench: Bench, title: str, work: Workload, found: dict[str, dict[str, Any]]
) -> None:
    print(
        f"{title:<50}{'tokens/s':>12}{'p50 ms':>10}{'p99 ms':>10}{'peak MiB':>10}{'launches':>10} "
        f"  ÷ {work.stock} (min–max)"
    )
    for name, row in found.items():
        if "failed" in row:
            print(f"  {name:<48}{row['failed']}")
            continue
        p50, p99 = row["step_ms"]["p50"], row["step_ms"]["p99"]
        spread = ratios(found, name, work.stock) or [float("nan")]
        rate = work.B * work.S / statistics.median(row["s_per_step"])
        print(
            "  "
            f"{name:<48}{rate:>12,.0f}{p50:>10.3f}{p99:>10.3f}{row['peak_mib']:>10,.0f}"
            f"{row['launches'] or '–':>10}"
            f"   {statistics.median(spread):.3f} ({min(spread):.3f}–{max(spread):.3f})"
        )
    for rival, least, nearly, says in (
        (work.stock, 1.0, 0.98, "traced ÷ untraced"),
        (OFF, 0.995, None, "record on ÷ off"),
        (LOGITS, 1.0, None, "traced ÷ output_router_logits"),
        (HOOK, 1.0, None, "traced ÷ hook with .cpu()"),
    ):
        if each := ratios(found, ON, rival):
            bench.target(
                f"{says}: {title} ({min(each):.3f}–{max(each):.3f})",
                statistics.median(each),
                least=least,
                nearly=nearly,
            )


def few_slots(bench: Bench, model: Any) -> list[dict[str, Any]]:
    """One experts module with few tokens: from how many slots on grouping is faster than a copy of
    each slot's expert."""
    module, kept, rows = find_routers(model)[0].module, experts.are_few, []
    E, K = module.num_experts, model.config.num_experts_per_tok

    def ours(few: bool, *given: Tensor) -> Tensor:
        experts.are_few = lambda slots, experts: few
        return experts.experts_forward(module, *given)

    ways = {"stock grouped": functools.partial(grouped_mm_experts_forward, module)}
    ways |= {"stock batched": functools.partial(batched_mm_experts_forward, module)}
    ways |= {"grouped": functools.partial(ours, False), "copied": functools.partial(ours, True)}
    try:
        for B in bench.sizes.few:
            hidden = torch.randn(B, model.config.hidden_size, device=bench.device.type).bfloat16()
            given, row = (hidden, *a_choice(bench, B, E, K)), {"tokens": B, "slots": B * K}
            for name, way in ways.items():
                run = functools.partial(way, *given)
                bench.device.free()
                try:
                    row[f"{name} us"], row[f"{name} host us"] = (
                        by_graph(bench, [run], 2),
                        host_us(bench, run, 20),
                    )
                except torch.OutOfMemoryError:
                    row[f"{name} us"] = "out of memory"
            rows.append(row)
    finally:
        experts.are_few = kept
    return rows


def models(bench: Bench) -> None:
    """Few-layer random models in bf16: a forward pass of a prompt, a step of decoding."""
    sizes = bench.sizes
    prefill = Workload(
        f"prefill {sizes.prefill[0]}×{sizes.prefill[1]}", *sizes.prefill, "grouped_mm"
    )
    works = [prefill, *(Workload(f"decode {B}", B, 1, "batched_mm") for B in sizes.decode)]
    jobs = [
        (family, work, captured)
        for family in sizes.families
        for work in works
        for captured in (False, True)
    ]
    loaded, model = "", None
    for n, (family, work, captured) in enumerate(jobs):
        title = f"{family} {work.name} {'CUDA graph' if captured else 'eager'}"
        if bench.over(title):
            continue
        if loaded != family:
            model = None  # before the next one is made
            bench.device.free()
            model, loaded = a_model(bench, family, sizes.width), family
            bench.figures[f"{family} few slots"] = rows = few_slots(bench, model)
            faster = [
                r["slots"]
                for r in rows
                if r["copied us"] != "out of memory" and r["copied us"] <= r["grouped us"]
            ]
            print(
                f"{family}: a copy per slot is faster than grouping at {faster or 'no number of'} "
                f"slots (FEW_SLOTS is {experts.FEW_SLOTS})"
            )
            for row in rows:
                print(
                    "  "
                    + ", ".join(
                        f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}"
                        for k, v in row.items()
                    )
                )
        now = time.perf_counter()
        found = contest(
            bench, model, work, captured, now + (bench.deadline - now) / (len(jobs) - n)
        )
        bench.figures[title] = found
        report_contest(bench, title, work, found)
