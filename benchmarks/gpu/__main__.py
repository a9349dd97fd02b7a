"""`python -m benchmarks.gpu`: what recording costs on this machine's CUDA GPU, in at most nine
minutes. Prints tables, the last one of targets; writes every raw figure to
benchmarks/results/gpu-<card>.json. Ends with 1 where anything recorded or computed is wrong.

`--dry-run` goes through the same code at toy size on the CPU, the kernels in Triton's interpreter,
so that no branch runs for the first time on a rented machine. Its figures mean nothing.

Rivals take turns within a round and are compared round by round (a ratio is the median over
rounds): a card's clock drifts. T tokens, K slots, S = T·K, E experts, H hidden, B sequences.
"""

# ruff: noqa: E402 (the interpreter is chosen before triton is imported)
from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton looks when it is imported
NEEDED = ("torch", "triton", "transformers", "numpy", "pyarrow", "pandas", "rich", "matplotlib")
if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    sys.exit(
        f"missing here: {', '.join(missing)}; install with: python -m pip install "
        f"{' '.join(missing)}"
    )

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.ceilings import ceilings
from benchmarks.gpu.correctness import correctness
from benchmarks.gpu.decode import decode
from benchmarks.gpu.devices import Cpu, Cuda
from benchmarks.gpu.engine import engine
from benchmarks.gpu.graphs import graphs
from benchmarks.gpu.micro import micro
from benchmarks.gpu.models import models
from benchmarks.gpu.sizes import DRY, FULL, Sizes
from benchmarks.gpu.writer import writer
from benchmarks.measuring import RESULTS
from moe_inspect.capture import hand_over
from moe_inspect.capture.hook import experts, kernels

# A section's seconds: what one leaves over the next may use. Within them it starts no new
# measurement when they are up; GRACE_S later it is interrupted. 470 s, the grace, and some 20 s to
# import and to write are nine minutes.
SECTIONS: dict[str, tuple[Callable[[Bench], None], float]] = {
    "ceilings": (ceilings, 10.0),
    "correctness": (correctness, 120.0),
    "micro": (micro, 50.0),
    "decode": (decode, 50.0),
    "engine": (engine, 20.0),
    "models": (models, 130.0),
    "graphs": (graphs, 65.0),
    "writer": (writer, 25.0),
}
GRACE_S = 30.0
WARNING = "DRY RUN ON A CPU, AT TOY SIZE: THE FIGURES MEAN NOTHING"


class TimeIsUp(BaseException):
    """Not an Exception, so that no section goes on after it."""


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    def end(*_: object) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(0.001, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def machine(device: Any, arguments: Sequence[str]) -> dict[str, Any]:
    return {
        **device.card(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in NEEDED},
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *arguments]),
    }


def print_targets(targets: Sequence[tuple[str, float, str, str]]) -> None:
    print(f"\n=== targets\n{'':<100}{'measured':>10}")
    for what, value, bar, verdict in targets:
        print(f"{what:<100}{value:>10.3f}   {bar:<8} {verdict}")
    print(f"{sum(t[3] == 'yes' for t in targets)} of {len(targets)} met")


def options_of(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=(__doc__ or "").partition("\n\n")[0],
        allow_abbrev=False,
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="on the CPU, at toy size: only to find out whether all of it runs",
    )
    parser.add_argument(
        "--only", action="append", choices=SECTIONS, help="this section (repeatable)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="where the JSON goes; default: benchmarks/results/gpu-<card>.json, in a dry run none",
    )
    parser.add_argument("--sanitized", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not (options.dry_run or torch.cuda.is_available()):
        parser.error("no CUDA GPU here (--dry-run needs none)")
    return options


def sizes_of(options: argparse.Namespace) -> Sizes:
    sizes = DRY if options.dry_run else FULL
    if not options.sanitized:
        return sizes
    few = {"T": (8, 512), "routers": sizes.routers[:2]}
    if options.dry_run:
        few = {"T": DRY.T[-1:], "routers": DRY.routers[-1:]}
    return replace(sizes, **few, blocks=(256,), repeats=1)


def run(name: str, bench: Bench) -> dict[str, Any]:
    """The figures of a section, which fails or is interrupted without ending the others."""
    section, _ = SECTIONS[name]
    print(f"\n=== {name}: {section.__doc__}", flush=True)
    started = time.perf_counter()
    # a dry run leaves nothing out
    limit = nullcontext() if bench.device.dry else interrupted_after(bench.seconds_left + GRACE_S)
    try:
        with limit, torch.no_grad():
            section(bench)
    except TimeIsUp:
        print(f"CUT, interrupted: {name}")
        bench.cut.append(f"the rest of {name}, which was interrupted")
    except Exception as error:
        traceback.print_exc()
        bench.failures.append(f"{name}: {type(error).__name__}: {error}")
    print(f"({name} took {time.perf_counter() - started:.0f} s)", flush=True)
    return bench.figures


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = options_of(arguments)
    device = Cpu() if options.dry_run else Cuda()
    if options.dry_run:
        print(WARNING)
        torch.set_num_threads(1)
        hand_over.HELD_ROWS = 64
    experts.register()
    facts = machine(device, arguments)
    said = {k: v for k, v in {**facts, **facts["versions"]}.items() if isinstance(v, str)}
    print(", ".join(f"{name} {value}" for name, value in said.items()))
    out = options.out
    if out is None and not options.dry_run:
        card = "-".join("".join(c if c.isalnum() else " " for c in facts["card"].lower()).split())
        out = RESULTS / f"gpu-{card}.json"
    whole: dict[str, Any] = {"machine": facts, "targets": [], "failures": [], "cut": []}
    whole["sections"] = {}
    deadline = time.perf_counter()
    for name, (_, seconds) in SECTIONS.items():
        if options.only and name not in options.only:
            continue
        deadline += seconds
        if options.dry_run:  # interpreted, a model is no faster than the slowed writer
            kernels.runs_triton = lambda tensor, interpreted=name != "writer": interpreted
        bench = Bench(
            device,
            sizes_of(options),
            options.sanitized,
            float("inf") if options.dry_run else deadline,
            {},
            whole["failures"],
            whole["targets"],
            whole["cut"],
        )
        whole["sections"][name] = run(name, bench)
        if out is not None and not options.sanitized:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
        if name == "correctness" and whole["failures"]:
            print("nothing else is measured: times of kernels that are wrong mean nothing")
            break
    print_targets(whole["targets"])
    print(f"left out for want of time: {', '.join(whole['cut']) or 'nothing'}")
    print(f"WRONG: {len(whole['failures'])}" + "".join(f"\n  {what}" for what in whole["failures"]))
    print(WARNING if options.dry_run else f"written to {out}")
    return 1 if whole["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
