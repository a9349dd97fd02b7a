"""One launch: its blocks in random order, the warps of a block interleaved at random between
barriers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.ptx.access import access_bytes, is_shared
from tests.ptx.memory import Buffer, Memory, Visitor
from tests.ptx.parser import Program
from tests.ptx.values import LANES, Array, Fault
from tests.ptx.warp import Code, Warp, decode


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
    given = [*arguments, *[0] * (len(program.parameters) - len(arguments))]
    memory.new_launch()
    launch = Launch(
        program,
        decode(program),
        (width, height),
        dict(zip(program.parameters, given, strict=True)),
        shared_bytes,
        memory,
        memory.new_epoch(),
        np.random.default_rng(seed),
        Counter(),
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
