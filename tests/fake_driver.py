"""A Triton driver without a GPU: it compiles for an H100, and a launch does nothing but note what
it was given. So what a launch is called with can be tested, and what it costs the host measured."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget


class FakeDriver:
    """To be set with `triton.runtime.driver.set_active`. `device` and `stream` are the current
    ones; `seen`, where given, is called with each launch: kernel, grid, stream and arguments."""

    def __init__(self, seen: Callable[..., None] | None = None):
        self.device, self.streams = 0, {0: 100, 1: 200}  # the current stream of each device
        self.utils = _Utils()
        self.launcher_cls = _noting(seen) if seen is not None else _Nothing

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.streams[device]

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def is_active(self) -> bool:
        return True


class _Utils:
    loaded = 0

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        self.loaded += 1  # a module of its own, and so a function of its own, every time
        return self.loaded, f"{name}#{self.loaded}", 32, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}


class _Nothing:
    def __init__(self, source: Any, metadata: Any):
        pass

    def __call__(self, *arguments: Any) -> None:
        pass


def _noting(seen: Callable[..., None]) -> Any:
    class Noting(_Nothing):
        launch_enter_hook = None

        def __call__(self, *arguments: Any) -> None:
            x, y, z, stream, function, metadata, launch_metadata, enter, leave, *given = arguments
            for hook in (enter, leave):
                if hook is not None:
                    hook(launch_metadata)
            noted = {"stream": stream, "function": function, "metadata": metadata}
            seen(SimpleNamespace(grid=(x, y, z), arguments=given, **noted))

    return Noting
