"""The kernels in Triton's interpreter and their torch twins, both against NumPy; as custom
operators; and compiled ahead of time for GPUs: a sample for one of them (SWEEP=whole: every variant
for all). The order in which a launch's programs run changes no result."""

from __future__ import annotations

import ast
import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_inspect.capture.engine import rows
from moe_inspect.capture.hook import kernels
from tests.support.aot import TARGETS, lines_of
from tests.support.kernel_reference import (
    Case,
    assert_close,
    check_combine,
    check_dispatch,
    check_kernel_and_twin,
    check_record,
    choice,
    drawn_cases,
    small_cases,
    tape_for,
)
from tests.support.sweep import WHOLE

if kernels.triton is None:
    pytest.skip("no triton on this platform", allow_module_level=True)

import triton
import triton.language as tl

LARGE = [
    # its blocks are more than a program scans at a time
    Case(16, 10, 2048, "uniform", 3, torch.int32, "none", "none", True),
    # as many tokens as the first program of a sum can record
    Case(8, 1, 1023, "zipf", None, torch.int64, "float32 as float16", "from the first row", True),
    *(
        Case(60, 6, 400, "zipf", launches, torch.int64, "none", "none", True, block)
        for launches in (2, 3)
        for block in (256, 512, 1024)
    ),
]
NONE = Case(8, 2, 0, "uniform", None, torch.int64, "bfloat16", "behind others", False)  # no tokens
CASES = [
    *small_cases(),
    NONE,
    *drawn_cases(150 if WHOLE else 12),
    *(LARGE if WHOLE else LARGE[2:5:2]),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_and_their_twins_are_right(case: Case) -> None:
    check_kernel_and_twin(case)


def test_assert_close_can_fail() -> None:
    x = torch.randn(100)
    with pytest.raises(AssertionError):
        assert_close(x + 1e-3, x.double(), torch.float32)
    with pytest.raises(AssertionError):
        assert_close(x.where(x != x[0], x[0] + 1), x.double(), torch.float16)


def test_strided_arguments() -> None:
    case = Case(
        8, 4, 10, "uniform", 1, torch.int64, "float32 as float16", "from the first row", False
    )
    ids, weights = choice(case)
    strided, strided_weights = ids.T.contiguous().T, weights.T.contiguous().T
    assert not strided.is_contiguous()
    found = []
    for given in ((ids, weights), (strided, strided_weights)):
        tape = tape_for(case)
        found.append((*kernels.dispatch_triton(*given, 8, tape), tape.ids, tape.weights))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_program_sizes() -> None:
    for experts in (0, 8, 512):
        sizes = {kernels.slots_per_program(s, experts) for s in range(0, 2**21, 777)}
        assert sizes == {256, 512, 1024}
    assert kernels.slots_per_program(8192 * 8) == kernels.slots_per_program(8192 * 8, 64) == 512
    assert kernels.dispatch_plan(2**16, 256) == (2, 1024)
    assert kernels.dispatch_plan(2**17, 256) == (3, 1024)
    assert kernels.slots_per_program(4096, 8) == 256


@pytest.mark.parametrize("by", ["reference", "kernel"])
def test_operators_pass_opcheck(by: str, request: pytest.FixtureRequest) -> None:
    if by == "kernel":
        request.getfixturevalue("on_triton")
    case = Case(60, 4, 20, "uniform", None, torch.int64, "float16", "behind others", True)
    ids, weights = choice(case)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    ops, parts = torch.ops.moe_inspect, lambda: kernels.tape_parts(tape_for(case))
    without_cursor = kernels.tape_parts(tape_for(replace(case, tape="without a cursor")))
    for op, args in (
        (ops.dispatch, (ids, None, 60, *kernels.tape_parts(None))),
        (ops.dispatch, (ids, weights, 60, *parts())),
        (ops.record, (ids, weights, *parts())),
        (ops.record_in_engine, (ids, weights, *without_cursor)),
    ):
        found = torch.library.opcheck(op.default, args, test_utils=tests)
        assert set(found.values()) == {"SUCCESS"}
    assert rows.FAULTS == {}


def test_every_launch_is_on_the_device_of_its_tensors() -> None:
    """With several GPUs the current one may be another, which no other test can have."""

    def launches(within: ast.AST) -> set[str]:
        calls = (n.func for n in ast.walk(within) if isinstance(n, ast.Call))
        grids = (f.value for f in calls if isinstance(f, ast.Subscript))
        return {g.id for g in grids if isinstance(g, ast.Name) and g.id.endswith("_kernel")}

    tree = ast.parse(Path(str(kernels.__file__)).read_text())
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.With)]
    on_device = [n for n in blocks if "torch.cuda.device_of(" in ast.unparse(n.items[0])]
    inside = set[str]().union(*map(launches, on_device))
    assert inside == launches(tree) == {n for n in vars(kernels) if n.endswith("_kernel")}


