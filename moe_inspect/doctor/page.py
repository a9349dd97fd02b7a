"""What `moe-inspect doctor` shows of this machine, as plain JSON values and as a page. torch is
imported by the functions that need it. Nothing names the user, the host or a path."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterable, Iterator
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

from moe_inspect.capture.engine.installed import installed_engines, text_of, version_of
from moe_inspect.errors import INSTALL_TRACE, MoeInspectError, missing_for_capture, writing
from moe_inspect.progress import phase
from moe_inspect.text import format_ratio, plural

PACKAGES = (
    *("moe-inspect", "torch", "transformers", "triton", "accelerate"),
    *("numpy", "pandas", "pyarrow", "numba"),
)
WRITE_BYTES = 64 << 20
WRITE_SECONDS = 2.0  # after which a slow disk's test ends

Facts: TypeAlias = dict[str, Any]  # plain JSON values


def examine(
    model: str | None = None, directory: Path = Path("."), measure: bool = True, **options: Any
) -> Facts:
    """Facts about this machine and, with `model`, about recording that model on it. `directory`:
    of traces. `measure`: check kernels and measure speeds too, for seconds. `options`: of the model
    (device, dtype, revision, trust_remote_code, random_init)."""
    missing = missing_for_capture()
    if model is not None and missing is not None:
        raise MoeInspectError(f"this needs {missing}: {INSTALL_TRACE}")
    if measure:
        phase("measuring the disk")
    facts: Facts = {
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version()} | {p: version_of(p) for p in PACKAGES},
        "system": system(),
        "directory": disk(directory, measure),
        "devices": list(devices()) if missing is None else [],
        "captures": list(captures(missing)),
    }
    if missing is not None:
        return facts
    from moe_inspect.doctor import costs

    if measure:
        phase("checking kernels")
        facts["selfcheck"] = [row for gpu in costs.gpus() for row in costs.selfchecks_of(gpu)]
        phase("measuring costs")
        facts["costs"] = costs.measured()
    if model is not None:
        facts["model"] = costs.examined(model, measure, **options)
    return facts


def devices() -> Iterator[Facts]:
    import torch

    from moe_inspect.capture.hook.selfcheck import driver_version

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


def disk(directory: Path, measure: bool = True) -> Facts:
    """The file system of `directory`, to which it must be possible to write."""
    resolved = directory.resolve()
    mounts = [line.split(" ")[1:3] for line in text_of(Path("/proc/mounts")).splitlines()]
    # the mount with the longest path that holds the directory
    holding = [m for m in mounts if resolved.is_relative_to(m[0].replace("\\040", " "))]
    with writing(directory):
        free = shutil.disk_usage(directory).free
        speed = _write_speed(directory, min(WRITE_BYTES, free // 4)) if measure else None
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
    if "selfcheck" in facts:
        yield "self-check of the Triton kernels", _selfcheck(facts["selfcheck"])
    if "costs" in facts:
        yield "what recording costs the host", _costs(facts["costs"])
    if "model" in facts:
        yield from _model(facts["model"])


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
    speed = disk.get("write_bytes_per_s")
    writes = f"writes {_rate(speed)}" if speed else ""
    parts = disk["filesystem"], f"{_bytes(disk['free_bytes'])} free", writes
    yield "directory of traces", ", ".join(part for part in parts if part)


def _capture(row: Facts) -> Line:
    answer = "yes" if row["possible"] else "no"
    return row["capture"], f"{answer}: {row['note']}" if row["note"] else answer


def _selfcheck(rows: Iterable[Facts]) -> Iterator[Line]:
    """A line per kernel and GPU, and one per variant that is wrong."""
    device = None
    for row in rows:
        if row["device"] != device:
            device = row["device"]
            yield "on", device
        checked = f"({plural(row['variants'], 'variant')} in {row['ms']:,.0f} ms)"
        yield row["kernel"], f"{'WRONG: torch runs instead' if row['wrong'] else 'right'} {checked}"
        for variant, wrong in (row["wrong"] or {}).items():
            yield "", f"{wrong} ({variant})"
    if device is None:
        yield "no GPU", "torch runs instead"


def _costs(costs: Facts) -> Iterator[Line]:
    for name, (low, middle, high) in costs["record_on_cpu_us"].items():
        # where a quarter of the rounds took no longer than untraced ones, the others tell nothing
        said = f"{middle:.0f} µs of CPU time (" if low > 0 else "too little to be measured here ("
        yield f"router call, {name}", f"{said}quartiles {low:.0f} to {high:.0f} µs)"
    for name, us in costs["launch_us"].items():
        yield f"launch, {name}", f"{us:.1f} µs"
    if not costs["launch_us"]:
        yield "launch of a kernel", "not measured: no GPU"
    speed = costs["copy_bytes_per_s"]
    yield "copy to pinned memory", _rate(speed) if speed else "not measured: no GPU"


def _model(model: Facts) -> Iterator[tuple[str, Iterable[Line]]]:
    routers = plural(model["routers"], "router")
    yield (
        "the model",
        [
            ("model", f"{model['id'] or 'of a directory'} ({model['class']})"),
            ("parameters", f"{model['parameters']:,} {model['dtype']} on {model['device']}"),
            ("routers", f"{routers}, {model['top_k']} of {model['experts']} experts"),
            *map(_capture, model["captures"]),
            ("auto is", model["auto"]),
            *((f"kernel {name}", found) for name, found in model["selfcheck"].items()),
        ],
    )
    if "speed" in model:
        on_cpu = model["device"] == "cpu"
        by = "CPU time of one thread" if on_cpu else "the clock"
        lines = (_speed(row, "cpu" if on_cpu else "wall") for row in model["speed"])
        yield f"traced ÷ untraced tokens/s, by {by}", lines
    if "balancing_loss" in model:
        yield "the balancing loss", _loss(model["balancing_loss"])


def _loss(findings: Iterable[Facts]) -> Iterator[Line]:
    for found in findings:
        first, *more = textwrap.wrap(found["text"], WIDTH - NAME - 2, break_on_hyphens=False)
        yield found["severity"], first
        yield from (("", line) for line in more)


def _speed(row: Facts, clock: str) -> Line:
    if "not_measured" in row:
        return row["phase"], f"not measured: {row['not_measured']}"
    ratios = row["traced_over_untraced"].items()
    shown = ", ".join(f"{name} {format_ratio(ratio[clock])}" for name, ratio in ratios)
    rate = row["tokens"] / row["seconds"]["untraced"][clock]
    return row["phase"], f"{shown}; untraced {rate:,.0f} tokens/s"


def _bytes(count: float) -> str:
    if count < 2**30:
        return f"{count / 2**20:.0f} MiB"
    return f"{count / 2**40:.1f} TiB" if count >= 2**40 else f"{count / 2**30:.1f} GiB"


def _rate(per_s: float) -> str:
    return f"{per_s / 1e9:.1f} GB/s" if per_s >= 1e9 else f"{per_s / 1e6:.0f} MB/s"
