"""`python -m benchmarks.kernels`: what the compiled kernels do, counted by executing their PTX in
NumPy (tests/ptx), without a GPU: the instructions of all warps, the barriers that a warp meets, the
32-byte sectors of global memory moved against those that must be, and conflicts between the banks
of shared memory. Nothing here is a time.

Writes benchmarks/results/kernels.json; `-o` another file, `--before FILE` prints the counts in FILE
beside the new ones.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # Triton looks when it is imported

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import RESULTS
from moe_inspect.capture.hook import kernels
from tests.ptx.launch import Device, executed
from tests.support.aot import TARGETS, GPUTarget
from tests.support.kernel_reference import Case, choice, tape_for

SHAPES = (  # E, k, T
    (8, 2, 4096),
    (64, 8, 8),
    (64, 8, 256),
    (64, 8, 4096),
    (256, 8, 2048),
    (512, 10, 512),
)
HIDDEN = 2048


def case(E: int, K: int, T: int) -> Case:
    return Case(E, K, T, "zipf", None, torch.int64, "bfloat16", "behind others", False)


def calls(E: int, K: int, T: int) -> dict[str, Callable[[], object]]:
    of = case(E, K, T)
    ids, weights = choice(of)
    assert weights is not None
    plan = kernels.dispatch_plan(ids.numel(), E)
    few = min(T, 16)  # of the kernel that sums a token's experts, all programs do the same
    y = torch.zeros(few * K, HIDDEN, dtype=torch.bfloat16)
    grouped = kernels.dispatch_torch(ids[:few], None, E)
    return {
        "record": lambda: kernels.record_triton(tape_for(of), ids, weights),
        "dispatch": lambda: kernels.dispatch_triton(ids, weights, E, tape_for(of), *plan),
        "combine": lambda: kernels.combine_triton(
            y, ids[:few], weights[:few], grouped, torch.bfloat16, E
        ),
    }


def count(gpu: str, shapes: Iterable[tuple[int, int, int]]) -> list[dict[str, Any]]:
    rows = []
    for E, K, T in shapes:
        for call, run in calls(E, K, T).items():
            with executed(kernels, Device(GPUTarget(*TARGETS[gpu]))) as device:
                run()
            slots = K * (min(T, 16) if call == "combine" else T)
            for name, _, counts in device.seen:
                moved = counts.sectors_read + counts.sectors_written
                rows.append(
                    {
                        "E": E,
                        "k": K,
                        "slots": slots,
                        "call": call,
                        "kernel": name.removeprefix("_").removesuffix("_kernel"),
                        "instructions": counts.instructions,
                        "per slot": round(counts.instructions / slots, 2),
                        "per warp": round(counts.instructions / counts.warps, 1),
                        "barriers": round(counts.barriers, 1),
                        "sectors": moved,
                        "÷ least": round(moved / counts.least_sectors, 2),
                        "bank conflicts per slot": round(counts.bank_conflicts / slots, 2),
                    }
                )
    return rows


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["E"], row["k"], row["slots"], row["call"], row["kernel"]


def show(rows: list[dict[str, Any]], before: list[dict[str, Any]]) -> None:
    old = {key(row): row for row in before}
    table = Table(*rows[0], title="before → now" if old else None)
    for row in rows:
        was = old.get(key(row), row)
        table.add_row(*(f"{was[n]} → {row[n]}" if was[n] != row[n] else str(row[n]) for n in row))
    Console(width=180).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", default="sm_90", choices=[g for g in TARGETS if g[:3] == "sm_"])
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "kernels.json")
    parser.add_argument("--before", type=Path)
    parser.add_argument("--shape", type=int, nargs=3, action="append", metavar=("E", "K", "T"))
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = count(given.gpu, given.shape or SHAPES)
    facts = {"gpu": given.gpu, **{name: version(name) for name in ("triton", "torch", "numpy")}}
    given.output.write_text(json.dumps({"compiled": facts, "counted": rows}, indent=1) + "\n")
    show(rows, json.loads(given.before.read_text())["counted"] if given.before else [])


if __name__ == "__main__":
    main()
