"""The 32 lanes of a warp. Lanes that took different branches run one group after the other, the
lowest instruction first, until they meet."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tests.ptx import access  # noqa: F401  registers its instructions
from tests.ptx.arithmetic import DECODE, Execute
from tests.ptx.memory import Visitor
from tests.ptx.parser import Instruction, Program
from tests.ptx.values import ALL, LANES, Array, Fault, Read, Registers

NEXT, JUMP, END, BARRIER, TOGETHER = range(5)


@dataclass(frozen=True)
class Step:
    """An instruction, decoded."""

    what: int
    text: str
    execute: Execute
    guard: Read | None
    negated: bool
    target: int  # of a jump
    members: Read  # the lanes that must be there together, as bits


class Code(NamedTuple):
    steps: tuple[Step, ...]
    registers: Registers


def decode(program: Program) -> Code:
    registers = Registers(program.registers)
    for ins in program.instructions:  # all registers must be known before the first warp starts
        for name in re.findall(r"%[a-z]+\d+", " ".join((ins.guard or "", *ins.operands))):
            registers.find(name)
    return Code(tuple(_step(i, program, registers) for i in program.instructions), registers)


def _step(ins: Instruction, program: Program, registers: Registers) -> Step:
    name, what, execute = ins.opcode[0], NEXT, lambda warp, on: None
    target, members = 0, registers.reader("-1", "b32")
    if name == "bra":
        what, target = JUMP, program.labels[ins.operands[-1]]
    elif name in ("ret", "exit"):
        what = END
    elif name == "bar" and ins.opcode[1] == "sync" and ins.operands == ("0",):
        what = BARRIER
    elif ins.opcode[:2] == ("bar", "warp"):
        what, members = TOGETHER, registers.reader(ins.operands[0], "b32")
    elif name in DECODE:
        execute = DECODE[name](ins, registers)
        if "sync" in ins.opcode:
            what = TOGETHER
            if "matrix" not in name:  # these name no lanes, and need all
                members = registers.reader(ins.operands[-1], "b32")
    else:
        raise Fault(f"instruction {ins.text} is not known")
    guard = registers.reader(ins.guard, "pred") if ins.guard else None
    return Step(what, ins.text, execute, guard, ins.negated, target, members)


class Warp:
    def __init__(self, block: Any, index: int, code: Code) -> None:
        self.block, self.index, self.steps = block, index, code.steps
        self.first_thread = index * LANES
        self.registers: list[Array] = [np.zeros(LANES, t) for t in code.registers.types]
        self.groups: dict[int, Array] = {0: ALL}  # index of the next instruction → lanes
        self.ended = np.zeros(LANES, bool)
        self.executed = [0] * len(code.steps)
        self.visitor: Visitor

    def run(self, most: int) -> bool:
        """Executes up to `most` instructions. False: waits at a barrier or has ended."""
        for _ in range(most):
            at = self._next()
            if at is None:
                return False
            on = self.groups.pop(at)
            step = self.steps[at]
            self.executed[at] += 1
            active = on
            if step.guard is not None:
                active = on & (step.guard(self) ^ step.negated)
            if step.what == JUMP:
                self._join(step.target, active)
                self._join(at + 1, on & ~active)
            elif step.what == END:
                self.ended = self.ended | active
                self._join(at + 1, on & ~active)
            else:
                if step.what == TOGETHER:
                    self._require_members(step, active)
                if active is ALL or active.all():
                    step.execute(self, ALL)
                elif active.any():
                    step.execute(self, active)
                self._join(at + 1, on)
        return True

    def pass_barrier(self) -> None:
        ((at, on),) = self.groups.items()
        self.executed[at] += 1
        self.groups = {at + 1: on}

    @property
    def at_barrier(self) -> bool:
        return len(self.groups) == 1 and self.steps[min(self.groups)].what == BARRIER

    def _next(self) -> int | None:
        """Lanes that wait for others, at a barrier or a shuffle, go last."""
        if len(self.groups) == 1:
            (at,) = self.groups
            return None if self.steps[at].what == BARRIER else at
        waiting: Sequence[int] = sorted(self.groups)
        for at in waiting:
            if self.steps[at].what not in (BARRIER, TOGETHER):
                return at
        for at in waiting:
            step = self.steps[at]
            if step.what == TOGETHER and not self._absent(step, self.groups[at]):
                return at
        if not waiting:
            return None
        at = waiting[0]
        if self.steps[at].what == BARRIER:
            raise Fault("lanes of a warp part at a barrier")
        self._require_members(self.steps[at], self.groups[at])
        raise AssertionError

    def _absent(self, step: Step, on: Array) -> bool:
        """Whether lanes that `step` names are elsewhere, and have not ended."""
        named = np.unpackbits(step.members(self)[on][:1].view(np.uint8), bitorder="little")
        return bool((named.astype(bool) & ~on & ~self.ended).any())

    def _require_members(self, step: Step, on: Array) -> None:
        if on is not ALL and self._absent(step, on):
            raise Fault(f"divergent shuffle: lanes that it names are elsewhere: {step.text}")

    def _join(self, at: int, on: Array) -> None:
        if on is ALL:
            self.groups[at] = ALL
            return
        if not on.any():
            return
        if at in self.groups:
            on = self.groups[at] | on
        self.groups[at] = ALL if on.all() else on
