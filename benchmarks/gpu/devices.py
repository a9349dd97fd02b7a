"""The GPU, and what stands in for it in a dry run."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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
