"""`python benchmarks/gpu.py`: what recording costs on this machine's CUDA GPU, in at most nine
minutes. Prints tables, the last one of targets; writes every raw figure to
benchmarks/results/gpu-<card>.json. Ends with 1 where anything recorded or computed is wrong.

`--dry-run` goes through the same code at toy size on the CPU, the kernels in Triton's interpreter,
so that no branch runs for the first time on a rented machine. Its figures mean nothing.

Rivals take turns within a round and are compared round by round (a ratio is the median over
rounds): a card's clock drifts. T tokens, K slots, S = T·K, E experts, H hidden, B sequences.
"""

# ruff: noqa: E402 (the interpreter is chosen before triton is imported, the checkout found before moe_inspect is)
from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a rented machine has the checkout, not the package
os.environ["HF_HUB_OFFLINE"] = "1"
if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton looks when it is imported
NEEDED = ("torch", "triton", "transformers", "numpy", "pyarrow", "pandas", "rich", "matplotlib")
if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    sys.exit(
        f"missing here: {', '.join(missing)}; install with: python -m pip install "
        f"{' '.join(missing)}"
    )

import numpy as np
import torch
import transformers
import triton
from torch import Tensor
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

import moe_inspect
from moe_inspect.capture.hook import experts, kernels, ring
from moe_inspect.model.routers import find_routers
from moe_inspect.trace.writer import TraceWriter
from tests.kernel_checks import Case, assert_close, choice

ROUTERS = (
    (8, 2),
    (60, 4),
    (64, 8),
    (128, 8),
    (256, 8),
    (384, 8),
    (512, 10),
)  # E, K of models there are
SKEWS = ("uniform", "zipf", "one-hot")
POISON = 77
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # layers of the real width, few of them
    "Mixtral": (
        "MixtralConfig",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        }
        | {"num_local_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 2},
    ),
    "Qwen3-MoE": (
        "Qwen3MoeConfig",
        {
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
        }
        | {
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "num_hidden_layers": 6,
        },
    ),
    "OLMoE": (
        "OlmoeConfig",
        {
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
        }
        | {"num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 6},
    ),
}
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_attention_heads": 4,
}
SMALL |= {"num_key_value_heads": 4, "head_dim": 64, "num_hidden_layers": 2, "vocab_size": 1024}
TOY = {
    **SMALL,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "head_dim": 8,
    "vocab_size": 64,
}
TOY |= {"num_experts": 8, "num_experts_per_tok": 4}


@dataclass(frozen=True)
class Sizes:
    copy_bytes: int
    T: tuple[int, ...]
    routers: tuple[tuple[int, int], ...]
    blocks: tuple[int, ...]
    repeats: int
    dispatches: tuple[tuple[int, int, int], ...]  # T, E, K
    combines: tuple[tuple[int, int, int, int], ...]  # T, E, K, H
    calls: int  # in a graph
    samples: int  # of a timing
    width: dict[str, Any]  # in place of a family's
    prefill: tuple[int, int]  # B, positions
    decode: tuple[int, ...]  # B
    few: tuple[int, ...]  # B of the sweep of FEW_SLOTS
    cache: int  # positions
    rounds: tuple[int, int]  # at least, at most
    steps: int  # that warm a rival up, and of its turn at least
    turn_s: float  # of a rival in a round
    batches: tuple[
        tuple[int, int], ...
    ]  # B, positions where recorded rows are checked: many slots, and few
    ring_tokens: int  # there: a ring so large that a copy of it shows
    throttled: tuple[int, int, float]  # B, positions, and what the writer sleeps a batch


FULL = Sizes(
    copy_bytes=2**30,
    T=(1, 8, 64, 512, 4096, 8192, 16384),
    routers=ROUTERS,
    blocks=(256, 512, 1024),
    repeats=20,
    dispatches=(
        (1, 64, 8),
        (64, 64, 8),
        (512, 60, 4),
        (8192, 8, 2),
        (8192, 64, 8),
        (8192, 128, 8),
        (16384, 256, 8),
        (16384, 512, 10),
    ),
    combines=((64, 64, 8, 2048), (8192, 8, 2, 4096), (8192, 64, 8, 2048), (16384, 128, 8, 2048)),
    calls=50,
    samples=15,
    width={"vocab_size": 32000},
    prefill=(8, 2048),
    decode=(1, 8, 64),
    few=(1, 2, 4, 8, 16, 32, 64, 128),
    cache=512,
    rounds=(3, 9),
    steps=3,
    turn_s=0.3,
    batches=((4, 100), (2, 4)),
    ring_tokens=6_000_000,
    throttled=(8, 512, 0.2),
)
DRY = Sizes(
    copy_bytes=2**16,
    T=(1, 140),
    routers=((8, 2), (60, 4)),
    blocks=(256,),
    repeats=2,
    dispatches=((64, 64, 8), (140, 8, 2)),
    combines=((4, 8, 2, 40),),
    calls=1,
    samples=1,
    width={**TOY, "num_hidden_layers": 1},
    prefill=(2, 8),
    decode=(1,),
    few=(1, 2),
    cache=32,
    rounds=(1, 1),
    steps=1,
    turn_s=0.0,
    batches=((2, 20), (2, 3)),
    ring_tokens=64,
    throttled=(2, 16, 0.1),
)


