"""The kernels as compiled for GPUs, executed without one (tests/ptx), and the executor itself.
SWEEP=whole executes every variant that tests.support.aot compiles, instead of a sample for one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

from tests.ptx.execute import execute
from tests.ptx.memory import Memory, bank_cycles
from tests.ptx.values import LANES, Fault, parse
from tests.support.aot import lines_of, printed_by
from tests.support.sweep import WHOLE

SAMPLE = "E60 k4 bf16(?! block (512|1024)| of 16384)", "logits", "1/1 E256 k8 fp16"


@pytest.mark.parametrize("gpu", ("sm_80", "sm_90", "sm_100") if WHOLE else ["sm_90"])
def test_compiled_kernels_are_right_and_race_free(gpu: str) -> None:
    choice = ("--aot",) if WHOLE else [f"--match={text}" for text in SAMPLE]
    rows = lines_of("tests.ptx", gpu, *choice)
    if WHOLE:
        assert rows.pop()["not executed"] == []
    kernels = {launch["kernel"] for row in rows for launch in row["launches"]}
    assert {"_one_kernel", "_count_kernel", "_scatter_kernel", "_combine_kernel"} <= kernels
    assert [row for row in rows if row["wrong"] or row["races"]] == []


def test_kernels_without_their_barriers_are_caught() -> None:
    """Positive control: a race, or memory that is read before anybody wrote it."""
    for row in lines_of(
        "tests.ptx", "sm_90", "--no-barriers", "--match=1/1 E60 k4 fp16", "--match=alone E60"
    ):
        assert row["races"] or "wrote" in row["wrong"], row


def test_the_benchmark_counts(tmp_path: Path) -> None:
    output = tmp_path / "counts.json"
    printed_by("benchmarks.kernels", "--shape", "8", "2", "8", "-o", output)
    rows = json.loads(output.read_text())["counted"]
    assert [row["kernel"] for row in rows] == ["record", "one", "combine"]
    assert all(row["instructions"] > 100 and row["÷ least"] >= 1 for row in rows)


# --- the executor, with kernels written by hand: it must find what is wrong. An instruction that it
# computed wrongly would show above, as a kernel that differs from its twin.


def kernel(body: str, threads: int = LANES) -> str:
    """A kernel with the parameter %rd1, the thread's number in %r1, and the address of the thread's
    32-bit value at the parameter in %rd3."""
    return f"""
.version 8.4
.target sm_90a
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0
)
.reqntid {threads}
{{
	.reg .pred 	%p<20>;
	.reg .b16 	%rs<20>;
	.reg .b32 	%r<20>;
	.reg .b64 	%rd<20>;
	ld.param.b64 	%rd1, [kernel_param_0];
	mov.u32 	%r1, %tid.x;
	mul.wide.u32 	%rd2, %r1, 4;
	add.s64 	%rd3, %rd1, %rd2;
	mov.b32 	%r2, global_smem;
	shl.b32 	%r3, %r1, 2;
	add.s32 	%r4, %r2, %r3;
{body}
	ret;
}}
"""


def run(body: str, data: Any, threads: int = LANES, seed: int = 0, grid: int = 1) -> Memory:
    memory = Memory()
    given = [memory.address(memory.add("data", data))]
    memory.counts = execute(parse(kernel(body, threads)), (grid,), given, memory, 4096, seed)
    return memory


EXCHANGE = """
	ld.global.b32 %r5, [%rd3];
	st.shared.b32 [%r4], %r5;
	bar.sync 0;
	xor.b32 %r6, %r4, 128;
	ld.shared.b32 %r7, [%r6];
	st.global.b32 [%rd3], %r7;
"""


@pytest.mark.parametrize("seed", range(6))
def test_a_barrier_orders_the_warps_and_a_missing_one_is_found(seed: int) -> None:
    """Whichever warp comes first: the other one's value is not there yet, or is a race."""
    data = np.arange(64, dtype=np.uint32)
    assert not run(EXCHANGE, data, threads=64, seed=seed).races
    assert data.tolist() == [*range(32, 64), *range(32)]
    missing = EXCHANGE.replace(BAR, "")
    try:
        found = str(run(missing, np.arange(64, dtype=np.uint32), threads=64, seed=seed).races)
    except Fault as fault:
        found = str(fault)
    assert "no barrier between" in found or "before anybody wrote" in found


