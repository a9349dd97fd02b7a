from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import Benchmarker, DriverBase


class InterpretedDriver(DriverBase):
    # vLLM asks for these before it starts a kernel
    utils = SimpleNamespace(
        get_device_properties=lambda device: {
            "multiprocessor_count": os.cpu_count(),
            "max_shared_mem": 2**20,
        }
    )

    @classmethod
    def is_active(cls) -> bool:
        return os.environ.get("TRITON_INTERPRET") == "1"

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise RuntimeError("nothing is compiled: set TRITON_INTERPRET=1")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_benchmarker(self) -> Benchmarker:
        from triton.testing import do_bench

        return do_bench


def argmax(array: np.ndarray, axis: int | None = None, keepdims: bool = False) -> np.ndarray:
    """As a GPU does, of NaN alone too, which vLLM's warm-up feeds to its sampler."""
    return np.argmax(np.where(np.isnan(array), -np.inf, array), axis, keepdims=keepdims)


def register() -> None:
    """Has the interpreter do what compiled code does."""
    from triton.runtime.interpreter import InterpreterBuilder

    np.nanargmax = argmax
    load = InterpreterBuilder.create_masked_load

    def load_by_integers(builder: Any, pointers: Any, mask: Any, *args: Any) -> Any:
        """vLLM's search of n-grams has such masks."""
        mask.data = mask.data.astype(bool)
        return load(builder, pointers, mask, *args)

    InterpreterBuilder.create_masked_load = load_by_integers
