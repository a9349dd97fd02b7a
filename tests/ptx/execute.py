"""One launch: its blocks in random order, the warps of a block interleaved at random between
barriers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tests.ptx.instructions import DECODE, Execute, access_bytes, is_shared
from tests.ptx.memory import Buffer, Memory, Visitor
from tests.ptx.values import ALL, LANES, Array, Fault, Instruction, Program, Read, Registers

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


@dataclass(frozen=True)
class Counts:
    """What a launch did, summed over its warps."""

    instructions: int
    warps: int
    barriers: float  # per warp
    sectors_read: int  # of 32 bytes: a block reads each once, since a cache holds it
    sectors_written: int  # one store instruction of a warp writes each once: no cache collects them
    least_sectors: int  # read and written, if each were moved once in the launch
    shared_cycles: int
    bank_conflicts: int  # of the shared cycles, those that conflicts cost
    lines: dict[int, int]  # line of the kernel's source → instructions


COUNTED = ("sectors_read", "sectors_written", "shared_cycles", "bank_conflicts")


@dataclass(frozen=True)
class Launch:
    program: Program
    code: Code
    grid: tuple[int, int]
    parameters: dict[str, int]
    shared_bytes: int
    memory: Memory
    first_epoch: int
    rng: np.random.Generator
    counts: Counter[str]


def execute(
    program: Program,
    grid: tuple[int, ...],
    arguments: list[int],
    memory: Memory,
    shared_bytes: int = 0,
    seed: int = 0,
) -> Counts:
    """Runs `program` on `memory`, whose `races` then tell what it should not have done. Parameters
    beyond `arguments` are 0."""
    if len(arguments) > len(program.parameters):
        raise Fault(f"{len(arguments)} arguments for {len(program.parameters)} parameters")
    width, height = (*grid, 1)[:2]
    named = zip(program.parameters, arguments, strict=False)
    given = dict.fromkeys(program.parameters, 0) | dict(named)
    memory.new_launch()
    code, epoch, rng = decode(program), memory.new_epoch(), np.random.default_rng(seed)
    launch = Launch(
        program, code, (width, height), given, shared_bytes, memory, epoch, rng, Counter()
    )
    executed = np.zeros(len(program.instructions), np.int64)
    for n in launch.rng.permutation(width * height):
        block = Block(launch, (int(n % width), int(n // width)))
        with np.errstate(all="ignore"):  # integers wrap, floats become infinite
            block.run()
        memory.races.update(block.shared.races)
        executed += np.sum([warp.executed for warp in block.warps], 0)
    lines, barriers = Counter[int](), 0
    for ins, times in zip(program.instructions, executed.tolist(), strict=True):
        lines[ins.line] += times
        barriers += times * (ins.opcode[0] == "bar")
    warps = width * height * (program.threads // LANES)
    return Counts(
        instructions=int(executed.sum()),
        warps=warps,
        barriers=barriers / warps,
        least_sectors=memory.sectors_touched(),
        lines=dict(lines),
        **{name: launch.counts[name] for name in COUNTED},
    )


class Block:
    def __init__(self, launch: Launch, place: tuple[int, int]) -> None:
        self.launch, self.place, self.grid = launch, place, launch.grid
        self.threads, self.memory = launch.program.threads, launch.memory
        self.counts = launch.counts
        shared = [i for i in launch.program.instructions if is_shared(i)]
        narrowest = min((access_bytes(i) for i in shared if "matrix" not in i.opcode[0]), default=2)
        size = -(-max(launch.shared_bytes, 16) // 16) * 16
        self.shared = Buffer("shared memory", np.zeros(size, np.uint8), min(narrowest, 4))
        self.shared.written[:] = False
        self.warps = [Warp(self, n, launch.code) for n in range(self.threads // LANES)]
        self.first_epoch = self.memory.new_epoch()
        self._begin_epoch(self.first_epoch)

    def parameter(self, name: str, to: np.dtype[Any]) -> Array:
        value = self.launch.parameters[name] & (1 << 8 * to.itemsize) - 1
        return np.full(LANES, value, f"u{to.itemsize}").view(to)

    def _begin_epoch(self, now: int) -> None:
        for warp in self.warps:
            warp.visitor = Visitor(self.launch.first_epoch, self.first_epoch, now, warp.index)

    def run(self) -> None:
        rng = self.launch.rng
        short_turns, order = rng.random() < 0.5, rng.permutation(len(self.warps))
        running = list(self.warps)
        while running:
            # half of the blocks by short turns; in the others one warp gets as far as it can before
            # the next one starts
            if short_turns:
                warp, turn = running[rng.integers(len(running))], int(rng.integers(1, 40))
            else:
                warp, turn = min(running, key=lambda w: order[w.index]), 1000
            if warp.run(turn):
                continue
            running.remove(warp)
            if not running and (waiting := [w for w in self.warps if w.at_barrier]):
                if any(w.ended.any() for w in self.warps):
                    raise Fault("a barrier that some threads never reach")
                for w in waiting:
                    w.pass_barrier()
                self._begin_epoch(self.memory.new_epoch())
                running = list(self.warps)
