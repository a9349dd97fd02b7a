"""Compiles kernel variants ahead of time, without a GPU, and prints one JSON line per variant:
`python -m tests.support.aot sm_90 "sm_80/3+rows"`, without TRITON_INTERPRET. /3: every third, and
+rows: those whose names this matches."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe_inspect.capture.engine import rows
from moe_inspect.capture.hook import kernels
from moe_inspect.capture.hook.launch import Launch

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
# name, launch, types (an ":16" marks a multiple of 16; None: absent)
Variant = tuple[str, Launch, dict[str, Any]]
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


NO_TAPE = kernels.TapeArguments(*("constexpr",) * len(kernels.TapeArguments._fields))
OFF = {"tape": NO_TAPE, "weights": None}
IN_ORDER = {"inverse": None, "offsets": None}
NO_SIZES = {"norms": None, "peaks": None}
KEPT = {"to_ids": "*i16", "to_weights": "*fp16", "physicals": None, "to_physicals": None}
REPLICAS = {"physicals": "*i16", "to_physicals": "*i16"}
TAKEN = {**KEPT, "ids": "*i16", "weights": "*fp16", "picked": "*i64"}
TAKEN |= {"positions": "*i64", "rows": "i32:16", "counted": "i32", "m": "i32", "sums": "*i64"}
ABSENT = ("weights", "picked", "tokens", "positions")
ABSENT += ("to_tokens", "to_positions", "to_ids", "to_weights")
COUNTED = {**TAKEN, **dict.fromkeys(ABSENT)}


def variants() -> Iterator[Variant]:
    """Everything that is launched."""
    for E, K in SHAPES:
        number = {"E": "i32" if E % 16 else "i32:16"}
        for name, launch, types in _variants_of(E, K):
            yield name, launch, {**number, **types}
    logits = {"weights": "*fp32", "tape": tape_types(None, "*fp16"), "ids": None}
    yield "record logits E64", kernels._record_launch(64, False), {"E": "i32:16", **logits}
    yield "advance", kernels._advance_launch(), logits


def _variants_of(E: int, K: int) -> Iterator[Variant]:
    ids, of_shape = "*u8" if E < 256 else "*i16", f"E{E} k{K}"
    taped: dict[str, Any] = {}
    for kind, given in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        weight, own = ("bf16", "*bf16") if kind == torch.bfloat16 else ("fp16", "*fp32")
        taped = {"weights": own, "tape": tape_types(ids, "*" + weight)}
        name = f"{of_shape} {weight}"
        yield f"record {name}", kernels._record_launch(K, False), taped
        yield f"dispatch 1/1 {name}", kernels._one_launch(K, E, kernels.ONE_LAUNCH), taped
        for size in BLOCKS:
            yield f"dispatch 1/2 {name} block {size}", kernels._count_launch(K, E, size), taped
        y = {"y": "*bf16", "out": "*bf16"}
        combine = functools.partial(kernels._combine_launch, K, y=torch.bfloat16, weights=given)
        one = combine(columns=kernels.COMBINE_COLUMNS)
        yield f"combine {name}", one, {**taped, **y, "tape": NO_TAPE, **NO_SIZES}
        yield f"combine + record {name}", one, {**taped, **y, **NO_SIZES, **IN_ORDER}
        for columns in COLUMNS[weight]:
            measured = {**taped, **y, "tape": NO_TAPE, "norms": "*fp32", "peaks": "*fp32"}
            yield f"combine + sizes {name} of {columns}", combine(columns=columns), measured
        router = {**KEPT, "weights": own, "ids": "*i64" if weight == "bf16" else "*i32"}
        yield f"rows kept {name}", rows._keep_launch(K, K, K, K), router
        replicas = {**router, **REPLICAS, "physicals": router["ids"]}
        yield f"rows kept {name}, replicas", rows._keep_launch(K, K, K, K), replicas
    ids_alone = {**KEPT, "ids": "*i64", "weights": None, "to_weights": None}
    yield f"rows kept {of_shape}, ids alone", rows._keep_launch(K, K, K, K), ids_alone
    for name, types in (("taken", TAKEN), ("counted", COUNTED), ("replicas", TAKEN | REPLICAS)):
        yield f"rows {name} {of_shape}", rows._take_launch(K, E), types
    yield f"record alone {of_shape}", kernels._record_launch(K, True), taped
    yield f"dispatch 1/1 off {of_shape}", kernels._one_launch(K, E, kernels.ONE_LAUNCH), OFF
    yield f"dispatch 1/2 off {of_shape}", kernels._count_launch(K, E, BLOCKS[-1]), OFF
    for scanned, turn in ((False, "2/2"), (True, "3/3")):
        for size in BLOCKS:
            launch = kernels._scatter_launch(K, E, scanned, size)
            yield f"dispatch {turn} {of_shape} block {size}", launch, taped
    yield f"dispatch 2/3 {of_shape}", kernels._scan_launch(), {}


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


def compiled(launch: Launch, types: dict[str, Any], target: GPUTarget) -> Any:
    """A kernel for one GPU. `types`: of its arguments, of a tape a tuple."""
    signature: dict[str, Any] = {}
    attributes, kernel = {}, launch.kernel
    absent = {name: None for name, kind in types.items() if kind is None}
    constants = {k: v for k, v in (absent | launch.named).items() if k in kernel.arg_names}
    options = {k: v for k, v in launch.named.items() if k not in kernel.arg_names}
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
    options = {"num_warps": 4, "enable_fp_fusion": False, **options}
    return triton.compile(source, target=target, options=options)


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
    backend, arch, warp = TARGETS[gpu]
    target = GPUTarget(backend, arch, warp)
    for n, (name, launch, types) in enumerate(variants()):
        if n % every and not (also and re.match(also, name)):
            continue
        found = compiled(launch, types, target)
        stored = re.findall(r"st\.global[.\w]*?(v\d\.\w+|b\d+)", found.asm.get("ptx", ""))
        stores = sorted(set(stored))
        row = {"kernel": name, "gpu": gpu, **resources(found), "stores": stores}
        print(json.dumps({**row, "shared_bytes": found.metadata.shared}), flush=True)


if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        gpu, _, some = wanted.partition("/")
        every, _, also = some.partition("+")
        main(gpu, int(every or 1), also)
