"""Whatever is wrong with a disk, a stream, a name or a terminal, each command ends in one line,
never in a traceback."""

from __future__ import annotations

import builtins
import csv
import errno
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import typer

import moe_inspect
from moe_inspect.__main__ import main
from moe_inspect.cli import app
from moe_inspect.cli.emit import Format, emit
from moe_inspect.errors import MoeInspectError
from moe_inspect.public import Trace, report
from moe_inspect.text import first_line, printable
from moe_inspect.trace.verify import verify
from tests.support.damage import disk_of, edit_manifest, files_in
from tests.support.synthetic import uniform_ids, write_trace
from tests.test_damage import put, replace_part

HOSTILE = "a\x1b]0;b\x07\x9b2J\u202ec\u2066"  # OSC, C1, direction marks
LONE = "half \ud800"
LATIN = os.fsdecode(b"caf\xe9")  # a name that is no UTF-8
BALANCED = Path(__file__).parent.parent / "sample_traces" / "balanced"  # of the bundled model
# command → what it is usually called with, beside a trace "t" with logits and a file "loads.csv"
USUAL: dict[str, list[Any]] = {
    "trace": ["demo", "-o", "new", "--max-tokens", 50],
    # (what it does is in test_engine_server: it needs a server)
    "engine": ["http://127.0.0.1:9"],
    "report": ["t"],
    "compare": ["t", "t"],
    "ablate": ["demo", "--layers", 1, "--experts", 0, "--max-tokens", 200],
    "describe": ["demo"],
    "import": ["counts", "loads.csv", "-o", "new", "--top-k", 1],
    "check": ["t"],
    "text": ["t", "--layers", 0, "--experts", 1],
    "watch": ["t", "--every", "10ms"],
    "doctor": ["--directory", "."],
    "merge": ["t", "u", "-o", "new"],
    "export": ["t", "--format", "counts", "-o", "new.csv"],
    "simulate placement": ["t", "--gpus", 2, "--policy", "contiguous"],
    "simulate decode": ["t"],
    "simulate cache": ["t"],
    "simulate routing": ["t"],
}
TRACING = ["trace", "engine"]
READERS = [name for name, arguments in USUAL.items() if "t" in arguments]
SILENT = ["trace", "import", "merge", "export"]  # on stdout
WRITE_ONCE = ["import", "merge"]  # but for --overwrite


def test_every_command_is_tried() -> None:
    named: Any = typer.main.get_command(app)
    inner = {f"simulate {name}" for name in named.commands["simulate"].commands}
    assert {*named.commands} - {"simulate"} | inner == {*USUAL}


def sample(root: Path, *labels: str, model: str = "synthetic") -> None:
    """Two routers of 4 experts, k = 2, with weights, logits and a vocabulary."""
    rng, T, E = np.random.default_rng(0), 64, 4
    config = {"model_type": "mixtral", "hidden_act": "silu"}
    config |= {"hidden_size": 8, "moe_intermediate_size": 8}
    write_trace(
        root,
        [uniform_ids(rng, T, E, 2) for _ in range(2)],
        E,
        document=np.arange(T) // 8,
        domain_of_document=labels,
        token_id=rng.integers(0, 3, T),
        weights=[np.tile(np.float32([0.75, 0.25]), (T, 1))] * 2,
        logits=[rng.normal(size=(T, E)).astype(np.float16) for _ in range(2)],
        batch_tokens=8,
        words=3,
        manifest={"model": {"id": model, "config": config}},
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("made")
    sample(place / "t", "law", "code")
    sample(place / "u", "poems")
    (place / "loads.csv").write_text("layer,expert,count\n0,0,5\n0,1,7\n")
    return place


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with what the usual calls read."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(
    command: str, *more: object, usual: Any = None, stdout: Any = None, stderr: Any = None
) -> tuple[int, str]:
    """The exit code and what is on stderr, in this process. Whatever else comes out of the command
    fails the test."""
    out, err = stdout or io.TextIOWrapper(io.BytesIO(), "utf-8"), stderr or io.StringIO()
    given = [*(USUAL[command] if usual is None else usual), *more]
    before, sys.argv = sys.argv, ["moe-inspect", *command.split(), *map(str, given)]
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.argv = before
    return int(ended.value.code or 0), "" if stderr else err.getvalue()


