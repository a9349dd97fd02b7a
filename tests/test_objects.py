"""What results look like: as text, in a notebook, as figures and files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moe_inspect
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.shown import Shown
from moe_inspect.trace.verify import verify
from tests.conftest import ROOT
from tests.support.synthetic import write_counts

SAMPLES = ROOT / "sample_traces"
BALANCED, COLLAPSED = SAMPLES / "balanced", SAMPLES / "collapsed"
HOSTILE = "<script>alert(1)</script>"
LINES, WIDE = 45, 80


def _counts(folder: Path) -> moe_inspect.Trace:
    """Of more experts than BALANCED has."""
    return write_counts(folder / "t", [np.full((1, 16), 500)] * 4, 2)


def _loads(folder: Path) -> moe_inspect.Comparison:
    a, b = np.full((2, 1, 8), 500), np.array([[range(100, 900, 100)]] * 2)
    traces = [write_counts(folder / name, list(load), 2) for name, load in (("a", a), ("b", b))]
    return moe_inspect.compare(*traces)


H200: dict[str, Any] = {"hardware": "h200", "engine": "vllm", "dtype": "bfloat16"}
MADE: dict[str, Callable[[Path], Shown]] = {
    "Comparison": lambda _: moe_inspect.compare(BALANCED, COLLAPSED),
    "Comparison of counts": _loads,
    "Comparison of models": lambda place: moe_inspect.compare(BALANCED, _counts(place)),
    "routing": lambda _: moe_inspect.open_trace(BALANCED).simulate.routing(),
    "placement": lambda _: moe_inspect.open_trace(BALANCED).simulate.placement(gpus=4),
    "decode": lambda _: moe_inspect.open_trace(BALANCED).simulate.decode(),
    "cache": lambda _: moe_inspect.open_trace(BALANCED).simulate.cache(),
    "placement priced": lambda _: moe_inspect.open_trace(BALANCED).simulate.placement(**H200),
}


@pytest.mark.parametrize("name", MADE)
def test_a_result_fits_a_screen(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDE))
    made = MADE[name](tmp_path)
    text = str(made).splitlines()
    assert 5 < len(text) <= LINES
    assert max(len(line.rstrip()) for line in text) <= WIDE
    assert "\x1b" not in str(made)
    assert len(repr(made).splitlines()) == 1
    html: Any = made._repr_html_()
    assert html.count("<li") <= 6
    assert html.count("<tr") <= 6
    assert "<script" not in html
    made.show()
    assert capsys.readouterr().out.startswith(text[0].rstrip()[:40])
    assert made.to_html(tmp_path / "page.html").read_text().startswith("<!doctype html>")
    if name in ("Comparison of counts", "decode"):  # a chart, a simulation
        written = made.save_plots(tmp_path / "plots")
        figure: Any = made.plot(written[0].stem)
        assert figure._repr_png_().startswith(b"\x89PNG")
        assert all(path.stat().st_size for path in written)
        with pytest.raises(MoeInspectError, match=f"'none': there are {written[0].stem}"):
            made.plot("none")


def test_a_report_is_text_a_page_and_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = moe_inspect.report(BALANCED)
    monkeypatch.setenv("COLUMNS", str(WIDE))
    monkeypatch.setenv("FORCE_COLOR", "1")  # a string may go anywhere
    text = str(made).splitlines()
    assert 20 < len(text) <= LINES
    assert max(map(len, text)) <= WIDE
    assert "\x1b" not in str(made)
    assert made.plot("load").axes
    cell = made._repr_html_()
    assert "Layer 3 is the worst balanced" in cell
    assert 'src="data:image/png;base64,' in cell
    assert "<script" not in cell
    with pytest.raises(MoeInspectError, match=r"no chart 'laod' \(did you mean load\?\): "):
        made.plot("laod")
    assert "Layer 3 is the worst balanced" in made.to_html(tmp_path / "r.html").read_text()
    assert "Layer 3 is the worst balanced" in " ".join(str(made).split())
    with pytest.raises(MoeInspectError, match="cannot write"):
        made.to_html(tmp_path / "no" / "r.html")


def test_what_verify_found_is_its_text(tmp_path: Path) -> None:
    found = verify(BALANCED)
    assert str(found) == repr(found)
    assert "is fine: 9,254 tokens" in str(found)
    assert "in 1 shard\n" in str(found)
    found.ok, found.violation, found.file, found.row = False, HOSTILE, "routing/p", 7
    assert str(found) == f"{BALANCED / 'routing/p'} row 7: {HOSTILE}"
