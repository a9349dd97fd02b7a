"""The search for dead code: what is planted is found, and the package has none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tools import unreachable
from tools.unreachable import Search

PLANTED = """

def _never_called() -> int:
    return _only_called_by_it()


def _only_called_by_it(shift: int = 0) -> int:
    return shift


class _NeverMade:
    field: int = 0
"""
DEAD = ["_never_called", "_only_called_by_it", "_NeverMade", "_NeverMade.field"]


def test_what_is_planted_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("*.py", "*.pyi", "*.html")
    for path in (each for name in names for each in (ROOT / "moe_inspect").rglob(name)):
        to = tmp_path / path.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to)
    for name in ("pyproject.toml", "docs/commands.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    before = {one.title for one in Search(tmp_path).dead()}
    with open(tmp_path / "moe_inspect/text.py", "a") as file:
        file.write(PLANTED)
    found = [one for one in Search(tmp_path).dead() if one.title not in before]
    assert [one.title for one in found] == DEAD
    monkeypatch.setattr("sys.argv", ["unreachable", str(tmp_path)])
    assert unreachable.main() == 1
    assert "moe_inspect/text.py:" in capsys.readouterr().out


def test_a_parameter_that_no_call_passes_is_found(tmp_path: Path) -> None:
    (tmp_path / "moe_inspect").mkdir()
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    (tmp_path / "moe_inspect/__main__.py").write_text(
        "def _f(a, b=0, c=0):\n    return a + b + c\n\n\ndef main():\n    return _f(1, c=2)\n"
    )
    search = Search(tmp_path)
    assert not [*search.dead()]
    assert [one.title for one in search.dead_parameters()] == ["_f(b=)"]


def test_the_package_has_no_dead_code() -> None:
    search = Search(ROOT)
    assert [one.title for one in (*search.dead(), *search.dead_parameters())] == []
