"""Reads the text of a compiled kernel; and operands of its instructions: the lanes' values as NumPy
arrays of the type that the instruction names, decoded once per program."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Instruction:
    text: str
    opcode: tuple[str, ...]  # "st.global.b32" → ("st", "global", "b32")
    operands: tuple[str, ...]
    guard: str | None  # the predicate that decides for each lane whether it takes part
    negated: bool
    line: int  # in the kernel's source file; 0 where the compiler names none


@dataclass(frozen=True)
class Program:
    name: str
    parameters: tuple[str, ...]
    threads: int
    registers: dict[str, str]  # prefix → type: "%rd" → "b64"
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]  # → index of the instruction that follows


def parse(text: str) -> Program:
    """The kernel in `text`, of which there must be one."""
    head, body = text[text.index(".entry") :].split("\n{", 1)
    name, threads = re.match(r"\.entry\s+(\w+)", head), re.search(r"\.reqntid\s+(\d+)", head)
    assert name, head
    assert threads, head
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    line = 0
    for statement in _statements(body[: body.rindex("}")]):
        if statement.endswith(":"):
            labels[statement[:-1]] = len(instructions)
        elif location := re.match(r"\.loc\s+\d+\s+(\d+)", statement):
            line = int(location[1])
        elif not statement.startswith("."):
            instructions.append(_instruction(statement, line))
    return Program(
        name[1],
        tuple(re.findall(r"\b(\w+_param_\d+)", head)),
        int(threads[1]),
        {prefix: kind for kind, prefix in re.findall(r"\.reg\s+\.(\w+)\s+(%[a-z]+)<", body)},
        tuple(instructions),
        labels,
    )


def _statements(body: str) -> Iterator[str]:
    for row in body.split(".section")[0].splitlines():
        row = row.split("//")[0].strip()
        if re.fullmatch(r"[$\w]+:", row):
            yield row
        else:
            yield from (s for part in row.split(";") if (s := part.strip()) and s not in "{}")


def _instruction(statement: str, line: int) -> Instruction:
    found = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", statement)
    assert found, f"no instruction: {statement}"
    # commas within braces and brackets do not separate operands
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", found[4])
    return Instruction(
        statement,
        tuple(found[3].split(".")),
        tuple(operand.strip() for operand in operands),
        found[2],
        found[1] == "!",
        line,
    )


LANES = 32
ALL = np.ones(LANES, bool)  # the mask of a warp whose lanes all take part, compared by identity
Array = np.ndarray[Any, Any]
Read = Callable[[Any], Array]  # warp → values [LANES]
Write = Callable[[Any, Array, Array], None]  # warp, values, mask


class Fault(Exception):
    """What no GPU may be asked to do, or what the executor does not know."""


@cache
def width(kind: str) -> int:
    """Bits of a type: "s32" → 32, "bf16" → 16."""
    if kind == "pred":
        return 1
    found = re.fullmatch(r"(?:[busf]|bf)(\d+)", kind)
    if found is None:
        raise Fault(f"type {kind} is not known")
    return int(found[1])


@cache
def integer(kind: str) -> np.dtype[Any]:
    """The NumPy type of an integer, or of a float's bits."""
    if kind == "pred":
        return np.dtype(bool)
    return np.dtype(f"{'i' if kind[0] == 's' else 'u'}{width(kind) // 8}")


def is_float(kind: str) -> bool:
    return kind[0] == "f" or kind.startswith("bf")


FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}


def as_float(bits: Array, kind: str) -> Array:
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(FLOATS[kind])


def as_bits(x: Array, kind: str) -> Array:
    """`x` of any float type rounded to nearest even."""
    if kind != "bf16":
        return x.astype(FLOATS[kind]).view(integer(kind))
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


class Registers:
    """Where each register of a program lies in a warp's list of values."""

    def __init__(self, kinds: dict[str, str]) -> None:
        self.kinds = kinds
        self.index: dict[str, int] = {}
        self.types: list[np.dtype[Any]] = []

    def find(self, name: str) -> int:
        if name not in self.index:
            prefix = name.rstrip("0123456789")
            if prefix not in self.kinds:
                raise Fault(f"register {name} is not declared")
            kind = self.kinds[prefix]
            self.index[name] = len(self.types)
            self.types.append(integer(kind if kind == "pred" else f"b{width(kind)}"))
        return self.index[name]

    def reader(self, operand: str, kind: str) -> Read:
        """Reads `operand` as the integer type `kind`: a wider register's low bits, a narrower one
        with zeros before them."""
        to = integer(kind)
        if not operand.startswith("%"):
            bits = np.full(LANES, _constant(operand) & ((1 << 64) - 1), np.uint64)
            constant = bits != 0 if kind == "pred" else bits.astype(f"u{to.itemsize}").view(to)
            return lambda warp: constant
        if operand in SPECIAL:
            special = SPECIAL[operand]
            return lambda warp: np.broadcast_to(special(warp), LANES).astype(to)
        at = self.find(operand)
        if self.types[at] == to:
            return lambda warp: warp.registers[at]
        if self.types[at].itemsize == to.itemsize:
            return lambda warp: warp.registers[at].view(to)
        return lambda warp: warp.registers[at].astype(f"u{to.itemsize}").view(to)

    def writer(self, operand: str) -> Write:
        """Writes a register: signed values with their sign extended, others with zeros."""
        if operand == "_":
            return lambda warp, values, on: None
        at = self.find(operand)
        to = self.types[at]

        def write(warp: Any, values: Array, on: Array) -> None:
            values = values.astype(to, copy=False)
            warp.registers[at] = values if on is ALL else np.where(on, values, warp.registers[at])

        return write

    def address(self, operand: str) -> Read:
        """Reads the byte address in "[%rd1 + 16]"."""
        found = re.fullmatch(r"\[\s*(\S+?)\s*(?:\+\s*(-?\d+)\s*)?\]", operand)
        if found is None:
            raise Fault(f"address {operand} is not understood")
        # there is no object before the dynamic shared memory: it begins at 0
        base = self.reader("0" if found[1] == "global_smem" else found[1], "s64")
        offset = int(found[2] or 0)
        return lambda warp: base(warp) + offset


def _constant(operand: str) -> int:
    if operand == "global_smem":
        return 0
    if operand.startswith("0f"):
        return int(operand[2:], 16)
    try:
        return int(operand.rstrip("U"), 0)
    except ValueError:
        raise Fault(f"operand {operand} is not understood") from None


def parts(operand: str) -> list[str]:
    """ "{ %r1, %r2 }" → ["%r1", "%r2"]; a single operand is one part."""
    return [part.strip() for part in operand.strip("{} ").split(",")]


SPECIAL: dict[str, Callable[[Any], Any]] = {
    "%tid.x": lambda warp: warp.first_thread + np.arange(LANES),
    "%tid.y": lambda warp: 0,
    "%tid.z": lambda warp: 0,
    "%laneid": lambda warp: np.arange(LANES),
    "%ctaid.x": lambda warp: warp.block.place[0],
    "%ctaid.y": lambda warp: warp.block.place[1],
    "%ctaid.z": lambda warp: 0,
    "%nctaid.x": lambda warp: warp.block.grid[0],
    "%nctaid.y": lambda warp: warp.block.grid[1],
    "%ntid.x": lambda warp: warp.block.threads,
}