def one_line(result: tuple[int, str], *says: str) -> None:
    code, err = result
    assert code == 1, err
    assert re.fullmatch(r"error: \S.*\n", err), err
    assert all(part in err for part in says), err


def broken(command: str, *says: str, usual: Any = None) -> None:
    """A trace that cannot be read: an error of one line, but a finding of `check`."""
    shown = io.BytesIO()
    result = run(command, usual=usual, stdout=io.TextIOWrapper(shown, "utf-8"))
    if command != "check":
        return one_line(result, *says)
    assert result == (3, "failed: broken_file\n")
    assert all(part in shown.getvalue().decode() for part in says)
    return None


def fine(result: tuple[int, str]) -> None:
    assert result[0] == 0, result[1]


def test_an_error_is_one_line_whatever_it_quotes() -> None:
    error = MoeInspectError(f"no column {HOSTILE}\nof {LATIN}")
    assert str(error).isprintable()
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


# --- numbers


def test_numbers_beyond_any_integer_are_fine_or_one_line(here: Path) -> None:
    for command, *asked in (
        ["report", "--table", "windows", "--window"],
        ["report", "--table", "drift", "--window"],
        ["watch", "--window"],
        ["text", "--context"],
    ):
        fine(run(command, *asked, 10**20))
    for option in ("--shift-positions", "--shift-routes"):
        one_line(run("compare", option, 10**20), "a shift by 100,000,000,000,000,000,000 tokens")
        one_line(run("compare", option, -(2**32)), "at most 1,048,575 are possible")


# --- streams


@pytest.mark.parametrize("command", [c for c in USUAL if c not in TRACING])
def test_stdout_that_takes_nothing(command: str, here: Path) -> None:
    for place, mode, why in (
        ("/dev/full", os.O_WRONLY, "No space left on device"),
        (os.devnull, os.O_RDONLY, "Bad file descriptor"),
    ):
        with os.fdopen(os.open(place, mode), "w", encoding="utf-8") as full:
            result = run(command, *(["--overwrite"] if command in WRITE_ONCE else []), stdout=full)
        fine(result) if command in SILENT else one_line(result, f"cannot write to stdout: {why}")


@pytest.mark.parametrize("command", [c for c in USUAL if c not in TRACING])
def test_stdout_that_is_gone_or_ascii_and_stderr_that_is_full(command: str, here: Path) -> None:
    again = ["--overwrite"] if command in WRITE_ONCE else []
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w", encoding="utf-8") as gone:
        fine(result := run(command, *again, stdout=gone))
    assert command in SILENT or result[1] == ""
    shown = io.BytesIO()
    fine(run(command, *again, stdout=io.TextIOWrapper(shown, "ascii")))
    assert shown.getvalue().isascii()
    assert bool(shown.getvalue()) == (command not in SILENT)
    with open("/dev/full", "w", encoding="utf-8", buffering=1) as full:
        fine(run(command, *again, stderr=full))
        assert run(command, f"--{HOSTILE}", stderr=full)[0] == 2


def test_real_streams(here: Path) -> None:
    poor = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for command, said in (
        ("describe demo >&-", "error: cannot write to stdout: Bad file descriptor\n"),
        ("--help > /dev/full", "error: No space left on device\n"),
        (
            "report t --table load --format csv -o /dev/full",
            "error: cannot write /dev/full: No space left on device\n",
        ),
        ("export t --format counts -o new.csv <&- >&- 2>/dev/full", ""),
    ):
        line = ["bash", "-c", f"{sys.executable} -m moe_inspect {command}"]
        done = subprocess.run(line, capture_output=True, text=True, env=poor)
        assert (done.returncode, done.stderr) == (int(said != ""), said), command
    assert (here / "new.csv").read_text().startswith('"layer","router"')


