"""The site builds without a warning, and holds what it takes from the program: in `make test-all`,
as the build takes long and runs nothing of the program but its help."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import moe_inspect
from moe_inspect.analysis.metrics.registry import listing
from moe_inspect.importers.context import formats
from tests.conftest import ROOT
from tests.support.sweep import WHOLE

pytest.importorskip("sphinx", reason="the extra docs")
pytestmark = pytest.mark.skipif(not WHOLE, reason="the whole site is built: make test-all")


@pytest.fixture(scope="module")
def site(tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return path


def text(page: Path) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


def test_every_command_and_option_is_there(site: Path) -> None:
    import typer

    from moe_inspect.cli import app

    shown = text(site / "commands.html")

    def walk(command: Any, name: str) -> int:
        subcommands = getattr(command, "commands", {})
        if subcommands:
            return sum(walk(c, f"{name} {n}") for n, c in subcommands.items())
        assert name in shown
        for parameter in command.params:
            assert all(option in shown for option in parameter.opts if option.startswith("-"))
        return 1

    assert walk(typer.main.get_command(app), "moe-inspect") >= 11


def test_every_metric_importer_and_public_name_is_there(site: Path) -> None:
    assert len(listing()) > 30
    assert len(formats()) >= 8
    shown = text(site / "metrics.html")
    assert all(row[name] in shown for row in listing() for name in ("metric", "definition"))
    shown = text(site / "import.html")
    assert all(name in shown and f.reads.replace("`", "") in shown for name, f in formats().items())
    shown = (site / "commands.html").read_text(encoding="utf-8")
    assert all(f'id="moe_inspect.{name}"' in shown for name in moe_inspect.__all__)


def test_it_can_be_searched_and_read_offline(site: Path) -> None:
    assert "collapsed" in (site / "searchindex.js").read_text(encoding="utf-8")
    for page in site.rglob("*.html"):
        fetched = re.findall(
            r'<(?:script|img|link)[^>]*(?:src|href)="(https?://[^"]*)"', page.read_text("utf-8")
        )
        assert not fetched, page
