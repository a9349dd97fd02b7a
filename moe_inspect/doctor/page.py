"""What `moe-inspect doctor` shows: gathered as plain JSON values, and printed as sections of lines,
name and value."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from moe_inspect.doctor import machine
from moe_inspect.doctor.machine import captures, devices, missing_for_capture
from moe_inspect.errors import INSTALL_TRACE, MoeInspectError
from moe_inspect.progress import phase
from moe_inspect.text import format_ratio, plural


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
        "versions": machine.versions(),
        "system": machine.system(),
        "directory": machine.disk(directory, measure),
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
        from moe_inspect.doctor.model import examined

        facts["model"] = examined(model, measure=measure, **options)
    return facts


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
    return ", ".join(
        [
            device["name"],
            _bytes(device["memory_bytes"]),
            device["architecture"],
            f"driver {device['driver'] or 'unknown'}",
        ]
    )


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
    if costs["copy_bytes_per_s"]:
        yield "copy to pinned memory", _rate(costs["copy_bytes_per_s"])
    if not costs["launch_us"]:
        yield "launch of a kernel", "not measured: no GPU"
    if not costs["copy_bytes_per_s"]:
        yield "copy to pinned memory", "not measured: no GPU"


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
