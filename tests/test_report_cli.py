"""The report from the command line, end to end."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_inspect.public import Trace, report
from moe_inspect.reporting.charts.spec import every_chart
from moe_inspect.reporting.report import Report
from tests.conftest import Cli
from tests.support.sweep import sample
from tests.support.synthetic import uniform_ids, write_counts, write_trace


@pytest.fixture
def said(cli_here: Cli, planted_trace: Trace) -> Callable[..., Any]:
    """`report` of the planted trace."""
    return partial(cli_here, "report", planted_trace.path)


@pytest.fixture
def printed(said: Any) -> Callable[..., io.StringIO]:
    """What `report` prints of a table."""
    return lambda table, form, *more: io.StringIO(
        said("--table", table, "--format", form, *more).stdout
    )


def test_csv_and_json_carry_every_digit_and_nan_is_null(printed: Any, planted_report: Report):
    expected = planted_report.tables["balance"]
    csv = pd.read_csv(printed("balance", "csv"), float_precision="round_trip")
    assert list(csv.columns) == list(expected.columns)
    assert csv["cv"].tolist() == expected["cv"].tolist()
    lines = [json.loads(line) for line in printed("balance", "json")]
    assert [line["max_over_mean_low"] for line in lines] == expected["max_over_mean_low"].tolist()
    assert [type(line["dead_experts"]) for line in lines] == [int] * 4
    one = json.loads(next(printed("specialization", "json", "--domains", "law")))
    assert (one["domain_mi_bits"], one["layer"]) == (None, 0)
    summary = [json.loads(line) for line in printed("summary", "json", "--domains", "law")]
    assert any(s["key"] == "note" and "one domain" in s["value"] for s in summary)


def test_parquet_into_a_pipe(planted_trace: Trace, planted_report: Report):
    command = [sys.executable, "-m", "moe_inspect", "report", str(planted_trace.path)]
    command += ["--table", "load", "--format", "parquet"]
    piped = subprocess.run(command, capture_output=True, check=True).stdout
    made = pd.read_parquet(io.BytesIO(piped))
    pd.testing.assert_frame_equal(made, planted_report.tables["load"])


READ: dict[str, Any] = {"csv": pd.read_csv, "parquet": pd.read_parquet}
READ |= {"json": partial(pd.read_json, lines=True)}


def test_the_ending_of_the_file_says_the_format(said: Any, tmp_path: Path, planted_report: Report):
    expected = planted_report.tables["load"]
    for ending in ("csv", "CSV", "json", "jsonl", "parquet", "txt", "md", ""):
        name = f"load.{ending}" if ending else "load"
        said("--table", "load", "-o", name)
        data = (tmp_path / name).read_bytes()
        if read := READ.get({"jsonl": "json"}.get(ending.lower(), ending.lower())):
            found = read(io.BytesIO(data))["assignments"]
            assert found.tolist() == expected["assignments"].tolist()
            # what is said outright goes first
            said("--table", "load", "-o", name, "--format", "table")
            data = (tmp_path / name).read_bytes()
        lines = data.decode().splitlines()
        assert lines[0].split() == list(expected.columns)
        assert not any(line != line.rstrip() for line in lines)


def test_the_report_in_words_on_stdout_and_in_a_file(said: Any, tmp_path: Path):
    done = said()
    assert "Critical: Layer 3 is the worst balanced" in done.stdout
    assert done.stderr == ""
    assert said("-o", "report.txt").stdout == ""
    assert (tmp_path / "report.txt").read_text() == done.stdout
    assert said("-o", "-").stdout == done.stdout
    assert not (tmp_path / "-").exists()


def test_after_a_page_or_pictures_only_the_headline_is_printed(said: Any):
    whole = said("--layers", "3").stdout
    for options, wrote in (
        (("--html", "r.html"), "r.html"),
        (("--plots", "p"), r"\d+ pictures in p"),
    ):
        done = said("--layers", "3", *options)
        assert done.stdout.startswith("Critical: Layer 3 is uneven")
        assert done.stdout == whole.splitlines(keepends=True)[3]
        assert re.fullmatch(f"wrote {wrote}\n", done.stderr)
    assert said("--html", "r.html", "-o", "r.txt").stdout == ""  # the file has all of it


def test_with_a_baseline_only_specialisation_is_printed(said: Any, planted_trace: Trace):
    bullets = [line for line in said().stdout.splitlines() if line.startswith("• ")]
    beside = said("--baseline", planted_trace.path).stdout
    assert "beyond chance, in the baseline" in beside or "the baseline's" in beside
    assert "mean of its layer" not in beside
    assert 0 < beside.count("• ") <= len(bullets)


def test_json_without_a_table_is_the_whole_report(said: Any, planted_report: Report):
    (line,) = said("--format", "json").stdout.splitlines()
    whole = json.loads(line)
    assert [one["text"] for one in whole["findings"]] == [one.text for one in planted_report.said]
    assert len(whole["balance"]) == len(planted_report.tables["balance"])
    gini = [row["gini"] for row in whole["balance"]]
    assert gini == pytest.approx(planted_report.tables["balance"]["gini"].tolist(), rel=1e-13)


def test_selecting_on_the_command_line(printed: Any):
    asked = "--layers 1,3 --domains law,code --domains math"
    frame = pd.read_csv(printed("domains", "csv", *asked.split()))
    assert frame["layer"].unique().tolist() == [1, 3]
    assert sorted(frame["domain"].unique()) == ["code", "law", "math"]
    words = pd.read_csv(printed("vocabulary", "csv", "--top", 2))
    assert words.groupby(["router", "expert"]).size().max() == 2


NAMED = {"a": ["a"], "a,=a,b": ["=a", "a", "b"], "=a, b": ["=a, b"], r"=a\, b": ["=a, b"]}
NAMED |= {"a|=a, b": ["=a, b", "a"]}  # repeated


@pytest.mark.parametrize("counted", [False, True])
def test_a_comma_may_be_of_the_name_of_a_domain(cli_here: Cli, tmp_path: Path, counted: bool):
    labels = ["a", "b", "=a", "=a, b"]
    if counted:
        write_counts(tmp_path / "t", [np.full((4, 8), 200)], 2, domains=labels)
    else:
        ids = uniform_ids(np.random.default_rng(0), 400, 8, 2)
        given: Any = {"document": np.arange(400) // 100, "domain_of_document": labels}
        write_trace(tmp_path / "t", [ids], 8, **given)
    for asked, expected in NAMED.items():
        named = [part for text in asked.split("|") for part in ("--domains", text)]
        done = cli_here("report", "t", "--table", "domains", "--format", "csv", *named)
        shown = pd.read_csv(io.StringIO(done.stdout))["domain"].str.removeprefix("'")
        assert sorted(set(shown)) == expected
    refused = cli_here("report", "t", "--domains", "=a,b,c", check=1).stderr
    assert refused == "error: no domain c in t: it has =a, =a, b, a, b\n"


USAGE = {
    "--format csv": "add --table summary, balance, load, windows, drift, coverage",
    "--format yaml --table load": "yaml",
    "-o load.csv": "-o load.csv needs one table: add --table summary",
    "--table load -o load.xlsx": "this ending, add --format table, csv, json, parquet",
    "--format pdf": "--format pdf is about pictures: give it with --plots DIR",
}
REFUSED = {
    "--layers 3-1": "cannot read layers '3-1': a range goes from low to high",
    "--table gini": "no table 'gini': there are summary, balance",
    "--layers 9": "it has layers 0-3",
    "--domains opera": "it has code, law, math, prose",
    "--table load -o no/such/place.csv": "cannot write no/such/place.csv: No such file or dir",
    "-o no/such/place.txt": "cannot write no/such/place.txt",
    "--html no/such/page.html": "cannot write no/such/page.html",
    "--plots /dev/null/x": "cannot write /dev/null/x",
}


def test_what_cannot_be_done_is_one_line(said: Any):
    for asked, says in (USAGE | REFUSED).items():
        done = said(*asked.split(), check=1 if asked in REFUSED else 2)
        assert says in " ".join(done.stderr.replace("│", " ").split()), asked
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
        if asked in REFUSED:
            assert done.stderr.startswith("error: ")
            assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("form", ["csv", "table"])
def test_head_ends_quietly(planted_trace: Trace, form: str):
    asked = f"report {planted_trace.path} --table vocabulary --top 0 --format {form}"
    command = f"{sys.executable} -m moe_inspect {asked} | head -n 1"
    shell = ["bash", "-o", "pipefail", "-c", command]
    done = subprocess.run(shell, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # a text table may fit the pipe before head closes it
    assert done.stderr == "" or (form == "table" and "more rows: --format" in done.stderr)
    assert len(done.stdout.splitlines()) == 1


def test_plots_are_pictures(said: Any, tmp_path: Path):
    done = said("--table", "balance", "--plots", "pictures")
    names = sorted(p.name for p in (tmp_path / "pictures").iterdir())
    assert {"balance.png", "domains.svg", "load.png", "specialization.svg"} <= set(names)
    assert {Path(name).stem for name in names} <= set(every_chart())
    assert done.stderr == f"wrote {len(names)} pictures in pictures\n"
    for name in names:
        data = (tmp_path / "pictures" / name).read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n" if name.endswith("png") else data[:5] == b"<?xml"
        assert len(data) > 10_000


def test_one_chart_as_wide_as_a_column_of_a_paper(
    cli_here: Cli, planted_trace: Trace, tmp_path: Path
):
    asked: Any = {"only": ["balance"], "width_inches": 3.3, "formats": ["pdf", "svg"]}
    made = {path.name for path in report(planted_trace).save_plots(tmp_path / "figures", **asked)}
    assert made == {"balance.pdf", "balance.svg"}
    pdf = (tmp_path / "figures" / "balance.pdf").read_bytes()
    (width,) = re.findall(rb"/MediaBox \[ ?0 0 ([\d.]+)", pdf)
    assert float(width) == pytest.approx(3.3 * 72, abs=0.5)
    assert b"/FontFile2" in pdf  # TrueType, so that text is text
    assert b"/Type3" not in pdf
    svg = (tmp_path / "figures" / "balance.svg").read_text()
    assert re.search(r"<text[^>]*>Balance by layer</text>", svg)
    assert "sans-serif" in svg
    cli_here("simulate", "routing", planted_trace.path, "--plots", "c")
    made = {path.name for path in (tmp_path / "c").iterdir()}
    assert made == {"routing.png", "routing.svg"}


def test_labels_in_any_script_are_drawn_without_a_warning(tmp_path: Path):
    ids = uniform_ids(np.random.default_rng(0), 600, 8, 2)
    labels, document = ["中文", "日本語", "한국어"], np.arange(600) // 50
    trace = write_trace(tmp_path / "t", [ids], 8, document=document, domain_of_document=labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)  # of what matplotlib calls
        report(trace).save_plots(tmp_path / "p", only=["domains"])
    assert (tmp_path / "p" / "domains.png").exists()


# the notebook's backend is left alone
LIGHT = {
    "terminal.print_report(made, io.StringIO())": "pandas",
    "matplotlib.draw(chart_of(made, 'load'))": "pandas matplotlib",
}


@pytest.mark.parametrize("does", LIGHT)
def test_what_is_not_needed_is_not_imported(planted_trace: Trace, does: str):
    code = (
        "import sys, io, moe_inspect, moe_inspect.analysis\n"
        "from moe_inspect.reporting.charts.spec import chart_of\n"
        f"from moe_inspect.reporting.render import {does.partition('.')[0]}\n"
        f"made = moe_inspect.report(r'{planted_trace.path}')\n"
        f"{does}\n"
        "print(*(m for m in ('pandas', 'torch', 'transformers', 'triton', 'typer', 'matplotlib', "
        "'matplotlib.pyplot') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == LIGHT[does]


HEAVY = ("pandas", "pyarrow.compute", "scipy", "matplotlib", "numba", "regex", "torch")
# what of it a command imports; one that completes an option has it in the environment
IMPORTED = {
    "report TRACE --table load": "",
    "report TRACE --table load --format csv --layers 0": "",
    "report TRACE --table load --format json -o OUT": "",
    "report TRACE --table load --format parquet -o OUT": "pandas pyarrow.compute",
    "report TRACE --table load --top 3 -o OUT": "",
    "report TRACE --table load --threshold uneven=0.3": "",
    "report TRACE --table balance": "scipy",
    "report TRACE --table transitions -o OUT": "pandas pyarrow.compute scipy",
    "compare TRACE TRACE": "pandas pyarrow.compute scipy regex",
    "report TRACE --table load --html OUT": "pandas pyarrow.compute scipy regex",
    "text TRACE --documents 0": "pandas pyarrow.compute regex",
    "": "",
}


@pytest.mark.parametrize("command", sample(IMPORTED, 4))
def test_commands_import_what_they_use(command: str, planted_trace: Trace, tmp_path: Path):
    paths = {"TRACE": str(planted_trace.path), "OUT": str(tmp_path / "out")}
    program = (
        "import sys\nfrom moe_inspect.__main__ import main\ntry: main()\nexcept SystemExit: pass\n"
        f"print(*(m for m in {HEAVY} if m in sys.modules), file=sys.stderr)"
    )
    words = [paths.get(word, word) for word in command.split()]
    completed = {"COMP_WORDS": "moe-inspect report --ta", "COMP_CWORD": "2"}
    if not words:
        completed["_MOE_INSPECT_COMPLETE"] = "complete_bash"
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        capture_output=True,
        text=True,
        env={**os.environ, **completed},
    )
    assert done.stdout.strip() or "OUT" in command
    assert done.stderr.splitlines()[-1] == IMPORTED[command]
