"""What a terminal shows: a real one (tmux), or a pseudo-terminal where there is no tmux."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from rich.color import Color, ColorSystem

from moe_inspect.analysis.metrics.registry import listing
from moe_inspect.cli.report import print_metrics
from moe_inspect.reporting.render.console import SCREEN_LINES, console_for, on_screen
from moe_inspect.reporting.render.heatmap import style
from moe_inspect.reporting.render.terminal import MOST_FINDINGS, finding_lines, print_report
from moe_inspect.reporting.report import report
from moe_inspect.trace.reader import open_trace
from tests.conftest import ROOT
from tests.synthetic import uniform_ids, write_trace

SHAPES = [(4, 8, 2), (24, 64, 8), (61, 256, 8)]
TALL, LOW = 60, 24
# draws the report whose number it reads, on a screen that it clears first, once that has the size
# that it reads; and says which turn it was
DRAW = """
import os, sys, time, moe_inspect
from moe_inspect.reporting.render.terminal import print_report
made = [moe_inspect.report(path) for path in sys.argv[1:]]
print("READY", flush=True)
for line in sys.stdin:
    print("\\x1b[2J\\x1b[H", end="")
    number, turn, *size = map(int, line.split())
    while tuple(os.get_terminal_size()) != tuple(size):
        time.sleep(0.01)
    print_report(made[number], sys.stdout)
    print("END", turn, flush=True)
"""
TURNS = count()
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
Show = Callable[..., list[str]]


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Relative paths in the current directory: titles are as long as a user's."""
    place, names = tmp_path_factory.mktemp("shapes"), list[str]()
    os.chdir(place)
    for L, E, k in SHAPES:
        rng, T = np.random.default_rng(0), 400
        ids = [uniform_ids(rng, T, E, k) for _ in range(L)]
        for r in range(0, L, 3):  # some layers prefer experts 0 to k - 1, in one domain or in all
            ids[r][r % 2 * 100 : 200] = np.arange(k)
        weights = [np.sort(rng.random((T, k)).astype(np.float32))[:, ::-1] for _ in ids]
        write_trace(
            Path(f"{L}x{E}"),
            ids,
            E,
            document=np.arange(T) // 20,
            domain_of_document=["law"] * 10 + ["code"] * 10,
            token_id=rng.integers(0, 30, T),
            weights=weights,
            words=30,
        )
        names.append(f"{L}x{E}")
    return names


@pytest.fixture(scope="module")
def show(traces: list[str]) -> Iterator[Show]:
    """The lines on a screen of so many columns, of the report of a trace."""
    command = [sys.executable, "-c", DRAW, *traces]
    here = _tmux(command) if shutil.which("tmux") else _pseudo_terminal(command)
    yield next(here)
    next(here, None)


def _tmux(command: list[str]) -> Iterator[Show]:
    server = ["tmux", "-L", f"moe-inspect-{os.getpid()}", "-f", os.devnull]

    def tmux(*arguments: object) -> str:
        made = [*server, *map(str, arguments)]
        return subprocess.run(made, capture_output=True, text=True, check=True).stdout

    def lines(until: str) -> list[str]:
        for _ in range(3_000):
            shown = tmux("capture-pane", "-p", "-t", "one").rstrip("\n").split("\n")
            if shown[-1] == until:
                return shown[:-1]
            time.sleep(0.05)
        raise AssertionError(shown)

    def show(columns: int, number: int, height: int = TALL) -> list[str]:
        tmux("resize-window", "-t", "one", "-x", columns, "-y", height)
        turn = next(TURNS)
        tmux("send-keys", "-R", "-t", "one", f"{number} {turn} {columns} {height}", "Enter")
        return lines(f"END {turn}")

    try:
        # pytest imports readline, which sets the size in the environment
        sizes = "env -u LINES -u COLUMNS"
        program = f"{sizes} PYTHONPATH={shlex.quote(str(ROOT))} {shlex.join(command)}"
        tmux("new-session", "-d", "-s", "one", "-x", 80, "-y", TALL, program)
        lines("READY")
        yield show
    finally:
        tmux("kill-server")


def _pseudo_terminal(command: list[str]) -> Iterator[Show]:
    ours, theirs = pty.openpty()
    running = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={
            **{name: at for name, at in os.environ.items() if name not in ("LINES", "COLUMNS")},
            **{"TERM": "xterm", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)},
        },
    )

    def read(until: str) -> str:
        sent = b""
        while not sent.endswith(f"{until}\r\n".encode()):
            sent += os.read(ours, 65_536)
        return sent.decode()

    def show(columns: int, number: int, height: int = TALL) -> list[str]:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", height, columns, 0, 0))
        turn = next(TURNS)
        os.write(ours, f"{number} {turn} {columns} {height}\n".encode())
        sent = ESCAPE.sub("", read(f"END {turn}").rpartition("\x1b[H")[2]).split("\r\n")[:-2]
        return [one for line in sent for one in _broken(line, columns)]

    try:
        read("READY")
        yield show
    finally:
        running.kill()
        running.wait()


