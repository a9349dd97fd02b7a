"""Bound launches are Triton's own launches. See tests/launches.py, which runs in a process of its
own; and the order in which a launch's programs run changes no result."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from typing import Any

import pytest
import torch

from moe_inspect.capture.hook import kernels
from tests.conftest import ROOT
from tests.kernel_checks import Case, check_combine, check_dispatch, check_record

if kernels.triton is None:
    pytest.skip("no triton on this platform", allow_module_level=True)

import triton
import triton.language as tl

SCENARIOS = (
    "a_small_kernel",
    "mistakes_are_noticed",
    "our_kernels",
    "the_benchmark_measures_both_ways",
)


@pytest.fixture(scope="module")
def errors() -> dict[str, str | None]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.launches"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = map(json.loads, done.stdout.splitlines())
    return {row["scenario"]: row["error"] for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_bound_launch_is_what_triton_would_launch(
    scenario: str, errors: dict[str, str | None]
) -> None:
    assert errors[scenario] is None, errors[scenario]


def test_in_the_interpreter_nothing_is_bound() -> None:
    case = Case(8, 2, 20, "uniform", 1, torch.int64, "float16", "in one page", False)
    check_record(kernels, case, reference=False)
    assert not kernels._record_launch(2, True).bound


# --- programs in another order


@pytest.fixture(params=["reversed", 0])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The interpreter runs a launch's programs in this order; returns those that ran."""
    interpreter: Any = triton.runtime.interpreter.interpreter_builder
    set_dim, set_index = interpreter.set_grid_dim, interpreter.set_grid_idx
    ran: list[Any] = []
    places: dict[tuple[int, ...], tuple[int, ...]] = {}

    def dim(*grid: int) -> None:
        set_dim(*grid)
        natural = list(itertools.product(*map(range, grid)))
        shuffled = natural[::-1]
        if request.param != "reversed":
            random.Random(request.param).shuffle(shuffled)
        places.clear()
        places.update(zip(natural, shuffled, strict=True))

    def index(*place: int) -> None:
        ran.append(places[place])
        set_index(*places[place])

    monkeypatch.setattr(interpreter, "set_grid_dim", dim)
    monkeypatch.setattr(interpreter, "set_grid_idx", index)
    return ran


@pytest.mark.parametrize("tape", ["across the ring's end", "beyond the limit"])
def test_the_order_of_programs_changes_nothing(order: list[Any], tape: str) -> None:
    for check, T, launches in (
        (check_dispatch, 131, 2),
        (check_dispatch, 131, 3),
        (check_record, 131, 1),
        (check_combine, 12, 1),
    ):
        case = Case(60, 8, T, "zipf", launches, torch.int64, "bfloat16", tape, True)
        check(kernels, case, reference=False)
    assert order != sorted(order), "control: another order than the interpreter's own"
    assert max(order) >= (11, 0, 0)


def test_an_order_that_matters_is_noticed(order: list[Any]) -> None:
    """A kernel whose every program takes the next place."""

    @triton.jit
    def takes_a_place(count, places):
        place = tl.load(count)
        tl.store(places + tl.program_id(0), place)
        tl.store(count, place + 1)

    places = torch.zeros(16, dtype=torch.int32)
    takes_a_place[(16,)](torch.zeros(1, dtype=torch.int32), places)
    assert sorted(places.tolist()) == list(range(16))
    assert places.tolist() != list(range(16))
