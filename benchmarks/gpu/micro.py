"""The kernels, against the operators that they replace."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, by_graph, host_us
from benchmarks.gpu.correctness import variants
from moe_inspect.capture.hook import kernels
from moe_inspect.capture.rows import RouterRows, ShownRouter


def stock_preparation(ids_TK: Tensor, weights_TK: Tensor, E: int) -> tuple[Tensor, ...]:
    """The index operators of transformers' grouped_mm, around the products."""
    ids_S, order = torch.sort(ids_TK.reshape(-1))
    token, weights_S = order // ids_TK.shape[1], weights_TK.reshape(-1)[order]
    counts = torch.histc(
        ids_S.float() if ids_S.device.type == "cpu" else ids_S.int(), bins=E, min=0, max=E - 1
    )
    offsets, inverse = torch.cumsum(counts, 0, dtype=torch.int32), torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return token, weights_S, offsets, inverse


def stock_combine(y_SH: Tensor, weights_S: Tensor, inverse: Tensor, K: int) -> Tensor:
    return (y_SH * weights_S.unsqueeze(-1))[inverse].view(-1, K, y_SH.shape[1]).sum(1)


def a_choice(bench: Bench, T: int, E: int, K: int) -> tuple[Tensor, Tensor]:
    scores = torch.rand(T, E, device=bench.device.type)
    return scores.topk(K, 1).indices, torch.rand(T, K, device=bench.device.type).bfloat16()


def dispatch_runs(bench: Bench, T: int, E: int, K: int) -> dict[str, list[Callable[[], Any]]]:
    rows = RouterRows(
        [ShownRouter(torch.device(bench.device.type), K, E, E)], [0], ("",), torch.bfloat16
    )
    rows.grow(T)
    (tape,) = rows.tapes[""]
    sets = [a_choice(bench, T, E, K) for _ in range(min(4, bench.sizes.calls))]
    runs: dict[str, list[Callable[[], Any]]] = {
        "stock": [functools.partial(stock_preparation, ids, w, E) for ids, w in sets]
    }
    for launches, block in variants(bench, T * K):
        for name, to in (("off", None), ("on", tape)):
            label = (
                "default"
                if launches is None
                else f"{launches} launches" + (f" of {block}" if block else "")
            )
            ours = functools.partial(kernels.dispatch_triton, launches=launches, block=block)
            runs[f"{label}, record {name}"] = [
                functools.partial(ours, ids, w, E, to) for ids, w in sets
            ]
    runs["record alone"] = [
        functools.partial(kernels.record_triton, tape, ids, w) for ids, w in sets
    ]
    return runs


def combine_runs(
    bench: Bench, T: int, E: int, K: int, H: int
) -> dict[str, list[Callable[[], Any]]]:
    ids, weights = a_choice(bench, T, E, K)
    y_SH = torch.randn(T * K, H, device=ids.device).bfloat16()
    _, weights_S, _, inverse = stock_preparation(ids, weights, E)
    grouped = kernels.dispatch_triton(ids, None, E)
    ours = functools.partial(kernels.combine_triton, y_SH, ids, weights, grouped, y_SH.dtype, E)
    return {
        "stock": [functools.partial(stock_combine, y_SH, weights_S, inverse, K)],
        "combine": [ours],
    }


def micro(bench: Bench) -> None:
    """Microseconds by graph replay, each figure measured in two passes; and the host's time for a
    call."""
    jobs = {
        f"dispatch T{T} E{E} k{K}": (dispatch_runs, (T, E, K)) for T, E, K in bench.sizes.dispatches
    }
    jobs |= {
        f"combine T{T} E{E} k{K} H{H}": (combine_runs, (T, E, K, H))
        for T, E, K, H in bench.sizes.combines
    }
    found: dict[str, dict[str, list[float]]] = bench.figures.setdefault("us", {})
    for turn in ("first", "second"):
        for job, (make, shape) in jobs.items():
            if bench.over(f"{job}, {turn} pass"):
                continue
            runs = make(bench, *shape)
            for name, of in runs.items():
                found.setdefault(job, {}).setdefault(name, []).append(
                    by_graph(bench, of, 5 if make is combine_runs else None)
                )
            if turn == "second":
                host = bench.figures.setdefault("host_us", {}).setdefault(job, {})
                for name in [
                    n
                    for n in runs
                    if n in ("stock", "combine", "record alone") or n.startswith("default")
                ]:
                    host[name] = host_us(bench, runs[name][0])
    for job, figures in found.items():
        print(f"{job:<36}" + f"{'first':>10}{'second':>10}{'stock ÷':>10}{'host':>10}   µs")
        for name, us in figures.items():
            faster = statistics.mean(figures["stock"]) / max(1e-9, statistics.mean(us))
            host = bench.figures.get("host_us", {}).get(job, {}).get(name)
            print(
                f"  {name:<34}"
                + "".join(f"{u:>10.2f}" for u in us)
                + f"{faster:>10.2f}"
                + (f"{host:>10.1f}" if host else "")
            )
    for T, E, K, most in ((8192, 64, 8, 12.0), (16384, 256, 8, 30.0), (64, 64, 8, 6.0)):
        if us := found.get(f"dispatch T{T} E{E} k{K}", {}).get("default, record on"):
            bench.target(
                f"dispatch with record T{T} E{E} k{K}, µs (the slower of {len(us)})",
                max(us),
                most=most,
            )
