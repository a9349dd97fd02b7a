"""Instructions that reach beyond a lane's registers: loads, stores, atomic operations, and the
exchange between the lanes of a warp."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx.arithmetic import Execute, opcode
from tests.ptx.memory import SECTOR, Buffer, bank_cycles
from tests.ptx.parser import Instruction
from tests.ptx.values import LANES, Array, Fault, Registers, integer, parts, width

LANE = np.arange(LANES)


def is_shared(ins: Instruction) -> bool:
    return any(word.startswith("shared") for word in ins.opcode)


def access_bytes(ins: Instruction) -> int:
    """Bytes per lane of a load or store."""
    vector = next((int(w[1:]) for w in ins.opcode if re.fullmatch(r"v\d", w)), 1)
    return vector * width(ins.opcode[-1]) // 8


@opcode("ld")
def load(ins: Instruction, registers: Registers) -> Execute:
    kind, targets = ins.opcode[-1], parts(ins.operands[0])
    to, writes = integer(kind), [registers.writer(t) for t in targets]
    if "param" in ins.opcode:
        name = ins.operands[1].strip("[] ")
        return lambda warp, on: writes[0](warp, warp.block.parameter(name, to), on)
    address, size, shared = registers.address(ins.operands[1]), access_bytes(ins), is_shared(ins)

    def execute(warp: Any, on: Array) -> None:
        values = np.zeros((LANES, size), np.uint8)
        for buffer, offset, lanes in places(warp, address(warp), on, shared):
            values[lanes] = buffer.load(offset, size, warp.visitor)
            count(warp, buffer, offset, size, "read")
        values = values.view(to)
        for n, write in enumerate(writes):
            write(warp, values[:, n], on)

    return execute


@opcode("st")
def store(ins: Instruction, registers: Registers) -> Execute:
    bits = integer(f"b{width(ins.opcode[-1])}")
    reads = [registers.reader(p, f"b{width(ins.opcode[-1])}") for p in parts(ins.operands[1])]
    address, shared, size = registers.address(ins.operands[0]), is_shared(ins), access_bytes(ins)

    def execute(warp: Any, on: Array) -> None:
        values = np.empty((LANES, len(reads)), bits)
        for n, read in enumerate(reads):
            values[:, n] = read(warp)
        given = values.view(np.uint8)
        for buffer, offset, lanes in places(warp, address(warp), on, shared):
            buffer.store(offset, given[lanes], warp.visitor)
            count(warp, buffer, offset, size, "written")

    return execute


ATOMIC: dict[str, Callable[[Array, Array], Array]] = {
    "add": operator.add,
    "min": np.minimum,
    "max": np.maximum,
    "or": operator.or_,
    "and": operator.and_,
    "xor": operator.xor,
    "exch": lambda old, new: new,
}


@opcode("atom", "red")
def atomic(ins: Instruction, registers: Registers) -> Execute:
    kind, returns = ins.opcode[-1], ins.opcode[0] == "atom"
    name = next((word for word in ins.opcode if word in ATOMIC), None)
    if name is None:
        raise Fault(f"instruction {ins.text} is not known")
    write = registers.writer(ins.operands[0] if returns else "_")
    place, given = ins.operands[returns:][:2]
    address, read = registers.address(place), registers.reader(given, kind)
    shared, size, to = is_shared(ins), access_bytes(ins), integer(kind)

    def execute(warp: Any, on: Array) -> None:
        values, old = read(warp), np.zeros((LANES, size), np.uint8)
        for buffer, offset, lanes in places(warp, address(warp), on, shared):
            of_lanes = np.flatnonzero(lanes)

            def operate(n: int, before: Array, of_lanes: Array = of_lanes) -> Array:
                new = ATOMIC[name](before.view(to), values[of_lanes[n]][None])
                return new.view(np.uint8)

            old[lanes] = buffer.atomic(offset, size, operate, warp.visitor)
            count(warp, buffer, offset, size, "written", atomic=True)
        write(warp, old.view(to)[:, 0], on)

    return execute


def places(warp: Any, address: Array, on: Array, shared: bool) -> list[tuple[Buffer, Array, Array]]:
    """(buffer, offsets of some lanes, their mask) of an access."""
    if not on.any():
        return []
    if shared:
        return [(warp.block.shared, address[on], on)]
    found = []
    for buffer, within in warp.block.memory.at(address[on]):
        lanes = np.zeros(LANES, bool)
        lanes[np.flatnonzero(on)[within]] = True
        found.append((buffer, address[lanes] & 0xFFFFFFFF, lanes))
    return found


def count(
    warp: Any, buffer: Buffer, offset: Array, size: int, how: str, atomic: bool = False
) -> None:
    counts = warp.block.counts
    if buffer is warp.block.shared:
        taken, least = bank_cycles(offset, size, atomic)
        counts["shared_cycles"] += taken
        counts["bank_conflicts"] += taken - least
        return
    sectors = np.unique(offset // SECTOR)
    if how == "read":
        new = sectors[buffer.read_by[sectors] != warp.visitor.block]
        buffer.read_by[new], buffer.sectors_read[new] = warp.visitor.block, True
        counts["sectors_read"] += len(new)
    else:
        buffer.sectors_written[sectors] = True
        counts["sectors_written"] += len(sectors)


@opcode("shfl")
def shuffle(ins: Instruction, registers: Registers) -> Execute:
    """Each lane reads the value of another one. What reaches beyond its segment reads its own."""
    mode = ins.opcode[2]
    target, *in_range = ins.operands[0].split("|")
    write = registers.writer(target)
    write_range = registers.writer(in_range[0] if in_range else "_")
    value, by, clamp = (registers.reader(o, "u32") for o in ins.operands[1:4])

    def execute(warp: Any, on: Array) -> None:
        b, c = by(warp).astype(np.int64), clamp(warp).astype(np.int64)
        segment, limit = c >> 8 & 31, c & 31
        most, least = (LANE & segment) | (limit & ~segment), LANE & segment
        source = {
            "up": LANE - b,
            "down": LANE + b,
            "bfly": LANE ^ b,
            "idx": least | (b & ~segment),
        }[mode]
        within = source >= most if mode == "up" else source <= most
        source = np.where(within, source, LANE)
        if not on[source[on]].all():
            raise Fault(f"divergent shuffle: it reads a lane that does not take part: {ins.text}")
        write(warp, value(warp)[source], on)
        write_range(warp, within, on)

    return execute


@opcode("redux")
def reduce_lanes(ins: Instruction, registers: Registers) -> Execute:
    """All lanes get the sum (or another reduction) over them."""
    kind, name = ins.opcode[-1], ins.opcode[2]
    read, write = registers.reader(ins.operands[1], kind), registers.writer(ins.operands[0])

    def execute(warp: Any, on: Array) -> None:
        values = read(warp)[on]
        total = values[0]
        for value in values[1:]:
            total = ATOMIC[name](total, value)
        write(warp, np.full(LANES, total, values.dtype), on)

    return execute


@opcode("vote")
def vote(ins: Instruction, registers: Registers) -> Execute:
    mode, read = ins.opcode[2], registers.reader(ins.operands[1], "pred")
    write = registers.writer(ins.operands[0])

    def execute(warp: Any, on: Array) -> None:
        said = read(warp) & on
        if mode == "ballot":
            ballot = int(np.packbits(said, bitorder="little").view(np.uint32)[0])
            write(warp, np.full(LANES, ballot, np.uint32), on)
        else:
            answer = said.any() if mode == "any" else (said | ~on).all()
            write(warp, np.full(LANES, answer), on)

    return execute


def _turned(matrix: Array, ins: Instruction) -> Array:
    """An 8 × 8 matrix of 16-bit values, transposed where the instruction says so."""
    return np.ascontiguousarray(matrix.T if "trans" in ins.opcode else matrix)


@opcode("ldmatrix")
def load_matrix(ins: Instruction, registers: Registers) -> Execute:
    """Matrices whose rows' addresses eight lanes each give."""
    targets = [registers.writer(p) for p in parts(ins.operands[0])]
    address = registers.address(ins.operands[1])

    def execute(warp: Any, on: Array) -> None:
        for rows, write in zip(np.split(address(warp), LANES // 8), targets, strict=False):
            matrix = warp.block.shared.load(rows, 16, warp.visitor).view(np.uint16)
            count(warp, warp.block.shared, rows, 16, "read")
            write(warp, _turned(matrix, ins).view(np.uint32).reshape(LANES), on)

    return execute


@opcode("stmatrix")
def store_matrix(ins: Instruction, registers: Registers) -> Execute:
    sources = [registers.reader(p, "b32") for p in parts(ins.operands[1])]
    address = registers.address(ins.operands[0])

    def execute(warp: Any, on: Array) -> None:
        for rows, read in zip(np.split(address(warp), LANES // 8), sources, strict=False):
            matrix = np.ascontiguousarray(read(warp)).view(np.uint16).reshape(8, 8)
            warp.block.shared.store(rows, _turned(matrix, ins).view(np.uint8), warp.visitor)
            count(warp, warp.block.shared, rows, 16, "written")

    return execute


@opcode("membar", "fence")
def fence(ins: Instruction, registers: Registers) -> Execute:
    return lambda warp, on: None
