"""The benchmarks. Of a GPU: at toy size where there is none, and its correctness section can fail.
Of small passes: ways of recording take turns on one model, and what Valgrind prints is read."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")  # there are platforms without it

from benchmarks import calls, instructions
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.devices import Cpu
from benchmarks.gpu.engine import engine
from benchmarks.gpu.models import models
from benchmarks.gpu.sizes import DRY
from moe_inspect.capture.engine.rows import Load
from moe_inspect.capture.hook import kernels
from tests.conftest import ROOT
from tests.support.sweep import WHOLE
from tests.support.zoo import state_of

LAYERS = 2
SECTIONS = ("ceilings", "correctness", "micro", "decode", "engine", "models", "graphs", "writer")


def benchmark(root: Path, *given: str, broken: bool = False) -> SimpleNamespace:
    """In a process of its own; with every kernel broken, maybe."""

    def run() -> None:
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(root / name, os.O_WRONLY | os.O_CREAT), descriptor)
        sys.stdout, sys.stderr = (os.fdopen(d, "w", closefd=False) for d in (1, 2))
        for kernel, breakage in BREAKAGES.items() if broken else ():
            break_kernel(f"{kernel}_triton", breakage)
        os.chdir(ROOT)
        sys.argv = ["benchmarks.gpu", *given]
        sys.exit(gpu.main(list(given)))

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join(900)
    child.kill()
    out, err = ((root / name).read_text() for name in ("out", "err"))
    return SimpleNamespace(returncode=child.exitcode, stdout=out, stderr=err)


# kernel → what its result suffers
BREAKAGES = {
    "dispatch": "made.permutation[0] += next(calls) % 2",  # now and then
    "record": "kwargs['tape'].ids[0] += 1",
    "combine": "made[0, 0] += 1",
}


def break_kernel(kernel: str, breakage: str) -> None:
    right, calls = getattr(kernels, kernel), itertools.count()

    def wrong(*args: Any, **kwargs: Any) -> Any:
        made = right(*args, **kwargs)
        exec(breakage, {"made": made, "kwargs": kwargs, "calls": calls})
        return made

    setattr(kernels, kernel, wrong)


@pytest.mark.skipif(not WHOLE, reason="SWEEP=whole goes through all of the benchmark")
def test_a_dry_run_goes_through_all_of_it(tmp_path: Path) -> None:
    before = sorted((ROOT / "benchmarks/results").iterdir())
    done = benchmark(tmp_path, "--dry-run")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for title in (*SECTIONS, "targets"):
        assert f"\n=== {title}" in done.stdout
    assert done.stdout.startswith("DRY RUN ON A CPU, AT TOY SIZE: THE FIGURES MEAN NOTHING")
    assert "left out for want of time: nothing\nWRONG: 0\n" in done.stdout
    targets = "traced ÷ untraced", "record on ÷ off", "traced ÷ output_router_logits"
    targets += "traced ÷ hook", "ours, recording ÷ stock: 2 layers, decode 1, eager"
    for target in (*targets, "dispatch with record"):
        assert f"\n{target}" in done.stdout.partition("=== targets")[2]
    assert sorted((ROOT / "benchmarks/results").iterdir()) == before


def test_wrong_kernels_are_found(tmp_path: Path) -> None:
    """Each by a check that runs none of the others."""
    sections = ("--only", "correctness", "--only", "micro")
    done = benchmark(tmp_path, "--dry-run", "--sanitized", *sections, broken=True)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    for kernel in BREAKAGES:
        assert f"WRONG: {kernel} T" in done.stdout
    assert "Traceback" not in done.stderr
    assert "=== micro" not in done.stdout


def test_wrong_rows_of_an_engine_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(Cpu(), DRY, False, float("inf"), {}, [], [], [])
    engine(bench)
    assert bench.failures == []
    add = Load.add
    monkeypatch.setattr(Load, "add", lambda load, ids: add(load, ids[:, :-1]))
    engine(bench)
    assert [what.partition(",")[0] for what in bench.failures] == ["counts of replayed graphs"]
    monkeypatch.setattr(kernels, "record", lambda *given: None)
    engine(bench)
    assert any(what.startswith("rows taken behind a replayed graph") for what in bench.failures)


def test_what_there_is_no_time_for_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench(Cpu(), DRY, False, 0.0, {}, [], [], [])
    models(bench)
    assert bench.figures == {}
    assert "OLMoE prefill 2×8 eager" in bench.cut
    assert "CUT, no time left: OLMoE decode 1 CUDA graph" in capsys.readouterr().out


def test_a_section_that_does_not_end_is_interrupted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def endless(bench: Bench) -> None:
        """Goes on whatever happens."""
        while True:
            with contextlib.suppress(Exception):
                bench.figures["measured"] = 1
                time.sleep(0.01)

    device = Cpu()
    device.dry = False
    monkeypatch.setitem(gpu.SECTIONS, "writer", (endless, 0.0))
    monkeypatch.setattr(gpu, "GRACE_S", 0.2)
    bench = Bench(device, DRY, False, time.perf_counter(), {}, [], [], [])
    assert gpu.run("writer", bench) == {"measured": 1}
    assert bench.cut == ["the rest of writer, which was interrupted"]
    assert bench.failures == []
    assert "CUT, interrupted: writer" in capsys.readouterr().out


def test_the_sections_take_nine_minutes_at_most() -> None:
    start_s = 20  # imports and the last write
    sections_s = sum(seconds for _, seconds in gpu.SECTIONS.values())
    assert sections_s + gpu.GRACE_S + start_s <= 9 * 60


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main([])
    assert ended.value.code == 2
    assert "no CUDA GPU here (--dry-run needs none)" in capsys.readouterr().err


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
    turns = [turn for of_way in found.values() for of_round in of_way for turn in of_round]
    assert all(len(turn) == 1 and turn[0] > 0 for turn in turns)


def test_what_drifts_while_measured_is_no_cost(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each turn takes 3 s longer than the one before, and a turn of tap 2 s more."""
    entered: list[str] = []
    for way, of in list(calls.WAYS.items()):
        monkeypatch.setitem(calls.WAYS, way, lambda m, p, w=way, e=of: entered.append(w) or e(m, p))
    monkeypatch.setattr(
        calls, "pass_seconds", lambda run: 10 + 3 * len(entered) + 2 * (entered[-1] == "tap")
    )
    found = calls.turns("tiny", ["tap", "dispatch"], rounds=4, in_a_row=3, seed=0)
    for way, beyond in (("tap", 2), ("dispatch", 0)):
        for spent, before, after in found[way]:
            assert {2 * s - b - a for s, b, a in zip(spent, before, after, strict=True)} == {
                2 * beyond
            }


def test_a_cost_is_told_with_its_quartiles() -> None:
    """Of 1, 2, … 8 ms beyond untraced, in rounds that differ otherwise too."""
    beyond = [5, 1, 8, 2, 7, 3, 6, 4]
    turns = [
        ([(10 + n * n + more) / 1e3] * 3, [(9 + n * n) / 1e3] * 3, [(11 + n * n) / 1e3] * 3)
        for n, more in enumerate(beyond)
    ]
    row = calls.summary({"tap": turns}, LAYERS)["tap"]
    low, middle, high = statistics.quantiles(beyond, n=4)
    assert row["us_per_layer"] == pytest.approx(middle * 1e3 / LAYERS)
    assert row["lower_quartile"] == pytest.approx(low * 1e3 / LAYERS)
    assert row["upper_quartile"] == pytest.approx(high * 1e3 / LAYERS)
    tenth = statistics.quantiles([10 + n * n + more for n, more in enumerate(beyond)] * 3, n=10)[0]
    plain = statistics.quantiles([x + n * n for n in range(8) for x in (9, 11)] * 3, n=10)[0]
    assert row["tenth_percentile_us"] == pytest.approx((tenth - plain) * 1e3 / LAYERS)
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
