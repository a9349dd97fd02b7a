"""Every command and Python block of the README and of the docs runs as it stands."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from packaging.requirements import Requirement

import moe_inspect
from docs.generate import fill
from tests.conftest import ROOT, Cli
from tests.support.sweep import WHOLE, sample
from tests.test_cli_trace import save, write_jsonl
from tests.test_terminal import on_a_terminal

README = (ROOT / "README.md").read_text()
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.S | re.M)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def steps(page: str) -> Iterator[tuple[str, str]]:
    """("console", a command) and ("python", a block) in the order of the page."""
    for kind, block in BLOCK.findall((ROOT / page).read_text()):
        if kind == "console":
            lines = block.splitlines()
            yield from (("console", line[2:]) for line in lines if line.startswith("$ "))
        elif kind == "python":
            yield "python", block


RUNNABLE = [page for page in PAGES if any(True for _ in steps(page))]


@pytest.fixture(scope="module")
def named(tmp_path_factory: Any) -> Path:
    """A directory with what the commands name."""
    path = tmp_path_factory.mktemp("named")
    save("olmoe", path / "allenai/OLMoE-1B-7B-0924")
    write_jsonl(path / "articles.jsonl", documents=10, words=50)
    pd.read_json(write_jsonl(path / "code.jsonl", documents=10, words=50), lines=True).to_parquet(
        path / "code.parquet"
    )
    for name in ("sample_traces", "docs", "examples"):
        (path / name).symlink_to(ROOT / name)
    return path


@pytest.mark.parametrize("page", [RUNNABLE[0], *sample(RUNNABLE[1:], 5)])
def test_the_page_runs_as_it_stands(
    page: str, named: Path, tmp_path: Path, cli_here: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    for entry in named.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    for kind, text in steps(page):
        if kind == "python":
            with redirect_stdout(io.StringIO()):
                exec(compile(text, page, "exec"), {"__name__": "__main__"})
        elif text.startswith("moe-inspect ") and "|" not in text:
            cli_here(*shlex.split(text)[1:])
        else:
            shell(text, tmp_path)
    CHECKS.get(page, lambda place: None)(tmp_path)


def shell(command: str, place: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def _readme(place: Path) -> None:
    for name in ("load", "balance", "domains"):
        assert all((place / f"charts/{name}.{form}").exists() for form in ("png", "svg"))
    assert 100_000 < (place / "report.html").stat().st_size < 6_000_000
    assert json.loads((place / "plan.json").read_text())


def _report(place: Path) -> None:
    load = pd.read_csv(place / "load.csv").groupby("layer")["assignments"].sum()
    assert set(load) == {len(pd.read_parquet(place / "runs/demo/tokens")) * 2}


def _import(place: Path) -> None:
    trace = moe_inspect.open_trace(place / "runs/demo")
    long, routes_TLK = pd.read_parquet(place / "long.parquet"), np.load(place / "routes.npy")
    assert routes_TLK.shape == (trace.n_tokens, 4, 2)
    at = tuple(long[name].to_numpy() for name in ("token", "router", "slot"))
    assert len(long) == routes_TLK.size
    assert (routes_TLK[at] == long["expert"]).all()
    domains = trace.tokens().set_index("token")["domain"]
    assert (long["domain"].astype(str) == domains.loc[at[0]].astype(str).to_numpy()).all()


CHECKS = {"README.md": _readme, "docs/report.md": _report, "docs/import.md": _import}


@pytest.mark.parametrize(
    ("page", "row"),
    [("docs/import.md", "| `phase`"), ("docs/engines.md", "| `MOE_INSPECT_SAMPLE`")],
)
def test_the_tables_written_into_a_page_are_those_of_the_code(page: str, row: str) -> None:
    text = (ROOT / page).read_text()
    (written,) = [line for line in text.splitlines() if line.startswith(row)]
    for stale in (text, text.replace(f"{written}\n", "")):
        assert fill(stale, only_written=True) == text, "make docs writes it"


def test_there_is_something_to_run() -> None:
    assert {f"docs/tutorials/{name}.md" for name in ("train", "serve", "study")} <= {*RUNNABLE}
    assert sum(len(list(steps(page))) for page in RUNNABLE) > 40


def test_the_output_shown_is_what_the_report_says() -> None:
    shown = next(block for kind, block in BLOCK.findall(README) if block.startswith("Critical"))
    assert len(shown.splitlines()) > 5
    lines = on_a_terminal(100, "report", ROOT / "sample_traces/collapsed")
    assert shown in "\n".join(lines)


@pytest.mark.skipif(not WHOLE, reason="mypy reads the package: make test-all")
def test_the_types_of_the_readmes_python_are_real(tmp_path: Path) -> None:
    """Under mypy --strict, as a reader's own code (test_public_api has the types themselves)."""
    blocks = [text for kind, text in steps("README.md") if kind == "python"]
    (tmp_path / "reader.py").write_text("\n".join([*blocks, "reveal_type(report)"]))
    (tmp_path / "mypy.ini").write_text(
        f"[mypy]\nstrict = true\ncache_dir = {ROOT / 'build/mypy'}\n"
        "[mypy-torch.*,transformers.*,triton.*]\n"
        "follow_imports = skip\nignore_missing_imports = true\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "reader.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert '.Report"' in done.stdout, done.stdout  # nothing of ours is Any


@pytest.mark.parametrize("page", ["README.md", "docs/install.md"])
def test_the_install_line_is_of_this_project(page: str) -> None:
    text, repository = (ROOT / page).read_text(), PROJECT["urls"]["Repository"]
    if page == "docs/install.md":
        assert f"git clone {repository} && cd {repository.rpartition('/')[2]}" in text
    named = Requirement(re.findall(r"pip install '(.* @ .*)'", text)[0])
    assert (named.name, named.url) == (PROJECT["name"], f"git+{repository}")
    assert "trace" in named.extras
    # the name alone finds nothing yet
    assert not re.search(r"pip install '?moe-inspect(?!\[\w+\] @)", text)


def test_the_first_screen_of_the_readme_leads_to_a_report() -> None:
    lines = README.splitlines()
    first = "\n".join(lines[:40])
    assert len(lines) <= 130
    commands = [text for kind, text in steps("README.md") if kind == "console"]
    assert commands[:2] == [
        "moe-inspect trace demo -o runs/demo",
        "moe-inspect report runs/demo --html report.html",
    ]
    assert "](docs/report.png)" in first
    assert first.count("pip install") == 1
    assert all(f"\n$ {command}\n" in first for command in commands[:2])
    tutorials = [f"docs/tutorials/{name}.md" for name in ("train", "serve", "study")]
    assert [link for link in LINK.findall(first) if "/tutorials/" in link] == tutorials
    assert 20_000 < (ROOT / "docs/report.png").stat().st_size <= 300_000


def test_the_readme_prints_recorded_figures_with_their_chance_level() -> None:
    blocks = [text for kind, text in steps("README.md") if kind == "python"]
    printed = next(text for text in blocks if "moe_inspect.record(" in text)
    assert '"max_over_mean", "expected_by_chance"' in printed


def test_the_documentation_is_short() -> None:
    pages = [(ROOT / page).read_text() for page in PAGES if page.startswith("docs/")]
    assert len(pages) <= 18
    assert sum(len(page.split()) for page in pages) <= 30_000


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *PAGES[1:]])
def test_what_a_page_links_to_is_there(page: str) -> None:
    targets = LINK.findall((ROOT / page).read_text())
    ours = "https://github.com/moe-inspect/moe-inspect/"
    for target in targets:
        if target.startswith(ours):
            path = ROOT / re.sub(r"^(blob|tree)/main/", "", target.removeprefix(ours))
        elif target.startswith("https://"):
            continue
        else:
            path = (ROOT / page).parent / target
        assert path.exists(), target


def test_the_make_targets_named_are_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in [*PAGES, "CONTRIBUTING.md"]:
        text = (ROOT / page).read_text()
        assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.M)) <= targets, page
        assert set(re.findall(r"moe-inspect\[(\w+)\]", text)) <= {*PROJECT["optional-dependencies"]}


def test_the_commands_of_the_sample_traces_are_those_in_their_manifests() -> None:
    text = (ROOT / "sample_traces/README.md").read_text()
    for name in ("balanced", "collapsed", "untrained"):
        manifest = json.loads((ROOT / "sample_traces" / name / "trace.json").read_text())
        assert f"`{shlex.join(manifest['capture']['command'])}`" in text
        assert manifest["status"] == "complete"
    assert sum(p.stat().st_size for p in (ROOT / "sample_traces").rglob("*")) < 8_000_000
