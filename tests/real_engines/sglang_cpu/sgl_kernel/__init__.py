"""Stands for SGLang's compiled kernels, whose released builds are for CUDA. Without them SGLang
computes on a CPU in torch: it imports the names, and calls none but those of speculative decoding,
which are in torch here. A call of another is an error."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from sgl_kernel import speculative


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)
    if (there := getattr(speculative, name, None)) is not None:
        return there

    def missing(*args: object, **kwargs: object) -> None:
        raise RuntimeError(f"sgl_kernel.{name} is not there: these are no compiled kernels")

    return missing


# the host's buffer of routed experts is pinned for copies from a GPU, which a torch for CPUs cannot
torch.cuda.cudart = lambda: SimpleNamespace(
    cudaHostRegister=lambda pointer, size, flags: 0, cudaHostUnregister=lambda pointer: 0
)
