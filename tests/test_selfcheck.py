"""The self-check: right kernels pass it once per device, a broken one is found, and recording goes
on by torch and is exact."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_inspect
from moe_inspect.capture.hook import kernel_reference as reference
from moe_inspect.capture.hook import kernels, selfcheck
from moe_inspect.capture.hook.kernel_reference import choice, tape_for
from moe_inspect.capture.hook.selfcheck import SWITCH, SelfCheck, Variant, summary
from moe_inspect.doctor import costs
from moe_inspect.doctor.page import page
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.verify import verify
from tests.conftest import ROOT, Cli, Put
from tests.support.kernel_checks import small_cases
from tests.support.sweep import sample

if kernels.triton is None:
    pytest.skip("no triton on this platform", allow_module_level=True)

Capture = pytest.CaptureFixture[str]
CPU = torch.device("cpu")
CASE = reference.Case(
    8, 2, 5, "uniform", None, torch.int64, "float32 as float16", "in one page", True
)
E, K = CASE.E, CASE.K


@pytest.fixture
def checked(
    on_triton: None, put: Put, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> list[Variant]:
    """As on a GPU where nothing is checked yet. The variants that the check runs."""
    ran, wrong_with = list[Variant](), selfcheck.wrong_with
    put(selfcheck, wrong_with=lambda *of, **by: ran.append(of[1]) or wrong_with(*of, **by))
    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    anew(put)
    return ran


def anew(put: Put) -> None:
    """As in a new process."""
    put(kernels, SELF_CHECK=SelfCheck(kernels.__name__))


def record() -> Any:
    ids, weights = choice(CASE)
    tape = tape_for(kernels, CASE)
    kernels.record(tape, ids, weights)
    reference.check_tape(CASE, tape, ids, weights)
    return tape


# --- right kernels


def test_a_variant_is_checked_once_and_remembered(
    checked: list[Variant], put: Put, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    record()
    record()
    assert [v.kernel for v in checked] == ["record"]
    assert summary(kernels.SELF_CHECK.found) == {"record": "ok"}
    anew(put)
    assert kernels.SELF_CHECK.found == {}
    record()
    assert len(checked) == 1, "an earlier process has checked it"
    monkeypatch.setenv(SWITCH, "always")
    anew(put)
    record()
    assert len(checked) == 2
    assert capsys.readouterr().err == ""


def test_it_can_be_switched_off(
    checked: list[Variant], put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH, "0")
    record()
    assert checked == []
    assert summary(kernels.SELF_CHECK.found) == {"record": "not checked"}
    monkeypatch.setenv(SWITCH, "yes")
    anew(put)
    with pytest.raises(MoeInspectError, match="SELFCHECK=yes: give 0, 1 or always"):
        record()


def test_another_device_or_version_is_another_place(put: Put) -> None:
    place = selfcheck.environment_of(kernels, CPU)
    for name in (torch.__version__, kernels.triton.__version__, selfcheck.version("moe-inspect")):
        assert name in place
    put(selfcheck, driver_version=lambda: "550.54.14")
    assert selfcheck.environment_of(kernels, CPU) != place


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 3}', "\x00\xff", '{"a": {"b": null}}'])
def test_a_damaged_file_is_no_error(text: str, checked: list[Variant], tmp_path: Path) -> None:
    file = selfcheck.cache_file()
    assert file == tmp_path / "cache/moe-inspect/selfcheck.json"
    file.parent.mkdir(parents=True)
    file.write_text(text.replace("a", selfcheck.environment_of(kernels, CPU)), encoding="latin-1")
    record()
    assert len(checked) == 1
    assert str(checked[0]) in json.loads(file.read_text())[selfcheck.environment_of(kernels, CPU)]


def test_an_unwritable_cache_is_no_error(
    checked: list[Variant], tmp_path: Path, put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file")
    record()
    assert len(checked) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setitem(sys.modules, "pwd", None)  # (as where a user is in no list)
    anew(put)
    record()
    assert selfcheck.cache_file() is None


def test_the_file_is_small_and_private_to_nobody(checked: list[Variant]) -> None:
    for n in range(3 * selfcheck.MOST):
        selfcheck.remember(f"place {n}", {"a", "b"})
    file = selfcheck.cache_file()
    assert len(json.loads(file.read_text())) == selfcheck.MOST
    assert selfcheck.passed(f"place {3 * selfcheck.MOST - 1}") == {"a", "b"}
    assert [f.name for f in file.parent.iterdir()] == [file.name], "no temporary file is left"
    assert stat.S_ISREG(file.stat().st_mode)


def test_each_variant_is_checked_on_its_own(checked: list[Variant]) -> None:
    ids, weights = choice(CASE)
    outputs = torch.randn(CASE.T * K, 6), ids, weights
    grouped = kernels.dispatch(ids, weights, E)
    for given in (weights, weights.bfloat16()):
        tape = tape_for(kernels, CASE)
        kernels.dispatch(ids, given, E, tape)
        kernels.record(tape, ids.int(), given)
    kernels.combine(*outputs, None, torch.float32, E, tape)
    for norms in (None, torch.empty(ids.shape)):
        kernels.combine(*outputs, grouped, torch.float32, E, None, norms)
    kinds = ["dispatch", *["dispatch", "record"] * 2, *["combine"] * 3]
    assert [v.kernel for v in checked] == kinds
    assert len(set(checked)) == len(set(map(str, checked))) == 8
    assert set(kernels.SELF_CHECK.found.values()) == {"ok"}


@pytest.mark.parametrize("shifted", [("ids",), ("weights",), ("ids", "weights"), ("y",)])
def test_a_kernel_that_is_wrong_only_at_odd_addresses_is_found(
    shifted: tuple[str, ...], checked: list[Variant], put: Put, capsys: Capture
) -> None:
    """Such tensors are a variant of their own. (Of a call whose y is shifted: a sum.)"""
    record_triton, combine_triton = kernels.record_triton, kernels.combine_triton

    def is_so(**tensors: torch.Tensor) -> bool:
        return tuple(n for n, t in tensors.items() if t.data_ptr() % 16) == shifted

    def record_wrong(tape: Any, ids: Any, weights: Any) -> None:
        record_triton(tape, ids + is_so(ids=ids, weights=weights), weights)

    def combine_wrong(y_SH: Any, ids: Any, weights: Any, *more: Any) -> Any:
        return combine_triton(y_SH, ids, weights, *more) + is_so(ids=ids, weights=weights, y=y_SH)

    put(kernels, record_triton=record_wrong, combine_triton=combine_wrong)
    for of_case in ((), shifted):
        assert capsys.readouterr().err == "", "control"
        case = dataclasses.replace(CASE, shifted=of_case)
        if "y" in shifted:
            case, kind = dataclasses.replace(case, tape="none"), (6, torch.float32, torch.float32)
            reference.check_combine(kernels, case, kernels.combine, False, *kind)
        else:
            reference.check_record(kernels, case, kernels.record)
    said = capsys.readouterr().err
    assert "the kernel gives a wrong result: " in said
    assert all(f"{name} at an odd address" in said for name in shifted)
    assert [v.shifted for v in checked] == [(), shifted, shifted]  # at last what stands in
    assert len(set(map(str, checked))) == 2


def test_a_recording_tells_of_the_kernels_that_it_used(checked: list[Variant]) -> None:
    check, given = kernels.SELF_CHECK, (*choice(CASE), E)
    first = check.begin()
    kernels.dispatch(*given)
    record()
    check.end(first)
    second = check.begin()
    record()
    check.end(second)
    kernels.dispatch(*given)
    assert summary(first) == {"dispatch": "ok", "record": "ok"}
    assert summary(second) == {"record": "ok"}
    assert len(checked) == 2, "each is checked once"


def test_cases_reach_pages_ring_and_limit() -> None:
    for launches in (1, 2):
        types = torch.int64, torch.float32, torch.float16
        cases = list(Variant("record", CPU, 64, 8, *types, 256, launches).cases(kernels))
        assert all((c.T * 8 > kernels.RECORD_BLOCK) == (launches == 2) for c in cases)
        assert all(c.invalid_ids for c in cases)
        assert {c.tape for c in cases} >= set(selfcheck.EDGES)
    sizes = Variant("dispatch", CPU, 64, 8, torch.int64, None, None, 0, 2, 256).cases(kernels)
    assert [case.T for case in sizes] == [1, 7, 371]


# --- torch in a kernel's place


@pytest.mark.parametrize("case", list(small_cases()), ids=str)
def test_what_stands_in_for_a_kernel_is_right(case: reference.Case) -> None:
    reference.check_record(kernels, case, kernels.record_on_device)
    reference.check_dispatch(kernels, case, kernels.dispatch_torch)
    if case.T * case.K <= kernels.RECORD_BLOCK:
        for grouped in (True, False):
            kind = grouped, 6, torch.float32, torch.float32, True
            reference.check_combine(kernels, case, kernels.combine_torch, *kind)


def test_a_kernel_that_cannot_be_compiled_is_replaced(
    checked: list[Variant], put: Put, capsys: Capture
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nMore.")

    put(kernels, record_triton=refuse)
    record()
    record()
    said = capsys.readouterr().err
    assert said.count("\n") == 1, "it is said once"
    assert said.startswith("warning: record on cpu: the kernel cannot be run: Failed to find C")
    assert "done by torch" in summary(kernels.SELF_CHECK.found)["record"]
    assert not selfcheck.passed(selfcheck.environment_of(kernels, CPU)), "checked again next time"


def test_where_torch_is_wrong_too_nothing_is_recorded(checked: list[Variant], put: Put) -> None:
    put(kernels, record_triton=lambda *_: None, record_torch=lambda *_: None)
    with pytest.raises(MoeInspectError, match=r"record on cpu: the kernel gives a wrong result: "):
        record()
    with pytest.raises(MoeInspectError, match="and torch instead gives a wrong result"):
        record()  # and again: it was not taken for checked


def test_doctor_shows_what_is_wrong(checked: list[Variant], put: Put, cli_here: Cli) -> None:
    facts = json.loads(cli_here("doctor", "--no-measure", "--json").stdout)
    put(costs, SHAPES=((8, 2),))
    right = {row["kernel"]: row["wrong"] for row in costs.selfchecks_of(CPU)}
    assert right == dict.fromkeys(("record", "dispatch", "combine"))
    put(kernels, dispatch_triton=lambda *a, **_: kernels.dispatch_torch(*a[:3]))
    rows = list(costs.selfchecks_of(CPU))
    shown = page({**facts, "selfcheck": rows})
    assert "record                      right (2 variants in " in shown
    assert "dispatch                    WRONG: torch runs instead (3 variants in " in shown
    assert "gives a wrong result: recorded ids of 1 token, in one page" in shown


# --- the whole of it


@pytest.mark.parametrize(
    ("capture", "broken"),
    sample([("tap", "record"), ("dispatch", "dispatch"), ("dispatch", "combine")], 2),
)
def test_with_a_broken_kernel_the_trace_is_exact(
    capture: str, broken: str, tmp_path: Path, cli_here: Cli, put: Put
) -> None:
    anew(put)
    usual = ("trace", "demo", "--max-tokens", 40, "--dtype", "float32", "--capture", capture)
    cli_here(*usual, "-o", "right")
    environment = {"BROKEN": broken, SWITCH: "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.broken", *map(str, usual), "-o", "broken"],
        cwd=tmp_path,
        env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"warning: {broken} on cpu: the kernel gives a wrong result: " in done.stderr
    traces = [moe_inspect.open_trace(tmp_path / name) for name in ("right", "broken")]
    right, exact = (trace.routing() for trace in traces)
    assert exact.equals(right)
    told = json.loads((tmp_path / "broken/trace.json").read_text())["capture"]["selfcheck"]
    assert told.pop(broken).startswith("done by torch: the kernel gives a wrong result: ")
    assert set(told.values()) == (set() if capture == "tap" else {"ok"})
    assert "selfcheck" not in json.loads((tmp_path / "right/trace.json").read_text())["capture"]
    verify(tmp_path / "broken")
