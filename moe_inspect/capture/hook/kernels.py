"""The Triton kernels that dispatch tokens to experts and record the routing decisions and, for each,
an implementation in torch with bit-identical results, which runs on a CPU.

T tokens, K slots, S = T·K, E experts, H hidden. What is written, and where, is decided on the device
alone: a CUDA graph can be replayed without any Python.
"""

from __future__ import annotations

# pyright sees neither what @triton.jit makes of a signature nor that the kernels exist only with
# triton:
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportIndexIssue=false, reportUntypedNamedTuple=false
import math
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe_inspect.capture.hook import first_launch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: the torch implementations run
    triton = None

# None of these is measured on a GPU yet: benchmarks/gpu sweeps them
ONE_LAUNCH = 2048  # slots that a single program can group
# up to so many entries of the table blocks × E, every program of the second launch sums it itself
TWO_LAUNCHES = 16384
# without a limit ptxas aims at 64 registers, and some variants spill to the stack
REGISTERS = {} if torch.version.hip else {"maxnreg": 128}
RECORD_BLOCK = 1024  # slots per program
COMBINE_COLUMNS = 1024  # of H, per program; where outputs are measured, all of H


def slots_per_program(slots: int, experts: int = 0) -> int:
    """For some 128 programs, about as many as a large GPU has multiprocessors. In two launches each
    program also reads the counts of all `experts` in all programs, 4 bytes each: then enough that
    it moves as many bytes of slots, some 80 each."""
    least = max(1, slots // 128, math.isqrt(slots * experts // 20))
    return min(1024, max(256, 1 << (least - 1).bit_length()))


def ranking_chunk(bins: int) -> int:
    """Slots that are ranked in one step: one per thread, fewer where the table of rows of 32 slots ×
    experts would need more registers than there are."""
    return min(256, max(64, 65536 // bins))


# A tape as one kernel argument: which fields are None is known at compile time. Triton compiles a
# variant for each combination of numbers in a tuple that are divisible by 16; these always are. The
# lane is not, and so is an argument of its own, which is not specialized.
FIELDS = "ids weights cursor enabled base rows"
TapeArguments = namedtuple("TapeArguments", FIELDS)


@dataclass(frozen=True, eq=False)
class Tape:
    """Where the decisions of one router are written: its part of a buffer of several routers, and
    state on the device. `cursor[lane]` counts the rows that came, and is the next one to write;
    without a cursor each call is written from the first row on. Rows beyond the part are not
    written. While `enabled` is 0, nothing is written or counted."""

    ids: Tensor | None  # uint8 (E < 256) or int16, of all routers of the buffer
    weights: Tensor | None  # float16 or bfloat16, likewise
    cursor: Tensor | None  # int64 [lanes]
    enabled: Tensor  # int32 [1]
    lane: int
    K: int  # values per row
    experts: int  # ids from this on are none
    base: int  # where this router's part begins, in values; divisible by 16
    rows: int  # that it holds; divisible by 16

    @property
    def null_id(self) -> int:
        """What is recorded for an id outside 0…E−1: 255 in uint8, −1 in int16."""
        return 255 if self.ids is not None and self.ids.dtype == torch.uint8 else -1

    @cached_property
    def arguments(self) -> tuple[TapeArguments, int]:
        """The kernels' arguments `tape` and `lane`, prepared once."""
        return TapeArguments(*self.tensors, self.base, self.rows), self.lane

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.ids, self.weights, self.cursor, self.enabled

    @property
    def written(self) -> tuple[Tensor | None, ...]:
        return self.tensors[:3]

    def part(self, tensor: Tensor) -> Tensor:
        """Return this router's part of a buffer, a view [rows, K]."""
        return tensor[self.base : self.base + self.rows * self.K].view(self.rows, self.K)


class Dispatch(NamedTuple):
    """The slots grouped by expert, within an expert in token order; all int32. Slots whose id is
    outside 0…E−1 come last, from place offsets[E] on, and are not counted."""

    counts: Tensor  # [E]
    offsets: Tensor  # [E + 1], from 0
    permutation: Tensor  # [S]: the slot at each place
    inverse: Tensor  # [S]: the place of each slot
    token: Tensor  # [S]: the token at each place, permutation // K


def runs_triton(tensor: Tensor) -> bool:
    return triton is not None and tensor.is_cuda


# --- record: writes decisions without dispatching


def record(tape: Tape, ids_TK: Tensor | None, weights_TK: Tensor | None) -> None:
    """Appends T decisions to the tape: ids [T, K], integers, those outside 0…E−1 as `tape.null_id`;
    weights [T, K], floats, rounded to the tape's type. What the tape does not hold may be None."""
    if weights_TK is not None and weights_TK.requires_grad:
        weights_TK = weights_TK.detach()
    if torch.compiler.is_compiling():
        torch.ops.moe_inspect.record(ids_TK, weights_TK, *tape_parts(tape))
    else:
        _record(tape, ids_TK, weights_TK)


def _record(tape: Tape, ids_TK: Tensor | None, weights_TK: Tensor | None) -> None:
    fed = ids_TK if ids_TK is not None else weights_TK
    if not runs_triton(tape.enabled) or not fed.numel():
        return record_torch(tape, ids_TK, weights_TK)
    if tape.cursor is None:
        name = "record from the first row"
    else:
        name = "record" if fed.numel() <= RECORD_BLOCK else "record in two launches"
    call = record_triton, record_torch, tape, ids_TK, weights_TK
    first_launch.run(name, fed.device, tape.written, *call)
    return None


def record_torch(tape: Tape, ids_TK: Tensor | None, weights_TK: Tensor | None) -> None:
    code = record_on_device if tape.enabled.is_cuda else record_on_host
    code(tape, ids_TK, weights_TK)


def record_on_host(tape: Tape, ids_TK: Tensor | None, weights_TK: Tensor | None) -> None:
    """On a CPU a quarter of the operators of `record_on_device`, and of its time."""
    if not int(tape.enabled):
        return
    T = len(ids_TK if ids_TK is not None else weights_TK)
    first = 0 if tape.cursor is None else int(tape.cursor[tape.lane])
    room = max(0, min(T, tape.rows - first))
    if tape.ids is not None and ids_TK is not None:
        written, ids = tape.part(tape.ids)[first : first + room], ids_TK[:room]
        written.copy_(ids).masked_fill_((ids < 0) | (ids >= tape.experts), tape.null_id)
    if tape.weights is not None and weights_TK is not None:
        tape.part(tape.weights)[first : first + room] = weights_TK[:room]
    if tape.cursor is not None:
        tape.cursor[tape.lane] += T


def record_on_device(tape: Tape, ids_TK: Tensor | None, weights_TK: Tensor | None) -> None:
    """Reads nothing from the device: it does not wait, and a CUDA graph can hold it."""
    T = len(ids_TK if ids_TK is not None else weights_TK)
    if T == 0:
        return
    device, lane = tape.enabled.device, slice(tape.lane, tape.lane + 1)
    enabled = tape.enabled.long()
    at = torch.zeros_like(enabled) if tape.cursor is None else tape.cursor[lane]
    room = (tape.rows - at).clamp(0, T) * enabled
    # rows that do not fit write the last row that does once more; if none does, what is there
    source_T = torch.minimum(torch.arange(T, device=device), (room - 1).clamp(min=0))
    row_T = (at + source_T).clamp(max=tape.rows - 1)
    offset_TK = (tape.base + row_T * tape.K).unsqueeze(1) + torch.arange(tape.K, device=device)

    def write(to: Tensor, values_TK: Tensor) -> None:
        to[offset_TK] = torch.where(room > 0, values_TK[source_T].to(to.dtype), to[offset_TK])

    if tape.ids is not None and ids_TK is not None:
        outside_TK = (ids_TK < 0) | (ids_TK >= tape.experts)
        write(tape.ids, ids_TK.long().masked_fill(outside_TK, tape.null_id))
    if tape.weights is not None and weights_TK is not None:
        write(tape.weights, weights_TK)
    if tape.cursor is not None:
        tape.cursor[lane] += T * enabled


if triton is not None:
    NO_TAPE = TapeArguments(*(None,) * 6), 0

    @triton.jit
    def _load_experts(ids, i, inside, E):
        """The expert of each slot (0 where its id is no expert's), and whether it has one."""
        raw = tl.load(ids + i, mask=inside, other=0)
        routed = inside & (raw >= 0) & (raw < E)
        return tl.where(routed, raw, 0).to(tl.int32), routed

    @triton.jit
    def _room(tape, at, T):
        """How many of T rows at position `at` are written."""
        room = tl.minimum(tl.maximum(tape.rows - at, 0), T)
        return room.to(tl.int32) * tl.load(tape.enabled)

    @triton.jit
    def _write(tape, lane, i, expert, routed, weights, given, T, K: tl.constexpr):
        """Writes slots `i` of this call to the tape; `given`: where their weights are. Triton's axis
        analysis sees that the K offsets of a row are contiguous only when they are written in this
        form: one vector store."""
        at = tl.full([], 0, tl.int64)
        if tape.cursor is not None:
            at = tl.load(tape.cursor + lane)
        inside = i < _room(tape, at, T) * K
        row = at.to(tl.int32) + i // K
        offset = tape.base + row * K + i % K
        if tape.ids is not None:
            value = tl.where(routed, expert, -1)  # 255 in an unsigned byte
            tl.store(tape.ids + offset, value.to(tape.ids.dtype.element_ty), mask=inside)
        if tape.weights is not None:
            weight = tl.load(weights + given, mask=inside, other=0)
            tl.store(tape.weights + offset, weight.to(tape.weights.dtype.element_ty), mask=inside)

    @triton.jit
    def _advance(tape, lane, T):
        """Moves the cursor. Run by one program, after all others have read the cursor."""
        at = tl.load(tape.cursor + lane)
        moved = T * tl.load(tape.enabled)
        tl.debug_barrier()  # every warp has read the cursor before the first one moves it
        tl.store(tape.cursor + lane, at + moved)

    @triton.jit(do_not_specialize=["T", "lane"])
    def _record_kernel(
        ids, weights, E, T, tape, lane,
        K: tl.constexpr, IDS: tl.constexpr, WEIGHTS: tl.constexpr, ALONE: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Records the first K columns of ids and weights, whose rows begin IDS and WEIGHTS values
        apart."""
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = i < T * K
        expert, routed = tl.zeros([BLOCK], tl.int32), inside
        if tape.ids is not None:
            expert, routed = _load_experts(ids, i // K * IDS + i % K, inside, E)
        _write(tape, lane, i, expert, routed, weights, i // K * WEIGHTS + i % K, T, K)
        if ALONE:
            _advance(tape, lane, T)

    @triton.jit(do_not_specialize=["T", "lane"])
    def _advance_kernel(T, tape, lane):
        _advance(tape, lane, T)

    def _arguments(
        tape: Tape | None, K: int, ids_TK: Tensor | None, weights_TK: Tensor | None
    ) -> tuple[TapeArguments, int]:
        """The arguments `tape` and `lane` of the kernels."""
        if tape is None:
            return NO_TAPE
        assert K == tape.K, f"{K} values a row on a tape of {tape.K}"
        assert ids_TK is not None or tape.ids is None, "a tape of ids, and no ids"
        assert weights_TK is not None or tape.weights is None, "a tape of weights, and no weights"
        return tape.arguments

    def _strided(values_TK: Tensor | None) -> tuple[Tensor | None, int]:
        """The values, copied unless the columns of a row are next to each other, and how many values
        apart rows begin."""
        if values_TK is None:
            return None, 0
        if values_TK.is_contiguous() or values_TK.stride(1) != 1:
            return values_TK.contiguous(), values_TK.shape[1]
        return values_TK, values_TK.stride(0)

    def record_triton(tape: Tape, ids_TK: Tensor | None, weights_TK: Tensor | None) -> None:
        """One launch for up to RECORD_BLOCK slots or without a cursor, else two: the cursor may only
        move when every program has read it."""
        fed = ids_TK if ids_TK is not None else weights_TK
        T, K = fed.shape
        if T == 0:
            return
        (ids, ids_stride), (weights, weights_stride) = map(_strided, (ids_TK, weights_TK))
        arguments = _arguments(tape, K, ids_TK, weights_TK)
        blocks, moves = -(-T * K // RECORD_BLOCK), tape.cursor is not None
        with torch.cuda.device_of(fed):
            _record_kernel[(blocks,)](
                ids, weights, tape.experts, T, *arguments, K=K, IDS=ids_stride, WEIGHTS=weights_stride,
                ALONE=moves and blocks == 1, BLOCK=RECORD_BLOCK, **REGISTERS,
            )  # fmt: skip
            if moves and blocks > 1:
                _advance_kernel[(1,)](T, *arguments, num_warps=1)


# --- dispatch: groups the slots by expert and, with a tape, records them in the same launches


def dispatch(
    ids_TK: Tensor, weights_TK: Tensor | None, experts: int, tape: Tape | None = None
) -> Dispatch:
    """Groups the slots of ids [T, K] by expert: stable and deterministic, without atomics and
    without waiting for the device. With `tape`, also records the T decisions as `record` does."""
    if weights_TK is not None and weights_TK.requires_grad:
        weights_TK = weights_TK.detach()
    if not torch.compiler.is_compiling():
        return _dispatch(ids_TK, weights_TK, experts, tape)
    return Dispatch(*torch.ops.moe_inspect.dispatch(ids_TK, weights_TK, experts, *tape_parts(tape)))


def _dispatch(
    ids_TK: Tensor,
    weights_TK: Tensor | None,
    experts: int,
    tape: Tape | None,
    out: Dispatch | None = None,
) -> Dispatch:
    if not runs_triton(ids_TK) or not ids_TK.numel():
        here = dispatch_numpy if ids_TK.is_cpu else dispatch_torch
        return here(ids_TK, weights_TK, experts, tape)
    launches, block = dispatch_plan(ids_TK.numel(), experts)
    kernel = partial(dispatch_triton, launches=launches, block=block, out=out)
    written = () if tape is None else tape.written
    call = kernel, dispatch_torch, ids_TK, weights_TK, experts, tape
    return first_launch.run(DISPATCHES[launches], ids_TK.device, written, *call)


# how many launches a dispatch takes → its name
DISPATCHES = {1: "dispatch", 2: "dispatch in two launches", 3: "dispatch in three launches"}


def dispatch_plan(slots: int, experts: int) -> tuple[int, int]:
    """How many launches a dispatch takes, and the slots per program."""
    if slots <= ONE_LAUNCH:
        return 1, ONE_LAUNCH
    block = slots_per_program(slots, experts)
    if -(-slots // block) * experts <= TWO_LAUNCHES:
        return 2, block
    return 3, slots_per_program(slots)


def dispatch_torch(
    ids_TK: Tensor, weights_TK: Tensor | None, experts: int, tape: Tape | None = None
) -> Dispatch:
    if tape is not None:
        record_torch(tape, ids_TK, weights_TK)
    flat = ids_TK.reshape(-1)
    flat = torch.where((flat < 0) | (flat >= experts), experts, flat)
    ordered, order = torch.sort(flat, stable=True)
    permutation = order.int()
    e = torch.arange(experts + 1, device=flat.device, dtype=flat.dtype)
    offsets = torch.searchsorted(ordered, e).int()
    inverse = torch.empty_like(permutation)
    inverse[order] = torch.arange(len(order), device=flat.device, dtype=torch.int32)
    token = permutation // max(1, ids_TK.shape[1])
    return Dispatch(offsets.diff(), offsets, permutation, inverse, token)


def dispatch_numpy(
    ids_TK: Tensor, weights_TK: Tensor | None, experts: int, tape: Tape | None = None
) -> Dispatch:
    """`dispatch_torch` on a CPU in a quarter of the time, with many slots by a radix sort."""
    if tape is not None:
        record_torch(tape, ids_TK, weights_TK)
    ids = ids_TK.detach().numpy().reshape(-1).astype(np.int64, copy=False)
    # as unsigned numbers, negative ids are larger than any other
    expert = np.minimum(ids.view(np.uint64), np.uint64(experts))
    expert = expert.astype(np.uint16 if experts < 2**16 else np.int64)
    order = expert.argsort(kind="stable").astype(np.int32)
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order), dtype=np.int32)
    counts = np.bincount(expert, minlength=experts)[:experts].astype(np.int32)
    offsets = np.zeros(experts + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    token = order // max(1, ids_TK.shape[1])
    return Dispatch(*map(torch.from_numpy, (counts, offsets, order, inverse, token)))


if triton is not None:

    @triton.jit
    def _count_bits(x):
        """How many bits of each uint32 are set. LLVM knows this sequence: one instruction."""
        x = x - ((x >> 1) & 0x55555555)
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
        x = (x + (x >> 4)) & 0x0F0F0F0F
        return ((x * 0x01010101) >> 24).to(tl.int32)

    @triton.jit
    def _earlier_in_row(expert, routed, BINS: tl.constexpr):
        """For each slot of [rows, 32], the number of earlier slots of its row with its expert; for
        one without an expert, of those that have none either. The slots of a row whose expert has a
        certain bit are a set of 32 bits; those with one expert are an intersection of such sets."""
        slot = tl.arange(0, 32)[None, :]
        with_expert = tl.sum(routed.to(tl.int32) << slot, 1)[:, None]
        # the set, or for an unrouted slot the others
        same = with_expert ^ (routed.to(tl.int32) - 1)
        for bit in tl.static_range(BINS.bit_length() - 1):
            is_set = (expert >> bit) & 1
            same &= tl.sum(is_set << slot, 1)[:, None] ^ (is_set - 1)
        return _count_bits((same & ((1 << slot) - 1)).to(tl.uint32, bitcast=True))

    @triton.jit
    def _place(
        ids, permutation, inverse, token, base_E, unrouted, first, end, E,
        K: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        """Places slots [first, end) from place `base_E` of their expert on, those without an expert
        from `unrouted` on, in their order. No sort: before a slot come the earlier ones with its
        expert in its row of 32, and those of the rows before, which a table [rows R, E] counts."""
        ROWS: tl.constexpr = CHUNK // 32
        row = tl.arange(0, ROWS)
        slot = tl.arange(0, 32)
        for chunk in tl.range(0, tl.cdiv(end - first, CHUNK)):
            i = first + chunk * CHUNK + row[:, None] * 32 + slot[None, :]
            inside = i < end
            expert, routed = _load_experts(ids, i, inside, E)
            cell = tl.reshape(row[:, None] * BINS + expert, [CHUNK])
            count = tl.histogram(cell, ROWS * BINS, tl.reshape(routed, [CHUNK]))
            count_RE = tl.reshape(count, [ROWS, BINS])
            before_RE = base_E[None, :] + tl.cumsum(count_RE, 0) - count_RE
            # of one dimension: a gather along the second one shuffles E / 32 times
            before = tl.gather(tl.reshape(before_RE, [ROWS * BINS]), cell, 0)
            before = tl.reshape(before, [ROWS, 32])
            unrouted_R = tl.sum((inside & (routed == 0)).to(tl.int32), 1)
            unrouted_before_R = unrouted + tl.cumsum(unrouted_R, 0) - unrouted_R
            place = tl.where(routed, before, unrouted_before_R[:, None])
            place += _earlier_in_row(expert, routed, BINS)
            tl.store(permutation + place, i, mask=inside)
            tl.store(token + place, i // K, mask=inside)
            tl.store(inverse + i, place, mask=inside)
            base_E += tl.sum(count_RE, 0)
            unrouted += tl.sum(unrouted_R, 0)

    @triton.jit(do_not_specialize=["T", "lane"])
    def _one_kernel(
        ids, weights, counts, offsets, permutation, inverse, token, E, T, tape, lane,
        K: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        """The whole dispatch in one program."""
        i = tl.arange(0, BLOCK)
        expert, routed = _load_experts(ids, i, i < T * K, E)
        if tape.cursor is not None:
            _write(tape, lane, i, expert, routed, weights, i, T, K)
        count_E = tl.histogram(expert, BINS, mask=routed)
        e = tl.arange(0, BINS)
        end_E = tl.cumsum(count_E, 0)
        tl.store(counts + e, count_E, mask=e < E)
        tl.store(offsets + 1 + e, end_E, mask=e < E)
        tl.store(offsets, 0)
        _place(ids, permutation, inverse, token, end_E - count_E, tl.sum(count_E, 0), 0, T * K,
               E, K, BINS, CHUNK)  # fmt: skip
        if tape.cursor is not None:
            _advance(tape, lane, T)

    @triton.jit(do_not_specialize=["T", "lane"])
    def _count_kernel(
        ids, weights, partial, E, T, tape, lane, K: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr
    ):  # fmt: skip
        """First launch: counts of each block, partial [blocks, E]; records the decisions."""
        block = tl.program_id(0)
        i = block * BLOCK + tl.arange(0, BLOCK)
        expert, routed = _load_experts(ids, i, i < T * K, E)
        if tape.cursor is not None:
            _write(tape, lane, i, expert, routed, weights, i, T, K)
        e = tl.arange(0, BINS)
        tl.store(partial + block * E + e, tl.histogram(expert, BINS, mask=routed), mask=e < E)

    @triton.jit(do_not_specialize=["blocks"])
    def _scan_kernel(partial, counts, E, blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """Second of three launches: replaces each column of partial [blocks, E] by its exclusive
        running sum, and writes its total to counts."""
        e = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        running_E = tl.zeros([COLUMNS], tl.int32)
        for first in tl.range(0, blocks, ROWS):
            row = first + tl.arange(0, ROWS)
            inside = (row[:, None] < blocks) & (e[None, :] < E)
            at = partial + row[:, None] * E + e[None, :]
            count = tl.load(at, mask=inside, other=0)
            tl.store(at, running_E[None, :] + tl.cumsum(count, 0) - count, mask=inside)
            running_E += tl.sum(count, 0)
        tl.store(counts + e, running_E, mask=e < E)

    @triton.jit(do_not_specialize=["T", "lane", "blocks"])
    def _scatter_kernel(
        ids, partial, counts, offsets, permutation, inverse, token, E, T, blocks, tape, lane,
        K: tl.constexpr, BINS: tl.constexpr, SCANNED: tl.constexpr,
        BLOCK: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        """Last launch: places each program's slots after those of the programs before it."""
        block = tl.program_id(0)
        e = tl.arange(0, BINS)
        before_E = tl.zeros([BINS], tl.int32)
        count_E = tl.zeros([BINS], tl.int32)
        if SCANNED:
            before_E += tl.load(partial + block * E + e, mask=e < E, other=0)
            count_E += tl.load(counts + e, mask=e < E, other=0)
        else:
            before_RE = tl.zeros([ROWS, BINS], tl.int32)
            count_RE = tl.zeros([ROWS, BINS], tl.int32)
            for first in tl.range(0, blocks, ROWS):
                row = first + tl.arange(0, ROWS)
                inside = (row[:, None] < blocks) & (e[None, :] < E)
                count = tl.load(partial + row[:, None] * E + e[None, :], mask=inside, other=0)
                count_RE += count
                before_RE += tl.where(row[:, None] < block, count, 0)
            # warps meet here, not in the loop
            count_E += tl.sum(count_RE, 0)
            before_E += tl.sum(before_RE, 0)
        end_E = tl.cumsum(count_E, 0)
        first_slot = block * BLOCK
        unrouted = tl.sum(count_E, 0) + first_slot - tl.sum(before_E, 0)
        _place(ids, permutation, inverse, token, end_E - count_E + before_E, unrouted, first_slot,
               tl.minimum(first_slot + BLOCK, T * K), E, K, BINS, CHUNK)  # fmt: skip
        if block == 0:
            tl.store(offsets + 1 + e, end_E, mask=e < E)
            tl.store(offsets, 0)
            if not SCANNED:
                tl.store(counts + e, count_E, mask=e < E)
            if tape.cursor is not None:
                _advance(tape, lane, T)

    def _bins(experts: int) -> int:
        return max(16, triton.next_power_of_2(experts))

    def dispatch_triton(
        ids_TK: Tensor,
        weights_TK: Tensor | None,
        experts: int,
        tape: Tape | None = None,
        launches: int | None = None,
        block: int | None = None,
        out: Dispatch | None = None,
    ) -> Dispatch:
        """`dispatch` on a GPU. `launches`: 1 (at most ONE_LAUNCH slots), 2 or 3; `block`: slots per
        program. None chooses by size. `out`: is filled and returned."""
        T, K = ids_TK.shape
        S = T * K
        if out is None:
            out = empty_dispatch(ids_TK, experts)
        if S == 0:
            out.counts.zero_()
            out.offsets.zero_()
            return out
        ids = ids_TK.contiguous()
        weights = weights_TK.contiguous() if weights_TK is not None else None
        arguments = _arguments(tape, K, ids_TK, weights_TK)
        launches = launches or dispatch_plan(S, experts)[0]
        bins = _bins(experts)
        ranking = {"CHUNK": ranking_chunk(bins), "num_warps": 8, **REGISTERS}
        with torch.cuda.device_of(ids):
            if launches == 1:
                assert S <= ONE_LAUNCH
                _one_kernel[(1,)](
                    ids, weights, *out, experts, T, *arguments,
                    K=K, BINS=bins, BLOCK=ONE_LAUNCH, **ranking,
                )  # fmt: skip
                return out
            block = block or slots_per_program(S)
            blocks, scanned = -(-S // block), launches == 3
            partial = torch.empty((blocks, experts), dtype=torch.int32, device=ids.device)
            # 8 slots per thread: a decision of K = 8 is one vector store of ids, one of weights
            _count_kernel[(blocks,)](
                ids, weights, partial, experts, T, *arguments,
                K=K, BINS=bins, BLOCK=block, num_warps=max(1, block // 256), **REGISTERS,
            )  # fmt: skip
            if scanned:
                grid = (-(-experts // 16),)
                _scan_kernel[grid](partial, out.counts, experts, blocks, ROWS=64, COLUMNS=16)
            _scatter_kernel[(blocks,)](
                ids, partial, *out, experts, T, blocks, *arguments, K=K, BINS=bins,
                SCANNED=scanned, BLOCK=block, ROWS=max(1, min(64, 1024 // bins)), **ranking,
            )  # fmt: skip
        return out


def empty_dispatch(ids_TK: Tensor, experts: int, apart: bool = False) -> Dispatch:
    """An uninitialized Dispatch. `apart`: of tensors that share no memory, as operators must."""
    S = ids_TK.numel()
    if apart or (experts | S) % 4:
        sizes = (experts, experts + 1, S, S, S)
        return Dispatch(*(ids_TK.new_empty(n, dtype=torch.int32) for n in sizes))
    # one allocation takes the host half as long as five; each part is aligned to 16 bytes
    whole = ids_TK.new_empty(2 * experts + 1 + 3 * S, dtype=torch.int32)
    counts, permutation, inverse, token, offsets = whole.unsafe_split_with_sizes(
        (experts, S, S, S, experts + 1)
    )
    return Dispatch(counts, offsets, permutation, inverse, token)


# --- combine: weights the experts' outputs and sums them over a token's slots


def weighted_sum(y_SH: Tensor, weights_TK: Tensor, inverse_S: Tensor | None) -> Tensor:
    """out[t] = Σ_k weight[t, k] · y[place of slot (t, k)], [T, H], in the type that y and weight
    promote to. `inverse_S` None: y is in slot order. Differentiable."""
    T, K = weights_TK.shape
    if inverse_S is not None and y_SH.is_cpu and not y_SH.requires_grad:
        y_SH = y_SH.index_select(0, inverse_S)  # one operator less
    elif inverse_S is not None:
        y_SH = y_SH[inverse_S.long()]
    return (y_SH * weights_TK.reshape(-1, 1)).view(T, K, y_SH.shape[1]).sum(1)


def norms_torch(y_SH: Tensor, K: int, inverse_S: Tensor | None) -> Tensor:
    """The norm ‖f(x)‖₂ of the output of each slot's expert before the gate weight, float32 [T, K],
    by the rows of `weighted_sum`. If rows are grouped, it is 0 for a slot without an expert. Without
    a gradient."""
    place_S = slice(None) if inverse_S is None else inverse_S.long()
    norm_S = torch.linalg.vector_norm(y_SH.detach(), dim=1, dtype=torch.float32)
    return norm_S[place_S].view(-1, K)


if triton is not None:

    @triton.jit
    def _row(inverse, offsets, y, t, k, h, E, H, T, K: tl.constexpr):
        """Columns `h` of the output of token t's slot k, float32; 0 where it has no expert."""
        place = t * K + k
        end = T * K
        if inverse is not None:
            place = tl.load(inverse + place).to(tl.int64)
            end = tl.load(offsets + E)  # later rows belong to no expert and were not written
        row = tl.load(y + place * H + h, mask=h < tl.where(place < end, H, 0), other=0.0)
        return row.to(tl.float32)

    @triton.jit
    def _weighted(row, y, weights, slot, ROUND: tl.constexpr):
        product = row * tl.load(weights + slot).to(tl.float32)
        if ROUND:
            product = product.to(y.dtype.element_ty).to(tl.float32)
        return product

    @triton.jit(do_not_specialize=["T", "lane"])
    def _combine_kernel(
        inverse, offsets, norms, y, ids, weights, out, E, H, T, tape, lane,
        K: tl.constexpr, ROUND: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """A program sums some columns of one token. `inverse` and `offsets` None: y is in slot
        order. `norms`: also writes the norms of its rows. The very first program also records the
        whole call, where there is a tape."""
        t = tl.program_id(0).to(tl.int64)
        h = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = h < H
        sum_H = tl.zeros([COLUMNS], tl.float32)
        if norms is None:
            for k in tl.static_range(K):
                row = _row(inverse, offsets, y, t, k, h, E, H, T, K)
                sum_H += _weighted(row, y, weights, t * K + k, ROUND)
        else:  # not unrolled: the rows of all slots would need more registers than there are
            for k in tl.range(0, K):
                row = _row(inverse, offsets, y, t, k, h, E, H, T, K)
                tl.store(norms + t * K + k, tl.sqrt_rn(tl.sum(row * row, 0)))
                sum_H += _weighted(row, y, weights, t * K + k, ROUND)
        if ROUND:
            sum_H = sum_H.to(y.dtype.element_ty).to(tl.float32)
        tl.store(out + t * H + h, sum_H.to(out.dtype.element_ty), mask=inside)
        if tape.cursor is not None and (tl.program_id(0) + tl.program_id(1) == 0):
            i = tl.arange(0, BLOCK)
            expert, routed = _load_experts(ids, i, i < T * K, E)
            _write(tape, lane, i, expert, routed, weights, i, T, K)
            _advance(tape, lane, T)

    def combine_triton(
        y_SH: Tensor, ids_TK: Tensor, weights_TK: Tensor, grouped: Dispatch | None, dtype: torch.dtype, experts: int,
        tape: Tape | None = None, norms: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """`weighted_sum` in one launch and one pass over y, rounded as there (on a GPU torch adds
        more than four slots in another order). Places without an expert count as zero. `grouped`
        None: y is in slot order, and at most RECORD_BLOCK slots are recorded on `tape`. Fills
        `norms` [T, K]."""
        T, K = weights_TK.shape
        S, H = y_SH.shape
        assert tape is None or (grouped is None and S <= RECORD_BLOCK)
        kind = y_SH.dtype
        # (naming the type takes longer)
        out = y_SH.new_empty(T, H) if dtype is kind else y_SH.new_empty(T, H, dtype=dtype)
        if T == 0:
            return out
        y, ids, weights = y_SH.contiguous(), ids_TK.contiguous(), weights_TK.contiguous()
        order = (grouped.inverse, grouped.offsets) if grouped is not None else (None, None)
        columns = COMBINE_COLUMNS
        if norms is not None:  # a program sees all of H
            columns = max(columns, 1 << (H - 1).bit_length())
        # in the order of transformers: product, rounding, sum
        rounded = torch.promote_types(kind, weights.dtype).itemsize == 2
        with torch.cuda.device_of(y):
            _combine_kernel[(T, -(-H // columns))](
                *order, norms, y, ids, weights, out, experts, H, T,
                *(NO_TAPE if tape is None else _arguments(tape, K, ids, weights)),
                K=K, ROUND=rounded, COLUMNS=columns, BLOCK=RECORD_BLOCK, enable_fp_fusion=False,
                num_warps=min(16, max(4, columns // 512)),  # 8 to 32 columns per thread
            )  # fmt: skip
        return out


def combine(
    y_SH: Tensor, ids_TK: Tensor, weights_TK: Tensor, grouped: Dispatch | None, dtype: torch.dtype, experts: int,
    tape: Tape | None = None, norms: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`combine_triton`, or `combine_torch` if the kernel is wrong on the device."""
    call = y_SH, ids_TK, weights_TK, grouped, dtype, experts, tape, norms
    if not y_SH.numel():
        return combine_torch(*call)
    name = "combine" if norms is None else "combine with norms"
    written = *(() if tape is None else tape.written), norms
    return first_launch.run(name, y_SH.device, written, combine_triton, combine_torch, *call)


def combine_torch(
    y_SH: Tensor, ids_TK: Tensor, weights_TK: Tensor, grouped: Dispatch | None, dtype: torch.dtype, experts: int,
    tape: Tape | None = None, norms: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What `combine_triton` does, in torch."""
    inverse = None
    if grouped is not None:
        place = torch.arange(len(y_SH), device=y_SH.device)
        y_SH = y_SH.masked_fill((place >= grouped.offsets[-1]).unsqueeze(1), 0.0)
        inverse = grouped.inverse
    if tape is not None:
        record_torch(tape, ids_TK, weights_TK)
    if norms is not None:
        norms.copy_(norms_torch(y_SH, ids_TK.shape[1], inverse))
    return weighted_sum(y_SH, weights_TK, inverse).to(dtype)


# --- the same as custom operators, which torch.compile does not trace into


def tape_parts(tape: Tape | None) -> tuple[object, ...]:
    """The arguments of an operator in place of a tape."""
    if tape is None:
        return (*[None] * 4, [])
    return *tape.tensors, [tape.lane, tape.K, tape.experts, tape.base, tape.rows]


def register_operator(
    name: str, given: str, results: int, run: Callable[..., object], shapes: Callable[..., object]
) -> None:
    """Register `run`, whose last arguments are those of `tape_parts`; `shapes` makes such
    results."""
    tape = (
        "Tensor(a!)? tape_ids, Tensor(b!)? tape_weights, Tensor(c!)? cursor, Tensor? enabled, "
        "int[] numbers"
    )
    made = torch.library.custom_op(
        f"moe_inspect::{name}",
        run,
        mutates_args=("tape_ids", "tape_weights", "cursor"),
        schema=f"({given}, {tape}) -> ({', '.join(['Tensor'] * results)})",
    )
    made.register_fake(shapes)


def record_parts(ids, weights, *tape):  # type: ignore[no-untyped-def]
    *tensors, numbers = tape
    _record(Tape(*tensors, *numbers), ids, weights)


def _dispatch_op(ids, weights, experts, *tape):  # type: ignore[no-untyped-def]
    *tensors, numbers = tape
    taped = Tape(*tensors, *numbers) if numbers else None
    return tuple(_dispatch(ids, weights, experts, taped, empty_dispatch(ids, experts, apart=True)))


register_operator("record", "Tensor? ids, Tensor? weights", 0, record_parts, lambda *_: None)
register_operator(
    "dispatch",
    "Tensor ids, Tensor? weights, int experts",
    5,
    _dispatch_op,
    lambda ids, weights, experts, *_: tuple(empty_dispatch(ids, experts, apart=True)),
)
