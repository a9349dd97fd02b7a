"""On PYTHONPATH, it hides Triton: vLLM's model runner V1 then runs on a CPU without Triton's
interpreter, which is slow, and refuses some kernels."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec

sys.modules["triton"] = None  # type: ignore[assignment]
find_spec = importlib.util.find_spec


def without_triton(name: str, package: str | None = None) -> ModuleSpec | None:
    return None if name.split(".")[0] == "triton" else find_spec(name, package)


importlib.util.find_spec = without_triton
