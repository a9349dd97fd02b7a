"""The kernels in Triton's interpreter and their torch implementations, both against NumPy; as
custom operators; and compiled ahead of time for GPUs: every variant for one of them, and a sample
for the others (SWEEP=whole: every variant for all). The order in which a launch's programs run
changes no result."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from moe_inspect.capture.engine import rows
from moe_inspect.capture.engine.rows import Rows as EngineRows
from moe_inspect.capture.hook import kernels
from tests.support.aot import TARGETS, lines_of
from tests.support.kernel_checks import (
    CHECKS,
    check_combine,
    check_dispatch,
    check_record,
    pairwise,
)
from tests.support.kernel_reference import Case, assert_close, choice, tape_for
from tests.support.sweep import WHOLE

if kernels.triton is None:
    pytest.skip("no triton on this platform", allow_module_level=True)

import triton
import triton.language as tl

CASES = [
    *pairwise(),
    # its blocks are more than a program scans at a time
    Case(16, 10, 2048, "uniform", 3, torch.int32, "none", "none", True),
    *(
        Case(60, 6, 400, "zipf", launches, torch.int64, "none", "none", True, block)
        for launches in (2, 3)
        for block in (256, 512, 1024)
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
@pytest.mark.parametrize("check", CHECKS.values(), ids=list(CHECKS))
def test_kernels_are_right(check: Callable[..., None], reference: bool, case: Case) -> None:
    check(kernels, case, reference)


def test_assert_close_can_fail() -> None:
    x = torch.randn(100)
    with pytest.raises(AssertionError):
        assert_close(x + 1e-3, x.double(), torch.float32)
    with pytest.raises(AssertionError):
        assert_close(x.where(x != x[0], x[0] + 1), x.double(), torch.float16)


def test_strided_arguments() -> None:
    case = Case(8, 4, 10, "uniform", 1, torch.int64, "float32 as float16", "in one page", False)
    ids, weights = choice(case)
    strided, strided_weights = ids.T.contiguous().T, weights.T.contiguous().T
    assert not strided.is_contiguous()
    found = []
    for given in ((ids, weights), (strided, strided_weights)):
        tape = tape_for(kernels, case)
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


# --- as operators


@pytest.mark.parametrize("by", ["reference", "kernel"])
def test_operators_pass_opcheck(by: str, request: pytest.FixtureRequest) -> None:
    if by == "kernel":
        request.getfixturevalue("on_triton")
    case = Case(60, 4, 20, "uniform", None, torch.int64, "float16", "across pages", True)
    ids, weights = choice(case)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    ops, parts = torch.ops.moe_inspect, lambda: kernels._parts(tape_for(kernels, case))
    kept = lambda T: (torch.zeros(T, 4).short(), torch.zeros(T, 4).half())  # noqa: E731
    scores, to_scores = torch.rand(20, 60), torch.zeros(17, 60).half()
    rows = EngineRows((1, 20, 4), 60, False, torch.device("cpu"), buffers=True)
    of = 60, rows.key, 0
    for op, args in (
        (ops.dispatch, (ids, None, 60, *kernels._parts(None))),
        (ops.dispatch, (ids, weights, 60, *parts())),
        (ops.record, (ids, weights, *parts())),
        (ops.keep_rows, (*kept(20), None, None, ids, weights, None, None, *of)),
        (ops.keep_rows, (*kept(17), to_scores, None, ids, weights, scores, None, *of)),
        (ops.keep_rows, (*kept(20), None, kept(20)[0], ids, weights, None, ids + 1, *of)),
    ):
        found = torch.library.opcheck(op.default, args, test_utils=tests)
        assert set(found.values()) == {"SUCCESS"}
        if op is ops.keep_rows:
            op(*args)
            assert torch.equal(args[0], ids[: len(args[0])].short())
    assert rows.fault is None
    (to, *others), ended = kept(20), 10**9  # rows that are no more
    ops.keep_rows(to, *others, None, None, ids, weights, None, None, 60, ended, 0)
    assert torch.equal(to, ids.short())


# --- compiled ahead of time

EVERY = 1 if WHOLE else 7
STORES = "record E|dispatch 1/1 E|rows (kept|taken)"  # whose stores are looked at
Rows = list[dict[str, Any]]


@pytest.fixture(scope="session")
def compiled() -> dict[str, Rows]:
    """Some variants for each target (`make test-ptx`: all), in one process."""
    wanted = [f"{gpu}/{EVERY}" + f"+{STORES}" * (gpu == "sm_90") for gpu in TARGETS]
    found: dict[str, Rows] = {gpu: [] for gpu in TARGETS}
    for row in lines_of("tests.support.aot", *wanted):
        found[row["gpu"]].append(row)
    return found


def stored(row: dict[str, Any], bits: int) -> bool:
    """Whether some store to global memory, such as b64 or v4.b32, is `bits` wide."""
    sizes = (re.fullmatch(r"(?:v(\d)\.)?b(\d+)", store).groups("1") for store in row["stores"])
    return any(int(n) * int(size) == bits for n, size in sizes)


@pytest.mark.slow
@pytest.mark.parametrize("gpu", TARGETS)
def test_nothing_spills(gpu: str, compiled: dict[str, Rows]) -> None:
    assert len(compiled[gpu]) > 150 // EVERY
    for row in compiled[gpu]:
        assert row["stack"] == row["spills"] == 0, row
        assert 0 < row["registers"] <= 255, row


@pytest.mark.slow
@pytest.mark.parametrize("gpu", [g for g in TARGETS if g.startswith("sm")] if WHOLE else ["sm_90"])
def test_a_decision_is_one_store(gpu: str, compiled: dict[str, Rows]) -> None:
    """Eight ids in 64 bits, from 256 experts on in 128; eight weights in 128; four in half."""
    kinds = re.compile(r"(record |dispatch 1/)(?!.* off)")
    recording = [row for row in compiled[gpu] if kinds.match(row["kernel"])]
    for k, ids, weights in (("E64 k8", 64, 128), ("E256 k8", 128, 128), ("E60 k4", 32, 64)):
        rows = [r for r in recording if k in r["kernel"]]
        assert len(rows) >= 4
        for row in rows:
            assert stored(row, ids), row
            assert stored(row, weights), row
    for k, bits in (("k8", 128), ("k4", 64)):  # ids and weights alike, in 16 bits
        rows = [r for r in compiled[gpu] if re.match(rf"rows (kept|taken) .*{k}", r["kernel"])]
        assert len(rows) >= 3
        assert all(stored(row, bits) for row in rows)
    # positive control: two slots are no vector
    single = [r for r in recording if "E8 k2" in r["kernel"]]
    assert single
    assert not any(stored(r, 128) for r in single)


# --- on the device of the tensors


def test_every_launch_is_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """With several GPUs the current one may be another."""
    entered: list[torch.Tensor] = []

    @contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        entered.append(tensor)
        yield
        entered.pop()

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *_, **__: launched.append(len(entered))

    launched: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    names = [(module, name) for module in (kernels, rows) for name in vars(module)]
    names = [(module, name) for module, name in names if name.endswith("_kernel")]
    for module, name in names:
        monkeypatch.setattr(module, name, Kernel())
    case = Case(8, 2, 600, "uniform", None, torch.int64, "float16", "in one page", False)
    ids, weights = choice(case)
    tape = tape_for(kernels, case)
    kernels.record_triton(tape, ids, weights)
    kernels.dispatch_triton(ids[:9], weights[:9], 8, tape, launches=1)
    kernels.dispatch_triton(ids, weights, 8, tape, launches=3)
    kernels.combine_triton(torch.zeros(18, 4), ids[:9], weights[:9], None, torch.float16, 8)
    of = EngineRows((1, 9, 2), 8, False, torch.device("cpu"), buffers=True)
    of.staged = of.staging()
    rows.keep_triton(of.ids[0], of.weights[0], ids[:9], weights[:9])
    rows.take_triton(of, 9, 9, torch.arange(9), ids[:9, 0].int(), ids[:9, 0])
    assert launched == [1] * (2 + 1 + 3 + 1 + 2)
    assert len(names) == len(launched), "every kernel"


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

    for name, changed in (("set_grid_dim", dim), ("set_grid_idx", index)):
        monkeypatch.setattr(interpreter, name, changed)
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
