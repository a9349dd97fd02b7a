"""Executes the project's kernels as compiled for one GPU type; prints a JSON line per case. Run it
without TRITON_INTERPRET."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from triton.backends.compiler import GPUTarget

from moe_inspect.capture.hook import kernels
from tests.aot import TARGETS, compiled, variants
from tests.ptx.cases import executions
from tests.ptx.launch import Device, executed
from tests.ptx.values import Fault, Instruction, Program


def without_barriers(program: Program) -> Program:
    def fence(ins: Instruction) -> Instruction:
        return replace(ins, opcode=("fence",)) if ins.opcode[0] == "bar" else ins

    return replace(program, instructions=tuple(fence(ins) for ins in program.instructions))


def outcome(
    check: Callable[[], None], target: GPUTarget, edit: Callable[[Program], Program] | None = None
) -> tuple[dict[str, Any], Device]:
    """What is wrong with the result ("" if nothing), the races, and what the launches did."""
    device, wrong, start = Device(target, edit=edit), "", time.process_time()
    try:
        with executed(kernels, device):
            check()
    except (AssertionError, Fault) as error:
        wrong = f"{type(error).__name__}: {str(error).strip()[:200]}"
    return {
        "wrong": wrong,
        "races": dict(device.memory.races),
        "launches": [{"kernel": s.kernel, **asdict(s.counts)} for s in device.seen],
        "seconds": round(time.process_time() - start, 2),
    }, device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gpu", choices=[gpu for gpu in TARGETS if gpu.startswith("sm_")])
    option = parser.add_argument
    option("--match", action="append", help="only cases with this regular expression")
    option("--aot", action="store_true", help="at last, a line with the variants not executed")
    option("--no-barriers", action="store_true", help="remove the barriers")
    given = parser.parse_args()
    target = GPUTarget(*TARGETS[given.gpu])
    seen = set()
    for name, check in executions():
        if given.match and not any(re.search(text, name) for text in given.match):
            continue
        row, device = outcome(check, target, without_barriers if given.no_barriers else None)
        seen |= {launch.ptx for launch in device.seen}
        print(json.dumps({"case": name, "gpu": given.gpu, **row}), flush=True)
    if given.aot:
        missing = [
            name
            for name, launch, types in variants()
            if compiled(launch, types, target).asm["ptx"] not in seen
        ]
        print(json.dumps({"not executed": missing, "gpu": given.gpu}), flush=True)


if __name__ == "__main__":
    main()
