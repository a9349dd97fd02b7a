"""What the machine can do at most."""

from __future__ import annotations

import torch
import triton

from benchmarks.gpu.bench import Bench, by_graph, host_us, median_us


@triton.jit
def empty_kernel(x): ...


def ceilings(bench: Bench) -> None:
    """Bandwidth of copies, and the time of an empty kernel launch."""
    device, size = bench.device, bench.sizes.copy_bytes
    a = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device.type)
    b, host = torch.empty_like(a), device.pinned(size // 16)
    found = bench.figures
    # read and written
    found["copy_gb_per_s"] = 2 * size / median_us(bench, lambda: b.copy_(a)) / 1e3
    found["to_pinned_host_gb_per_s"] = (
        len(host) / median_us(bench, lambda: host.copy_(a[: len(host)], non_blocking=True)) / 1e3
    )
    found["empty_launch_us"] = by_graph(bench, [lambda: empty_kernel[(1,)](a)])
    found["empty_launch_host_us"] = host_us(bench, lambda: empty_kernel[(1,)](a))
    for name, value in found.items():
        print(f"{name:<40}{value:>12.2f}")
