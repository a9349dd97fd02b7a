"""One thread for torch: spinning threads cost ten times what they bring on two cores. No hub,
ever."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRITON_INTERPRET"] = (
    "1"  # kernels called by name run on the CPU; everything else uses the torch twins
)

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

    def run(
        *arguments: object, check: int | None = 0, **options: object
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "moe_inspect", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            **options,
        )
        if check is not None:
            assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def cli_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """As `cli`, in this process: for what does not hang on being one of its own, and need not
    import torch anew."""
    from moe_inspect.__main__ import main

    def run(*arguments: object, check: int | None = 0) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["moe-inspect", *map(str, arguments)])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        out, err, code = io.StringIO(), io.StringIO(), 0
        try:
            with redirect_stdout(out), redirect_stderr(err):
                main()
        except SystemExit as done:
            code = int(done.code or 0)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        done = subprocess.CompletedProcess(sys.argv, code, out.getvalue(), err.getvalue())
        if check is not None:
            assert code == check, f"exit {code}\n{done.stdout}\n{done.stderr}"
        return done

    return run