# --- the device, and what stands for it in a dry run


class Cuda:
    type, dry = "cuda", False

    def sync(self) -> None:
        torch.cuda.synchronize()

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between_ms(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end)

    def graph(self, run: Callable[[], Any], recorder: Any = None) -> Callable[[], Any]:
        """`run`, which has run before, as a CUDA graph."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def compiled(self, model: Any) -> Any:
        return torch.compile(model, mode="reduce-overhead", dynamic=False)

    def launches(self, run: Callable[[], Any]) -> list[tuple[str, float]]:
        """Kernels, copies and fills on the device in one `run`: name, microseconds."""
        self.sync()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            self.sync()
        on_device = torch.autograd.DeviceType.CUDA
        return [
            (e.name, e.time_range.elapsed_us())
            for e in profile.events()
            if e.device_type == on_device
        ]

    def free(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def peak_mib(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**20

    def pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def card(self) -> dict[str, str]:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = (
            subprocess.run(asked, capture_output=True, text=True).stdout.split()
            if shutil.which("nvidia-smi")
            else []
        )
        return {
            "card": torch.cuda.get_device_name(),
            "driver": found[0] if found else "unknown",
            "cuda": str(torch.version.cuda),
        }


class Cpu:
    """A graph is the function itself, a launch an operator, and nothing that has run took any time
    on a device."""

    type, dry = "cpu", True

    def sync(self) -> None: ...

    def mark(self) -> float:
        return time.perf_counter()

    def between_ms(self, start: float, end: float) -> float:
        return (end - start) * 1e3

    def graph(self, run: Callable[[], Any], recorder: Any = None) -> Callable[[], Any]:
        """As in a replay, no hook of the recorder's runs, and what the kernels record they
        record."""

        def replay() -> None:
            attachment = recorder.attachment
            attachment._bracketed = attachment.scopes[""].open = True
            run()
            attachment._bracketed = attachment.scopes[""].open = False

        return run if recorder is None else replay

    def compiled(self, model: Any) -> Any:
        return torch.compile(model, backend="aot_eager", dynamic=False)

    def launches(self, run: Callable[[], Any]) -> list[tuple[str, float]]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run()
        return [(event.name, 0.0) for event in profile.events()]

    def free(self) -> None: ...

    def peak_mib(self) -> float:
        return 0.0

    def pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def card(self) -> dict[str, str]:
        return {"card": "none (dry run)", "driver": "none", "cuda": "none"}


@dataclass
class Bench:
    """What a section is handed, and what it adds to: figures for the JSON, failures, targets, what
    it had no time for."""

    device: Any
    sizes: Sizes
    sanitized: bool  # a few cases only: a sanitizer is watching, and slow
    deadline: float
    figures: dict[str, Any]
    failures: list[str]
    targets: list[tuple[str, float, str, str]]
    cut: list[str]

    def over(self, what: str) -> bool:
        """Whether the section's time is up; then `what` is said to be left out."""
        if time.perf_counter() < self.deadline:
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
    """Microseconds a call, back to back in a graph, of several input sets in turn: neither the host
    nor the gaps count."""
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


# --- 1: ceilings


@triton.jit
def empty_kernel(x): ...


