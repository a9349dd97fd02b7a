"""The pages of --help, what a shell completes, and what a slip of the keys is told."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest
import typer

from moe_inspect.cli import app
from moe_inspect.cli.help import TABLES, metrics, tables, traces
from moe_inspect.comparison.compare import TABLES as COMPARE_TABLES
from moe_inspect.comparison.result import LOAD_TABLES, MODEL_TABLES
from moe_inspect.reporting.report import TABLES as REPORT_TABLES
from moe_inspect.text import did_you_mean, no_such
from tests.conftest import ROOT, Cli

ROOT_COMMAND: Any = typer.main.get_command(app)


def commands(command: Any = ROOT_COMMAND, name: str = "") -> Iterator[tuple[str, Any]]:
    yield name, command
    for inner in getattr(command, "commands", {}).items():
        yield from commands(inner[1], inner[0])


COMMANDS = dict(commands())
EXAMPLES = [line for of in COMMANDS.values() for line in (of.epilog or "").splitlines()]


def help_of(command: Any, columns: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(columns))
    context = command.make_context(f"moe-inspect {command.name}", [], resilient_parsing=True)
    return command.get_help(context).splitlines()


def test_every_command_has_a_group_and_examples() -> None:
    panels = {command.rich_help_panel for command in ROOT_COMMAND.commands.values()}
    assert panels == {"Record", "Look", "Try", "Files"}
    assert [name for name, command in COMMANDS.items() if not command.epilog] == ["simulate"]


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_are_read_as_they_stand(example: str) -> None:
    program, *arguments = shlex.split(example)
    assert program == "moe-inspect"
    command = ROOT_COMMAND
    while hasattr(command, "commands"):
        command = command.commands[arguments.pop(0)]
    command.make_context("moe-inspect", arguments)  # a usage error raises
    assert len(f"  {example}") <= 80


PANELS: dict[str, dict[str, str | None]] = {
    "trace": {"data": "Text", "special_tokens": "Text", "text": "Record"} | {"model": None},
    "ablate": {"data": "Held-out text", "batch_tokens": "Held-out text"},
    "placement": {"output": "Output", "hardware": "Times"},
}


@pytest.mark.parametrize("name", PANELS)
def test_an_option_is_in_the_panel_of_its_dataclass_or_its_own(name: str) -> None:
    panels = {p.name: getattr(p, "rich_help_panel", None) for p in COMMANDS[name].params}
    assert panels | PANELS[name] == panels


def sections_of(command: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Title and text of each section of a page of help; what is above the first has no title."""
    parts = re.split(r"^(\w.*):$", "\n".join(help_of(command, 80, monkeypatch)), flags=re.M)
    return list(zip(["", *parts[1::2]], parts[::2], strict=True))


def test_help_lists_every_option_once_by_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, command in COMMANDS.items():
        _, *sections = sections_of(command, monkeypatch)
        shown = re.findall(r"^  (?:-\w, )?(--[\w-]+)", "\n".join(s for _, s in sections), re.M)
        options = [p for p in command.params if p.param_type_name == "option"]
        long = [next(name for name in p.opts if name.startswith("--")) for p in options]
        assert sorted(shown) == sorted([*long, "--help"]), name
    titles = [title for title, _ in sections_of(COMMANDS["report"], monkeypatch)]
    said = " | Arguments | Selection | Output | Times | GPUs | Checks, exit code 3 | Options"
    assert " | ".join(titles) == f"{said} | Examples"


def test_help_is_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, command in COMMANDS.items():
        narrow, wide = (help_of(command, columns, monkeypatch) for columns in (80, 150))
        words = [set(" ".join(lines).split()) for lines in (narrow, wide)]
        assert words[0] == words[1], name  # none is broken, at a hyphen either
        assert max(map(len, narrow)) <= 80
        assert len(wide) <= len(narrow)
        assert len(narrow) < 40 or max(map(len, wide)) > 100


SEVERAL = [
    (name, option.name)
    for name, command in COMMANDS.items()
    for option in command.params
    if getattr(option, "multiple", False)
    and option.name not in ("domains", "fit_domains")  # as `select` splits them
]
NUMBERS: dict[str, type] = {
    **dict.fromkeys(("batches", "batch_tokens", "drafts", "slots", "sweep", "top_k"), int),
    **dict.fromkeys(("capacity_factors", "top_p", "capacity_factor", "fit_weights"), float),
}


@pytest.mark.parametrize(("command", "name"), SEVERAL)
def test_several_values_are_repeated_or_comma_separated(command: str, name: str) -> None:
    """Of every option that takes them, those with a list of choices too."""
    option = next(p for p in COMMANDS[command].params if p.name == name)
    a, b = ("1", "2") if name in NUMBERS else ("a", "b\\,c")
    given = (a, b), (f"{a}, {b}",)
    repeated, separated = (option.process_value(None, values) for values in given)
    read = NUMBERS.get(name, str)
    assert list(repeated) == list(separated) == [read(a), read(b.replace("\\", ""))]


