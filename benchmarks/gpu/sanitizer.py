"""A few cases of the correctness section in a process that compute-sanitizer watches."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

from benchmarks.gpu.bench import Bench
from benchmarks.measuring import ROOT

AT_LEAST_S, AT_MOST_S = 30.0, 60.0


def sanitize(bench: Bench) -> None:
    """Adds "sanitizer" to the figures: clean, what it found, or why it did not run. Each tensor of
    the process is an allocation of its own, so that an access beyond it shows."""
    tool = shutil.which("compute-sanitizer")
    if tool is None and not bench.device.dry:
        bench.figures["sanitizer"] = "not found"
    elif not bench.over("compute-sanitizer"):
        _run(bench, None if bench.device.dry else tool)
    print(f"compute-sanitizer: {bench.figures.get('sanitizer', 'cut')}")


def _run(bench: Bench, tool: str | None) -> None:
    # torch asks the driver for what may not be there: errors of the API are no findings
    command = [tool, "--error-exitcode", "9", "--report-api-errors", "no"] if tool else []
    command += [sys.executable, "-m", "benchmarks.gpu", "--only", "correctness", "--sanitized"]
    command += ["--dry-run"] if bench.device.dry else []
    limit_s = max(AT_LEAST_S, min(AT_MOST_S, bench.seconds_left))
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=None if bench.device.dry else limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the tool and what it watches
            bench.figures["sanitizer"] = "did not end in its time"
            bench.cut.append("compute-sanitizer, which did not end in its time")
            return
    fine = process.returncode == 0
    bench.figures["sanitizer"] = "clean" if fine else said[-2000:]
    bench.expect(fine, f"compute-sanitizer: exit {process.returncode}\n{said[-2000:]}")