def ceilings(bench: Bench) -> None:
    """What the machine can do at all."""
    device, size = bench.device, bench.sizes.copy_bytes
    a = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device.type)
    b, host = torch.empty_like(a), device.pinned(size // 16)
    found = bench.figures
    found["copy_gb_per_s"] = (
        2 * size / median_us(bench, lambda: b.copy_(a)) / 1e3
    )  # read and written
    found["to_pinned_host_gb_per_s"] = (
        len(host) / median_us(bench, lambda: host.copy_(a[: len(host)], non_blocking=True)) / 1e3
    )
    found["empty_launch_us"] = by_graph(bench, [lambda: empty_kernel[(1,)](a)])
    found["empty_launch_host_us"] = host_us(bench, lambda: empty_kernel[(1,)](a))
    for name, value in found.items():
        print(f"{name:<40}{value:>12.2f}")


# --- 2: correctness


def a_tape(device: Any, E: int, K: int, T: int, kind: str, bf16: bool) -> tuple[Any, int]:
    """A poisoned tape, the second of three routers' on its ring, and how many of T rows it will
    take."""
    P, pages = 1024, 18
    start = (
        (6 * pages - 1) * P + P - 3 if kind == "across the ring's end" else 5 * pages * P + P - 3
    )
    room = T // 2 if kind == "beyond the limit" else T
    values = pages * P * 3 * K + 1
    on = {"device": device.type}
    ids = torch.full((values,), POISON, dtype=torch.uint8 if E < 256 else torch.int16, **on)
    weights = torch.full(
        (values,), float(POISON), dtype=torch.bfloat16 if bf16 else torch.float16, **on
    )
    state = (
        torch.tensor([11, start, 13], **on),
        torch.tensor([0, 5, 0], **on),
        torch.tensor([start + room], **on),
    )
    enabled = torch.tensor([int(kind != "disabled")], dtype=torch.int32, **on)
    made = kernels.Tape(
        ids,
        weights,
        *state,
        enabled,
        lane=1,
        K=K,
        experts=E,
        base=P * K,
        page_values=P * 3 * K,
        P=P,
        pages=pages,
    )
    return made, room * int(kind != "disabled")


def on_tape(tape: Any, room: int, ids_TK: Tensor, weights_TK: Tensor) -> list[Tensor]:
    """What ids, weights, cursor and dropped of this fresh tape must be afterwards, by plain
    indexing."""
    T, on = len(ids_TK), int(tape.enabled)
    position = int(tape.cursor[1]) + torch.arange(room, device=ids_TK.device)
    at = (
        position // tape.P % tape.pages * tape.page_values + tape.base + position % tape.P * tape.K
    )[:, None]
    at = at + torch.arange(tape.K, device=at.device)
    ids, weights, moved = (
        tape.ids.clone(),
        tape.weights.clone(),
        torch.tensor([0, T * on, 0], device=at.device),
    )
    ids[at] = ids_TK.masked_fill((ids_TK < 0) | (ids_TK >= tape.experts), tape.null_id)[:room].to(
        ids.dtype
    )
    weights[at] = weights_TK[:room].to(weights.dtype)
    return [
        ids,
        weights,
        tape.cursor + moved,
        tape.dropped + moved - torch.tensor([0, room, 0], device=at.device),
    ]


def grouping(ids_TK: Tensor, E: int) -> list[Tensor]:
    """Counts, offsets, permutation, inverse and token by numpy's stable sort."""
    flat = ids_TK.numpy().reshape(-1)
    kind = np.where((flat >= 0) & (flat < E), flat, E)
    order = np.argsort(kind, kind="stable")
    counts, inverse = np.bincount(kind, minlength=E + 1)[:E], np.empty_like(order)
    inverse[order] = np.arange(len(order))
    found = (
        counts,
        np.concatenate([[0], counts.cumsum()]),
        order,
        inverse,
        order // ids_TK.shape[1],
    )
    return [torch.from_numpy(a.astype(np.int32)) for a in found]


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """What a kernel does not write shows."""
    whole = kernels.empty_dispatch
    kernels.empty_dispatch = lambda *a: kernels.Dispatch(
        *(t.fill_(POISON * 1000) for t in whole(*a))
    )
    try:
        yield
    finally:
        kernels.empty_dispatch = whole


def variants(bench: Bench, S: int) -> list[tuple[int | None, int | None]]:
    """Launches and slots a program in which S slots can be dispatched; None: as it chooses."""
    one = [(1, None)] if S <= kernels.ONE_LAUNCH else []
    return [
        (None, None),
        *one,
        *((launches, block) for launches in (2, 3) for block in bench.sizes.blocks),
    ]


def is_same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def check_repeated(
    bench: Bench,
    name: str,
    run: Callable[..., Any],
    fresh: Callable[[], tuple[Any, int]],
    wanted: list[Tensor],
) -> None:
    """What `run` returns and writes onto a fresh tape is right, to the bit, each time."""
    bench.figures["cases"] = bench.figures.get("cases", 0) + 1
    wrong = 0
    for _ in range(bench.sizes.repeats):
        tape, _ = fresh()
        returned = run(tape=tape) or ()
        wrong += not is_same([*returned, tape.ids, tape.weights, tape.cursor, tape.dropped], wanted)
    bench.expect(wrong == 0, f"{name}: {wrong} of {bench.sizes.repeats} times")


def check_combine(
    bench: Bench,
    name: str,
    E: int,
    ids: Tensor,
    weights: Tensor,
    fresh: Callable[[], tuple[Any, int]],
) -> None:
    """Against float64, both of grouped places (those of no expert hold NaN) and of slots, which
    record in the same launch."""
    (T, K), H = ids.shape, 1000
    y_SH = torch.randn(T * K, H, device=ids.device).to(weights.dtype)
    grouped = kernels.Dispatch(*(t.to(ids.device) for t in grouping(ids.cpu(), E)))
    y_SH[int(grouped.offsets[-1]) :] = float("nan")
    rows = y_SH[grouped.inverse.long()].nan_to_num(0.0)
    want = (rows.double().view(T, K, H) * weights.double().unsqueeze(-1)).sum(1)
    found = [
        kernels.combine_triton(y_SH, ids, weights, grouped, torch.float32, E)
        for _ in range(bench.sizes.repeats)
    ]
    if T * K <= kernels.RECORD_BLOCK:
        tape, room = fresh()
        expected = on_tape(tape, room, ids, weights)
        found.append(kernels.combine_triton(rows, ids, weights, None, torch.float32, E, tape))
        bench.expect(
            is_same([tape.ids, tape.weights, tape.cursor, tape.dropped], expected),
            f"combine's record {name}",
        )
    try:
        assert_close(found[0], want, weights.dtype)
    except AssertionError as error:
        bench.expect(False, f"combine {name}: {error}")
    bench.expect(
        all(torch.equal(found[0], other) for other in found),
        f"combine {name} differs from repeat to repeat, or ungrouped",
    )


def correctness(bench: Bench) -> None:
    """Every kernel against a reference, outputs poisoned, before anything is timed."""
    device, sizes = bench.device, bench.sizes
    kinds = ("across pages", "across the ring's end", "beyond the limit", "disabled")
    with poisoned_outputs():
        for n, (T, (E, K), skew) in enumerate(
            (t, r, s) for t in sizes.T for r in sizes.routers for s in SKEWS
        ):
            if bench.over(f"correctness of T{T} E{E} k{K} {skew}"):
                continue
            bf16 = K == 8
            case = Case(
                E,
                K,
                T,
                skew,
                None,
                torch.int64,
                "bfloat16" if bf16 else "float32 as float16",
                "",
                invalid_ids=n % 2 == 1,
            )
            host_ids, host_weights = choice(case)
            ids, weights = host_ids.to(device.type), host_weights.to(device.type)
            wanted = [t.to(device.type) for t in grouping(host_ids, E)]
            fresh = functools.partial(a_tape, device, E, K, T, kinds[n % 4], bf16)
            taped = on_tape(*fresh(), ids, weights)
            name = f"T{T} E{E} k{K} {skew}, tape {kinds[n % 4]}"

            for launches, block in variants(bench, T * K):
                run = functools.partial(
                    kernels.dispatch_triton, ids, weights, E, launches=launches, block=block
                )
                check_repeated(
                    bench,
                    f"dispatch {name}, {launches} launches of {block}",
                    run,
                    fresh,
                    [*wanted, *taped],
                )
            bench.expect(
                is_same(kernels.dispatch_triton(ids, None, E), wanted),
                f"dispatch {name}, not recording",
            )
            record = functools.partial(kernels.record_triton, ids_TK=ids, weights_TK=weights)
            check_repeated(bench, f"record {name}", record, fresh, taped)
            check_combine(bench, name, E, ids, weights, fresh)
    print(
        f"{bench.figures['cases']} cases, {sizes.repeats} repeats each: {len(bench.failures)} wrong"
    )
    if not bench.sanitized:
        sanitize(bench)


def sanitize(bench: Bench) -> None:
    """A few cases once more in a process that compute-sanitizer watches, each tensor an allocation
    of its own."""
    tool = shutil.which("compute-sanitizer")
    if tool is None and not bench.device.dry:
        bench.figures["sanitizer"] = "not found"
    elif not bench.over("compute-sanitizer"):
        # (torch itself asks the driver for what may not be there: API errors are no findings)
        watched = (
            [tool, "--error-exitcode", "9", "--report-api-errors", "no"]
            if tool and not bench.device.dry
            else []
        )
        command = [
            *watched,
            sys.executable,
            str(Path(__file__).resolve()),
            "--only",
            "correctness",
            "--sanitized",
        ]
        command += ["--dry-run"] if bench.device.dry else []
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(
            command, env=environment, start_new_session=True, **output
        ) as process:
            try:
                limit_s = (
                    None
                    if bench.device.dry
                    else max(30.0, min(120.0, bench.deadline - time.perf_counter()))
                )
                said, _ = process.communicate(timeout=limit_s)
                bench.figures["sanitizer"] = "clean" if process.returncode == 0 else said[-2000:]
                bench.expect(
                    process.returncode == 0,
                    f"compute-sanitizer: exit {process.returncode}\n{said[-2000:]}",
                )
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # the tool and what it watches
                bench.figures["sanitizer"] = "did not end in its time"
                bench.cut.append("compute-sanitizer, which did not end in its time")
    print(f"compute-sanitizer: {bench.figures.get('sanitizer', 'cut')}")


# --- 3: kernels, against the operators that they replace


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
    pages = ring.Ring(torch.device(bench.device.type), [K], [E], torch.bfloat16, rows=T)
    pages.limit.fill_(2**62)  # nobody drains it
    tape, sets = (
        pages.tapes[0],
        [a_choice(bench, T, E, K) for _ in range(min(4, bench.sizes.calls))],
    )
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
    """Microseconds by graph replay, each figure measured in two passes; and what the host needs for
    a call."""
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


# --- 4: models

OFF, ON, LOGITS, HOOK = (
    "ours, not recording",
    "ours, recording",
    "stock + output_router_logits",
    "stock + hook, .cpu()",
)
CAPTURABLE = ("grouped_mm", "batched_mm", OFF, ON)  # the others wait for the host


@dataclass(frozen=True)
class Workload:
    name: str
    B: int
    S: int
    stock: str  # what transformers runs: `generate` decodes with batched_mm

    @property
    def rivals(self) -> list[str]:
        decoding = ["batched_mm"] if self.stock == "batched_mm" else []
        return ["stock eager", "grouped_mm", *decoding, OFF, ON, LOGITS, HOOK]


def a_model(bench: Bench, family: str, width: dict[str, Any], **options: Any) -> Any:
    """Random weights of the family's width, but for what `width` says otherwise."""
    name, given = FAMILIES[family]
    kind = getattr(transformers, name)
    known = {k: v for k, v in {**given, **width}.items() if k in given or k == "vocab_size"}
    config = kind(**known, pad_token_id=None, bos_token_id=0, eos_token_id=1, **options)
    torch.manual_seed(0)
    with torch.device(bench.device.type):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def to_host(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What people write: the router's choice, to the host at once."""
    for value in [*args, *kwargs.values()][1:3]:
        value.cpu()


@contextmanager
def running(
    bench: Bench, model: Any, rival: str, work: Workload, captured: bool
) -> Iterator[Callable[[], Any]]:
    """One step of `model` under a rival, warmed up (and captured)."""
    host_ids = torch.randint(
        0, model.config.vocab_size, (work.B, work.S), generator=torch.Generator().manual_seed(0)
    )
    inputs = {"input_ids": host_ids.to(bench.device.type), "logits_to_keep": 1}
    if work.S == 1:
        inputs["past_key_values"] = transformers.StaticCache(
            config=model.config, max_cache_len=bench.sizes.cache
        )
    named = {
        "stock eager": "eager",
        "grouped_mm": "grouped_mm",
        "batched_mm": "batched_mm",
        OFF: experts.NAME,
    }
    model.set_experts_implementation(named.get(rival, work.stock))
    if rival == LOGITS:
        inputs["output_router_logits"] = True

    def call() -> None:
        model(**inputs)

    with ExitStack() as stack:
        if rival == HOOK:
            for site in find_routers(model):
                stack.callback(
                    site.module.register_forward_pre_hook(to_host, with_kwargs=True).remove
                )
        recorder = None
        if rival == ON:
            trace = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "trace"
            recorder = stack.enter_context(
                moe_inspect.record(model, trace, capture="dispatch", ring_tokens=host_ids.numel())
            )
        for _ in range(bench.sizes.steps):
            call()
        step = bench.device.graph(call, recorder) if captured else call
        if captured and recorder is not None:
            replay, announce = (
                step,
                functools.partial(recorder.step, host_ids.numel(), input_ids=host_ids),
            )

            def step() -> None:
                announce()
                replay()

        step()
        yield step


def timed(bench: Bench, step: Callable[[], Any], steps: int) -> tuple[float, list[float]]:
    """Seconds a step by the host's clock, and milliseconds of each by the device's."""
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
        n: {"s_a_step": [], "step_ms": [], "close_s": []} for n in names
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
                row["s_a_step"].append(seconds)
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
    """Tokens a second of one ÷ of the other, round by round; empty where one of them failed."""
    if any("failed" in found.get(name, {"failed": ""}) for name in (ours, theirs)):
        return []
    return [b / a for a, b in zip(found[ours]["s_a_step"], found[theirs]["s_a_step"], strict=True)]


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
        rate = work.B * work.S / statistics.median(row["s_a_step"])
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
        for family in FAMILIES
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
                f"{family}: a copy a slot is faster than grouping at {faster or 'no number of'} "
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


# --- 5: rows recorded by graphs


def routing_of(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """token ids [T], experts and weights [routers·T, K] of a trace."""
    trace = moe_inspect.open_trace(path)
    rows = trace.routing().sort_values(["router", "token"])
    return trace.tokens()["token_id"].to_numpy(), *(
        rows.filter(like=f"{name}_").to_numpy() for name in ("expert", "weight")
    )


def in_common(a: np.ndarray, b: np.ndarray) -> float:
    """Share of assignments that two traces of the same tokens agree on."""
    return float((a[:, :, None] == b[:, None, :]).any(2).mean())


def graphs(bench: Bench) -> None:
    """A CUDA graph replayed by hand and torch.compile's own, with changing inputs: each row against
    an eager tap's."""
    # (attention: stock masks otherwise while a graph is captured, and then rounds otherwise, unless
    # told to be plain)
    width = TOY if bench.device.dry else {**SMALL, "num_experts": 64}
    model = a_model(bench, "Qwen3-MoE", width, attn_implementation="eager")
    for B, S in bench.sizes.batches:
        check_graphs(bench, model, B, S)


def check_graphs(bench: Bench, model: Any, B: int, S: int) -> None:
    device, sizes, generator = bench.device, bench.sizes, torch.Generator().manual_seed(1)
    model.set_experts_implementation(experts.NAME)
    batches = [
        torch.randint(0, model.config.vocab_size, (B, S), generator=generator)
        for _ in range(5 if device.dry else 24)
    ]
    fed = torch.empty_like(batches[0], device=device.type)  # where a graph reads its input
    options = {"capture": "dispatch", "ring_tokens": sizes.ring_tokens}

    def call(network: Any = model) -> None:
        network(input_ids=fed, use_cache=False)

    def tapped(path: Path) -> None:
        with moe_inspect.record(model, path, capture="tap"):
            for batch in batches:
                fed.copy_(batch)
                call()

    def replayed(path: Path) -> None:
        with moe_inspect.record(model, path, **options) as recorder:
            for batch in batches[:3]:
                fed.copy_(batch)
                call()
            replay = device.graph(call, recorder)
            for batch in batches[3:]:
                recorder.step(batch.numel(), input_ids=batch)
                fed.copy_(batch)
                if batch is batches[-1]:
                    check_copies(f"CUDA graph {B}×{S}", recorder, replay)
                else:
                    replay()

    def compiled(path: Path) -> None:
        network = device.compiled(model)
        torch._dynamo.utils.counters.clear()
        with moe_inspect.record(network, path, **options) as recorder:
            for batch in batches:
                fed.copy_(batch)
                torch.compiler.cudagraph_mark_step_begin()
                if batch is batches[-1]:
                    check_copies(
                        f"torch.compile {B}×{S}", recorder, functools.partial(call, network)
                    )
                else:
                    call(network)
        counters = {
            k: dict(v)
            for k, v in torch._dynamo.utils.counters.items()
            if k in ("inductor", "graph_break", "stats")
        }
        skips = counters.get("inductor", {}).get("cudagraph_skips", 0)
        bench.figures[f"dynamo {B}×{S}"] = json.loads(json.dumps(counters, default=str))
        bench.target(f"CUDA graphs that reduce-overhead skipped, {B}×{S}", skips, most=0)
        bench.target(
            f"graph breaks under torch.compile, {B}×{S}",
            sum(counters.get("graph_break", {}).values()),
            most=0,
        )

    def check_copies(way: str, recorder: Any, run: Callable[[], Any]) -> None:
        """No launch of a step may take half as long as a copy of the ring's ids, its smaller part,
        would."""
        a = torch.empty(
            recorder.attachment.sinks[0].tapes[0].ids.nbytes, dtype=torch.uint8, device=device.type
        )
        b = torch.empty_like(a)
        copy_us = median_us(bench, lambda: b.copy_(a))
        launches = device.launches(run)
        name, longest_us = max(launches, key=lambda launch: launch[1])
        bench.figures[f"{way} launches"] = launches
        bench.target(
            f"{way}: longest launch ÷ a copy of the ring's ids ({len(a) / 2**20:.0f} MiB)",
            longest_us / copy_us,
            most=0.5,
        )
        print(
            f"{way}: {len(launches)} launches a step, the longest {longest_us:.0f} µs "
            f"({name[:60]}); a copy of the ring's ids {copy_us:.0f} µs"
        )

    with tempfile.TemporaryDirectory() as scratch:
        tapped(Path(scratch) / "tap")
        tokens, chosen, weights = routing_of(Path(scratch) / "tap")
        L = len(chosen) // len(tokens)
        others = np.roll(chosen.reshape(L, len(tokens), -1), batches[0].numel(), 1).reshape(
            chosen.shape
        )
        bench.expect(
            in_common(chosen, others) < 0.75,
            "batches that route alike: a row in the wrong place would not show",
        )
        for way, record in (("CUDA graph", replayed), ("torch.compile", compiled)):
            path = Path(scratch) / way
            way = f"{way} {B}×{S}"
            if bench.over(way):
                continue
            record(path)
            found_tokens, found, found_weights = routing_of(path)
            complete = np.array_equal(found_tokens, tokens) and found.shape == chosen.shape
            bench.expect(
                complete,
                f"{way}: {len(found):,} rows recorded, not the {len(chosen):,} that an eager tap "
                "records",
            )
            same = in_common(found, chosen) if complete else 0.0
            bench.figures[f"{way} in common with an eager tap"] = same
            print(
                f"{way}: {len(found):,} rows, {same:.4f} of the assignments an eager tap records "
                "of the same inputs"
            )
            # (compiled code rounds otherwise, and near ties fall otherwise; a captured kernel is
            # the same kernel)
            exact = record is compiled or (
                complete
                and np.array_equal(found, chosen)
                and np.array_equal(found_weights, weights)
            )
            bench.expect(
                same >= 0.9 and exact,
                f"{way}: rows differ from an eager tap's ({same:.4f} in common)",
            )


# --- 6: a writer that cannot keep up


def writer(bench: Bench) -> None:
    """A throttled writer: without `drop` nothing is lost, with it what is lost is counted alike
    everywhere."""
    B, S, sleep_s = bench.sizes.throttled
    model = a_model(
        bench,
        "OLMoE",
        TOY if bench.device.dry else {**SMALL, "num_experts": 16},
        attn_implementation="eager",
    )
    batches = [torch.randint(0, model.config.vocab_size, (B, S)) for _ in range(16)]
    stock = TraceWriter._take
    TraceWriter._take = lambda self, batch: (time.sleep(sleep_s), stock(self, batch))[1]
    try:
        for drop in (False, True):
            with tempfile.TemporaryDirectory() as scratch:
                began = time.perf_counter()
                with moe_inspect.record(
                    model, f"{scratch}/t", capture="dispatch", drop=drop, ring_tokens=B * S
                ) as recorder:
                    for batch in batches:
                        model(input_ids=batch.to(bench.device.type), use_cache=False)
                took = time.perf_counter() - began
                on_device = sum(recorder.stacks[""].rings.dropped())
                trace = moe_inspect.open_trace(f"{scratch}/t")
                facts = dict(moe_inspect.report(trace).tables["summary"].to_numpy().tolist())
                L, fed = len(trace.routers), B * S * len(batches)
                row = {
                    "s": took,
                    "fed": fed * L,
                    "written": len(trace.routing()),
                    "dropped_device": on_device,
                }
                row |= {
                    "dropped_manifest": trace.manifest["counts"]["dropped"],
                    "dropped_report": int(facts["dropped"]),
                }
            bench.figures["drop" if drop else "block"] = row
            print(
                f"drop={drop}: "
                + ", ".join(
                    f"{k} {v:,.1f}" if isinstance(v, float) else f"{k} {v:,}"
                    for k, v in row.items()
                )
            )
            agree = (
                on_device
                == row["dropped_manifest"]
                == row["dropped_report"]
                == row["fed"] - row["written"]
            )
            bench.expect(agree, f"drop={drop}: device, manifest, report and trace disagree: {row}")
            bench.expect((on_device > 0) == drop, f"drop={drop}: {on_device:,} decisions dropped")
    finally:
        TraceWriter._take = stock


# --- all of it

SECTIONS: dict[
    str, tuple[Callable[[Bench], None], float]
] = {  # and its seconds; what one leaves over the next may use
    "ceilings": (ceilings, 10.0),
    "correctness": (correctness, 120.0),
    "micro": (micro, 50.0),
    "models": (models, 220.0),
    "graphs": (graphs, 75.0),
    "writer": (writer, 25.0),
}
WARNING = "DRY RUN ON A CPU, AT TOY SIZE: THE FIGURES MEAN NOTHING"


def machine(device: Any, arguments: Sequence[str]) -> dict[str, Any]:
    return {
        **device.card(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in NEEDED},
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/gpu.py", *arguments]),
    }


def print_targets(targets: Sequence[tuple[str, float, str, str]]) -> None:
    print(f"\n=== targets\n{'':<100}{'measured':>10}")
    for what, value, bar, verdict in targets:
        print(f"{what:<100}{value:>10.3f}   {bar:<8} {verdict}")
    print(f"{sum(t[3] == 'yes' for t in targets)} of {len(targets)} met")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="on the CPU, at toy size: only to find out whether all of it runs",
    )
    parser.add_argument(
        "--only", action="append", choices=SECTIONS, help="this section (repeatable)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help=(
            "where the JSON goes; default: benchmarks/results/gpu-<card>.json (none for a dry run)"
        ),
    )
    parser.add_argument("--sanitized", action="store_true", help=argparse.SUPPRESS)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(arguments)
    if not (options.dry_run or torch.cuda.is_available()):
        parser.error("no CUDA GPU here (--dry-run needs none)")
    device = Cpu() if options.dry_run else Cuda()
    sizes = DRY if options.dry_run else FULL
    if options.sanitized:
        few = (
            {"T": DRY.T[-1:], "routers": DRY.routers[-1:]}
            if options.dry_run
            else {"T": (8, 512), "routers": sizes.routers[:2]}
        )
        sizes = replace(sizes, **few, blocks=(256,), repeats=1)
    if options.dry_run:
        print(WARNING)
        torch.set_num_threads(1)
        ring.PAGE_ROWS_CPU = 64
    experts.register()
    facts = machine(device, arguments)
    print(
        ", ".join(
            f"{k} {v}" for k, v in {**facts, **facts["versions"]}.items() if isinstance(v, str)
        )
    )
    out = options.out
    if out is None and not options.dry_run:
        card = "-".join("".join(c if c.isalnum() else " " for c in facts["card"].lower()).split())
        out = ROOT / "benchmarks" / "results" / f"gpu-{card}.json"
    whole: dict[str, Any] = {
        "machine": facts,
        "targets": [],
        "failures": [],
        "cut": [],
        "sections": {},
    }
    began, seconds = time.perf_counter(), 0.0
    for name, (section, given) in SECTIONS.items():
        if options.only and name not in options.only:
            continue
        seconds += given
        deadline = (
            float("inf") if options.dry_run else began + seconds
        )  # a dry run leaves nothing out
        print(f"\n=== {name}: {section.__doc__}", flush=True)
        bench = Bench(
            device,
            sizes,
            options.sanitized,
            deadline,
            {},
            whole["failures"],
            whole["targets"],
            whole["cut"],
        )
        started = time.perf_counter()
        if options.dry_run:  # (interpreted, a model is no faster than the throttled writer)
            kernels.runs_triton = lambda tensor, interpreted=name != "writer": interpreted
        try:
            with torch.no_grad():
                section(bench)
        except (
            Exception
        ) as error:  # the other sections' figures are worth having; it ends with 1 all the same
            traceback.print_exc()
            whole["failures"].append(f"{name}: {type(error).__name__}: {error}")
        print(f"({name} took {time.perf_counter() - started:.0f} s)", flush=True)
        whole["sections"][name] = bench.figures
        if out is not None and not options.sanitized:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
        if name == "correctness" and whole["failures"]:
            print("nothing else is measured: what kernels take that are wrong says nothing")
            break
    print_targets(whole["targets"])
    print(f"left out for want of time: {', '.join(whole['cut']) or 'nothing'}")
    print(f"WRONG: {len(whole['failures'])}" + "".join(f"\n  {what}" for what in whole["failures"]))
    print(WARNING if options.dry_run else f"written to {out}")
    return 1 if whole["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
