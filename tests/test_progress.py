"""The progress bar of commands, seen through a pseudo-terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import pytest
from rich.console import Console

from moe_inspect import MoeInspectError, check, progress
from moe_inspect.__main__ import main
from moe_inspect.cli import progress as bars
from moe_inspect.comparison.compare import compare
from moe_inspect.public import report
from moe_inspect.reporting.charts.spec import draw_charts
from moe_inspect.simulate.cache import simulate_cache
from moe_inspect.simulate.placement.placement import simulate_placement
from tests.conftest import ROOT
from tests.support.watched import waited

L, T = 3, 300  # of the trace `sound`
COUNTED = {"reading tokens": T, "counting": T * L}
PLACED = {"counting loads": T, "placing": L, "counting ranks": T}
PHASES: dict[Callable[[str], object], dict[str, int]] = {
    lambda path: draw_charts(report(path)): {**COUNTED, "drawing": 0},
    lambda path: check(path, quick=True): {"checksums": T, "checking rows": T},
    check: {"checksums": T, "checking rows": T, "checking routes": T},
    lambda path: compare(path, path).verdict(): {"comparing": T},
    lambda path: report(path).page(): {
        **COUNTED,
        **dict.fromkeys(("drawing", "reading text", "writing page"), 0),
    },
    simulate_cache: {"simulating cache": T},
    lambda path: simulate_placement(path, policies=["contiguous"]): PLACED,
}


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Generator[list[bytes]]:
    """What is written to stderr, which is a terminal; complete when the block ends."""
    ours, theirs = pty.openpty()
    sent = list[bytes]()

    def read() -> None:
        try:
            while more := os.read(ours, 65_536):
                sent.append(more)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w") as stderr, redirect_stderr(stderr):
        monkeypatch.setenv("TERM", "xterm")
        yield sent
    reader.join()
    os.close(ours)


@pytest.mark.parametrize("run", PHASES)
def test_phases_have_a_total_from_the_start_and_reach_it(
    sound: Path, run: Callable[[str], object]
) -> None:
    begun, done = dict[str, int](), dict[str, int]()

    def listener(name: str, total: int, unit: str) -> progress.Advance:
        begun[name], done[name] = total, 0

        def advance(amount: int) -> None:
            done[name] += amount

        return advance

    with progress.listening(listener):
        run(str(sound))
    assert done == begun
    assert begun.keys() == PHASES[run].keys()
    assert all(begun[name] == (total or begun[name]) > 0 for name, total in PHASES[run].items())
    begun.clear()
    run(str(sound))  # nobody listens
    assert not begun


def test_a_long_command_shows_its_phases_on_stderr_and_removes_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for after_s, expected in ((0.0, True), (60.0, False)):  # the second is done before that
        monkeypatch.setattr(bars, "AFTER_S", after_s)
        with terminal(monkeypatch) as sent, bars.shown() as bar:
            assert bar is not None
            bar.started.wait(5 if expected else 0)
            for name in ("first", "second"):
                advance = progress.phase(name, 2_000, "tokens")
                advance(1_500)
                if expected:
                    bar.rich.refresh()
                advance(500)
        text = b"".join(sent).decode()
        for name in ("first", "second"):
            assert bool(re.search(f"{name} .*1,500 of 2,000 tokens", text)) == expected
        assert bool(re.search(r"\x1b\[2K$", text)) == expected  # the line is erased
    assert capsys.readouterr().out == ""


def test_the_bar_shows_within_a_second_and_moves_without_a_total(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with terminal(monkeypatch) as sent, bars.shown() as bar:
        assert bar is not None
        assert bar.started.wait(1)
        progress.phase("loading")  # of which no total is known

        def drawn() -> set[str]:
            return {line for line in b"".join(sent).decode().split("\r") if "loading" in line}

        waited(lambda: len(drawn()) >= 3, 5)
        assert not any(" of " in line for line in drawn())


def test_the_time_left_is_that_of_the_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    bar = bars.Bar()
    bar.rich.get_time = lambda: now[0]

    def drawn() -> str:
        Console(file=(file := io.StringIO()), width=80).print(bar.rich.get_renderable())
        (line,) = file.getvalue().splitlines()
        return line

    first = bar.phase("first", 100, "tokens")
    first(0)
    now[0] += 3_600
    first(50)
    assert drawn().endswith(" 50 of 100 tokens 1:00:00")  # no speed is known yet
    now[0] += 10
    first(10)
    assert drawn().endswith(" 60 of 100 tokens 1:00:10, 0:40 left")
    second = bar.phase("second", 4, "tables")
    first(10)  # of a thread that is late
    assert drawn().startswith("second ")
    second(4)
    assert drawn().endswith(" 4 of 4 tables 1:00:10")
    bar.counted("third", "bytes")(5, 10)
    assert " 5 of 10 bytes " in drawn()
    bar.close()


LOADS = {
    "trace demo -o t": ("trace.need_torch", "starting"),
    "doctor": ("describe.quiet", "loading torch"),
}


@pytest.mark.parametrize("command", LOADS)
def test_a_command_shows_progress_before_it_loads_torch(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, shows = LOADS[command]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["moe-inspect", *command.split()])
    with terminal(monkeypatch) as sent:

        def load() -> None:
            waited(lambda: shows in b"".join(sent).decode(), 10)
            raise MoeInspectError("shown")

        monkeypatch.setattr(f"moe_inspect.cli.{loads}", load)
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 1
    assert "error: shown" in b"".join(sent).decode()


def test_nothing_is_shown_on_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    with bars.shown() as bar:  # stderr is no terminal
        assert bar is None
    monkeypatch.setattr(bars, "_piped", lambda: True)
    with terminal(monkeypatch) as sent, bars.shown() as bar:  # stdout is a pipe: to `less`
        assert bar is None
    assert not sent
    code = "from moe_inspect.cli.progress import _piped; import sys; sys.exit(_piped())"
    for stdout, piped in ((subprocess.PIPE, 1), (subprocess.DEVNULL, 0)):
        made = subprocess.run([sys.executable, "-c", code], cwd=Path(ROOT), stdout=stdout)
        assert made.returncode == piped
