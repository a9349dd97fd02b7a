"""Facts about this machine for `moe-inspect doctor`, as plain JSON values and as a page. torch is
imported by the functions that need it. Nothing names the user, the host or a path."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from moe_inspect.capture.engine.installed import installed_engines, text_of, version_of
from moe_inspect.errors import INSTALL_TRACE, missing_for_capture, writing
from moe_inspect.progress import phase
from moe_inspect.text import first_line, plural

if TYPE_CHECKING:
    import torch

PACKAGES = (
    *("moe-inspect", "torch", "transformers", "triton", "accelerate"),
    *("numpy", "pandas", "pyarrow", "numba"),
)
WRITE_BYTES = 64 << 20
WRITE_SECONDS = 2.0  # after which a slow disk's test ends
TOKENS = (16384, 1024, 8)  # dispatched in three launches, two and one

Facts: TypeAlias = dict[str, Any]  # plain JSON values


def examine(directory: Path = Path(".")) -> Facts:
    """Facts about this machine. `directory`: of traces."""
    missing = missing_for_capture()
    phase("measuring the disk")
    facts: Facts = {
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version()} | {p: version_of(p) for p in PACKAGES},
        "system": system(),
        "directory": disk(directory),
        "devices": list(devices()) if missing is None else [],
        "captures": list(captures(missing)),
    }
    if missing is None:
        phase("checking kernels")
        facts["kernels"] = [row for gpu in gpus() for row in check_kernels(gpu)]
    return facts


def devices() -> Iterator[Facts]:
    import torch

    yield {"device": "cpu", "threads": torch.get_num_threads()}
    for n in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(n)
        yield {
            "device": f"cuda:{n}",
            "name": of.name,
            "memory_bytes": of.total_memory,
            "architecture": getattr(of, "gcnArchName", "") or f"sm_{of.major}{of.minor}",
            "multiprocessors": of.multi_processor_count,
            "driver": driver_version(),
        }


def driver_version() -> str | None:
    """Version of the GPU's kernel driver: NVIDIA's, else AMD's."""
    found = re.search(r"\b\d{3,}\.\d[\d.]*", text_of(Path("/proc/driver/nvidia/version")))
    return found[0] if found else text_of(Path("/sys/module/amdgpu/version")).strip() or None


def captures(missing: str | None) -> Iterator[Facts]:
    """What can be recorded here, why not or how. `missing`: a package that recording needs."""

    def row(capture: str, possible: bool, note: str) -> Facts:
        return {"capture": capture, "possible": possible, "note": note}

    def needing(capture: str, package: str, extra: str = "trace") -> Facts:
        found = find_spec(package) is not None
        how = f"{package} is not installed: pip install 'moe-inspect[{extra}]'"
        return row(capture, found, "" if found else how)

    if missing is not None:
        none = f"{missing} is not installed: {INSTALL_TRACE}"
        yield row("tap, dispatch, counts only", False, none)
    else:
        yield row("tap", True, "the calls of a model's own experts")
        yield row("dispatch", True, "instead of grouped_mm; auto takes it on a GPU only")
        yield row("counts only", True, "sums kept on the model's device")
        why = _why_no_kernels()
        yield row("Triton kernels", not why, why or "they record on the GPU")
        yield needing("a model over several GPUs", "accelerate", "accelerate")
        for engine in installed_engines():
            yield row(f"inside {engine.engine}", engine.fits, engine.note)
    yield needing("text from hf://, s3://, …", "fsspec")
    yield row("reports and simulations", True, "of traces from anywhere; without torch")


def _why_no_kernels() -> str:
    import torch

    if torch.cuda.is_available():
        if find_spec("triton") is not None:
            return ""
        return "triton is not installed; torch code with the same results records on the GPU"
    built = torch.version.cuda or torch.version.hip
    if built is None:
        return "this build of torch is for CPUs only"
    return f"torch, built for {'CUDA' if torch.version.cuda else 'ROCm'} {built}, finds no GPU"


def system() -> Facts:
    """Operating system, processor, cores that this process may use, and memory. Of the system's
    version, what a distributor or a site has added to it is left out."""
    release = re.match(r"[\d.]*\d", platform.release())
    parts = [platform.system(), release[0] if release else "", platform.machine()]
    named = re.search(r"^model name\s*:\s*(.+)$", text_of(Path("/proc/cpuinfo")), re.M)
    able, pages = hasattr(os, "sched_getaffinity"), ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
    return {
        "platform": " ".join(part for part in [*parts, *platform.libc_ver()] if part),
        "processor": named[1].strip() if named else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if able else os.cpu_count() or 1,
        "memory_bytes": math.prod(map(os.sysconf, pages)) if sys.platform != "win32" else None,
    }


