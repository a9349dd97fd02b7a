"""The Triton kernels on each GPU of this machine: the self-check, and what a launch costs the
host."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from moe_inspect.capture.hook import kernels
from moe_inspect.capture.hook.ring import PAGE_ROWS, Ring
from moe_inspect.capture.hook.selfcheck.check import Variant, device_name, wrong_with

SHAPES = ((64, 8), (256, 8))  # E, K
LAUNCHES = 200  # the queue of a GPU holds more
ROUNDS = 5


def gpus() -> list[torch.device]:
    """Where the kernels run."""
    if kernels.triton is None:
        return []
    return [torch.device("cuda", n) for n in range(torch.cuda.device_count())]


def selfchecks() -> list[dict[str, Any]]:
    """{device, kernel, variants, ms, wrong} of each kernel on each GPU, checked now. `wrong`: None,
    or what is wrong, by variant."""
    return [row for device in gpus() for row in selfchecks_of(device)]


def selfchecks_of(device: torch.device) -> Iterator[dict[str, Any]]:
    for kernel in ("record", "dispatch", "combine"):
        variants = [v for E, K in SHAPES for v in _variants(kernel, device, E, K)]
        began = time.perf_counter()
        found = {str(v): wrong_with(kernels, v, by_torch=False) for v in variants}
        yield {
            "device": device_name(device),
            "kernel": kernel,
            "variants": len(variants),
            "ms": (time.perf_counter() - began) * 1e3,
            "wrong": {name: wrong for name, wrong in found.items() if wrong} or None,
        }


def _variants(kernel: str, device: torch.device, E: int, K: int) -> Iterator[Variant]:
    """Those of a bfloat16 model."""
    kinds = torch.int64, torch.bfloat16, torch.bfloat16, PAGE_ROWS

    def made(**more: Any) -> Variant:
        return Variant(kernel, device, E, K, *kinds, **more)

    if kernel == "record":
        yield from (made(launches=n) for n in (1, 2))
    elif kernel == "dispatch":
        for slots in (64, 2048, 4096 * K):  # in 1, 1, 2 or 3 launches
            launches, block = kernels.dispatch_plan(slots, E)
            yield made(launches=launches, block=block)
    else:
        types: dict[str, Any] = {"y": torch.bfloat16, "out": torch.bfloat16}
        yield made(**types)
        for sizes in ((), ("norms",)):
            columns = kernels.combine_columns(2048, measured=True) if sizes else 0
            yield Variant(
                kernel,
                device,
                E,
                K,
                *kinds[:2],
                None,
                0,
                grouped=True,
                sizes=sizes,
                columns=columns,
                **types,
            )


def calls(device: torch.device) -> dict[str, Callable[[], object]]:
    """What the hooks call on a GPU, with a decode step's 8 tokens or, in several launches, with
    8192."""
    E, K, H = 64, 8, 2048
    tape = Ring(device, [K], [E], torch.bfloat16, rows=8192).tapes[0]

    def choice(T: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.randint(0, E, (T, K), device=device)
        return ids, torch.rand(T, K, device=device).to(torch.bfloat16)

    def dispatch(T: int, launches: int) -> Callable[[], object]:
        ids, weights = choice(T)
        return lambda: kernels.dispatch_triton(ids, weights, E, tape, launches=launches)

    ids, weights = choice(8)
    y_SH = torch.rand(8 * K, H, device=device).to(torch.bfloat16)
    return {
        "record": lambda: kernels.record_triton(tape, ids, weights),
        "dispatch + record, 1 launch": dispatch(8, 1),
        "dispatch + record, 2 launches": dispatch(8192, 2),
        "dispatch + record, 3 launches": dispatch(8192, 3),
        "combine": lambda: kernels.combine_triton(y_SH, ids, weights, None, torch.bfloat16, E),
    }


def launch_us() -> dict[str, float]:
    """Call → microseconds of the host's time, on the first GPU; empty without one."""
    found = {}
    for device in gpus()[:1]:
        for name, call in calls(device).items():
            found[name] = min(_host_us(call, device) for _ in range(ROUNDS))
    return found


def _host_us(call: Callable[[], object], device: torch.device) -> float:
    call()
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(LAUNCHES):
        call()
    took = time.perf_counter() - began
    torch.cuda.synchronize(device)
    return took / LAUNCHES * 1e6
