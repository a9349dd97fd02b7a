"""Global and shared memory: what it holds, which bytes anybody has written, and who touched what
since the last barrier."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tests.ptx.values import Array, Fault

SPACING = 32  # bits: every global buffer begins at a multiple of 2**32
SECTOR = 32  # bytes, the unit that global memory moves
BANK = 4  # bytes per bank of shared memory, of which there are 32

# Who touched a unit of memory last, in one number: epoch · 128 + warp, + 64 if by an atomic
# operation; 127 for more than one warp. An epoch is the time of one block between two barriers:
# blocks run one after another, so that the numbers of a block follow each other.
EPOCH = 128
ATOMIC = 64
SEVERAL = 127


@dataclass(frozen=True)
class Visitor:
    """Who touches memory, and when."""

    launch: int  # the first epoch of this launch, times EPOCH
    block: int  # … of this block
    now: int  # … and the present one
    warp: int


@dataclass
class Buffer:
    """Bytes. `unit`: of so many bytes is remembered who touched them; no access is narrower."""

    name: str
    data: Array  # uint8
    unit: int
    races: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        units = len(self.data) // self.unit
        self.written = np.ones(units, bool)
        self.writer, self.reader = np.zeros(units, np.int64), np.zeros(units, np.int64)
        self.read_by_several_blocks = np.zeros(units, bool)
        self.new_launch()

    def new_launch(self) -> None:
        self.read_by_several_blocks[:] = False
        sectors = len(self.data) // SECTOR + 1
        self.read_by = np.zeros(sectors, np.int64)  # the last block that read a sector
        self.sectors_read, self.sectors_written = np.zeros(sectors, bool), np.zeros(sectors, bool)

    def units(self, offset: Array, size: int) -> Array:
        """The units [n, size / unit] of an access to `size` bytes at each of n offsets."""
        outside = (offset < 0) | (offset + size > len(self.data))
        if outside.any():
            at = int(offset[outside][0])
            raise Fault(f"access to byte {at} of {self.name}, which has {len(self.data)}")
        if (offset % size).any():
            raise Fault(f"misaligned access of {size} bytes to {self.name}")
        if size < self.unit:
            raise Fault(f"access of {size} bytes to {self.name}, whose values have {self.unit}")
        return offset[:, None] // self.unit + np.arange(size // self.unit)

    def load(self, offset: Array, size: int, who: Visitor) -> Array:
        """Bytes [n, size] at n offsets."""
        units = self.units(offset, size)
        if not self.written[units].all():
            at = int(units[~self.written[units]][0]) * self.unit
            raise Fault(f"byte {at} of {self.name} is read before anybody wrote it")
        self._conflicts("wrote", "reads", self.writer[units], who)
        last = self.reader[units]
        self.read_by_several_blocks[units] |= (last >= who.launch) & (last < who.block)
        me = who.now + who.warp
        self.reader[units] = np.where((last < who.now) | (last == me), me, who.now + SEVERAL)
        return self.data[offset[:, None] + np.arange(size)]

    def store(self, offset: Array, values: Array, who: Visitor) -> None:
        """Bytes [n, size] to n offsets."""
        units = self.units(offset, values.shape[1])
        at = offset[:, None] + np.arange(values.shape[1])
        # threads that hold copies of a value may all store it: that changes nothing
        same = (self.data[at] == values).reshape(*units.shape, self.unit).all(-1)
        self._about_to_change(units[~(same & self.written[units])], who)
        self.writer[units] = who.now + who.warp
        self.data[at] = values
        self.written[units] = True
        if (self.data[at] != values).any():
            self.races[f"{self.name}: two lanes of a warp write different values"] += 1

    def atomic(
        self, offset: Array, size: int, operate: Callable[[int, Array], Array], who: Visitor
    ) -> Array:
        """operate(n, old bytes) → new bytes, for one offset after another; returns the old ones."""
        units = self.units(offset, size)
        if not self.written[units].all():
            raise Fault(f"an atomic operation on a part of {self.name} that nobody wrote")
        self._about_to_change(units, who, atomic=True)
        last, me = self.writer[units], who.now + ATOMIC + who.warp
        self.writer[units] = np.where((last < who.now) | (last == me), me, who.now + SEVERAL)
        old = np.empty((len(offset), size), np.uint8)
        for n, start in enumerate(offset):
            old[n] = self.data[start : start + size]
            self.data[start : start + size] = operate(n, old[n])
        return old

    def _about_to_change(self, units: Array, who: Visitor, atomic: bool = False) -> None:
        self._conflicts("wrote", "writes", self.writer[units], who, atomic)
        self._conflicts("read", "writes", self.reader[units], who)
        if self.read_by_several_blocks[units].any():
            self.races[f"{self.name}: blocks read, another writes"] += 1

    def _conflicts(
        self, did: str, does: str, last: Array, who: Visitor, atomic: bool = False
    ) -> None:
        """Notes the races with whoever touched memory last."""
        mine = last - who.now - who.warp
        fine = (last < who.launch) | ((last >= who.block) & (last < who.now))
        fine |= (mine == 0) | (mine == ATOMIC)
        if atomic:  # atomic operations do not race with each other
            fine |= last % EPOCH >= ATOMIC
        if fine.all():
            return
        blocks = int((~fine & (last < who.block)).sum())
        warps = int((~fine & (last >= who.now)).sum())
        if blocks:
            self.races[f"{self.name}: one block {did}, another {does}"] += blocks
        if warps:
            self.races[f"{self.name}: one warp {did}, another {does}, no barrier between"] += warps


class Memory:
    """Global memory. Buffers are far apart, so that what is beyond one is in none."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.races: Counter[str] = Counter()  # of all launches
        self.epoch = 0

    def add(self, name: str, data: Array) -> Buffer:
        """A buffer over the bytes of `data`, which is changed in place."""
        assert data.flags.c_contiguous
        buffer = Buffer(name, data.reshape(-1).view(np.uint8), data.dtype.itemsize, self.races)
        self.buffers.append(buffer)
        return buffer

    def address(self, buffer: Buffer) -> int:
        return (1 + next(n for n, b in enumerate(self.buffers) if b is buffer)) << SPACING

    def at(self, address: Array) -> list[tuple[Buffer, Array]]:
        """The buffers that `address` [n] is in, each with a mask."""
        number = address >> SPACING
        found = []
        for n in np.unique(number):
            if not 1 <= n <= len(self.buffers):
                raise Fault(f"access to {int(address[number == n][0]):#x}, in no buffer")
            found.append((self.buffers[n - 1], number == n))
        return found

    def new_launch(self) -> None:
        """Everything before it happened before everything in it."""
        for buffer in self.buffers:
            buffer.new_launch()

    def new_epoch(self) -> int:
        self.epoch += EPOCH
        return self.epoch

    def sectors_touched(self) -> int:
        """Different sectors that the last launch read, and that it wrote."""
        return sum(int(b.sectors_read.sum() + b.sectors_written.sum()) for b in self.buffers)


def bank_cycles(address: Array, size: int, atomic: bool) -> tuple[int, int]:
    """(cycles that an access of some lanes to shared memory takes, cycles without conflicts).
    Lanes that read one word share a cycle; atomic operations on one word do not."""
    lanes = max(1, 32 * BANK // max(size, BANK))  # that move at once
    taken = least = 0
    for first in range(0, len(address), lanes):
        word = (address[first : first + lanes, None] + np.arange(0, max(size, BANK), BANK)) // BANK
        word = word.ravel() if atomic else np.unique(word)
        taken += int(np.bincount(word % 32).max())
        least += 1
    return taken, least
