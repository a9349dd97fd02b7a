"""Every command of the README runs, in its order, as it stands there. A hub id is a tiny model in a
directory of that name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.conftest import ROOT
from tests.test_cli_trace import save, write_jsonl

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
COMMANDS = [
    line[2:]
    for kind, block in BLOCKS
    if kind == "console"
    for line in block.splitlines()
    if line.startswith("$ ")
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: Any) -> Path:
    """A directory with what the README's commands name."""
    path = tmp_path_factory.mktemp("readme")
    save("olmoe", path / "allenai/OLMoE-1B-7B-0924")
    write_jsonl(path / "articles.jsonl", documents=10, words=50)
    pd.read_json(write_jsonl(path / "code.jsonl", documents=10, words=50), lines=True).to_parquet(
        path / "code.parquet"
    )
    (path / "sample_traces").symlink_to(ROOT / "sample_traces")
    (path / "docs").symlink_to(ROOT / "docs")
    return path


def run(command: list[str] | str, place: Path) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        command,
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        shell=isinstance(command, str),
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_commands_run_as_they_stand(place: Path) -> None:
    assert len(COMMANDS) >= 6
    said = [
        run(f"set -o pipefail; {command}" if "|" in command else command, place)
        for command in COMMANDS
        if "duckdb" not in command
    ]
    assert any("assignments" in text for text in said)
    run(next(c for c in COMMANDS if "duckdb" in c), place)
    pictures = {p.name for p in (place / "pictures").iterdir()}
    assert pictures >= {
        f"{name}.{form}" for name in ("load", "balance", "domains") for form in ("png", "svg")
    }
    assert 100_000 < (place / "report.html").stat().st_size < 6_000_000
    assert set(pd.read_csv(place / "load.csv").groupby("layer")["assignments"].sum()) == {
        len(pd.read_parquet(place / "runs/demo/tokens")) * 2
    }


def test_the_python_runs_as_it_stands(place: Path) -> None:
    if not (place / "runs/demo").exists():  # where the commands have not run before
        run([sys.executable, "-m", "moe_inspect", "trace", "demo", "-o", "runs/demo"], place)
    programs = [block for kind, block in BLOCKS if kind == "python"]
    assert len(programs) == 2
    for program in programs:
        run([sys.executable, "-c", program], place)


def test_the_output_shown_is_what_the_report_says(place: Path) -> None:
    shown = next(block for kind, block in BLOCKS if kind == "text" and block.startswith("• "))
    assert len(shown.splitlines()) > 5
    assert shown in run(
        [sys.executable, "-m", "moe_inspect", "report", "sample_traces/collapsed"], place
    )


def test_the_picture_is_light() -> None:
    assert 20_000 < (ROOT / "docs/report.png").stat().st_size <= 300_000


def test_what_the_readme_names_is_there() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake (\w+)\s+#", README)) <= targets
    assert (
        "trace"
        in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    )
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
    for path in re.findall(r"^\| `([a-z_/]+/)` \|", README.partition("## File map")[2], re.M):
        assert (ROOT / path).is_dir(), path


def test_the_commands_of_the_sample_traces_are_those_in_their_manifests() -> None:
    import json
    import shlex

    text = (ROOT / "sample_traces/README.md").read_text()
    for name in ("balanced", "collapsed", "untrained"):
        manifest = json.loads((ROOT / "sample_traces" / name / "trace.json").read_text())
        assert f"`{shlex.join(manifest['capture']['command'])}`" in text
        assert manifest["status"] == "complete"
    assert sum(p.stat().st_size for p in (ROOT / "sample_traces").rglob("*")) < 8_000_000
