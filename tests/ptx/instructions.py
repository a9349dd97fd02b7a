"""What instructions do: one function per opcode, which decodes an instruction once and returns what
executes it. A new opcode is one function here."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx.memory import SECTOR, Buffer, bank_cycles
from tests.ptx.values import (
    LANES,
    Array,
    Fault,
    Instruction,
    Registers,
    as_bits,
    as_float,
    integer,
    is_float,
    parts,
    width,
)

Execute = Callable[[Any, Array], None]  # warp, mask
Decode = Callable[[Instruction, Registers], Execute]
DECODE: dict[str, Decode] = {}


def opcode(*names: str) -> Callable[[Decode], Decode]:
    def register(decode: Decode) -> Decode:
        DECODE.update(dict.fromkeys(names, decode))
        return decode

    return register


def computes(
    ins: Instruction, registers: Registers, kinds: tuple[str, ...], f: Callable[..., Array]
) -> Execute:
    """first operand = f(the others), read as `kinds`."""
    write = registers.writer(ins.operands[0])
    reads = [registers.reader(o, k) for o, k in zip(ins.operands[1:], kinds, strict=True)]
    return lambda warp, on: write(warp, f(*[read(warp) for read in reads]), on)


UNARY: dict[str, Any] = {"neg": operator.neg, "abs": np.abs, "sqrt": np.sqrt}
BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "min": np.fmin,  # of a number and NaN, the number
    "max": np.fmax,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
}


@opcode("add", "sub", "mul", "min", "max", "fma", "neg", "abs", "sqrt")
def arithmetic(ins: Instruction, registers: Registers) -> Execute:
    kind = ins.opcode[-1]
    if kind.endswith("x2"):
        return _pairs(ins, registers, kind[:-2])
    if is_float(kind):
        return _floats(ins, registers, kind)
    if ins.opcode[0] == "mul":
        return multiply(ins, registers)
    if ins.opcode[0] in UNARY:
        return computes(ins, registers, (kind,), UNARY[ins.opcode[0]])
    return computes(ins, registers, (kind, kind), BINARY[ins.opcode[0]])


def _float_operation(name: str, kind: str) -> Callable[..., Array]:
    """Of float64 for the 16-bit types, whose products it holds exactly, and for a fused product and
    sum (rounded twice where float64 is not exact); else of the type itself."""
    if name in UNARY:
        return UNARY[name]
    if name == "fma":
        return lambda a, b, c: a.astype(np.float64) * b + c
    two = BINARY[name]

    def operation(*values: Array) -> Array:  # (sm_100 has min and max of three)
        return functools.reduce(two, values)

    if kind in ("f32", "f64"):
        return operation
    return lambda a, *others: operation(a.astype(np.float64), *others)


def _floats(ins: Instruction, registers: Registers, kind: str) -> Execute:
    kinds, result = [kind] * (len(ins.operands) - 1), kind
    # 16-bit operands; the last and the result are f32
    if ins.opcode[-2] == "f32" and kind != "f32":
        kinds[-1] = result = "f32"
    operation = _float_operation(ins.opcode[0], result)
    f = lambda *given: as_bits(operation(*map(as_float, given, kinds)), result)  # noqa: E731
    return computes(ins, registers, tuple(f"b{width(k)}" for k in kinds), f)


def _pairs(ins: Instruction, registers: Registers, kind: str) -> Execute:
    """Two floats in a register."""
    whole, operation = f"b{2 * width(kind)}", _float_operation(ins.opcode[0], kind)
    half, to = integer(f"b{width(kind)}"), integer(whole)

    def of_both(*given: Array) -> Array:
        pairs = (np.ascontiguousarray(a).view(half).reshape(LANES, 2) for a in given)
        values = as_bits(operation(*(as_float(pair, kind) for pair in pairs)), kind)
        return np.ascontiguousarray(values).view(to)[:, 0]

    return computes(ins, registers, (whole,) * (len(ins.operands) - 1), of_both)


@opcode("mad")
def multiply(ins: Instruction, registers: Registers) -> Execute:
    """mul and mad of integers: the low or the high half of the product, or all of it."""
    kind, half = ins.opcode[-1], ins.opcode[1]
    bits = 2 * width(kind) if half == "wide" else width(kind)
    to = integer(f"{kind[0]}{bits}")

    def product(a: Array, b: Array, *c: Array) -> Array:
        if half == "hi":
            pairs = zip(a.tolist(), b.tolist(), strict=True)
            r = np.array([int(x) * int(y) >> bits & (1 << bits) - 1 for x, y in pairs], np.uint64)
            r = r.astype(f"u{to.itemsize}").view(to)
        else:
            r = a.astype(to) * b.astype(to)
        return r + c[0] if c else r

    kinds = (kind, kind, f"{kind[0]}{bits}")[: len(ins.operands) - 1]
    return computes(ins, registers, kinds, product)


@opcode("div", "rem")
def divide(ins: Instruction, registers: Registers) -> Execute:
    """Rounded towards zero."""
    kind, name = ins.opcode[-1], ins.opcode[0]
    write = registers.writer(ins.operands[0])
    first, second = (registers.reader(o, kind) for o in ins.operands[1:])

    def execute(warp: Any, on: Array) -> None:
        a, b = first(warp), second(warp)
        if (b[on] == 0).any():
            raise Fault("division by zero")
        b = np.where(b == 0, 1, b).astype(b.dtype)
        rest = np.fmod(a, b)
        write(warp, rest if name == "rem" else (a - rest) // b, on)

    return execute


@opcode("shf")
def funnel_shift(ins: Instruction, registers: Registers) -> Execute:
    """One half of the 64 bits that two registers hold, shifted."""
    _, direction, mode, _ = ins.opcode

    def shifted(low: Array, high: Array, n: Array) -> Array:
        both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
        n = (n & 31 if mode == "wrap" else np.minimum(n, 32)).astype(np.uint64)
        return (both << n >> np.uint64(32) if direction == "l" else both >> n).astype(np.uint32)

    return computes(ins, registers, ("u32",) * 3, shifted)


def _shifted(a: Array, n: Array, left: bool) -> Array:
    """By the operand's width or more: everything is shifted out, or the sign remains."""
    bits = 8 * a.dtype.itemsize
    within = np.minimum(n, bits - 1).astype(a.dtype)
    moved = a << within if left else a >> within
    return np.where((n < bits) | (a.dtype.kind == "i"), moved, 0).astype(a.dtype)


