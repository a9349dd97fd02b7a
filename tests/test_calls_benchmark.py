"""The benchmarks of small passes: ways of recording take turns on one model and leave no mark on
it, and what Valgrind prints is read."""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import Any

import pytest

from benchmarks import calls, instructions
from tests.support.zoo import state_of

LAYERS = 2


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The one that the ways of the case "tiny" share."""
    shared = calls.qwen(LAYERS, 8)
    made = iter([shared, calls.qwen(LAYERS, 8)])
    monkeypatch.setitem(calls.CASES, "tiny", (lambda: next(made), calls.decode(1), LAYERS))
    return shared


def test_every_way_takes_turns_on_one_model_and_leaves_it_as_it_was(model: Any) -> None:
    before, ways = state_of(model), [way for way in calls.WAYS if way != "untraced"]
    found = calls.turns("tiny", ways, rounds=2, in_a_row=1, seed=0)
    assert list(found) == ways
    assert state_of(model) == before
    assert all(len(of_way) == 2 for of_way in found.values())
    assert all(spent > 0 and plain > 0 for of_way in found.values() for spent, plain in of_way)


def test_what_drifts_while_measured_is_no_cost(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each turn takes 3 s longer than the one before, and a turn of tap 2 s more."""
    entered: list[str] = []
    for way, enter in list(calls.WAYS.items()):
        monkeypatch.setitem(
            calls.WAYS, way, lambda m, path, w=way, e=enter: (entered.append(w), e(m, path))[1]
        )
    monkeypatch.setattr(
        calls, "pass_seconds", lambda run: 10 + 3 * len(entered) + 2 * (entered[-1] == "tap")
    )
    found = calls.turns("tiny", ["tap", "dispatch"], rounds=4, in_a_row=3, seed=0)
    assert {spent - plain for spent, plain in found["tap"]} == {2}
    assert {spent - plain for spent, plain in found["dispatch"]} == {0}


def test_a_cost_is_told_with_its_quartiles() -> None:
    """Of 1, 2, … 8 ms beyond untraced, in rounds that differ otherwise too."""
    beyond = [5, 1, 8, 2, 7, 3, 6, 4]
    turns = [((10 + n * n + more) / 1e3, (10 + n * n) / 1e3) for n, more in enumerate(beyond)]
    row = calls.summary({"tap": turns}, LAYERS)["tap"]
    low, middle, high = statistics.quantiles(beyond, n=4)
    assert row["us_per_layer"] == pytest.approx(middle * 1e3 / LAYERS)
    assert row["lower_quartile"] == pytest.approx(low * 1e3 / LAYERS)
    assert row["upper_quartile"] == pytest.approx(high * 1e3 / LAYERS)
    assert row["least_us_per_layer"] == pytest.approx(2e3 / LAYERS)
    usual = statistics.median(10 + n * n for n in range(8))
    assert row["untraced_over_this"] == pytest.approx(usual / (usual + middle))


def test_the_package_of_a_commit_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    if not (calls.ROOT / ".git").exists():
        pytest.skip("not a clone of the repository")
    package = calls.package_at("HEAD", tmp_path)
    (package / "moe_inspect" / "__init__.py").write_text("raise SystemExit('of this commit')")
    asked = {"case": "bundled model, passes of 150 tokens", "ways": ["tap"], "rounds": 1}
    with pytest.raises(SystemExit, match="of this commit"):
        calls.in_process(package, {**asked, "in_a_row": 1, "seed": 0})


def test_what_valgrind_counted_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    valgrind = tmp_path / "valgrind"
    valgrind.write_text(
        "#!/bin/sh\n"
        "echo '==7== Events    : Ir Dr Dw I1mr D1mr D1mw ILmr DLmr DLmw' >&2\n"
        "echo '==7== Collected : 1000 300 200 50 40 30 6 5 4' >&2\n"
    )
    valgrind.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = instructions.counted("tiny", "tap", passes=2)
    assert found == {"instructions": 500, "level_1_misses": 60, "level_2_misses": 7.5}
