"""Reads the text of a compiled kernel."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass


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
