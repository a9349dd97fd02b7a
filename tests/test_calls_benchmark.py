"""The benchmarks of small passes: ways of recording take turns on one model and leave no mark on
it, and what Valgrind prints is read."""

from __future__ import annotations

import statistics
import subprocess
from typing import Any

import pytest

from benchmarks import calls, instructions

LAYERS = 2


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The one that the ways of the case "tiny" share."""
    shared = calls.qwen(LAYERS, 8)
    made = iter([shared, calls.qwen(LAYERS, 8)])
    monkeypatch.setitem(calls.CASES, "tiny", (lambda: next(made), calls.decode(1), LAYERS))
    return shared


def state(model: Any) -> list[tuple[type, list[str], int, int]]:
    """What a way of recording changes of a module."""
    return [
        (type(m), sorted(vars(m)), len(m._forward_pre_hooks), len(m._forward_hooks))
        for m in model.modules()
    ]


def test_every_way_takes_turns_on_one_model_and_leaves_it_as_it_was(model: Any) -> None:
    before = state(model)
    found = calls.measured("tiny", list(calls.WAYS), rounds=2, in_a_row=1)
    assert list(found) == list(calls.WAYS)
    assert state(model) == before
    assert found["untraced"]["us_per_layer"] == 0
    assert all(row["least_ms"] > 0 for row in found.values())


def test_a_cost_is_told_with_its_quartiles(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1, 2, … 8 ms beyond untraced, in rounds that differ otherwise too."""
    rounds = 8
    untraced = [10.0 + n * n for n in range(rounds)]
    beyond = [5, 1, 8, 2, 7, 3, 6, 4]
    of_way = {"untraced": untraced, "tap": [a + b for a, b in zip(untraced, beyond, strict=True)]}
    turns: list[str] = []
    monkeypatch.setattr(calls, "WARM_UP", 0)
    for way, enter in list(calls.WAYS.items()):
        monkeypatch.setitem(
            calls.WAYS, way, lambda m, path, w=way, e=enter: (turns.append(w), e(m, path))[1]
        )

    def seconds(run: Any) -> float:
        return of_way[turns[-1]][turns.count(turns[-1]) - 1] / 1e3

    monkeypatch.setattr(calls, "pass_seconds", seconds)
    row = calls.measured("tiny", ["untraced", "tap"], rounds, in_a_row=3)["tap"]
    low, middle, high = statistics.quantiles(beyond, n=4)
    assert row["us_per_layer"] == pytest.approx(middle * 1e3 / LAYERS)
    assert row["lower_quartile"] == pytest.approx(low * 1e3 / LAYERS)
    assert row["upper_quartile"] == pytest.approx(high * 1e3 / LAYERS)
    assert row["least_us_per_layer"] == pytest.approx(2e3 / LAYERS)


def test_what_valgrind_counted_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = (
        "==7== Events    : Ir Dr Dw I1mr D1mr D1mw ILmr DLmr DLmw\n"
        "==7== Collected : 1000 300 200 50 40 30 6 5 4\n"
    )

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[0] == "valgrind"
        return subprocess.CompletedProcess(command, 0, "", printed)

    monkeypatch.setattr(instructions.subprocess, "run", run)
    assert instructions.counted("tiny", "tap", passes=2) == {
        "instructions": 500,
        "level_1_misses": 60,
        "level_2_misses": 7.5,
    }
