"""The first launch of a kernel on a device is compared with its twin in torch: right kernels pass,
a wrong one is noticed, and what is recorded is right all the same."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_inspect
from moe_inspect.capture.hook import first_launch, kernels
from tests.conftest import ROOT, Cli, Put
from tests.support import kernel_reference as reference
from tests.support.kernel_reference import choice, tape_for
from tests.support.sweep import WHOLE

if kernels.triton is None:
    pytest.skip("no triton on this platform", allow_module_level=True)

Capture = pytest.CaptureFixture[str]
CPU = torch.device("cpu")
CASE = reference.Case(
    8, 2, 5, "uniform", None, torch.int64, "float32 as float16", "from the first row", True
)
E, K = CASE.E, CASE.K
WRONG = "gives a wrong result"


@pytest.fixture
def found(put: Put) -> dict[Any, str]:
    """As on a GPU where no kernel has run."""
    put(kernels, runs_triton=lambda tensor: True)
    first_launch.FOUND.clear()
    return first_launch.FOUND


def record() -> None:
    """Records a choice, and finds it on the tape."""
    ids, weights = choice(CASE)
    tape = tape_for(CASE)
    kernels.record(tape, ids, weights)
    reference.check_tape(CASE, tape, ids, weights)


def dispatch() -> None:
    reference.check_dispatch(CASE, kernels.dispatch)


def combine(norms: bool = False) -> None:
    for grouped in (True, False):
        of = grouped, 6, torch.float32, torch.float32, norms
        reference.check_combine(CASE, kernels.combine, *of)


CALLS: dict[str, Callable[[], None]] = {
    "record": record,
    "dispatch": dispatch,
    "combine": combine,
    "combine with norms": lambda: combine(norms=True),
}


def test_the_first_launch_is_compared_and_no_other(
    put: Put, found: dict[Any, str], capsys: Capture
) -> None:
    """And while a graph is captured nothing is."""
    ran = list[str]()

    def launched(name: str, device: torch.device, result: float = 1.0) -> tuple[Any, list[str]]:
        ran.clear()
        kernel = lambda: (ran.append("kernel"), torch.tensor(result))[1]  # noqa: E731
        twin = lambda: (ran.append("twin"), torch.tensor(1.0))[1]  # noqa: E731
        return first_launch.run(name, device, [], kernel, twin).item(), [*ran]

    assert launched("right", CPU) == (1, ["kernel", "twin"])
    assert launched("right", CPU) == (1, ["kernel"])
    assert launched("rounded", CPU, 1 + 1e-5)[0] == pytest.approx(1, rel=1e-4)
    assert capsys.readouterr().err == ""
    assert launched("wrong", CPU, 1.01) == (1, ["kernel", "twin"])
    assert launched("wrong", CPU, 1.01) == (1, ["twin"])
    assert found == {("right", CPU): "", ("rounded", CPU): "", ("wrong", CPU): WRONG}
    assert capsys.readouterr().err.count("\n") == 1, "it is said once"
    put(torch.cuda, is_current_stream_capturing=lambda: True)
    gpu = torch.device("cuda:0")
    assert launched("right", gpu) == (1, ["kernel"])
    assert ("right", gpu) not in found
    found["wrong", gpu] = WRONG
    assert launched("wrong", gpu) == (1, ["twin"])


def test_each_kernel_is_compared_on_its_own(found: dict[Any, str], put: Put) -> None:
    ids = torch.arange(4200).view(-1, 6) % 512
    for T, two_launches in ((2, 16384), (400, 16384), (700, 0)):
        put(kernels, TWO_LAUNCHES=two_launches)
        kernels.dispatch(ids[:T], None, 512)
    for T in (2, 700):
        case = reference.Case(
            60, 2, T, "uniform", None, torch.int64, "float16", "from the first row", False
        )
        kernels.record(tape_for(case), *choice(case))
    without_cursor = tape_for(dataclasses.replace(CASE, tape="without a cursor"))
    kernels.record(without_cursor, *choice(CASE))
    names = ["dispatch", "dispatch in two launches", "dispatch in three launches"]
    names += ["record", "record in two launches", "record from the first row"]
    assert found == dict.fromkeys([(name, CPU) for name in names], "")


def test_without_tokens_nothing_is_launched_or_compared(found: dict[Any, str]) -> None:
    ids, weights = torch.zeros(0, K, dtype=torch.int64), torch.zeros(0, K)
    kernels.record(tape_for(CASE), ids, weights)
    grouped = kernels.dispatch(ids, weights, E)
    assert kernels.combine(torch.zeros(0, 6), ids, weights, grouped, torch.float32, E).shape == (
        0,
        6,
    )
    assert found == {}


# the kernel, and what it does wrong after its work: `made` is its result
MISTAKES = [
    ("record", "tape.ids[tape.ids != 77] += 1"),
    ("record", "tape.weights[tape.weights != 77] += 1e-3"),
    ("record", "tape.cursor.add_(1)"),
    ("record", "tape.ids[-1] = 0"),
    ("record", "raise RuntimeError('Failed to find C compiler.\\nMore.')"),
    ("dispatch", "made.permutation.copy_(made.permutation.flip(0))"),
    ("dispatch", "made.offsets[-1] += 1"),
    ("dispatch", "tape.ids[tape.ids != 77] += 1"),
    ("combine", "made[1, 2] *= 1.01"),
    ("combine", "made[0, 0] = float('nan')"),
    ("combine with norms", "norms[0, 0] *= 1.01"),
]


@pytest.mark.parametrize(("kernel", "mistake"), MISTAKES)
def test_a_wrong_kernel_is_noticed_at_its_first_launch_and_torch_does_its_work(
    kernel: str, mistake: str, put: Put, found: dict[Any, str], capsys: Capture
) -> None:
    name = kernel.partition(" ")[0]
    right = getattr(kernels, f"{name}_triton")

    def wrong(*given: Any, **named: Any) -> Any:
        assert not found.get((kernel, CPU)), "it is tried again"
        made = right(*given, **named)
        of = [g for g in given if isinstance(g, kernels.Tape)]
        exec(mistake, {"made": made, "tape": of[0] if of else None, "norms": given[-1]})
        return made

    put(kernels, **{f"{name}_triton": wrong})
    CALLS[kernel]()  # which finds right results
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    raises = mistake.startswith("raise")
    why = "cannot be run: Failed to find C compiler." if raises else WRONG
    assert said.startswith(f"warning: {kernel} on cpu: the kernel {why}: torch runs instead")
    assert found[kernel, CPU] == why
    CALLS[kernel]()
    assert capsys.readouterr().err == "", "it is said once"


# --- the whole of it


BROKEN = [("tap", "record"), ("dispatch", "dispatch"), ("dispatch", "combine")]


@pytest.mark.parametrize(("capture", "broken"), BROKEN if WHOLE else BROKEN[:1])
def test_with_a_broken_kernel_the_trace_is_exact(
    capture: str, broken: str, tmp_path: Path, cli_here: Cli
) -> None:
    usual = ("trace", "demo", "--max-tokens", 40, "--dtype", "float32", "--capture", capture)
    usual += ("--max-length", 20, "--batch-tokens", 20)  # the first pass shows shapes alone
    cli_here(*usual, "-o", "right")
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.broken", *map(str, usual), "-o", "broken"],
        cwd=tmp_path,
        env={**os.environ, "BROKEN": broken, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"warning: {broken} on cpu: the kernel gives a wrong result: " in done.stderr
    assert done.stderr.count("warning: ") == 1
    traces = [moe_inspect.open_trace(tmp_path / name) for name in ("right", "broken")]
    right, exact = (trace.routing() for trace in traces)
    assert exact.equals(right)
