"""Executes the project's kernels as compiled for one GPU type; prints a JSON line per case. Run it
without TRITON_INTERPRET."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget

from moe_inspect.capture.hook import kernels
from tests.ptx.launch import Device, executed
from tests.ptx.values import Fault, Instruction, Program
from tests.support.aot import BLOCKS, COLUMNS, SHAPES, TARGETS, variants
from tests.support.kernel_reference import (
    Case,
    check_dispatch,
    check_norms,
    check_record,
    choice,
    tape_for,
)

TAPES = ("beyond its part", "disabled", "behind others", "from the first row")
SKEWS = ("uniform", "zipf", "one-hot")
WEIGHTS = {"fp16": "float32 as float16", "bf16": "bfloat16"}
H = 48


Execution = tuple[str, Callable[[], None]]  # its name; what launches, and compares


def executions() -> Iterator[Execution]:
    for E, K in SHAPES:
        for weights in WEIGHTS:
            yield from _of_shape(E, K, weights)
        off = _case(E, K, 90 // K, "none", launches=1, tape="none")
        yield _dispatch(f"dispatch 1/1 off E{E} k{K}", off)
        off = _case(E, K, 1100 // K, "none", launches=2, tape="none", block=1024)
        yield _dispatch(f"dispatch 2 off E{E} k{K}", off)
    yield "record logits E64", _check_logits


def _of_shape(E: int, K: int, weights: str) -> Iterator[Execution]:
    name, kind = f"E{E} k{K} {weights}", WEIGHTS[weights]
    yield _dispatch(f"dispatch 1/1 {name}", _case(E, K, 250 // K, kind, launches=1))
    for launches in (2, 3):
        for n, block in enumerate(BLOCKS):
            # two programs, of which the second has less to do
            case = _case(E, K, (block + 100) // K, kind, launches=launches, block=block, turn=n)
            yield _dispatch(f"dispatch {launches} {name} block {block}", case)
    for T, kernel in ((1100 // K, "record"), (130 // K, "record alone")):
        case = _case(E, K, T, kind)
        if case.skew == "zipf":  # whose ids are columns of wider tensors: executed below
            case = replace(case, skew="uniform")
        yield f"{kernel} {name}", lambda case=case: check_record(case, kernels.record_triton)
    for grouped in (True, False):
        of = _case(E, K, 9, kind, turn=int(grouped)), grouped
        recording = "" if grouped else "+ record "
        yield f"combine {recording}{name}", lambda of=of: check_combine(*of)
    ids = torch.int64 if weights == "bf16" else torch.int32
    for skew, which in (("uniform", "without a cursor"), ("zipf", "some columns without a cursor")):
        case = replace(_case(E, K, 1100 // K, kind, tape="without a cursor"), ids=ids, skew=skew)
        yield f"record {which} {name}", lambda case=case: check_record(case, kernels.record_triton)
    for columns in COLUMNS[weights]:
        of = _case(E, K, 2, kind), True, columns // 2 + 16
        yield f"combine + norms {name} of {columns}", lambda of=of: check_combine(*of, norms=True)


def _case(E: int, K: int, T: int, weights: str, turn: int = 0, **how: Any) -> Case:
    """Tapes and skews change from case to case."""
    turn += E // 4 + how.get("launches", 0) + (weights == "bfloat16")
    how = {"launches": None, "tape": TAPES[turn % len(TAPES)], **how}
    of = {"skew": SKEWS[turn % len(SKEWS)], "ids": torch.int64, "invalid_ids": True}
    return Case(E, K, max(1, T), weights=weights, **of, **how)


def _dispatch(name: str, case: Case) -> Execution:
    how = {"launches": case.launches, "block": case.block}
    return name, lambda: check_dispatch(case, lambda *of: kernels.dispatch_triton(*of, **how))


def _check_logits() -> None:
    """A tape that holds scores alone."""
    case = _case(64, 64, 20, "float32 as float16", tape="behind others")
    _, scores = choice(case)
    tapes = [tape_for(case) for _ in range(2)]
    for tape, record in zip(tapes, (kernels.record_triton, kernels.record_torch), strict=True):
        object.__setattr__(tape, "ids", None)
        record(tape, None, scores)
    assert torch.equal(tapes[0].weights, tapes[1].weights)
    assert torch.equal(tapes[0].cursor, tapes[1].cursor)


def check_combine(case: Case, grouped: bool, H: int = H, norms: bool = False) -> None:
    """Against the same sums in float32, in the order of the slots: exactly equal. `norms`: and the
    norms of the rows."""
    ids, weights = choice(case)
    y_SH = torch.randn(case.T * case.K, H, generator=torch.Generator().manual_seed(case.T))
    y_SH = y_SH.bfloat16()
    places = kernels.dispatch_torch(ids, None, case.E) if grouped else None
    tape = None if grouped else tape_for(case)
    norms_TK = torch.empty(ids.shape) if norms else None
    how = torch.bfloat16, case.E, tape, norms_TK
    found = kernels.combine_triton(y_SH, ids, weights, places, *how)
    rows = y_SH if places is None else y_SH[places.inverse.long()]
    rows = rows.view(case.T, case.K, H).float()
    if grouped:  # places without an expert count as zero
        rows[(ids < 0) | (ids >= case.E)] = 0
    if norms_TK is not None:
        check_norms(norms_TK, rows.double())
    total = torch.zeros(case.T, H)
    for k in range(case.K):
        product = rows[:, k] * weights[:, k : k + 1].float()
        total += product.bfloat16().float() if weights.dtype == torch.bfloat16 else product
    assert torch.equal(found, total.bfloat16())
    if tape is not None:
        expected = tape_for(case)
        kernels.record_torch(expected, ids, weights)
        for name in ("ids", "weights", "cursor"):
            assert torch.equal(getattr(tape, name), getattr(expected, name)), name


def without_barriers(program: Program) -> Program:
    def fence(ins: Instruction) -> Instruction:
        return replace(ins, opcode=("fence",)) if ins.opcode[0] == "bar" else ins

    return replace(program, instructions=tuple(map(fence, program.instructions)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gpu", choices=[gpu for gpu in TARGETS if gpu.startswith("sm_")])
    option = parser.add_argument
    option("--match", action="append", help="only cases with this regular expression")
    option("--aot", action="store_true", help="at last, a line with the variants not executed")
    option("--no-barriers", action="store_true", help="remove the barriers")
    given = parser.parse_args()
    target, edit = GPUTarget(*TARGETS[given.gpu]), without_barriers if given.no_barriers else None
    seen = set()
    for name, check in executions():
        if given.match and not any(re.search(text, name) for text in given.match):
            continue
        device, wrong, start = Device(target, edit=edit), "", time.process_time()
        try:
            with executed(kernels, device):
                check()
        except (AssertionError, Fault) as error:
            wrong = f"{type(error).__name__}: {str(error).strip()[:200]}"
        seen |= {launch.ptx for launch in device.seen}
        launches = [{"kernel": s.kernel, **asdict(s.counts)} for s in device.seen]
        row = {"case": name, "gpu": given.gpu, "wrong": wrong, "launches": launches}
        row |= {"races": device.memory.races, "seconds": round(time.process_time() - start, 2)}
        print(json.dumps(row), flush=True)
    if given.aot:
        missing = [
            name for name, launch in variants() if launch.compile(target).asm["ptx"] not in seen
        ]
        print(json.dumps({"not executed": missing, "gpu": given.gpu}), flush=True)


if __name__ == "__main__":
    main()
