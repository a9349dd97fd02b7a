"""The record kernel against its torch twin, in Triton's interpreter; and compiled ahead of time for real GPUs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from moe_inspect.capture.kernels import dispatch, nowhere, record_torch, triton

if triton is None:
    pytest.skip("no triton on this platform", allow_module_level=True)

from moe_inspect.capture.kernels import record_triton

POISON = 77


def page(T: int, K: int, experts: int, weight_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    kind = torch.uint8 if experts < 256 else torch.int16
    return torch.full((T + 9, K), POISON, dtype=kind), torch.full((T + 9, K), float(POISON), dtype=weight_dtype)


@pytest.mark.parametrize("T", [0, 1, 7, 371, 1023])
@pytest.mark.parametrize(("experts", "K"), [(8, 1), (8, 2), (8, 8), (60, 4), (64, 6), (255, 8), (256, 8), (512, 10)])
@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32])
def test_record_equals_its_twin(T: int, experts: int, K: int, id_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(T * experts + K)
    ids = torch.randint(0, experts, (T, K), generator=generator).to(id_dtype)
    ids[torch.rand(T, K, generator=generator) < 0.1] = experts  # sentinels and skip experts
    ids[torch.rand(T, K, generator=generator) < 0.05] = -1
    weights = torch.rand(T, K, generator=generator).half()
    pages = [page(T, K, experts, torch.float16) for _ in range(2)]
    record_torch(ids, weights, *pages[0], row=5, experts=experts)
    record_triton(ids, weights, *pages[1], row=5, experts=experts, block=256)
    for twin, kernel in zip(*pages, strict=True):
        assert torch.equal(twin, kernel)
    written, marks = pages[1][0], nowhere(pages[1][0])
    assert (written[:5] == POISON).all()
    assert (written[5 + T :] == POISON).all()
    inside = (ids >= 0) & (ids < experts)
    assert torch.equal(written[5 : 5 + T].long(), torch.where(inside, ids.long(), marks))
    if T:
        pages[1][0][5, 0] ^= 1  # positive control: one bit is seen
        assert not torch.equal(pages[0][0], pages[1][0])


def test_bf16_and_strided_arguments() -> None:
    ids = torch.arange(40).reshape(4, 10).T % 8  # [10, 4], not contiguous
    weights = torch.rand(10, 4).bfloat16().float().T.contiguous().T
    pages = [page(10, 4, 8, torch.bfloat16) for _ in range(2)]
    for write, (page_ids, page_weights) in zip((record_torch, record_triton), pages, strict=True):
        write(ids, weights, page_ids, page_weights, row=0, experts=8)
    assert torch.equal(pages[0][0], pages[1][0])
    assert torch.equal(pages[1][1][:10], weights.bfloat16())


def test_without_weights_only_ids_are_written() -> None:
    page_ids, _ = page(3, 2, 8, torch.float16)
    record_triton(torch.tensor([[1, 2], [3, 4], [5, 6]]), None, page_ids, None, row=0, experts=8)
    assert page_ids[:3].tolist() == [[1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize(("T", "K", "experts"), [(0, 2, 8), (1, 1, 1), (7, 2, 8), (371, 8, 64), (1023, 8, 256)])
def test_dispatch_is_a_stable_grouping(T: int, K: int, experts: int) -> None:
    ids = torch.randint(0, experts + 1, (T, K), generator=torch.Generator().manual_seed(T))  # id E: routed nowhere
    offsets, permutation, inverse = dispatch(ids, experts)
    flat = ids.reshape(-1)
    counts = torch.bincount(flat, minlength=experts + 1)
    assert torch.equal(offsets.diff().long(), counts[:experts])
    assert torch.equal(torch.sort(permutation).values, torch.arange(T * K))
    assert torch.equal(permutation[inverse], torch.arange(T * K))
    for e in range(experts):
        group = permutation[offsets[e] : offsets[e + 1]]
        assert (flat[group] == e).all()
        assert (group.diff() > 0).all()


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from moe_inspect.capture.kernels import _record
backend, arch, warp = sys.argv[1], sys.argv[2], int(sys.argv[3])
target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, warp)
for page in ("u8", "i16"):
    for weight in ("fp16", "bf16"):
        signature = {"ids": "*i64", "weights": "*fp32", "page_ids": "*" + page, "page_weights": "*" + weight, "first": "i32",
                     "slots": "i32", "experts": "i32", "mark": "i32", "HAS_WEIGHTS": "constexpr", "BLOCK": "constexpr"}
        source = ASTSource(fn=_record, signature=signature, constexprs={"HAS_WEIGHTS": True, "BLOCK": 1024})
        compiled = triton.compile(source, target=target, options={"num_warps": 4})
        print(page, weight, sorted(compiled.asm))
"""


@pytest.mark.parametrize(("backend", "arch", "warp"), [("cuda", "80", 32), ("cuda", "90", 32), ("cuda", "100", 32), ("hip", "gfx942", 64)])
def test_record_compiles_for_real_gpus(backend: str, arch: str, warp: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE, backend, arch, str(warp)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cubin" if backend == "cuda" else "hsaco") == 4