def disk(directory: Path) -> Facts:
    """The file system of `directory`, to which it must be possible to write."""
    resolved = directory.resolve()
    mounts = [line.split(" ")[1:3] for line in text_of(Path("/proc/mounts")).splitlines()]
    # the mount with the longest path that holds the directory
    holding = [m for m in mounts if resolved.is_relative_to(m[0].replace("\\040", " "))]
    with writing(directory):
        free = shutil.disk_usage(directory).free
        speed = _write_speed(directory, min(WRITE_BYTES, free // 4))
    return {
        "filesystem": max(holding, key=lambda mount: len(mount[0]))[1] if holding else None,
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


# --- the Triton kernels


def gpus() -> list[torch.device]:
    """GPUs on which the kernels run."""
    import torch

    count = 0 if find_spec("triton") is None else torch.cuda.device_count()
    return [torch.device("cuda", n) for n in range(count)]


def check_kernels(device: torch.device) -> Iterator[Facts]:
    """Launch each kernel, and compare it with its twin in torch. `wrong`: the fault, or None."""
    from moe_inspect.capture.hook import first_launch

    broken = ""
    try:
        _launch_kernels(device)
    except Exception as error:  # after some faults a GPU computes nothing more
        broken = first_line(error)
    for (kernel, where), wrong in first_launch.FOUND.items():
        if where == device:
            yield {"device": str(device), "kernel": kernel, "wrong": wrong or None}
    if broken:
        yield {"device": str(device), "kernel": "the others", "wrong": f"cannot be run: {broken}"}


def _launch_kernels(device: torch.device) -> None:
    import torch

    from moe_inspect.capture import rows
    from moe_inspect.capture.engine.rows import EngineRows
    from moe_inspect.capture.hook import kernels

    E, K, H = 256, 8, 512
    written = rows.RouterRows([rows.ShownRouter(device, K, E, E)], [0], ("",), torch.bfloat16)
    written.grow(2 * sum(TOKENS))
    (tape,) = written.tapes[""]
    for T in TOKENS:
        ids = torch.rand(T, E, device=device).topk(K).indices
        weights = torch.rand(T, K, device=device).bfloat16()
        grouped = kernels.dispatch(ids, weights, E, tape)
        kernels.record(tape, ids, weights)
    y_SH = torch.randn(T * K, H, device=device).bfloat16()
    for norms in (None, torch.empty(T, K, device=device)):
        kernels.combine(y_SH, ids, weights, grouped, y_SH.dtype, E, None, norms)
    EngineRows((1, T, K), E, device, compiled=True).keep(0, ids, weights, weights)


# --- as text

Line = tuple[str, str]
NAME = 28  # width of the names' column
WIDTH = 100


def page(facts: Facts) -> str:
    """Plain text of at most 100 columns, to be pasted into a bug report."""
    blocks = [f"moe-inspect doctor, {facts['date']}"]
    for title, lines in _sections(facts):
        blocks.append("\n".join([title, *(f"  {name:<{NAME}}{value}" for name, value in lines)]))
    return "\n\n".join(blocks)


def _sections(facts: Facts) -> Iterator[tuple[str, Iterable[Line]]]:
    yield "versions", ((name, found or "–") for name, found in facts["versions"].items())
    yield "machine", _machine(facts)
    yield "what can be recorded", map(_capture, facts["captures"])
    if "kernels" in facts:
        yield "Triton kernels", _kernels(facts["kernels"])


def _machine(facts: Facts) -> Iterator[Line]:
    system, disk = facts["system"], facts["directory"]
    yield "system", system["platform"]
    yield "processor", f"{system['processor']}, {plural(system['cores'], 'core')}"
    if system["memory_bytes"]:
        yield "memory", _bytes(system["memory_bytes"])
    for device in facts["devices"]:
        if device["device"] == "cpu":
            yield "cpu", plural(device["threads"], "thread") + " of torch"
            continue
        parts = device["name"], _bytes(device["memory_bytes"]), device["architecture"]
        yield device["device"], f"{', '.join(parts)}, driver {device['driver'] or 'unknown'}"
    speed = disk["write_bytes_per_s"]
    writes = f"writes {_rate(speed)}" if speed else ""
    parts = disk["filesystem"], f"{_bytes(disk['free_bytes'])} free", writes
    yield "directory of traces", ", ".join(part for part in parts if part)


def _capture(row: Facts) -> Line:
    answer = "yes" if row["possible"] else "no"
    return row["capture"], f"{answer}: {row['note']}" if row["note"] else answer


def _kernels(rows: Sequence[Facts]) -> Iterator[Line]:
    """A line per GPU whose kernels are right, and one per wrong kernel."""
    if not rows:
        yield "no GPU", "torch runs instead"
    for device, of_device in groupby(rows, key=lambda row: row["device"]):
        kernels = list(of_device)
        wrong = [row for row in kernels if row["wrong"]]
        yield device, f"{len(kernels) - len(wrong)} of {plural(len(kernels), 'kernel')} right"
        for row in wrong:
            yield "", f"WRONG: {row['kernel']} {row['wrong']}; torch runs instead"


def _bytes(count: float) -> str:
    if count < 2**30:
        return f"{count / 2**20:.0f} MiB"
    return f"{count / 2**40:.1f} TiB" if count >= 2**40 else f"{count / 2**30:.1f} GiB"


def _rate(per_s: float) -> str:
    return f"{per_s / 1e9:.1f} GB/s" if per_s >= 1e9 else f"{per_s / 1e6:.0f} MB/s"