# --- compiled ahead of time

EVERY = 1 if WHOLE else 11
STORES = "record (E|without|some)|dispatch 1/1 E"  # whose stores are looked at
COMPILED = [*TARGETS] if WHOLE else ["sm_90"]
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def compiled() -> dict[str, Rows]:
    """Some variants for each target (`make test-ptx`: all), in one process."""
    found: dict[str, Rows] = {gpu: [] for gpu in COMPILED}
    wanted = [f"{gpu}/{EVERY}" + f"+{STORES}" * (gpu == "sm_90") for gpu in COMPILED]
    for row in lines_of("tests.support.aot", *wanted):
        found[row["gpu"]].append(row)
    return found


def stored(row: dict[str, Any], bits: int) -> bool:
    """Whether some store to global memory, such as b64 or v4.b32, is `bits` wide."""
    sizes = (re.fullmatch(r"(?:v(\d)\.)?b(\d+)", store).groups("1") for store in row["stores"])
    return any(int(n) * int(size) == bits for n, size in sizes)


@pytest.mark.parametrize("gpu", COMPILED)
def test_nothing_spills_and_a_decision_is_one_store(gpu: str, compiled: dict[str, Rows]) -> None:
    """Eight ids in 64 bits, from 256 experts on in 128; eight weights in 128; four in half."""
    assert len(compiled[gpu]) > 150 // EVERY
    for row in compiled[gpu]:
        assert row["stack"] == row["spills"] == 0, row
        assert 0 < row["registers"] <= 255, row
    if not gpu.startswith("sm"):
        return
    kinds = re.compile(r"(record |dispatch 1/)(?!.* off)")
    recording = [row for row in compiled[gpu] if kinds.match(row["kernel"])]
    for k, ids, weights in (("E64 k8", 64, 128), ("E256 k8", 128, 128), ("E60 k4", 32, 64)):
        found = [r for r in recording if k in r["kernel"]]
        assert len(found) >= 4
        assert all(stored(row, ids) and stored(row, weights) for row in found)
    # positive control: two slots are no vector
    single = [r for r in recording if "E8 k2" in r["kernel"]]
    assert single
    assert not any(stored(r, 128) for r in single)


# --- programs in another order


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The interpreter runs a launch's programs in reversed order; returns those that ran."""
    interpreter: Any = triton.runtime.interpreter.interpreter_builder
    set_dim, set_index = interpreter.set_grid_dim, interpreter.set_grid_idx
    ran: list[Any] = []
    places: dict[tuple[int, ...], tuple[int, ...]] = {}

    def dim(*grid: int) -> None:
        set_dim(*grid)
        natural = list(itertools.product(*map(range, grid)))
        places.clear()
        places.update(zip(natural, natural[::-1], strict=True))

    def index(*place: int) -> None:
        ran.append(places[place])
        set_index(*places[place])

    for name, changed in (("set_grid_dim", dim), ("set_grid_idx", index)):
        monkeypatch.setattr(interpreter, name, changed)
    return ran


def test_the_order_of_programs_changes_nothing(ran: list[Any]) -> None:
    for T, launches, tape in ((131, 2, "behind others"), (131, 3, "beyond its part")):
        case = Case(60, 8, T, "zipf", launches, torch.int64, "bfloat16", tape, True)
        check_dispatch(case, lambda *of, n=launches: kernels.dispatch_triton(*of, launches=n))
        check_record(case, kernels.record_triton)
    case = Case(60, 8, 12, "zipf", 1, torch.int64, "bfloat16", "beyond its part", True)
    for grouped in (True, False):
        check_combine(case, kernels.combine_triton, grouped, 40, torch.bfloat16, torch.float32)
    assert ran != sorted(ran), "control: another order than the interpreter's own"
    assert max(ran) >= (11, 0, 0)


def test_an_order_that_matters_is_noticed(ran: list[Any]) -> None:
    """A kernel whose every program takes the next place."""

    @triton.jit
    def takes_a_place(count, places):
        place = tl.load(count)
        tl.store(places + tl.program_id(0), place)
        tl.store(count, place + 1)

    places = torch.zeros(16, dtype=torch.int32)
    takes_a_place[(16,)](torch.zeros(1, dtype=torch.int32), places)
    assert places.tolist() == [*range(16)][::-1]
