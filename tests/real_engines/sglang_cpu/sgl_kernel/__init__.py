"""Stands for SGLang's compiled kernels, whose released builds are for CUDA. Without them SGLang
computes on a CPU in torch: it imports the names, and calls none. A call is an error."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: object, **kwargs: object) -> None:
        raise RuntimeError(f"sgl_kernel.{name} is not there: these are no compiled kernels")

    return missing


# the host's buffer of routed experts is pinned for copies from a GPU, which a torch for CPUs cannot
torch.cuda.cudart = lambda: SimpleNamespace(
    cudaHostRegister=lambda pointer, size, flags: 0, cudaHostUnregister=lambda pointer: 0
)
