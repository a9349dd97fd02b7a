"""The GPU benchmark: where there is no GPU every branch of it runs at toy size, and its correctness
section can fail."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")  # there are platforms without it

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.devices import Cpu
from benchmarks.gpu.models import models
from benchmarks.gpu.sizes import DRY
from moe_inspect.capture.hook import kernels
from tests.conftest import ROOT
from tests.support.sweep import WHOLE, sample

SECTIONS = ("ceilings", "correctness", "micro", "decode", "models", "graphs", "writer")


def benchmark(root: Path, *given: str, breakage: tuple[str, str] | None = None) -> SimpleNamespace:
    """`python -m benchmarks.gpu`, in a process of its own that need not import anything.
    `breakage`: a function of `kernels`, and what is done to its result."""

    def run() -> None:
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(root / name, os.O_WRONLY | os.O_CREAT), descriptor)
        sys.stdout, sys.stderr = (os.fdopen(d, "w", closefd=False) for d in (1, 2))
        if breakage is not None:
            break_kernel(*breakage)
        os.chdir(ROOT)
        sys.argv = ["benchmarks.gpu", *given]
        sys.exit(gpu.main(list(given)))

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join(900)
    child.kill()
    out, err = ((root / name).read_text() for name in ("out", "err"))
    return SimpleNamespace(returncode=child.exitcode, stdout=out, stderr=err)


def break_kernel(kernel: str, breakage: str) -> None:
    right, calls = getattr(kernels, kernel), itertools.count()

    def wrong(*args: Any, **kwargs: Any) -> Any:
        made = right(*args, **kwargs)
        exec(breakage, {"made": made, "kwargs": kwargs, "calls": calls})
        return made

    setattr(kernels, kernel, wrong)


@pytest.mark.slow
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


BREAKAGES = [
    ("dispatch_triton", "made.permutation[0] += next(calls) % 2", "dispatch T"),  # now and then
    ("record_triton", "kwargs['tape'].ids[0] += 1", "record T"),
    ("combine_triton", "made[0, 0] += 1", "combine T"),
]


@pytest.mark.parametrize(("kernel", "breakage", "found"), sample(BREAKAGES, 2))
def test_a_wrong_kernel_is_found(kernel: str, breakage: str, found: str, tmp_path: Path) -> None:
    sections = ("--only", "correctness", "--only", "micro")
    done = benchmark(tmp_path, "--dry-run", "--sanitized", *sections, breakage=(kernel, breakage))
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"WRONG: {found}" in done.stdout
    assert "Traceback" not in done.stderr
    assert "=== micro" not in done.stdout


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