def _extracted_bits(a: Array, at: Array, n: Array) -> Array:
    at, n = (np.minimum(x & 255, 8 * a.dtype.itemsize).tolist() for x in (at, n))
    value = [int(x) >> p & (1 << m) - 1 for x, p, m in zip(a, at, n, strict=True)]
    if a.dtype.kind == "i":
        value = [v - (1 << m) if m and v >> m - 1 else v for v, m in zip(value, n, strict=True)]
    return np.array(value).astype(a.dtype)


def _leading_zeros(a: Array) -> Array:
    return np.array([8 * a.dtype.itemsize - int(x).bit_length() for x in a], np.uint32)


def _permuted_bytes(a: Array, b: Array, selector: Array) -> Array:
    from_ = np.stack([a, b], 1).astype("<u4").view(np.uint8)  # [LANES, 8]
    nibble = selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & np.uint32(15)
    byte = np.take_along_axis(from_, (nibble & 7).astype(np.int64), 1)
    sign = np.where(byte & 128, 255, 0)
    chosen = np.where(nibble & 8, sign, byte).astype(np.uint8)
    return np.ascontiguousarray(chosen).view(np.uint32)[:, 0]


def _by_table(a: Array, b: Array, c: Array, table: Array) -> Array:
    """Any function of three bits, by the table in the last operand."""
    result = np.zeros(LANES, np.uint32)
    for n in range(8):
        term = (a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c)
        result |= np.where(table >> np.uint32(n) & 1, term, 0).astype(np.uint32)
    return result


# of which kinds the operands are (None: of the instruction's), and what is computed of them
PLAIN: dict[str, tuple[tuple[str | None, ...], Callable[..., Array]]] = {
    **{name: ((None, None), BINARY[name]) for name in ("and", "or", "xor")},
    "not": ((None,), operator.invert),
    "popc": ((None,), lambda a: np.array([int(x).bit_count() for x in a], np.uint32)),
    "clz": ((None,), _leading_zeros),
    "shl": ((None, "u32"), functools.partial(_shifted, left=True)),
    "shr": ((None, "u32"), functools.partial(_shifted, left=False)),
    "bfe": ((None, "u32", "u32"), _extracted_bits),
    "prmt": (("b32",) * 3, _permuted_bytes),
    "lop3": (("b32",) * 4, _by_table),
    "selp": ((None, None, "pred"), lambda a, b, p: np.where(p, a, b)),
}


@opcode(*PLAIN)
def plain(ins: Instruction, registers: Registers) -> Execute:
    kinds, f = PLAIN[ins.opcode[0]]
    return computes(ins, registers, tuple(kind or ins.opcode[-1] for kind in kinds), f)


COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge},
    "neu": operator.ne,
}


@opcode("setp")
def compare(ins: Instruction, registers: Registers) -> Execute:
    if len(ins.opcode) != 3:
        raise Fault(f"instruction {ins.text} is not known")
    _, name, kind = ins.opcode
    if not is_float(kind):
        return computes(ins, registers, (kind, kind), COMPARE[name])
    bits = f"b{width(kind)}"
    f = lambda a, b: COMPARE[name](as_float(a, kind), as_float(b, kind))  # noqa: E731
    return computes(ins, registers, (bits, bits), f)


@opcode("mov")
def move(ins: Instruction, registers: Registers) -> Execute:
    kind = ins.opcode[-1]
    to, source = ins.operands
    if source.startswith("{"):
        return _pack(ins, registers)
    if to.startswith("{"):
        return _unpack(ins, registers)
    return computes(ins, registers, (f"b{width(kind)}" if is_float(kind) else kind,), lambda a: a)


def _pack(ins: Instruction, registers: Registers) -> Execute:
    kind, pieces = ins.opcode[-1], parts(ins.operands[1])
    reads = [registers.reader(piece, f"b{width(kind) // len(pieces)}") for piece in pieces]
    write, to = registers.writer(ins.operands[0]), integer(kind)
    packed = lambda warp: np.stack([read(warp) for read in reads], 1).view(to)  # noqa: E731
    return lambda warp, on: write(warp, packed(warp)[:, 0], on)


def _unpack(ins: Instruction, registers: Registers) -> Execute:
    kind, pieces = ins.opcode[-1], parts(ins.operands[0])
    to = integer(f"b{width(kind) // len(pieces)}")
    writes = [registers.writer(piece) for piece in pieces]
    read = registers.reader(ins.operands[1], kind)

    def execute(warp: Any, on: Array) -> None:
        values = np.ascontiguousarray(read(warp)).view(to).reshape(LANES, len(pieces))
        for n, write in enumerate(writes):
            write(warp, values[:, n], on)

    return execute


@opcode("cvt")
def convert(ins: Instruction, registers: Registers) -> Execute:
    to, kind = ins.opcode[-2:]
    if to.endswith("x2"):
        return _convert_pair(ins, registers, to[:-2], kind)
    if not is_float(kind) and not is_float(to):
        return computes(ins, registers, (kind,), lambda a: a.astype(integer(to)))
    if not is_float(kind):
        return computes(ins, registers, (kind,), lambda a: as_bits(a.astype(np.float64), to))
    bits = f"b{width(kind)}"
    if is_float(to):
        return computes(ins, registers, (bits,), lambda a: as_bits(as_float(a, kind), to))
    toward = np.trunc if "rzi" in ins.opcode else np.rint
    return computes(
        ins, registers, (bits,), lambda a: toward(as_float(a, kind)).astype(integer(to))
    )


def _convert_pair(ins: Instruction, registers: Registers, to: str, kind: str) -> Execute:
    """Two floats, the first of which goes into the upper half."""

    def pair(high: Array, low: Array) -> Array:
        halves = [as_bits(as_float(bits, kind), to) for bits in (low, high)]
        return np.stack(halves, 1).view(np.uint32)[:, 0]

    return computes(ins, registers, (f"b{width(kind)}",) * 2, pair)


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


@opcode("ldmatrix", "stmatrix")
def move_matrix(ins: Instruction, registers: Registers) -> Execute:
    """Loads or stores matrices, of whose rows eight lanes each give the addresses."""
    loads = ins.opcode[0] == "ldmatrix"
    held, place = ins.operands if loads else ins.operands[::-1]
    address, pieces = registers.address(place), parts(held)
    reads = [registers.reader(p, "b32") for p in pieces]
    writes = [registers.writer(p) for p in pieces]

    def execute(warp: Any, on: Array) -> None:
        shared = warp.block.shared
        for rows, read, write in zip(np.split(address(warp), 4), reads, writes, strict=False):
            if loads:
                matrix = shared.load(rows, 16, warp.visitor).view(np.uint16)
                write(warp, _turned(matrix, ins).view(np.uint32).reshape(LANES), on)
            else:
                matrix = np.ascontiguousarray(read(warp)).view(np.uint16).reshape(8, 8)
                shared.store(rows, _turned(matrix, ins).view(np.uint8), warp.visitor)
            count(warp, shared, rows, 16, "read" if loads else "written")

    return execute


@opcode("membar", "fence")
def fence(ins: Instruction, registers: Registers) -> Execute:
    return lambda warp, on: None