LOW = "setp.lt.u32 %p1, %r1, 16;"  # lanes
SKIP, BAR = f"{LOW} @%p1 bra $SKIP;", "bar.sync 0;"
SHUFFLE = "shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;"
DIVERGENT = "divergent shuffle: lanes that it names are elsewhere"
FAULTS = {
    "beyond": ("st.global.b32 [%rd3 + 4], %r1;", "access to byte 128 of data, which has 128"),
    "before": ("ld.global.b32 %r5, [%rd3 + -4];", "in no buffer"),
    "nowhere": ("mov.b64 %rd4, 64; ld.global.b32 %r5, [%rd4];", "in no buffer"),
    "beyond shared": ("st.shared.b32 [%r4 + 4096], %r1;", "of shared memory, which has 4096"),
    "unwritten": ("ld.shared.b32 %r5, [%r4];", "read before anybody wrote it"),
    "misaligned": ("st.global.v2.b32 [%rd1 + 4], {%r1, %r1};", "misaligned access of 8 bytes"),
    "divergent shuffle": (f"{SKIP} {SHUFFLE}\n$SKIP:\n{SHUFFLE}", DIVERGENT),
    "shuffle under a predicate": (f"{LOW} @%p1 {SHUFFLE}", DIVERGENT),
    "shuffle from a lane not named": (
        f"{LOW} @!%p1 bra $SKIP; shfl.sync.bfly.b32 %r5, %r1, 16, 31, 65535;\n$SKIP:",
        "reads a lane that does not take part",
    ),
    "barrier in a branch": (f"{SKIP} {BAR} {BAR}\n$SKIP:\n{BAR}", "part at a barrier"),
    "barrier not reached": (f"{LOW} @%p1 ret; {BAR}", "a barrier that some threads never reach"),
    "division": ("mov.b32 %r5, 0; rem.u32 %r6, %r1, %r5;", "division by zero"),
    "unknown": ("mma.sync.f32 %r1, %r1, %r1;", "mma.sync.f32 %r1, %r1, %r1 is not known"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name: str) -> None:
    body, message = FAULTS[name]
    with pytest.raises(Fault) as found:
        run(body, np.zeros(LANES, np.uint32))
    assert message in str(found.value)


def test_global_memory_that_nobody_wrote() -> None:
    memory = Memory()
    buffer = memory.add("empty", np.zeros(LANES, np.uint32))
    buffer.written[:] = False
    with pytest.raises(Fault, match="byte 0 of empty is read before"):
        execute(parse(kernel("ld.global.b32 %r5, [%rd3];")), (1,), [memory.address(buffer)], memory)
    execute(parse(kernel("st.global.b32 [%rd3], %r1;")), (1,), [memory.address(buffer)], memory)
    assert buffer.written.all()


BLOCK = "mov.u32 %r5, %ctaid.x; setp.eq.b32 %p1, %r5, 1;"
STORE, ADD = "st.global.b32 [%rd3], %r5;", "atom.global.add.u32 %r6, [%rd3], 1;"
WROTE = "one block wrote, another writes"
RACES = {
    "lanes": ("st.global.b32 [%rd1], %r1;", 1, "two lanes of a warp write different values"),
    "blocks": (f"{BLOCK} {STORE}", 3, WROTE),
    "block reads": (f"{BLOCK} @%p1 {STORE} @!%p1 ld.global.b32 %r6, [%rd3];", 2, "one block"),
    "atomic and plain": (f"{BLOCK} @%p1 {ADD} @!%p1 {STORE}", 2, WROTE),
}


@pytest.mark.parametrize("name", RACES)
def test_races_are_found(name: str) -> None:
    body, blocks, message = RACES[name]
    for seed in range(4):
        races = run(body, np.full(LANES, 9, np.uint32), grid=blocks, seed=seed).races
        assert any(message in race for race in races), races


def test_what_a_launch_does_is_counted() -> None:
    data = np.zeros(64, np.uint32)
    counts = run(EXCHANGE, data, threads=64).counts
    assert counts.warps == 2
    assert counts.instructions == 2 * (7 + 6 + 1)
    assert counts.barriers == 1
    assert (counts.sectors_read, counts.sectors_written, counts.least_sectors) == (8, 8, 16)
    assert (counts.shared_cycles, counts.bank_conflicts) == (4, 0)


def test_bank_conflicts() -> None:
    lane = np.arange(LANES)
    for stride, cycles in ((4, 1), (8, 2), (128, 32), (0, 1)):  # (at 0 one word, read by all)
        assert bank_cycles(stride * lane, 4, atomic=False) == (cycles, 1)
    assert bank_cycles(0 * lane, 4, atomic=True) == (32, 1)
    assert bank_cycles(16 * lane, 16, atomic=False) == (4, 4)