def _broken(line: str, columns: int) -> list[str]:
    """A line as a terminal breaks it that is narrower."""
    return [line[n : n + columns].rstrip() for n in range(0, max(len(line), 1), columns)]


def _words(lines: list[str]) -> set[str]:
    """The words of a report without its map, whose rows depend on the width."""
    kept, of_map = list[str](), False
    for line in lines:
        of_map = bool(line) and (of_map or line.startswith("load of each expert"))
        kept += [] if of_map else [line]
    return set(" ".join(kept).split())


def _in_a_file(path: str) -> list[str]:
    file = io.StringIO()
    print_report(report(open_trace(path)), file, full=True)
    whole = file.getvalue().splitlines()
    file = io.StringIO()
    print_report(report(open_trace(path)), file)
    return whole + file.getvalue().splitlines()


def test_a_report_fits_a_screen_and_no_word_is_broken(show: Show, traces: list[str]) -> None:
    for number, (path, (L, E, _)) in enumerate(zip(traces, SHAPES, strict=True)):
        piped = _in_a_file(path)
        known = _words(piped)
        assert not _words([one for line in piped for one in _broken(line, 80)]) <= known  # control
        shown: dict[int, list[str]] = {}
        for columns in (80, 120, 200):
            lines = shown[columns] = show(columns, number)
            assert 20 < len(lines) <= SCREEN_LINES, (path, columns, len(lines))
            new = _words(lines[:-1]) - known
            assert all(word.isdecimal() for word in new), (path, columns, new)
            rows = [line for line in lines if re.match(r"layer +\d", line)]
            assert len(rows) == L or 10 <= len(rows) < L
            assert lines[-1].startswith("--full adds ")
            at = next(n for n, line in enumerate(lines) if "max/mean" in line) + 1
            worst = [float(line.split()[2].rstrip("x")) for line in lines[at:-2]]
            assert worst == sorted(worst, reverse=True)
            assert len(worst) >= min(L, 5)
            assert (
                sum(line.startswith("• ") for line in lines)
                <= MOST_FINDINGS
                < len([line for line in piped if line.startswith("• ")])
            )
        assert len(shown[200]) <= len(shown[80])
        first = [line for line in shown[80] if re.match(r"layer +0", line)]
        assert bool(re.search("[▇█]", first[0])) == (E > 8)  # characters where numbers do not fit


def test_a_report_fits_a_low_terminal(show: Show, traces: list[str]) -> None:
    for number in range(len(traces)):
        lines = show(80, number, LOW)
        # the line that ends the drawing stands in the last one, as a prompt would
        assert 15 < len(lines) < LOW, (number, lines)
        assert lines[-1].startswith("--full adds ")
        assert any(line.startswith(("• Critical: ", "• Warning: ")) for line in lines)
        assert sum(bool(re.match(r"layer +\d", line)) for line in lines) >= 4


def test_a_file_gets_sentences_in_one_line(traces: list[str]) -> None:
    made, file = report(open_trace(traces[1])), io.StringIO()
    print_report(made, file)
    lines = file.getvalue().splitlines()
    said = [str(line) for one in made.verdict() for line in finding_lines(one, console_for(file))]
    assert said == lines[2 : 2 + len(made.verdict())]
    assert said[0].startswith("• Critical: ")
    assert said[-1].startswith("• Judged on")
    assert len(lines) <= SCREEN_LINES
    assert not any(line.endswith((" ", "…")) for line in lines)


def test_the_list_of_metrics_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in (80, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = on_screen(lambda file: print_metrics(console_for(file))).splitlines()
        assert columns - 20 < max(map(len, lines)) <= columns
        whole = " ".join(" ".join(lines).split())
        for row in listing():
            assert f"{row['metric']} {row['definition']} {row['range']} · " in whole
        tables = [line for line in lines if line.startswith("table ")]
        assert len(tables) == len(set(tables)) == len({row["table"] for row in listing()})


@pytest.mark.parametrize("colours", [ColorSystem.TRUECOLOR, ColorSystem.EIGHT_BIT])
def test_loads_below_at_and_above_the_mean_have_colours_that_differ(colours: ColorSystem) -> None:
    def background(ratio: float) -> tuple[int, int, int]:
        colour = Color.parse(style(ratio).rpartition(" ")[2]).downgrade(colours)
        return colour.get_truecolor()

    assert style(1) == style(0.98) == ""
    below, above, far, farther = map(background, (0.78, 1.24, 2, 4))
    assert below[2] - below[0] > 60  # blue
    assert above[0] - above[2] > 60  # red
    assert far[1] < above[1] - 30
    assert farther[1] < far[1] - 30
