"""What recording costs the host on this machine, whatever the model: a launch of each Triton
kernel, a router call on the CPU, a copy to pinned memory."""

from __future__ import annotations

import time
from typing import Any

import torch

from moe_inspect.doctor.kernels import launch_us
from moe_inspect.doctor.traced_speed import CAPTURES, decode_phase, timed

LAYERS, EXPERTS, TOP_K = 24, 16, 8
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
    }
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = Qwen3MoeConfig(
        **sizes,
        **heads,
        vocab_size=256,
        num_hidden_layers=LAYERS,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        pad_token_id=0,
    )
    return Qwen3MoeForCausalLM(config).eval()


def record_on_cpu() -> dict[str, float]:
    """Capture → microseconds of CPU time per router call, in a decode step of `narrow_model`."""
    network = narrow_model()
    found = timed(network, decode_phase(network, torch.arange(16).view(1, 16)))
    untraced = found["untraced"].cpu
    return {name: (found[name].cpu - untraced) / LAYERS * 1e6 for name in CAPTURES}


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