# --- a full disk

OUTPUTS = {
    "trace": [[]],
    "report": [["--table", "load", "-o", "new.csv"], ["-o", "new.txt"], ["--html", "new.html"]],
    "compare": [["-o", "new.csv"], ["--table", "flips", "-o", "new.parquet"], ["-o", "new.txt"]],
    "describe": [["-o", f"new.{ending}"] for ending in ("csv", "json", "parquet", "txt")],
    "import": [[]],
    "merge": [[]],
    "export": [
        ["--format", f, "-o", f"new{e}"] for f, e in (("counts", ".csv"), ("sglang", ".json"))
    ],
    "simulate placement": [["-o", "new.json"], ["-o", "new.yaml"], ["-o", "new.csv"]],
    "simulate decode": [["--plots", "new"]],
    "simulate cache": [["--html", "new.html"]],
    "simulate routing": [["-o", "new.parquet"]],
}


@pytest.mark.parametrize("command", [c for c in USUAL if c in OUTPUTS])
def test_a_full_disk_is_named_and_what_was_there_stays(command: str, here: Path) -> None:
    fine(run(command))  # caches of the libraries are written
    for output in OUTPUTS[command]:
        if output and "." in output[-1]:
            (here / output[-1]).write_text("the old one")
        before = files_in(here)
        again = ["--overwrite"] if command in ("trace", *WRITE_ONCE) else []
        with disk_of(10):
            result = run(command, *output, *again)
        one_line(result, "cannot write new", "File too large")
        if command != "trace":  # which may be gone on with
            assert files_in(here) == before


WITHIN = [[command, *given[-1]] for command, given in OUTPUTS.items() if given[-1]]
WITHIN += [[command, "-o", "new"] for command in ("merge", "import")]
WITHIN += [["ablate", "--resume", "new"], ["report", "--plots", "new"]]
WITHIN += [["compare", "--html", "new.html"], ["compare", "--plots", "new"]]


@pytest.mark.parametrize("written", WITHIN, ids=" ".join)
def test_no_output_is_within_a_trace(written: list[str], here: Path) -> None:
    *before_it, output = written
    (here / "linked").symlink_to(here / "t" / "tokens")
    before = files_in(here)
    for place in ("t/tokens", "linked"):
        result = run(*before_it, f"{place}/{output}")
        one_line(result, f"{place}/{output} is within the trace ")
    assert files_in(here) == before


def test_two_outputs_are_not_written_to_one_place(here: Path) -> None:
    (here / "linked").symlink_to("q.csv")
    before = files_in(here)
    for outputs in ("-o q.csv --html q.csv", "-o ./q.csv --html linked", "--html q --plots q"):
        code, err = run("report", "--table", "load", *outputs.split())
        assert code == 2
        assert "would both write" in err
    assert files_in(here) == before


def test_resuming_on_a_full_disk(here: Path) -> None:
    fine(run("trace"))
    edit_manifest(here / "new", status="interrupted")
    whole = sorted(p.name for p in (here / "new").rglob("*"))
    with disk_of(10):
        one_line(run("trace", "--resume"), "cannot write new: File too large")
    fine(run("trace", "--resume"))
    assert sorted(p.name for p in (here / "new").rglob("*")) == whole
    assert verify(here / "new").ok


def test_devices_and_links_are_written_not_replaced(here: Path) -> None:
    os.mkfifo(here / "pipe.csv")
    reads = os.open(here / "pipe.csv", os.O_RDONLY | os.O_NONBLOCK)
    fine(run("export", "-o", "pipe.csv"))
    assert os.read(reads, 2**16).startswith(b'"layer","router"')
    os.close(reads)
    assert (here / "pipe.csv").is_fifo()
    (here / "real.csv").write_text("")
    (here / "link.csv").symlink_to("real.csv")
    fine(run("export", "-o", "link.csv"))
    assert (here / "link.csv").is_symlink()
    assert (here / "real.csv").read_text().startswith('"layer","router"')


