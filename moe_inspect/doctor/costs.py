"""What recording costs the host on this machine, whatever the model: a launch of each Triton
kernel, a router call on the CPU, a copy to pinned memory. And the self-check of the kernels on each
GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from moe_inspect.capture.hook import kernels
from moe_inspect.capture.hook.ring import PAGE_ROWS, Ring
from moe_inspect.capture.hook.selfcheck import Variant, device_name, wrong_with
from moe_inspect.doctor.model import CAPTURES, decode_phase, timed

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
            columns = kernels.measuring_columns(2048) if sizes else 0
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
    tape = Ring(device, [K], [E], torch.bfloat16, rows=8192).tapes[""][0]

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
    return {
        name: min(_host_us(call, device) for _ in range(ROUNDS))
        for device in gpus()[:1]
        for name, call in calls(device).items()
    }


def _host_us(call: Callable[[], object], device: torch.device) -> float:
    call()
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(LAUNCHES):
        call()
    took = time.perf_counter() - began
    torch.cuda.synchronize(device)
    return took / LAUNCHES * 1e6


COPY_BYTES = 64 << 20


def measured() -> dict[str, Any]:
    """All of them; what needs a GPU is empty or None without one."""
    return {
        "record_on_cpu_us": record_on_cpu(),
        "launch_us": launch_us(),
        "copy_bytes_per_s": copy_bandwidth(),
    }


def narrow_model() -> Any:
    """A model of many narrow layers on the CPU, in which recording has little to hide behind."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 256,
        "num_hidden_layers": 24,
        "num_experts": 16,
        "num_experts_per_tok": 8,
        "pad_token_id": 0,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).eval()


def record_on_cpu() -> dict[str, float]:
    """Capture → microseconds of CPU time per router call, in a decode step of `narrow_model`."""
    network = narrow_model()
    found = timed(network, decode_phase(network, torch.arange(16).view(1, 16)))
    untraced, layers = found["untraced"].cpu, network.config.num_hidden_layers
    return {name: (found[name].cpu - untraced) / layers * 1e6 for name in CAPTURES}


def copy_bandwidth() -> float | None:
    """Bytes per second from the GPU to pinned memory; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    device = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    least = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        host.copy_(device, non_blocking=True)
        torch.cuda.synchronize()
        least = min(least, time.perf_counter() - began)
    return COPY_BYTES / least
