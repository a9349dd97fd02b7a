"""The examples run as they stand."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

import moe_inspect
from moe_inspect.model.own import load_object
from tests.conftest import ROOT

EXAMPLES = ROOT / "examples"


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_a_training_loop_logs_every_layer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "train_loop.py")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 3 * 4
    assert lines[-1].startswith("step 6 layer 3: max_vio ")


def test_a_model_of_ones_own_is_traced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Trained for a few steps, and traced again from the command line as its text says."""
    run(monkeypatch, "your_own_moe.py", tmp_path, 3)
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith("after 3 steps")
    assert [line.split()[0] for line in out[2:6]] == ["0", "1", "2", "3"]
    assert [line.split() for line in out[7:]] == [[str(n), "128", "0.0"] for n in range(4)]
    traced = moe_inspect.open_trace(tmp_path / "trace")
    loader = load_object(f"{EXAMPLES / 'your_own_moe.py'}:load")
    checkpoint = str(tmp_path / "model.pt")
    again = moe_inspect.trace_model(checkpoint, tmp_path / "again", loader=loader, max_tokens=500)
    key = ["sequence", "position", "token_id", "expert_0", "expert_1"]
    both = [t.tokens().merge(t.routing(layer=2), on="token")[key] for t in (traced, again)]
    assert len(both[1].merge(both[0])) == 500  # the same routing
    longer = moe_inspect.trace_model(
        checkpoint, tmp_path / "longer", loader=loader, max_tokens=500, generate=4
    )
    assert moe_inspect.verify(longer.path).ok
    assert longer.n_tokens == 500 + 4 * len(longer.documents())
    decoded = longer.tokens().query("phase == 'decode'")
    assert (decoded.groupby("document").size() == 4).all()


def test_a_trace_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "analyse.py")
    out = capsys.readouterr().out
    assert out.startswith("layer 3 is the least balanced: max_vio 1.87\n")
    assert "english" in out


@pytest.mark.parametrize(("trace", "code"), [("balanced", 0), ("collapsed", 3)])
def test_a_gate_fails_the_collapsed_model(
    trace: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "gate.py", ROOT / "sample_traces" / trace)
    assert ended.value.code == code
    assert ("layer 3: max_vio 1.87 > 0.5" in capsys.readouterr().out) == (code == 3)


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "commit it without outputs"
            *lines, last = "".join(cell["source"]).splitlines()
            exec("\n".join(lines), names)
            try:
                shown = eval(last, names)  # what a notebook displays
            except SyntaxError:
                exec(last, names)
            else:
                assert shown is None or "<" in shown._repr_html_() or len(shown)
    assert set(names["simulation"].tables) >= {"policies"}


def test_every_example_is_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.iterdir():
        assert path.name == "README.md" or f"[{path.name}]({path.name})" in listed
