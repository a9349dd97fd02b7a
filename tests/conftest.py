"""One thread for torch: spinning threads cost ten times what they bring on two cores. No hub, ever."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRITON_INTERPRET"] = "1"  # kernels called by name run on the CPU; everything else uses the torch twins

import pytest

ROOT = Path(__file__).parent.parent
Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what tests found, whichever process they ran in."""
    for report in terminalreporter.stats.get("passed", []):
        for name, text in report.user_properties:
            if name == "print":
                terminalreporter.write_line("\n" + text)


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Runs `moe-inspect …` as a user does, in an empty directory."""

    def run(*arguments: object, check: int | None = 0, **options: object) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "moe_inspect", *map(str, arguments)], capture_output=True, text=True, cwd=tmp_path, **options
        )
        if check is not None:
            assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run
