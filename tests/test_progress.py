"""The progress bar of commands, seen through a pseudo-terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from moe_inspect import MoeInspectError, progress, simulate_cache, simulate_placement, verify
from moe_inspect.__main__ import main
from moe_inspect.cli.progress import bar as bars
from moe_inspect.cli.report.build import build, phases_of
from moe_inspect.cli.report.options import ReportOptions, Simulated
from moe_inspect.cli.report.request import requested
from moe_inspect.cli.report.write import write_files
from moe_inspect.comparison.compare import compare
from moe_inspect.reporting.charts.spec import draw_charts
from moe_inspect.reporting.report import report
from moe_inspect.trace.reader import open_trace
from tests.conftest import ROOT, phases_begun
from tests.synthetic import uniform_ids, write_trace

L, T = 3, 400
PHASES: dict[Callable[[str], object], dict[str, int]] = {
    lambda path: draw_charts(report(path)): {
        "reading tokens": T,
        "counting": T * L,
        "drawing": 0,
    },
    verify: {"checksums": T, "checking rows": T},
    lambda path: compare(path, path).verdict(): {"comparing": T},
    lambda path: report(path).page(): {
        "reading tokens": T,
        "counting": T * L,
        "drawing": 0,
        "reading text": 0,
        "reading documents": T,
        "counting documents": T,
        "reading routes": T,
        "writing page": 0,
    },
    simulate_cache: {"simulating cache": T},
    lambda path: simulate_placement(path, policies=["contiguous"]): {
        "counting loads": T,
        "placing": L,
        "counting ranks": T,
    },
    lambda path: simulate_placement(path, gpus=4, minimize="ranks"): {
        "counting loads": T,
        "placing": L,
        "sampling": T,
        "exchanging": L,
        "counting ranks": T,
    },
}


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("progress") / "t"
    ids = [uniform_ids(rng, T, 8, 2) for _ in range(L)]
    domains = ["law"] * 10 + ["code"] * 10
    token_id = rng.integers(0, 30, T)
    document = np.arange(T) // 20
    write_trace(
        path, ids, 8, document=document, domain_of_document=domains, token_id=token_id, words=30
    )
    return str(path)


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
    with monkeypatch.context() as patched, os.fdopen(theirs, "w") as stderr:
        patched.setattr(sys, "stderr", stderr)
        patched.setenv("TERM", "xterm")
        yield sent
    reader.join()
    os.close(ours)


@pytest.mark.parametrize("run", PHASES)
def test_phases_have_a_total_from_the_start_and_reach_it(
    trace: str, run: Callable[[str], object]
) -> None:
    begun, done = dict[str, int](), dict[str, int]()

    def listener(name: str, total: int, unit: str) -> progress.Advance:
        begun[name], done[name] = total, 0

        def advance(amount: int) -> None:
            done[name] += amount

        return advance

    with progress.listening(listener):
        run(trace)
    assert done == begun
    assert begun.keys() == PHASES[run].keys()
    assert all(begun[name] == (total or begun[name]) > 0 for name, total in PHASES[run].items())
    begun.clear()
    run(trace)  # nobody listens
    assert not begun


def test_a_long_command_shows_its_phases_on_stderr_and_removes_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for after_s, expected in ((0.0, True), (60.0, False)):  # the second is done before that
        monkeypatch.setattr(bars, "AFTER_S", after_s)
        with terminal(monkeypatch) as sent, bars.shown(("first", 3), ("second", 1)) as bar:
            assert bar is not None
            bar.started.wait(5 if expected else 0)
            for name in ("first", "second"):
                advance = progress.phase(name, 2_000, "tokens")
                advance(1_500)
                if expected:
                    bar.rich.refresh()
                advance(500)
        text = b"".join(sent).decode()
        assert ("first 1/2" in text and "1,500 of 2,000 tokens" in text) == expected
        assert ("second 2/2" in text and "2,000 of 2,000 tokens" in text) == expected
        assert bool(re.search(r"\x1b\[2K$", text)) == expected  # the line is erased
    assert capsys.readouterr().out == ""


def test_the_time_left_is_that_of_the_whole_command(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    bar = bars.Bar([("a", 1), ("skipped", 5), ("b", 4), ("b", 3), ("c", 2)])
    task = bar.rich.tasks[0]
    advance = bar.phase("a", 100, "tokens")
    assert bar.left_s() is None  # nothing is known yet
    now[0] += 2
    advance(50)
    # half of a took 2 s, so that what costs 1 takes 4
    assert bar.left_s() == pytest.approx(2 + (5 + 4 + 3 + 2) * 4)
    now[0] += 1
    assert bar.left_s() == pytest.approx(1 + (5 + 4 + 3 + 2) * 4)
    advance(50)
    assert task.completed == 1
    advance = bar.phase("b", 10, "tokens")
    assert task.completed == 6  # one that is left out counts as done
    assert bar.left_s() == pytest.approx((4 + 3 + 2) * 3)
    now[0] += 4
    advance(5)  # its own speed, then the mean of both: 7 s for 1 + 2
    assert bar.left_s() == pytest.approx(4 + (3 + 2) * 7 / 3)
    advance = bar.phase("unplanned", 10, "tokens")  # 7 s for 1 + 4 before
    assert bar.left_s() == pytest.approx((3 + 2) * 7 / 5)
    now[0] += 1
    advance(5)
    assert bar.left_s() == pytest.approx(1 + (3 + 2) * 7 / 5)
    assert task.completed == 10
    for name, at in (("b", 13), ("c", 15)):
        assert bar.estimated
        now[0] += 1
        bar.phase(name, 1, "tokens")(1)
        assert task.completed == at
    assert not bar.estimated
    assert task.total == 15
    bar.close()


def test_the_bar_is_one_line_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    bar = bars.Bar([("counting loads", 3), ("counting ranks", 2)])
    advance = bar.phase("counting loads", 125_042_688, "tokens")
    now[0] += 800
    advance(62_521_344)
    file = io.StringIO()
    Console(file=file, width=80).print(bar.rich.get_renderable())
    (line,) = file.getvalue().splitlines()
    assert line.startswith("counting loads 1/2 ")
    assert line.endswith(" 62,521,344 of 125,042,688 tokens 13:20, about 31:06 left")
    bar.close()


def test_the_phases_of_a_report_are_those_it_goes_through(trace: str, tmp_path: Path) -> None:
    asked = ReportOptions(
        trace,
        html=tmp_path / "p.html",
        simulate=[Simulated.capacity, Simulated.placement],
    )
    request, opened = requested(asked), open_trace(trace)
    with phases_begun() as begun:
        write_files(build(opened, request)[0], request)
    planned = phases_of(opened, request)
    assert begun == [name for name, _ in planned]
    assert all(cost > 0 for _, cost in planned)
    drawn = phases_of(opened, requested(replace(asked, plots=tmp_path)))
    assert [name for name, _ in drawn][3:6] == ["drawing", "writing pictures", "drawing"]


@pytest.mark.parametrize(
    ("command", "module", "loads", "shows"),
    [
        (["trace", "demo", "-o", "t"], "cli.trace.command", "need_torch", "starting"),
        (["doctor"], "cli.doctor", "quiet", "loading torch"),
    ],
)
def test_a_command_shows_progress_before_it_loads_torch(
    command: list[str],
    module: str,
    loads: str,
    shows: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["moe-inspect", *command])
    with terminal(monkeypatch) as sent:

        def load() -> None:
            end = time.monotonic() + 10
            while shows not in b"".join(sent).decode() and time.monotonic() < end:
                time.sleep(0.01)
            raise MoeInspectError("shown" if time.monotonic() < end else "not shown")

        monkeypatch.setattr(f"moe_inspect.{module}.{loads}", load)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        with pytest.raises(SystemExit) as ended:
            main()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert ended.value.code == 1
    assert "error: shown" in b"".join(sent).decode()


def test_nothing_is_shown_on_a_pipe(trace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with bars.shown(("first", 1)) as bar:  # stderr is no terminal
        assert bar is None
    monkeypatch.setattr(bars, "_piped", lambda: True)
    with (
        terminal(monkeypatch) as sent,
        bars.shown(("first", 1)) as bar,
    ):  # stdout is a pipe: to `less`
        assert bar is None
    assert not sent
    code = "from moe_inspect.cli.progress.bar import _piped; import sys; sys.exit(_piped())"
    for stdout, piped in ((subprocess.PIPE, 1), (subprocess.DEVNULL, 0)):
        made = subprocess.run([sys.executable, "-c", code], cwd=Path(ROOT), stdout=stdout)
        assert made.returncode == piped
