"""The instructions that recording adds to a decode step, counted by Valgrind: the same on a busy
machine as on an idle one, where `benchmarks.calls` needs an idle one. Cache misses are those of a
simulated processor (32 KiB of level 1, 1 MiB of level 2).

Each way of recording runs in a process of its own, all of which make the same passes. Where in
memory Python's attribute cache looks differs between them, which is some ±4,000 instructions per
layer. What is done now and then, as handing passes over, is left out.

    python -m benchmarks.instructions [--passes 6] [--case NAME ...] [--way NAME ...] [-o FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.calls import ALLOCATOR, CASES, RECIPE, WAYS
from benchmarks.measuring import ROOT, machine, write_results
from moe_inspect.capture import hand_over

VALGRIND = (
    "valgrind",
    "--tool=callgrind",
    "--callgrind-out-file=/dev/null",
    "--instr-atstart=no",
    "--cache-sim=yes",
    "--I1=32768,8,64",
    "--D1=32768,8,64",
    "--LL=1048576,16,64",
)
WARM_UP = 8  # passes


def run(case: str, way: str, passes: int) -> None:
    """The passes of one way of recording, of which Valgrind counts the last ones."""
    torch.set_num_threads(1)
    hand_over.HELD_SECONDS = float("inf")
    make, passes_of, _ = CASES[case]
    model = make()

    def count(on: str) -> None:
        control = ["callgrind_control", "-i", on, str(os.getpid())]
        subprocess.run(control, check=True, stdout=subprocess.DEVNULL)

    with (
        torch.inference_mode(),
        tempfile.TemporaryDirectory() as scratch,
        WAYS[way](model, Path(scratch) / "trace"),
    ):
        once = passes_of(model, way == RECIPE)
        for _ in range(WARM_UP):
            once()
        count("on")
        for _ in range(passes):
            once()
        count("off")


def counted(case: str, way: str, passes: int) -> dict[str, float]:
    """Per pass: instructions, and misses of both levels of the caches."""
    program = f"from benchmarks.instructions import run; run({case!r}, {way!r}, {passes})"
    done = subprocess.run(
        [*VALGRIND, sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    events, values = (
        re.search(rf"{name} *: (.+)", done.stderr)[1].split()  # type: ignore[index]
        for name in ("Events", "Collected")
    )
    of = {event: int(value) / passes for event, value in zip(events, values, strict=True)}
    return {
        "instructions": of["Ir"],
        "level_1_misses": of["I1mr"] + of["D1mr"] + of["D1mw"],
        "level_2_misses": of["ILmr"] + of["DLmr"] + of["DLmw"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--passes", type=int, default=6)
    parser.add_argument("--case", action="append", choices=list(CASES), help="default: decode")
    parser.add_argument("--way", action="append", choices=list(WAYS), help="besides untraced")
    parser.add_argument("-o", "--output", type=Path)
    asked = parser.parse_args()
    ways = ["untraced", *(way for way in asked.way or WAYS if way != "untraced")]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for case in asked.case or [case for case in CASES if case.startswith("decode")]:
        layers, of_case = CASES[case][2], found.setdefault(case, {})
        print(f"\n{case}: beyond untraced, per layer\n{'':24s}", end="")
        print(f"{'instructions':>16s}{'%':>8s}{'misses, level 1':>18s}{'level 2':>10s}", flush=True)
        for way in ways:
            of_case[way] = counted(case, way, asked.passes)
            plain = of_case["untraced"]
            more, level_1, level_2 = (of_case[way][k] - plain[k] for k in plain)
            print(
                f"{way:24s}{more / layers:+16,.0f}{more / plain['instructions']:+8.2%}"
                f"{level_1 / layers:+18.0f}{level_2 / layers:+10.0f}",
                flush=True,
            )
    facts = {
        **machine(),
        "command": "python -m benchmarks.instructions",
        "passes": asked.passes,
        "allocator": ALLOCATOR,
    }
    if asked.output is None:
        print(f"\nwritten to {write_results('instructions', facts, found)}")
        return
    asked.output.write_text(json.dumps({"machine": facts, "measured": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
