"""What the benchmarks share: the machine they run on, processes of their own, peak memory."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


PACKAGES = (
    "moe-inspect",
    "torch",
    "transformers",
    "pyarrow",
    "pandas",
    "numpy",
    "numba",
    "polars",
    "duckdb",
)


def machine(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "processor": model,
        "cores": sum(line.startswith("processor") for line in lines),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(*packages),
        "allocator": {
            name: " ".join(Path(part).name for part in os.environ[name].split())
            for name in ("LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_ARENA_MAX")
            if name in os.environ
        },
        "date": date.today().isoformat(),
        "command": "make bench",
    }


def versions(*packages: str) -> dict[str, str]:
    """Of those that are installed."""
    found = dict[str, str]()
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def write_results(kind: str, facts: dict[str, Any], measured: Any) -> Path:
    """Writes benchmarks/results/<kind>-<processor>.json, and returns its path from the root."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": facts, "measured": measured}, indent=1, ensure_ascii=False)
    (path := _result(kind, facts)).write_text(text + "\n")
    return path.relative_to(ROOT)


def written(kind: str, facts: dict[str, Any]) -> dict[str, Any]:
    """What was measured before; empty where nothing was."""
    path = _result(kind, facts)
    return json.loads(path.read_text())["measured"] if path.exists() else {}


def _result(kind: str, facts: dict[str, Any]) -> Path:
    name = f"{kind} {facts['processor']} {facts['cores']} cores".lower().replace("(r)", "")
    name = "".join(c for c in "-".join(name.split()) if c.isalnum() or c == "-")
    return RESULTS / f"{name}.json"


def peak_memory_mib() -> float:
    """Of this process alone: getrusage would count what its parent held when it was forked."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def in_a_process(function: str, *arguments: object, module: str) -> dict[str, Any]:
    program = (
        f"import json; from {module} import {function}; print(json.dumps({function}{arguments!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def start(*arguments: str, times: int = 7) -> float:
    """Median wall seconds of a whole command."""
    walls = []
    for _ in range(times):
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "moe_inspect", *arguments],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        walls.append(time.perf_counter() - began)
    return statistics.median(walls)
