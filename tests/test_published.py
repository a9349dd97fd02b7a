"""docs/reproduced.md, and what `python -m benchmarks.published` does where data are missing or a
figure differs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import published
from benchmarks.published import FIGURES, Figure, page, row
from tests.conftest import ROOT
from tests.test_real_data import REAL

PAGE = ROOT / "docs/reproduced.md"


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason=f"no {REAL}")
def test_the_page_is_what_the_data_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but what a machine's arithmetic changes: the model's own runs."""
    for folder in REAL.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    published.table.cache_clear()
    written = page([figure for figure in FIGURES if figure.data], REAL)
    recorded = [line for line in PAGE.read_text().splitlines() if "`trace demo " in line]
    assert len(recorded) == 1
    assert [*written.splitlines(), *recorded] == PAGE.read_text().splitlines()


def test_figures_without_data_are_skipped_with_a_line(tmp_path: Path) -> None:
    figures = [figure for figure in FIGURES if figure.data]
    lines = page(figures, tmp_path).splitlines()[-len(figures) :]
    for figure, line in zip(figures, lines, strict=True):
        assert line.rstrip() == f"Skipped, as there is no {figure.data}: {figure.what}."


def test_a_figure_that_differs_says_why() -> None:
    def ours(how: str) -> list[float]:
        return [0.0123, 1.256]

    same = Figure("x", "us", "0.012, 1.26", "report a; report b --domain {domain}", ours)
    end = "| the same | `report a`<br>`report b --domain NAME` |"
    assert row(same) == f"| x | us | 0.012, 1.26 | 0.012, 1.26 {end}"
    with pytest.raises(SystemExit, match=r"^y: 0.012, 1.26, not 0.013, 1.26: say why$"):
        row(Figure("y", "us", "0.013, 1.26", "", ours))
    assert "| rounding | `ours` of" in row(
        Figure("y", "us", "0.013, 1.26", "", ours, why="rounding")
    )