# --- reading


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize("name", ["trace.json", "shards-0.jsonl"])
def test_a_disk_that_fails_while_a_trace_is_opened(
    command: str, name: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open

    def failing(file: Any, *more: Any, **options: Any) -> Any:
        if Path(str(file)).name == name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(file, *more, **options)

    monkeypatch.setattr(builtins, "open", failing)
    monkeypatch.setattr(io, "open", failing)  # pathlib's
    broken(command, "cannot read t: Input/output error")


@pytest.mark.parametrize("command", READERS)
def test_parquet_text_that_is_no_utf8(command: str, here: Path) -> None:
    ends = pa.array([0, 2, 4], pa.int32()).buffers()[1]
    labels = pa.StringArray.from_buffers(2, ends, pa.py_buffer(b"\xff\xfeab"))
    codes = pa.array(np.arange(64, dtype=np.int32) // 8 % 2)
    for name in ("domain", "phase"):
        wrong = pa.DictionaryArray.from_arrays(codes, labels)
        replace_part(here / "t", "tokens", put(name, wrong))
    if command in ("simulate placement", "watch"):  # they read no label
        return fine(run(command))
    broken(command, "tokens/part-0-0.parquet", "UTF8")


# --- names


@pytest.mark.parametrize("command", READERS)
def test_labels_and_names_steer_no_terminal(command: str, here: Path) -> None:
    place, shown = HOSTILE + LATIN, io.BytesIO()
    sample(here / place, HOSTILE, "code")
    usual = [place, *USUAL[command][1:]]
    fine(result := run(command, usual=usual, stdout=io.TextIOWrapper(shown, "utf-8")))
    assert all(line.isprintable() for line in (shown.getvalue().decode() + result[1]).split("\n"))
    assert command in SILENT or shown.getvalue()


# (watch waits for a trace that is not there)
@pytest.mark.parametrize("command", [c for c in USUAL if c != "watch"])
def test_errors_steer_no_terminal(command: str, here: Path) -> None:
    place, read = HOSTILE + LATIN, ("t", "demo", ".", "loads.csv", *USUAL["engine"])
    result = run(command, usual=[place if given in read else given for given in USUAL[command]])
    one_line(result, printable(place))
    assert result[1].removesuffix("\n").isprintable()
    code, err = run(command, usual=[f"--{HOSTILE}", *USUAL[command]])
    assert code == 2
    assert all(line.isprintable() for line in err.split("\n"))


@pytest.mark.parametrize("command", ["trace", "import"])
def test_traces_at_a_name_that_is_no_utf8(command: str, here: Path) -> None:
    shutil.copy("loads.csv", f"{LATIN}.csv")
    (here / f"{LATIN}.txt").write_text("some words")
    more = {"trace": ["--data", f"{LATIN}.txt"], "import": []}[command]
    usual = [
        {"new": LATIN, "loads.csv": f"{LATIN}.csv"}.get(str(argument), argument)
        for argument in USUAL[command]
    ]
    fine(run(command, *more, usual=usual))
    assert verify(here / LATIN).ok
    assert report(Trace(here / LATIN)).tables["load"]["assignments"].sum() > 0
    assert set(Trace(here / LATIN).documents()["domain"]) <= {r"caf\udce9"}


def test_halves_of_characters_are_spelled_out(here: Path) -> None:
    """In a label, a field and a manifest, in every output."""
    (here / "x.jsonl").write_text('{"text": "some words", "domain": "\\ud800"}\n')
    fine(run("trace", "--data", "x.jsonl"))
    assert set(Trace(here / "new").tokens()["domain"]) == {r"\ud800"}
    (here / "loads.json").write_text('[{"layer": 0, "expert": 0, "count": 4, "domain": "\\ud800"}]')
    usual = ["counts", "loads.json", "-o", "new", "--top-k", 1, "--experts", 4]
    one_line(run("import", "--overwrite", usual=usual), "loads.json")
    sample(here / "odd", "law", model=LONE)
    for ending in ("csv", "json", "parquet"):
        fine(run("report", "--table", "summary", "-o", f"s.{ending}", usual=["odd"]))
    found = [pd.read_csv("s.csv"), pd.read_json("s.json", lines=True), pd.read_parquet("s.parquet")]
    assert all(f.set_index("key")["value"]["model"] == r"half \ud800" for f in found)
    fine(run("report", "--html", "page.html", usual=["odd"]))
    assert r"half \ud800" in (here / "page.html").read_text()


# --- one place each


def test_one_function_writes_to_stderr() -> None:
    """The one that cleans; `moe_inspect.demo` is no command of a user's."""
    package = Path(str(moe_inspect.__file__)).parent
    writes = re.compile(r"file=sys\.stderr|sys\.stderr\.write")
    writers = [p.name for p in package.rglob("*.py") if writes.search(p.read_text())]
    assert writers == ["text.py"]


def test_the_first_line_of_any_error() -> None:
    texts = {"": "ValueError", "\n \n": "ValueError", "\n a\nb": "a"}
    assert [first_line(ValueError(text)) for text in texts] == [*texts.values()]
    assert first_line(OSError(errno.EIO, "Input/output error", "x")) == "Input/output error"
    assert first_line(OSError()) == "OSError"


def test_a_formula_is_text(here: Path) -> None:
    begins = ["=", "+", "-", "@", "\t", "\r", "\n"]
    labels = [f"{begin}1+cmd|' /C calc'!A0" for begin in begins]
    sample(here / "odd", "a=1", *labels)
    fine(run("report", "--table", "domains", "-o", "d.csv", usual=["odd"]))
    fine(run("export", "-o", "c.csv", usual=["odd", "--format", "counts"]))
    for name in ("d.csv", "c.csv"):
        with open(here / name, newline="", encoding="utf-8") as file:
            found = {row["domain"] for row in csv.DictReader(file)}
        assert found == {"a=1", *(f"'{label}" for label in labels)}


def test_numbers_are_no_formulas(here: Path) -> None:
    table = pd.DataFrame(
        {"number": [-1.5, 2.0], "whole": [-3, 4], "mixed": pd.Series([-2.5, "-x"], dtype=object)}
    )
    emit(table, Format.csv, here / "n.csv")
    assert (here / "n.csv").read_text() == "number,whole,mixed\n-1.5,-3,-2.5\n2.0,4,'-x\n"


@pytest.mark.parametrize("text", ["a\rb", 'a"b,c\nd'])
def test_csv_is_that_of_pandas(here: Path, text: str) -> None:
    real = [0.1, np.nan, np.inf, -0.0, 1e16, 1e-5, 123456789.123]
    columns = {
        "single": np.array(real, np.float32),
        "real": np.array(real),
        "whole": np.arange(7, dtype=np.uint8),
        "is": np.arange(7) % 2 == 0,
        "text": np.array([text, "", None, "nan", "1=", "é", np.nan], object),
    }
    frame = pd.DataFrame(columns).assign(
        maybe=pd.array([1, None, 3, 4, 5, 6, 7], "Int64"),
        true=pd.array([True, None] * 3 + [False], "boolean"),
        kind=pd.Categorical(["a", "b", None, "a", "b", "a", "a"]),
        mixed=pd.Series([np.float64(2.5), np.int64(3), "x", None, np.nan, [1], True], dtype=object),
    )
    unquoted, quoted = csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC
    for table in (columns, frame, frame.iloc[::2], frame[:0], pd.DataFrame()):
        emit(table, Format.csv, here / "t.csv")
        quoting = quoted if "\r" in text and len(table) else unquoted
        expected = pd.DataFrame(table).to_csv(index=False, lineterminator="\n", quoting=quoting)
        assert (here / "t.csv").read_bytes().decode() == expected
    emit(frame[:0], Format.json, here / "t.json")
    assert (here / "t.json").read_bytes() == b""