def test_help_marks_options_that_take_several(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join(help_of(COMMANDS["report"], 100, monkeypatch))
    assert "--layers LAYERS,…" in text
    assert "--top N " in text


def test_every_page_of_help_fits_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, command in COMMANDS.items():
        most = 70 if name in ("trace", "report", "placement") else 50
        assert len(help_of(command, 100, monkeypatch)) <= most, name


def test_lists_of_values_are_options_that_take_several() -> None:
    assert {"data", "layers", "threshold", "top_k", "map"} <= {name for _, name in SEVERAL}


def test_every_command_that_prints_tables_has_the_same_options_for_it() -> None:
    for name, command in COMMANDS.items():
        output = [p.name for p in command.params if getattr(p, "rich_help_panel", "") == "Output"]
        if "table" in output:  # placement also writes plans
            output = [each for each in output if each != "plan_for"]
            assert sorted(output) == ["format", "html", "output", "plots", "table"], name


WITH_TABLES = [name for name, of in COMMANDS.items() if any(p.name == "table" for p in of.params)]


@pytest.mark.parametrize("command", WITH_TABLES)
def test_one_table_is_asked_for(command: str) -> None:
    parser = COMMANDS[command].make_parser(typer.Context(COMMANDS[command]))
    assert parser.parse_args(args=["--table", "load"])[0]["table"] == "load"
    with pytest.raises(typer.BadParameter, match="--table is given twice: give one table"):
        COMMANDS[command].make_context(command, ["--table", "load", "--table=balance"])


def complete(*words: str) -> list[str]:
    """What bash is offered for the last word."""
    asked = {"COMP_WORDS": shlex.join(words), "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [sys.executable, "-m", "moe_inspect"],
        env={**os.environ, "_MOE_INSPECT_COMPLETE": "complete_bash", **asked},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not done.stderr
    return done.stdout.split()


def test_a_shell_completes_options_and_traces_once() -> None:
    assert complete("moe-inspect", "re") == ["report"]
    assert complete("moe-inspect", "report", "sample_traces/b") == ["sample_traces/balanced"]
    assert complete("moe-inspect", "trace", "demo", "--dt") == ["--dtype"]


def test_the_command_line_knows_the_tables_of_every_registry() -> None:
    registries: dict[str, Any] = {"report": REPORT_TABLES, "compare": COMPARE_TABLES}
    registries |= {"counts": LOAD_TABLES, "models": MODEL_TABLES}
    for kind, registry in registries.items():
        assert TABLES[kind] == ", ".join(sorted(registry))


def test_tables_are_named_and_completed_without_pandas(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pandas.py").write_text("raise ImportError('pandas is imported')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setenv("COLUMNS", "300")
    for command, says in {
        "report": [TABLES["report"]],
        "compare": [TABLES[kind] for kind in ("compare", "counts", "models")],
        "import": ["Formats:"],
        "export": ["Formats:"],
    }.items():
        said = " ".join(cli(command, "--help").stdout.split())
        assert [text for text in says if text not in said] == []
    assert complete("moe-inspect", "report", "--table", "bal") == ["balance"]
    assert complete("moe-inspect", "compare", "--table", "fli") == ["flips"]
    assert complete("moe-inspect", "simulate", "cache", "--table", "x") == []


def test_tables_metrics_and_traces_are_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    report, compare = (SimpleNamespace(info_name=name) for name in ("report", "compare"))
    assert tables(report, "sp") == ["specialization"]
    assert set(tables(report, "")) == set(REPORT_TABLES)
    assert "max_vio=" in metrics(report, "max_")
    assert tables(compare, "fl") == ["flips"]
    assert set(tables(compare, "")) == set(COMPARE_TABLES)
    assert "set_mismatch=" in metrics(compare, "set")
    monkeypatch.chdir(ROOT)
    assert traces("sam") == [f"sample_traces/{n}" for n in ("balanced", "collapsed", "untrained")]
    assert traces("tests/") == traces("nowhere/") == []


def test_a_slip_of_the_keys_is_told_what_is_near(cli_here: Cli, tmp_path: Path) -> None:
    assert did_you_mean("lod", ["balance", "load"]) == " (did you mean load?)"
    assert did_you_mean("zzz", ["balance", "load"]) == ""
    assert no_such("table", "zzz", ["a", "b"]) == "no table 'zzz': there are a, b"
    many = [f"metric_{n}" for n in range(30)]
    near = no_such("m", "ric_21", many)
    assert near.startswith("no m 'ric_21' (did you mean metric_21, ")
    assert near.endswith("?)")
    assert no_such("m", "zzz", many).endswith(f": there are {', '.join(many)}")
    trace, empty = ROOT / "sample_traces/balanced", tmp_path / "empty"
    empty.mkdir()
    for arguments, code, said in (
        ((trace, "--table", "balanc"), 1, "no table 'balanc' (did you mean balance?)"),
        ((trace, "--fail-above", "maxvio=1"), 2, "no metric 'maxvio' (did you mean max_vio, "),
        ((trace, "--layers", "33"), 1, f"no layer 33 in {trace} (did you mean 3?)"),
        ((f"{trace}d",), 1, f"no trace at {trace}d (did you mean {trace}?)"),
        ((trace.parent,), 1, f"no trace at {trace.parent}, but in it: {trace}, "),
        ((empty,), 1, f'"moe-inspect trace MODEL -o {empty}/NAME"'),
        ((trace, "--format", "xml"), 2, "'--format': 'xml' is not one of 'table'"),
    ):
        assert said in cli_here("report", *arguments, check=code).stderr
    # no folder that one stands in is to be written over
    assert cli_here("report", ".", check=1).stderr.count('-o ."') == 0


def test_every_trace_that_is_read_may_be_a_url() -> None:
    # a Path of s3://bucket/trace is s3:/bucket/trace
    given = {
        name: get_type_hints(command.callback)[parameter.name]
        for name, command in COMMANDS.items()
        for parameter in command.params
        if "TRACE" in str(parameter.metavar) and parameter.name not in ("output", "plots")
    }
    assert len(given) > 10
    assert not [name for name, kind in given.items() if "Path" in str(kind)]
