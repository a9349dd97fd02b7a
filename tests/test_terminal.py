"""The report as text: in a file, and on a terminal of so many columns and lines."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.color import Color, ColorSystem

from moe_inspect.analysis.metrics.registry import listing
from moe_inspect.cli.report import print_metrics
from moe_inspect.public import Trace, report
from moe_inspect.reporting.render import console
from moe_inspect.reporting.render.console import SCREEN_LINES, console_for, on_screen
from moe_inspect.reporting.render.heatmap import style
from moe_inspect.reporting.render.terminal import finding_lines, headline_lines, print_report
from moe_inspect.reporting.report import Report
from moe_inspect.reporting.verdict.findings import verdict_of
from tests.conftest import Cli
from tests.support.planted import planted, text_of
from tests.support.synthetic import uniform_ids, write_trace

SHAPES = [(4, 8, 2), (24, 64, 8), (61, 256, 8)]
TALL, LOW = 60, 24
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
Show = Callable[..., list[str]]


class Screen(io.StringIO):
    """Takes what is printed as a terminal would."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch) -> Show:
    """The lines of a report on a screen of so many columns and lines, as a terminal breaks them."""

    def lines(made: Report, columns: int, height: int = TALL) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("LINES", str(height))
        monkeypatch.setenv("TERM", "xterm")
        print_report(made, file := Screen())
        printed = ESCAPE.sub("", file.getvalue()).splitlines()
        return [one for line in printed for one in _broken(line, columns)]

    return lines


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    """Of relative paths in the current directory: titles are as long as a user's."""
    place, made = tmp_path_factory.mktemp("shapes"), list[Report]()
    os.chdir(place)
    for L, E, k in SHAPES:
        rng, T = np.random.default_rng(0), 400
        ids = [uniform_ids(rng, T, E, k) for _ in range(L)]
        for r in range(0, L, 3):  # some layers prefer experts 0 to k - 1, in one domain or in all
            ids[r][r % 2 * 100 : 200] = np.arange(k)
        weights = [np.sort(rng.random((T, k)).astype(np.float32))[:, ::-1] for _ in ids]
        given: Any = {"document": np.arange(T) // 20, "token_id": rng.integers(0, 30, T)}
        given |= {"domain_of_document": ["law"] * 10 + ["code"] * 10, "words": 30}
        made.append(report(write_trace(Path(f"{L}x{E}"), ids, E, weights=weights, **given)))
    return made


def _broken(line: str, columns: int) -> list[str]:
    """A line as a terminal breaks it that is narrower."""
    return [line[n : n + columns].rstrip() for n in range(0, max(len(line), 1), columns)]


def _words(lines: list[str]) -> set[str]:
    """The words of a report without its map, whose rows depend on the width."""
    text = re.sub(r"^load of each expert.*?(\n\n|\Z)", "", "\n".join(lines), flags=re.M | re.S)
    return set(text.split())


def _in_a_file(made: Report) -> list[str]:
    return text_of(made).splitlines()


def test_a_report_fits_a_screen_and_no_word_is_broken(show: Show, reports: list[Report]) -> None:
    for made, (L, E, _) in zip(reports, SHAPES, strict=True):
        piped = _in_a_file(made)
        known = _words(piped)
        assert not _words([one for line in piped for one in _broken(line, 80)]) <= known  # control
        shown: dict[int, list[str]] = {}
        for columns in (80, 120, 200):
            lines = shown[columns] = show(made, columns)
            assert 20 < len(lines) <= SCREEN_LINES, (E, columns, len(lines))
            new = _words(lines[:-1]) - known
            assert all(word.isdecimal() for word in new), (E, columns, new)
            rows = [line for line in lines if re.match(r"layer +\d", line)]
            assert len(rows) == L or 10 <= len(rows) < L
            assert lines[-1].endswith("page: --html FILE")
            at = next(n for n, line in enumerate(lines) if "max/mean" in line) + 1
            worst = [float(line.split()[2].rstrip("x")) for line in lines[at:-2]]
            assert worst == sorted(worst, reverse=True)
            assert len(worst) >= min(L, 5)
            bullets, in_file = (sum(of.startswith("• ") for of in text) for text in (lines, piped))
            verdict = verdict_of(made)
            assert bullets <= in_file == min(verdict.most_others, len(verdict.others))
        assert len(shown[200]) <= len(shown[80])
        first = [line for line in shown[80] if re.match(r"layer +0", line)]
        assert bool(re.search("[▇█]", first[0])) == (E > 8)  # characters where numbers do not fit


def test_a_report_fits_a_low_terminal(show: Show, reports: list[Report]) -> None:
    for made in reports:
        lines = show(made, 80, LOW)
        assert 15 < len(lines) < LOW, lines  # the prompt stands in the last one
        assert lines[-1].endswith("page: --html FILE")
        assert any(line.startswith(("Critical: ", "Warning: ")) for line in lines)
        assert sum(bool(re.match(r"layer +\d", line)) for line in lines) >= 4


def test_a_file_gets_sentences_in_one_line(reports: list[Report]) -> None:
    made, file = reports[1], io.StringIO()
    print_report(made, file)
    lines = file.getvalue().splitlines()
    verdict, console = verdict_of(made), console_for(file)
    others = [line for one in verdict.others for line in finding_lines(one, console)]
    headline = headline_lines(verdict.headline, console)
    texts = [verdict.sample.text, "", *headline, "", *others[: verdict.most_others]]
    assert [*map(str, texts)] == lines[1 : 1 + len(texts)]
    assert str(headline[0]).startswith("Critical: ")
    assert len(lines) <= SCREEN_LINES
    assert not any(line.endswith((" ", "…")) for line in lines)


def test_the_list_of_metrics_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in (80, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = on_screen(partial(print_metrics, pd.DataFrame(listing()))).splitlines()
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


def test_text_in_a_file_keeps_every_number(planted_report: Report):
    text = text_of(planted_report)
    assert "…" not in text
    assert not any(line.endswith(" ") for line in text.splitlines())
    assert "more columns" not in text
    assert "\x1b" not in text
    ratio = planted_report.tables["load"]["load_ratio"].to_numpy()
    row = "".join(f"{v:5.2f}" if v else "    0" for v in ratio[24:])
    assert f"layer 3  {row}" in text


def test_wide_models_fit_their_line(tmp_path: Path):
    rng = np.random.default_rng(0)
    ids = uniform_ids(rng, 2_000, 300, 8)
    ids[:, 0] = 299
    made = report(write_trace(tmp_path / "t", [ids], 300, document=np.arange(2_000) // 100))
    text = text_of(made)
    row = next(line for line in text.splitlines() if line.startswith("layer 0 "))
    assert len(row) == len("layer 0  ") + 100
    assert row.endswith("█")  # the busiest expert shows through its neighbours
    assert "each character: most extreme of 3 experts" in text


def test_a_domain_that_is_selected_is_compared_with_the_others(
    tmp_path: Path, planted_report: Report
):
    law = report(planted(tmp_path / "u"), domains="law")
    every = planted_report.tables["domains"]
    of_law = every[every["domain"] == "law"].reset_index(drop=True)
    assert law.tables["domains"].equals(of_law)
    assert of_law["lift"].max() > 1.1


def test_an_encoding_that_lacks_a_character_loses_that_character_only(
    cli: Cli, planted_trace: Trace
):
    done = cli("report", planted_trace.path, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.stdout.isascii()
    assert "Critical: Layer 3 is the worst balanced" in done.stdout


def test_tokens_that_look_like_markup_are_text():
    frame = pd.DataFrame({"layer": [0, 0], "router": [0, 0], "token": ["[/bold]\n", ":smile:"]})
    console.print_table(frame, file := io.StringIO())
    assert "[/bold]\\n" in file.getvalue()
    assert ":smile:" in file.getvalue()


def on_a_terminal(columns: int, *arguments: object, height: int = 50) -> list[str]:
    """The lines that a terminal of this size is sent, without colours."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", height, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm"}
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "moe_inspect", *map(str, arguments)]
    nothing = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    running = subprocess.Popen(command, stdout=theirs, env=environment, **nothing)
    os.close(theirs)
    sent = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(ours, 65_536):
            sent += part
    os.close(ours)
    assert running.wait() == 0
    assert b"\x1b[" in sent
    return ESCAPE.sub("", sent.decode()).replace("\r\n", "\n").splitlines()


@pytest.mark.parametrize("columns", [80, 120])
def test_a_part_of_a_wide_table_says_which_rows_it_has(planted_trace: Trace, columns: int):
    asked = ("--table", "windows", "--layers", 0)
    lines = on_a_terminal(columns, "report", planted_trace.path, *asked)
    assert max(map(len, lines)) <= columns
    heads = [line.split() for line in lines if line.split()[:1] == ["window"]]
    said = " ".join(lines[: lines.index(next(line for line in lines if "window " in line))])
    constant = [part.split()[0] for part in said.removeprefix("every row: ").split(" · ")]
    named = {name for head in heads for name in head} | {*constant, "router"}
    assert named == {*report(planted_trace).tables["windows"].columns}
    assert "layer" in constant
    assert len(heads) > 1 or columns == 120


def test_long_facts_are_broken_not_cut(planted_trace: Trace):
    lines = on_a_terminal(60, "report", planted_trace.path, "--table", "summary")
    assert max(map(len, lines)) <= 60
    text = " ".join(" ".join(lines).split())
    assert all(note in text for note in report(planted_trace).notes())


def test_the_size_is_that_of_the_terminal(planted_trace: Trace):
    assert len(on_a_terminal(80, "report", planted_trace.path, height=LOW)) < LOW
    assert len(on_a_terminal(80, "report", planted_trace.path)) > LOW
