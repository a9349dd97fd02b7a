"""Compiles kernel variants ahead of time, without a GPU, and prints one JSON line per variant:
`python -m tests.support.aot sm_90 "sm_80/3+alone"`, without TRITON_INTERPRET. /3: every third, and
+alone: those whose names this matches."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from moe_inspect.capture.hook import kernels
from tests.ptx.launch import Device, Specialised, replaced, specialised

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHAPES = ((8, 2), (60, 4), (64, 8), (256, 8), (512, 10))  # E, k
BLOCKS = (256, 512, 1024)  # every value of kernels.slots_per_program
COLUMNS = {"fp16": (2048,), "bf16": (8192, 16384)}  # of hidden sizes up to these
ROWS = 4096  # of a tape
WEIGHTS = {"fp16": (torch.float32, torch.float16), "bf16": (torch.bfloat16, torch.bfloat16)}


class Noted:
    """Stands in for a kernel, and notes what Triton would compile for each of its launches."""

    launches: list[Specialised] = []  # noqa: RUF012  of all kernels

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        device = Device(GPUTarget("cuda", 90, 32))
        return lambda *arguments, **named: self.launches.append(
            specialised(self.kernel, device, arguments, named)
        )


def variants() -> Iterator[tuple[str, Specialised]]:
    """Everything that is launched."""
    seen = set[str]()
    for names, call in calls():
        with replaced(kernels, Noted):
            Noted.launches = []
            call()
        for name, launch in zip(names, Noted.launches, strict=True):
            if name not in seen:
                seen.add(name)
                yield name, launch


Call = tuple[list[str], Callable[[], object]]  # a name for each launch; what launches


def calls() -> Iterator[Call]:
    for E, K in SHAPES:
        for kind in WEIGHTS:
            yield from _recording(E, K, kind)
        yield from _others(E, K)
    scores, tape = torch.zeros(20, 64), tape_of(64, 64, "fp16", ids=False)
    names = ["record logits E64", "advance"]
    yield names, lambda: kernels.record_triton(tape, None, scores)


def tape_of(E: int, K: int, kind: str, ids: bool = True) -> kernels.Tape:
    """A tape of no room: nothing is written."""
    state, recorded = torch.zeros(3, dtype=torch.int64), WEIGHTS[kind][1]
    ids_dtype = torch.uint8 if E < 256 else torch.int16
    return kernels.Tape(
        torch.zeros(16, dtype=ids_dtype) if ids else None,
        torch.zeros(16, dtype=recorded),
        state.clone(),
        enabled=state.int(),
        **{"lane": 1, "K": K, "experts": E, "base": ROWS * K, "rows": ROWS},
    )


def choice_of(T: int, K: int, kind: str, ids: torch.dtype = torch.int64) -> tuple[Any, Any]:
    return torch.zeros(T, K, dtype=ids), torch.zeros(T, K, dtype=WEIGHTS[kind][0])


def _recording(E: int, K: int, kind: str) -> Iterator[Call]:
    name, tape = f"E{E} k{K} {kind}", tape_of(E, K, kind)
    ids, weights = choice_of(16, K, kind)
    many = choice_of(1100 // K, K, kind)
    yield [f"record {name}", "advance"], lambda: kernels.record_triton(tape, *many)
    alone = [f"record alone E{E} k{K} {kind}"]
    yield alone, lambda: kernels.record_triton(tape, ids, weights)
    dispatch = kernels.dispatch_triton
    yield [f"dispatch 1/1 {name}"], lambda: dispatch(ids, weights, E, tape, launches=1)
    for block in BLOCKS:
        of = f"E{E} k{K} block {block}"
        for launches, scan in ((2, []), (3, [f"dispatch 2/3 E{E} k{K}"])):
            names = [f"dispatch 1/2 {name} block {block}", *scan]
            names += [f"dispatch {launches}/{launches} {of}"]
            yield names, lambda n=launches, block=block: dispatch(*many, E, tape, n, block)

    def combine(H: int, grouped: bool, measures: bool = False) -> None:
        y_SH = torch.zeros(16 * K, H, dtype=torch.bfloat16)
        places = kernels.empty_dispatch(ids, E) if grouped else None
        norms = torch.empty(ids.shape) if measures else None
        to = None if grouped else tape
        kernels.combine_triton(y_SH, ids, weights, places, torch.bfloat16, E, to, norms)

    yield [f"combine {name}"], lambda: combine(2048, True)
    yield [f"combine + record {name}"], lambda: combine(2048, False)
    for columns in COLUMNS[kind]:
        of_columns = [f"combine + norms {name} of {columns}"]
        yield of_columns, lambda H=columns: combine(H, True, measures=True)
    ids_dtype = torch.int64 if kind == "bf16" else torch.int32
    for columns, which in ((K, "without a cursor"), (K + 1, "some columns without a cursor")):
        wide = choice_of(16, columns, kind, ids_dtype)
        yield (
            [f"record {which} {name}"],
            lambda given=wide: kernels.record_triton(
                replace(tape, cursor=None), *(t[:, :K] for t in given)
            ),
        )


def _others(E: int, K: int) -> Iterator[Call]:
    of_shape = f"E{E} k{K}"
    ids, _ = choice_of(1100 // K, K, "bf16")
    off = lambda: kernels.dispatch_triton(ids[:16], None, E, launches=1)  # noqa: E731
    yield [f"dispatch 1/1 off {of_shape}"], off
    names = [f"dispatch 1/2 off {of_shape}", f"dispatch 2/2 off {of_shape}"]
    yield names, lambda: kernels.dispatch_triton(ids, None, E, None, 2, BLOCKS[-1])


def lines_of(module: str, *arguments: object) -> list[dict[str, Any]]:
    return list(map(json.loads, printed_by(module, *arguments).splitlines()))


def printed_by(module: str, *arguments: object) -> str:
    """What `python -m module` prints where kernels are compiled."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def resources(found: Any) -> dict[str, int]:
    """Registers per thread, and what was spilled: bytes on NVIDIA, registers on AMD."""
    if "cubin" not in found.asm:
        names = ("vgpr_count", "vgpr_spill_count")
        of = [re.search(rf"\.{name}:\s+(\d+)", found.asm["amdgcn"]) for name in names]
        return {"registers": int(of[0][1]), "stack": 0, "spills": int(of[1][1])}
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        output = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", output)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    return {"registers": registers, "stack": stack, "spills": local}


def main(gpu: str, every: int, also: str) -> None:
    target = GPUTarget(*TARGETS[gpu])
    for n, (name, launch) in enumerate(variants()):
        if n % every and not (also and re.match(also, name)):
            continue
        found = launch.compile(target)
        stored = re.findall(r"st\.global[.\w]*?(v\d\.\w+|b\d+)", found.asm.get("ptx", ""))
        stores = sorted(set(stored))
        row = {"kernel": name, "gpu": gpu, **resources(found), "stores": stores}
        print(json.dumps({**row, "shared_bytes": found.metadata.shared}), flush=True)


if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        gpu, _, some = wanted.partition("/")
        every, _, also = some.partition("+")
        main(gpu, int(every or 1), also)
