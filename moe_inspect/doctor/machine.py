"""Versions, processor, memory and disk of this machine. Nothing here needs torch, and nothing names
the user, the host or a path."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moe_inspect.errors import writing

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
