"""Compiles every kernel variant ahead of time for one GPU, which needs no GPU; prints a JSON line
each. Run as a program: the interpreter must be off."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe_inspect.capture.hook import kernels

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHAPES = ((8, 2), (60, 4), (64, 8), (256, 8), (512, 10))  # E, k
BLOCKS = (256, 512, 1024)  # every value of kernels.slots_a_program
NUMBERS = ("T", "E", "H", "blocks", "lane", "base", "page_values", "pages")
ALIGNED = (
    "base",
    "page_values",
    "H",
)  # multiples of 16 by construction (H: in the models there are)


def variants() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """(name, kernel, types, constants, options) of everything that is launched."""
    for E, K in SHAPES:
        ids = "*u8" if E < 256 else "*i16"
        for weight in ("fp16", "bf16"):
            types = {
                "ids": "*i64",
                "weights": "*fp32" if weight == "fp16" else "*bf16",
                "tape_ids": ids,
                "tape_weights": "*" + weight,
            }
            tape = {"P": 4096, "MARK": 255 if E < 256 else -1, "IDS": True, "WEIGHTS": True}
            shape = {"K": K, "BINS": max(16, triton.next_power_of_2(E))}
            block, chunk = {"BLOCK": kernels.RECORD_BLOCK}, {"CHUNK": kernels.CHUNK}
            one, ranking = {"BLOCK": kernels.ONE_LAUNCH}, kernels.RANKING
            name = f"E{E} k{K} {weight}"
            yield (
                f"record {name}",
                kernels._record_kernel,
                types,
                {**tape, **block, "K": K, "ALONE": False},
                kernels.REGISTERS,
            )
            yield (
                f"dispatch 1/1 {name}",
                kernels._one_kernel,
                types,
                {**shape, **tape, **one, **chunk},
                ranking,
            )
            for size in BLOCKS:
                warps = {"num_warps": kernels.recording_warps(size)}
                yield (
                    f"dispatch 1/2 {name} block {size}",
                    kernels._count_kernel,
                    types,
                    {**shape, **tape, "BLOCK": size},
                    warps,
                )
            grouped = {"GROUPED": True, "ROUND": weight == "bf16", "COLUMNS": 1024}
            y = {"y": "*bf16", "out": "*bf16"}
            off = {"P": 16, "MARK": 0, "IDS": False, "WEIGHTS": False}
            yield (
                f"combine {name}",
                kernels._combine_kernel,
                {**types, **y},
                {**off, **block, **grouped, "K": K},
                {},
            )
            few = {**grouped, "GROUPED": False}
            yield (
                f"combine + record {name}",
                kernels._combine_kernel,
                {**types, **y},
                {**tape, **block, **few, "K": K},
                {},
            )
        name, rows = f"E{E} k{K}", {"ROWS": max(1, min(64, 4096 // shape["BINS"]))}
        yield (
            f"record alone {name}",
            kernels._record_kernel,
            types,
            {**tape, **block, "K": K, "ALONE": True},
            kernels.REGISTERS,
        )
        yield (
            f"dispatch 1/1 off {name}",
            kernels._one_kernel,
            types,
            {**shape, **off, **one, **chunk},
            ranking,
        )
        yield (
            f"dispatch 1/2 off {name}",
            kernels._count_kernel,
            types,
            {**shape, **off, **block},
            {},
        )
        for scanned in (False, True):
            for size in BLOCKS:
                constants = {
                    **shape,
                    **chunk,
                    **rows,
                    "BLOCK": size,
                    "SCANNED": scanned,
                    "ADVANCE": True,
                }
                yield (
                    f"dispatch {'3/3' if scanned else '2/2'} {name} block {size}",
                    kernels._scatter_kernel,
                    types,
                    constants,
                    ranking,
                )
        yield f"dispatch 2/3 {name}", kernels._scan_kernel, types, {"ROWS": 64, "COLUMNS": 16}, {}
    logits = {"weights": "*fp32", "tape_weights": "*fp16"}
    off = {"P": 4096, "MARK": 0, "IDS": False, "WEIGHTS": True, "ALONE": False}
    yield (
        "record logits E64",
        kernels._record_kernel,
        logits,
        {**off, "K": 64, "BLOCK": kernels.RECORD_BLOCK},
        kernels.REGISTERS,
    )
    yield "advance", kernels._advance_kernel, {}, {}, {"num_warps": 1}


def compiled(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    target: GPUTarget,
    options: dict[str, int],
) -> Any:
    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in NUMBERS:
            return "i32"
        return types.get(
            name, "*i64" if name in ("cursor", "dropped", "limit", "ids", "weights") else "*i32"
        )

    signature = {name: type_of(name) for name in kernel.arg_names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in ALIGNED
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(
        source, target=target, options={"num_warps": 4, "enable_fp_fusion": False, **options}
    )


def resources(found: Any) -> dict[str, int]:
    """Registers a thread, and what of them lies in memory: stack and local bytes on NVIDIA, spilled
    registers on AMD."""
    if "cubin" not in found.asm:
        asm = found.asm["amdgcn"]
        registers, spills = (
            int(re.search(rf"\.{name}:\s+(\d+)", asm)[1])
            for name in ("vgpr_count", "vgpr_spill_count")
        )
        return {"registers": registers, "stack": 0, "spills": spills}
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        said = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", said)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    return {"registers": registers, "stack": stack, "spills": local}


def main(gpu: str) -> None:
    backend, arch, warp = TARGETS[gpu]
    target = GPUTarget(backend, arch, warp)
    for name, kernel, types, constants, options in variants():
        found = compiled(kernel, types, constants, target, options)
        stores = sorted(
            set(re.findall(r"st\.global[.\w]*?(v\d\.\w+|b\d+)", found.asm.get("ptx", "")))
        )
        print(
            json.dumps(
                {
                    "kernel": name,
                    "gpu": gpu,
                    **resources(found),
                    "shared_bytes": found.metadata.shared,
                    "stores": stores,
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1])
