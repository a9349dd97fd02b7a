"""The devices that torch finds, and which captures are possible on them. torch is imported by the
functions that need it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from moe_inspect.errors import INSTALL_TRACE


def missing_for_capture() -> str | None:
    """The package that recording needs and that is not installed."""
    try:
        import torch  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import transformers  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        return error.name or "torch"
    return None


def devices() -> list[dict[str, Any]]:
    """The CPU, then each GPU."""
    import torch

    from moe_inspect.capture.hook.selfcheck.memory import driver_version

    found: list[dict[str, Any]] = [{"device": "cpu", "threads": torch.get_num_threads()}]
    for n in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(n)
        found.append(
            {
                "device": f"cuda:{n}",
                "name": of.name,
                "memory_bytes": of.total_memory,
                "architecture": getattr(of, "gcnArchName", "") or f"sm_{of.major}{of.minor}",
                "multiprocessors": of.multi_processor_count,
                "driver": driver_version(),
            }
        )
    return found


def why_no_gpu() -> str | None:
    """Why torch has no GPU; None where it has one."""
    import torch

    if torch.cuda.is_available():
        return None
    built = torch.version.cuda or torch.version.hip
    if built is None:
        return "this build of torch is for CPUs only"
    return f"torch, built for {'CUDA' if torch.version.cuda else 'ROCm'} {built}, finds no GPU"


def captures() -> list[dict[str, Any]]:
    """What can be recorded on this machine: {capture, possible, note}, the note says why not, or
    how it is done."""
    return [
        {"capture": name, "possible": possible, "note": note} for name, possible, note in _rows()
    ]


def _rows() -> Iterator[tuple[str, bool, str]]:
    missing = missing_for_capture()
    if missing is not None:
        yield "tap, dispatch, counts only", False, f"{missing} is not installed: {INSTALL_TRACE}"
    else:
        yield "tap", True, "the calls of a model's own experts"
        yield "dispatch", True, "instead of grouped_mm; auto takes it on a GPU only"
        yield "counts only", True, "sums kept on the model's device"
        why = _why_no_kernels()
        yield "Triton kernels", why is None, why or "they record on the GPU"
        yield _needing("a model over several GPUs", "accelerate", "moe-inspect[accelerate]")
        yield _needing("vLLM and SGLang servers", "httpx", "moe-inspect[trace]")
    yield _needing("text from hf://, s3://, …", "fsspec", "moe-inspect[trace]")
    yield "reports and simulations", True, "of traces from anywhere; without torch"


def _why_no_kernels() -> str | None:
    no_gpu = why_no_gpu()
    if no_gpu is None and find_spec("triton") is None:
        return "triton is not installed; torch code with the same results records on the GPU"
    return no_gpu


def _needing(name: str, package: str, extra: str) -> tuple[str, bool, str]:
    if find_spec(package) is not None:
        return name, True, ""
    return name, False, f"{package} is not installed: pip install '{extra}'"
