"""Versions, processor, memory, disk and devices of this machine, and which captures are possible on
them. torch is imported by the functions that need it. Nothing names the user, the host or a
path."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moe_inspect.errors import INSTALL_TRACE, writing


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

    from moe_inspect.capture.hook.selfcheck import driver_version

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


PACKAGES = (
    "moe-inspect",
    "torch",
    "transformers",
    "triton",
    "accelerate",
    "numpy",
    "pandas",
    "pyarrow",
    "numba",
)
WRITE_BYTES = 64 << 20
WRITE_SECONDS = 2.0  # after which a slow disk's test ends


def versions() -> dict[str, str | None]:
    """Name of a package → its version, None where it is not installed."""
    return {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}}


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def system() -> dict[str, Any]:
    """Operating system, processor, cores that this process may use, and memory."""
    return {
        "platform": _platform(),
        "processor": processor(),
        "cores": cores(),
        "memory_bytes": _memory_bytes(),
    }


def _platform() -> str:
    """The operating system, its version without what a distributor or a site has added to it, and
    the C library."""
    release = re.match(r"[\d.]*\d", platform.release())
    parts = [platform.system(), release[0] if release else "", platform.machine()]
    return " ".join(part for part in [*parts, *platform.libc_ver()] if part)


def processor() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _text("/proc/cpuinfo"), re.M)
    return found[1].strip() if found else platform.processor() or platform.machine()


def cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int | None:
    if sys.platform == "win32":
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def disk(directory: Path, measure: bool = True) -> dict[str, Any]:
    """Type and free space of the file system of `directory`, and with `measure` its write speed.
    MoeInspectError where it cannot be written."""
    with writing(directory):
        free = shutil.disk_usage(directory).free
        speed = _write_speed(directory, min(WRITE_BYTES, free // 4)) if measure else None
        return {
            "filesystem": _filesystem(directory),
            "free_bytes": free,
            "write_bytes_per_s": speed,
        }


def _write_speed(directory: Path, most: int) -> float | None:
    """Bytes per second of a file written and flushed to the disk; None where there is no room."""
    block, written = os.urandom(4 << 20), 0  # random: some file systems compress
    with tempfile.TemporaryFile(dir=directory) as file:
        began = time.perf_counter()
        while written + len(block) <= most and time.perf_counter() - began < WRITE_SECONDS:
            written += file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return written / (time.perf_counter() - began) if written else None


def _filesystem(directory: Path) -> str | None:
    """ext4, nfs4, overlay, …: of the mount with the longest path that holds the directory."""
    resolved = directory.resolve()
    mounts = [line.split(" ")[1:3] for line in _text("/proc/mounts").splitlines()]
    holding = [
        (len(point), kind)
        for point, kind in mounts
        if resolved.is_relative_to(point.replace("\\040", " "))
    ]
    return max(holding, key=lambda mount: mount[0])[1] if holding else None


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:  # not Linux
        return ""
