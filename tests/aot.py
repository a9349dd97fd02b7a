"""Compiles kernel variants ahead of time for GPU types, which needs no GPU, and prints one JSON
line per variant: `python -m tests.aot sm_90 sm_80/3`, without TRITON_INTERPRET. /3: every third."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
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
BLOCKS = (256, 512, 1024)  # every value of kernels.slots_per_program
COLUMNS = {"fp16": (2048,), "bf16": (8192, 16384)}  # of hidden sizes up to these
PAGE_ROWS = 4096
# name, kernel, types (an ":16" marks a multiple of 16), constants, options
Variant = tuple[str, Any, dict[str, Any], dict[str, Any], dict[str, int]]
NUMBERS = ("T", "E", "H", "blocks", "lane", "base", "page_values", "ring_rows")
# multiples of 16 by construction (H: in the models there are)
ALIGNED = ("base", "page_values", "ring_rows", "H")
WIDE = ("cursor", "dropped", "limit", "ids")  # int64; what is not named here is int32


def tape_types(ids: str | None, weights: str | None) -> kernels.TapeArguments:
    """The types of a tape's fields; P, and what is None, are constants."""
    fields = {name: type_of(name) for name in kernels.TapeArguments._fields}
    given = {"ids": ids or "constexpr", "weights": weights or "constexpr", "P": "constexpr"}
    return kernels.TapeArguments(**{**fields, **given})


def type_of(name: str) -> str:
    return "i32" if name in NUMBERS else "*i64" if name in WIDE else "*i32"


NO_SIZES = {"norms": None, "peaks": None}
NO_TAPE = kernels.TapeArguments(*("constexpr",) * len(kernels.TapeArguments._fields))


def variants() -> Iterator[Variant]:
    """Everything that is launched."""
    for E, K in SHAPES:
        number = {"E": "i32" if E % 16 else "i32:16"}
        for name, kernel, types, constants, options in _variants_of(E, K):
            yield name, kernel, {**number, **types}, constants, options
    logits = tape_types(None, "*fp16")
    yield (
        "record logits E64",
        kernels._record_kernel,
        {"weights": "*fp32", "tape": logits, "E": "i32:16"},
        {"BLOCK": kernels.RECORD_BLOCK, "K": 64, "ALONE": False, "ids": None},
        kernels.REGISTERS,
    )
    yield "advance", kernels._advance_kernel, {"tape": logits}, {}, {"num_warps": 1}


def _variants_of(E: int, K: int) -> Iterator[Variant]:
    block, one = {"BLOCK": kernels.RECORD_BLOCK}, {"BLOCK": kernels.ONE_LAUNCH}
    shape = {"K": K, "BINS": max(16, triton.next_power_of_2(E))}
    chunk, ranking = {"CHUNK": kernels.ranking_chunk(shape["BINS"])}, kernels.RANKING
    ids = "*u8" if E < 256 else "*i16"
    off = {"tape": NO_TAPE}
    for weight in ("fp16", "bf16"):
        weights = {"weights": "*fp32" if weight == "fp16" else "*bf16"}
        taped = {**weights, "tape": tape_types(ids, "*" + weight)}
        name = f"E{E} k{K} {weight}"
        yield (
            f"record {name}",
            kernels._record_kernel,
            taped,
            {**block, "K": K, "ALONE": False},
            kernels.REGISTERS,
        )
        yield (
            f"dispatch 1/1 {name}",
            kernels._one_kernel,
            taped,
            {**shape, **one, **chunk},
            ranking,
        )
        for size in BLOCKS:
            yield (
                f"dispatch 1/2 {name} block {size}",
                kernels._count_kernel,
                taped,
                {**shape, "BLOCK": size},
                {"num_warps": kernels.record_warps(size)},
            )
        y = {"y": "*bf16", "out": "*bf16"}
        combine = {**block, "ROUND": weight == "bf16", "COLUMNS": 1024, "K": K}
        yield (
            f"combine {name}",
            kernels._combine_kernel,
            {**weights, **off, **y},
            {**combine, **NO_SIZES},
            {},
        )
        yield (
            f"combine + record {name}",
            kernels._combine_kernel,
            {**taped, **y},
            {**combine, **NO_SIZES, "inverse": None, "offsets": None},
            {},
        )
        for columns in COLUMNS[weight]:
            measured = {"norms": "*fp32", "peaks": "*fp32"}
            yield (
                f"combine + sizes {name} of {columns}",
                kernels._combine_kernel,
                {**weights, **off, **y, **measured},
                {**combine, "COLUMNS": columns},
                {"num_warps": kernels.combine_warps(columns)},
            )
    name, rows = f"E{E} k{K}", {"ROWS": max(1, min(64, 1024 // shape["BINS"]))}
    yield (
        f"record alone {name}",
        kernels._record_kernel,
        taped,
        {**block, "K": K, "ALONE": True},
        kernels.REGISTERS,
    )
    unweighted = {"weights": None}
    yield (
        f"dispatch 1/1 off {name}",
        kernels._one_kernel,
        off,
        {**shape, **one, **chunk, **unweighted},
        ranking,
    )
    yield (
        f"dispatch 1/2 off {name}",
        kernels._count_kernel,
        off,
        {**shape, **block, **unweighted},
        {},
    )
    for scanned in (False, True):
        for size in BLOCKS:
            yield (
                f"dispatch {'3/3' if scanned else '2/2'} {name} block {size}",
                kernels._scatter_kernel,
                taped,
                {**shape, **chunk, **rows, "BLOCK": size, "SCANNED": scanned},
                ranking,
            )
    yield f"dispatch 2/3 {name}", kernels._scan_kernel, {}, {"ROWS": 64, "COLUMNS": 16}, {}


def compiled(
    kernel: Any,
    types: dict[str, Any],
    constants: dict[str, Any],
    target: GPUTarget,
    options: dict[str, int],
) -> Any:
    """`kernel` for one GPU. `types`: of its arguments, of a tape a tuple; `constants`: by name."""
    signature: dict[str, Any] = {}
    attributes = {}
    values: dict[Any, Any] = dict(constants)
    for i, name in enumerate(kernel.arg_names):
        kind = "constexpr" if name in constants else types.get(name, type_of(name))
        signature[name] = kind.removesuffix(":16") if isinstance(kind, str) else kind
        fields = zip(kind._fields, kind, strict=True) if name == "tape" else ((name, kind),)
        for n, (field, of) in enumerate(fields):
            path = (i, n) if name == "tape" else (i,)
            if of[0] == "*" or of.endswith(":16") or (field in ALIGNED and of != "constexpr"):
                attributes[path] = [["tt.divisibility", 16]]
            if name == "tape" and of == "constexpr":
                values[path] = PAGE_ROWS if field == "P" and kind is not NO_TAPE else None
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    return triton.compile(
        source, target=target, options={"num_warps": 4, "enable_fp_fusion": False, **options}
    )


def resources(found: Any) -> dict[str, int]:
    """Registers per thread, and what was spilled: stack and local bytes on NVIDIA, registers on
    AMD."""
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
        output = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", output)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    return {"registers": registers, "stack": stack, "spills": local}


def main(gpu: str, every: int = 1) -> None:
    backend, arch, warp = TARGETS[gpu]
    target = GPUTarget(backend, arch, warp)
    for name, kernel, types, constants, options in islice(variants(), 0, None, every):
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
    for wanted in sys.argv[1:]:
        gpu, _, every = wanted.partition("/")
        main(gpu, int(every or 1))
