"""The report as text, in a file and on a terminal."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from moe_inspect.reporting.render import console, terminal
from moe_inspect.reporting.report import Report, report
from moe_inspect.trace.reader import Trace
from tests.conftest import Cli
from tests.planted import T, planted, sentences, text_of
from tests.synthetic import uniform_ids, write_trace


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return planted(tmp_path_factory.mktemp("planted") / "t")


@pytest.fixture(scope="module")
def made(trace: Trace) -> Report:
    return report(trace)


def test_text_in_a_file_keeps_every_column_and_number(made: Report):
    text = text_of(made)
    for name in ("balance", "load", "domains", "specialization", "vocabulary"):
        head = next(
            line
            for line in text.splitlines()
            if line.split()[:2] == ["layer", "router"]
            and line.split() == list(made.tables[name].columns)
        )
        assert head
    assert "…" not in text
    assert not any(line.endswith(" ") for line in text.splitlines())
    assert "more columns" not in text
    lines = text[text.index("•") : text.index("\n\nload of")].splitlines()
    assert [re.sub("• ((Critical|Warning): )?", "", line) for line in lines] == sentences(made)
    assert lines[0].startswith("• Critical: ")
    assert "\x1b" not in text
    ratio = made.tables["load"]["load_ratio"].to_numpy()
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


def test_a_terminal_gets_lines_it_can_hold(made: Report):
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    file = Screen()
    os.environ["COLUMNS"], before = "80", os.environ.get("COLUMNS")
    try:
        terminal.print_report(made, file, full=True)
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue()).splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    text = " ".join(" ".join(lines).split())
    for name in ("balance", "domains"):
        assert re.search(rf"\+ \d+ more columns: moe-inspect report \S+ --table {name}", text)


def test_one_domain_has_nothing_to_compare(tmp_path: Path, made: Report):
    """Selected from several it has: all of them."""
    ids = uniform_ids(np.random.default_rng(0), 500, 8, 2)
    trace = write_trace(tmp_path / "t", [ids], 8)
    one, law = text_of(report(trace)), report(planted(tmp_path / "u"), domains="law")
    assert "domains: only one, 'text': nothing to compare it with" in one
    assert " lift" not in one
    assert " lift" in text_of(law)
    every = made.tables["domains"]
    of_law = every[every["domain"] == "law"].reset_index(drop=True)
    assert law.tables["domains"].equals(of_law)
    assert of_law["lift"].max() > 1.1


def test_the_domains_shown_are_in_the_order_said(made: Report):
    shown = terminal.EXCERPTS["domains"].rows(made.tables["domains"])
    above = shown["activation"] - shown["activation"] / shown["lift"]
    assert "by activation minus that mean" in terminal.EXCERPTS["domains"].what
    assert above.is_monotonic_decreasing
    assert len(shown) == terminal.ROWS


def test_progress_counts_each_decision_as_often_as_it_is_read(trace: Trace):
    told: list[int] = []
    made = report(trace, progress=told.append)
    assert made.tables["balance"].size
    assert sum(told) == T * 4
    assert made.tables["specialization"].size
    assert sum(told) == 2 * T * 4


def test_an_encoding_that_lacks_a_character_loses_that_character_only(cli: Cli, trace: Trace):
    done = cli("report", trace.path, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.stdout.isascii()
    assert "? Critical: Layer 3 is the worst balanced" in done.stdout


def test_tokens_that_look_like_markup_are_text():
    frame = pd.DataFrame({"layer": [0, 0], "router": [0, 0], "token": ["[/bold]\n", ":smile:"]})
    file = io.StringIO()
    console.print_table(frame, file)
    assert "[/bold]\\n" in file.getvalue()
    assert ":smile:" in file.getvalue()


def on_a_terminal(columns: int, *arguments: object) -> list[str]:
    """The lines that a terminal so wide is sent, without colours."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("COLUMNS", "LINES", "NO_COLOR")
    }
    command = [sys.executable, "-m", "moe_inspect", *map(str, arguments)]
    running = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        env={**environment, "TERM": "xterm"},
    )
    os.close(theirs)
    sent = b""
    while True:
        try:
            part = os.read(ours, 65_536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        sent += part
    os.close(ours)
    assert running.wait() == 0
    assert b"\x1b[" in sent
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", sent.decode()).replace("\r\n", "\n").splitlines()


@pytest.mark.parametrize("columns", [80, 120])
def test_a_part_of_a_wide_table_says_which_rows_it_has(trace: Trace, columns: int):
    lines = on_a_terminal(columns, "report", trace.path, "--table", "windows", "--layers", 0)
    assert max(map(len, lines)) <= columns
    heads = [line.split() for line in lines if line.split()[:1] == ["window"]]
    said = " ".join(lines[: lines.index(next(line for line in lines if "window " in line))])
    constant = [part.split()[0] for part in said.removeprefix("every row: ").split(" · ")]
    assert {name for head in heads for name in head} | {*constant, "router"} == {
        *report(trace).tables["windows"].columns
    }
    assert "layer" in constant
    assert len(heads) > 1 or columns == 120


def test_long_facts_are_broken_not_cut(trace: Trace):
    lines = on_a_terminal(60, "report", trace.path, "--table", "summary")
    assert max(map(len, lines)) <= 60
    text = " ".join(" ".join(lines).split())
    assert all(note in text for note in report(trace).notes())
