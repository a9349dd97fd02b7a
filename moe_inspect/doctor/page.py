"""What `moe-inspect doctor` shows: versions, processor, memory, disk and devices of this machine,
and which captures are possible on them, gathered as plain JSON values, and printed as sections of
lines, name and value. torch is imported by the functions that need it. Nothing names the user, the
host or a path."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moe_inspect.errors import INSTALL_TRACE, MoeInspectError, writing
from moe_inspect.progress import phase
from moe_inspect.text import format_ratio, plural

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


def examine(
    model: str | None = None, directory: Path = Path("."), measure: bool = True, **options: Any
) -> dict[str, Any]:
    """Facts about this machine and, with `model`, about recording that model on it.

    directory  where traces are to be written
    measure    whether to check the kernels and to measure speeds too, which takes seconds
    options    of the model: device, dtype, revision, trust_remote_code, random_init
    """
    missing = missing_for_capture()
    able = missing is None
    if model is not None and not able:
        raise MoeInspectError(f"this needs {missing}: {INSTALL_TRACE}")
    if measure:
        phase("measuring the disk")
    facts = {
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version()} | {p: version_of(p) for p in PACKAGES},
        "system": system(),
        "directory": disk(directory, measure),
        "devices": devices() if able else [],
        "captures": captures(),
    }
    if able and measure:
        from moe_inspect.doctor import costs

        phase("checking kernels")
        facts["selfcheck"] = costs.selfchecks()
        phase("measuring costs")
        facts["costs"] = costs.measured()
    if model is not None:
        from moe_inspect.doctor import costs

        facts["model"] = costs.examined(model, measure=measure, **options)
    return facts


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
    return [dict(zip(("capture", "possible", "note"), row, strict=True)) for row in _rows()]


def _rows() -> Iterator[tuple[str, bool, str]]:
    missing = missing_for_capture()
    if missing is not None:
        yield "tap, dispatch, counts only", False, f"{missing} is not installed: {INSTALL_TRACE}"
    else:
        yield "tap", True, "the calls of a model's own experts"
        yield "dispatch", True, "instead of grouped_mm; auto takes it on a GPU only"
        yield "counts only", True, "sums kept on the model's device"
        why = why_no_gpu()
        if why is None and find_spec("triton") is None:
            why = "triton is not installed; torch code with the same results records on the GPU"
        yield "Triton kernels", why is None, why or "they record on the GPU"
        yield _needing("a model over several GPUs", "accelerate", "moe-inspect[accelerate]")
        yield _needing("vLLM and SGLang servers", "httpx", "moe-inspect[trace]")
    yield _needing("text from hf://, s3://, …", "fsspec", "moe-inspect[trace]")
    yield "reports and simulations", True, "of traces from anywhere; without torch"


def _needing(name: str, package: str, extra: str) -> tuple[str, bool, str]:
    if find_spec(package) is not None:
        return name, True, ""
    return name, False, f"{package} is not installed: pip install '{extra}'"


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def system() -> dict[str, Any]:
    """Operating system, processor, cores that this process may use, and memory. Of the system's
    version, what a distributor or a site has added to it is left out."""
    release = re.match(r"[\d.]*\d", platform.release())
    parts = [platform.system(), release[0] if release else "", platform.machine()]
    named = re.search(r"^model name\s*:\s*(.+)$", _text("/proc/cpuinfo"), re.M)
    able = hasattr(os, "sched_getaffinity")
    is_unix = sys.platform != "win32"
    return {
        "platform": " ".join(part for part in [*parts, *platform.libc_ver()] if part),
        "processor": named[1].strip() if named else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if able else os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if is_unix
        else None,
    }


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


# --- as text

Line = tuple[str, str]
NAME = 28  # width of the names' column


def page(facts: Mapping[str, Any]) -> str:
    """Plain text of at most 100 columns, to be pasted into a bug report."""
    sections: list[tuple[str, Iterable[Line]]] = [
        ("versions", ((name, found or "–") for name, found in facts["versions"].items())),
        ("machine", _machine(facts)),
        ("what can be recorded", map(_capture, facts["captures"])),
    ]
    if "selfcheck" in facts:
        sections.append(("self-check of the Triton kernels", _selfcheck(facts["selfcheck"])))
    if "costs" in facts:
        sections.append(("what recording costs the host", _costs(facts["costs"])))
    if "model" in facts:
        sections += _model(facts["model"])
    blocks = [f"moe-inspect doctor, {facts['date']}"]
    for title, lines in sections:
        blocks.append("\n".join([title, *(f"  {name:<{NAME}}{value}" for name, value in lines)]))
    return "\n\n".join(blocks)


def _machine(facts: Mapping[str, Any]) -> Iterator[Line]:
    system, disk = facts["system"], facts["directory"]
    yield "system", system["platform"]
    yield "processor", f"{system['processor']}, {plural(system['cores'], 'core')}"
    if system["memory_bytes"]:
        yield "memory", _bytes(system["memory_bytes"])
    for device in facts["devices"]:
        yield device["device"], _device(device)
    speed = disk.get("write_bytes_per_s")
    parts = [disk["filesystem"], f"{_bytes(disk['free_bytes'])} free"]
    parts += [f"writes {_rate(speed)}"] if speed else []
    yield "directory of traces", ", ".join(part for part in parts if part)


def _device(device: Mapping[str, Any]) -> str:
    if device["device"] == "cpu":
        return plural(device["threads"], "thread") + " of torch"
    parts = device["name"], _bytes(device["memory_bytes"]), device["architecture"]
    return f"{', '.join(parts)}, driver {device['driver'] or 'unknown'}"


def _capture(row: Mapping[str, Any]) -> Line:
    answer = "yes" if row["possible"] else "no"
    return row["capture"], f"{answer}: {row['note']}" if row["note"] else answer


def _selfcheck(rows: Iterable[Mapping[str, Any]]) -> Iterator[Line]:
    """A line per kernel and GPU, and one per variant that is wrong."""
    device = None
    for row in rows:
        if row["device"] != device:
            device = row["device"]
            yield "on", device
        yield row["kernel"], _verdict(row)
        for variant, wrong in (row["wrong"] or {}).items():
            yield "", f"{wrong} ({variant})"
    if device is None:
        yield "no GPU", "torch runs instead"


def _verdict(row: Mapping[str, Any]) -> str:
    checked = f"{plural(row['variants'], 'variant')} in {row['ms']:,.0f} ms"
    return f"WRONG: torch runs instead ({checked})" if row["wrong"] else f"right ({checked})"


def _costs(costs: Mapping[str, Any]) -> Iterator[Line]:
    for name, us in costs["record_on_cpu_us"].items():
        yield f"router call, {name}", f"{us:.1f} µs of CPU time"
    for name, us in costs["launch_us"].items():
        yield f"launch, {name}", f"{us:.1f} µs"
    if not costs["launch_us"]:
        yield "launch of a kernel", "not measured: no GPU"
    speed = costs["copy_bytes_per_s"]
    yield "copy to pinned memory", _rate(speed) if speed else "not measured: no GPU"


def _model(model: Mapping[str, Any]) -> Iterator[tuple[str, Iterable[Line]]]:
    shape = f"{plural(model['routers'], 'router')}, {model['top_k']} of {model['experts']} experts"
    facts = [
        ("model", f"{model['id'] or 'of a directory'} ({model['class']})"),
        ("parameters", f"{model['parameters']:,} {model['dtype']} on {model['device']}"),
        ("routers", shape),
    ]
    checked = [(f"kernel {name}", found) for name, found in model["selfcheck"].items()]
    captures = map(_capture, model["captures"])
    yield "the model", [*facts, *captures, ("auto is", model["auto"]), *checked]
    if "speed" in model:
        clock = "cpu" if model["device"] == "cpu" else "wall"
        by = "CPU time of one thread" if clock == "cpu" else "the clock"
        lines = [line for row in model["speed"] for line in _speed(row, clock)]
        yield f"traced ÷ untraced tokens/s, by {by}", lines


def _speed(row: Mapping[str, Any], clock: str) -> Iterator[Line]:
    if "not_measured" in row:
        yield row["phase"], f"not measured: {row['not_measured']}"
        return
    ratios = [
        f"{name} {format_ratio(ratio[clock])}"
        for name, ratio in row["traced_over_untraced"].items()
    ]
    rate = row["tokens"] / row["seconds"]["untraced"][clock]
    yield row["phase"], f"{', '.join(ratios)}; untraced {rate:,.0f} tokens/s"


def _bytes(count: float) -> str:
    for unit, size in (("TiB", 2**40), ("GiB", 2**30)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 2**20:.0f} MiB"


def _rate(per_s: float) -> str:
    return f"{per_s / 1e9:.1f} GB/s" if per_s >= 1e9 else f"{per_s / 1e6:.0f} MB/s"
