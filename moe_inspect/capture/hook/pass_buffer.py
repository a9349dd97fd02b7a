"""The choices of a forward pass on a CPU, kept until the pass ends and then written or counted
together: one write per pass instead of one per router, which in a decode step costs more than the
router itself.

A choice is copied at the call that hands it over, because a model may change its tensors in place
later in the same pass, or use them again as output buffers. Two copies into memory that is already
there cost about a microsecond.

R routers, T rows of the forward pass, K values per row, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from moe_inspect.capture.hook.kernels import Tape

# A larger pass is written call by call: kept, its values would leave the processor's caches
BUFFER_BYTES = 2**20

Pages = list[np.ndarray]


class Slot:
    """Where one router's values of the current pass are kept: views [T, K] of its group's buffers,
    `ids` None for router logits. `seen`: rows so far, of all calls in the pass."""

    __slots__ = ("ids", "seen", "shape", "values")

    def __init__(self, ids: Tensor | None, values: Tensor):
        self.ids, self.values, self.shape, self.seen = ids, values, values.shape, 0

    def keep(self, ids_TK: Tensor | None, values_TK: Tensor) -> None:
        """Copies what one call of the router hands over."""
        if values_TK.requires_grad:
            values_TK = values_TK.detach()
        if values_TK.shape == self.shape and not self.seen:
            self.values.copy_(values_TK)
            if self.ids is not None and ids_TK is not None:
                self.ids.copy_(ids_TK)
            self.seen = self.shape[0]
        else:
            self._keep_part(ids_TK, values_TK)

    def _keep_part(self, ids_TK: Tensor | None, values_TK: Tensor) -> None:
        """One of several calls in a pass. Rows beyond the pass are only counted: the check at its
        end names the router."""
        T, K = values_TK.shape
        assert self.shape[1] == K, f"{K} values per row where the first pass had {self.shape[1]}"
        first, self.seen = self.seen, self.seen + T
        if self.seen <= self.shape[0]:
            self.values[first : self.seen].copy_(values_TK)
            if self.ids is not None and ids_TK is not None:
                self.ids[first : self.seen].copy_(ids_TK)


class Group:
    """Consecutive routers of equal K and E, `first` being the index of the first one. `dtype`: of
    the values. While a pass is open: `ids` int64 [R, T, K], or None for router logits, and `values`
    [R, T, K], those of bfloat16 as their bits."""

    def __init__(
        self, first: int, routers: int, K: int, E: int, with_ids: bool, dtype: torch.dtype
    ):
        self.first, self.routers, self.K, self.E, self.with_ids = first, routers, K, E, with_ids
        self.dtype = dtype
        self.ids: np.ndarray | None = None
        self.values = np.empty(0)
        self.slots: list[Slot] = []

    @property
    def bytes_per_row(self) -> int:
        return self.routers * self.K * (8 * self.with_ids + self.dtype.itemsize)

    def allocate(self, rows: int) -> None:
        size = self.routers * rows * self.K
        self._ids = torch.empty(size if self.with_ids else 0, dtype=torch.int64)
        self._values = torch.empty(size, dtype=self.dtype)

    def open(self, T: int) -> None:
        shape = (self.routers, T, self.K)
        size = self.routers * T * self.K
        values_RTK = self._values[:size].view(shape)
        bits_RTK = values_RTK.view(torch.int16) if self.dtype == torch.bfloat16 else values_RTK
        ids_RTK = self._ids[:size].view(shape) if self.with_ids else None
        self.values = bits_RTK.numpy()
        self.ids = ids_RTK.numpy() if ids_RTK is not None else None
        ids_of = ids_RTK.unbind(0) if ids_RTK is not None else [None] * self.routers
        self.slots = [Slot(i, v) for i, v in zip(ids_of, values_RTK.unbind(0), strict=True)]


class PassBuffer:
    """`routers`: (K, E) of each. `weight_dtype`: that gate weights are kept in. With `logits`, a
    slot for the logits of each router follows, as float16."""

    def __init__(
        self, routers: Sequence[tuple[int, int]], weight_dtype: torch.dtype, logits: bool = False
    ):
        kinds = [(K, E, True, weight_dtype) for K, E in routers]
        kinds += [(E, E, False, torch.float16) for _, E in routers] if logits else []
        self.groups: list[Group] = []
        first = 0
        for kind, same in groupby(kinds):
            self.groups.append(Group(first, len(list(same)), *kind))
            first += self.groups[-1].routers
        self.max_rows = BUFFER_BYTES // sum(group.bytes_per_row for group in self.groups)
        self.slots: list[Slot] = []  # of every router, then of its logits
        self._T = -1

    def open(self, T: int) -> bool:
        """Begins a pass of T rows; False where it is too large to be kept."""
        if self.max_rows < T:
            return False
        if self._T != T:
            # no inference tensors: they could not be written outside inference mode
            with torch.inference_mode(False):
                for group in self.groups:
                    if self._T < 0:
                        group.allocate(self.max_rows)
                    group.open(T)
            self.slots = [slot for group in self.groups for slot in group.slots]
            self._T = T
        for slot in self.slots:
            slot.seen = 0
        return True

    @property
    def is_complete(self) -> bool:
        """Whether every router has seen each row of the pass once."""
        return all(slot.seen == self._T for slot in self.slots)


class TapeWriter:
    """Writes what a buffer has kept to the tapes of the same routers, as `kernels.record` would
    have, call by call."""

    def __init__(self, buffer: PassBuffer, tapes: Sequence[Tape]):
        self.tapes = tapes
        state = tapes[0]
        # the same memory as the tensors: reading a number from a tensor costs more than a copy
        self.cursor, self.dropped = state.cursor.numpy(), state.dropped.numpy()
        self.limit, self.enabled = state.limit.numpy(), state.enabled.numpy()
        self.groups = [
            (
                group,
                _pages(group, tapes[group.first], "ids"),
                _pages(group, tapes[group.first], "weights"),
            )
            for group in buffer.groups
        ]

    def write(self) -> None:
        if not self.enabled[0]:
            return
        for group, ids, values in self.groups:
            seen = [slot.seen for slot in group.slots]
            together = seen.count(seen[0]) == len(seen)
            for n in range(1 if together else group.routers):
                routers = slice(0, group.routers) if together else slice(n, n + 1)
                self._append(group, ids, values, routers, seen[n])

    def _append(self, group: Group, ids: Pages, values: Pages, routers: slice, seen: int) -> None:
        """The rows of some routers of a group, all of which have `seen` as many."""
        lanes = slice(group.first + routers.start, group.first + routers.stop)
        tape = self.tapes[lanes.start]
        start = int(self.cursor[lanes.start])
        room = max(0, min(seen, group.slots[0].shape[0], int(self.limit[0]) - start))
        values_RTK = group.values[routers]
        ids_RTK = group.ids[routers] if group.ids is not None else None
        # (as unsigned numbers, negative ids are the largest)
        if ids_RTK is not None and ids_RTK.size and ids_RTK.view(np.uint64).max() >= group.E:
            ids_RTK = np.where((ids_RTK < 0) | (ids_RTK >= group.E), tape.null_id, ids_RTK)
        for page, row, done, n in _pieces(start, room, tape.P, tape.pages):
            values[page][routers, row : row + n] = values_RTK[:, done : done + n]
            if ids_RTK is not None:
                ids[page][routers, row : row + n] = ids_RTK[:, done : done + n]
        self.cursor[lanes] += seen
        if room < seen:
            self.dropped[lanes] += seen - room


def _pages(group: Group, tape: Tape, kind: str) -> Pages:
    """The group's part of each page, [R, P, K]; bfloat16 as its bits."""
    tensor = getattr(tape, kind)
    if tensor is None:
        return []
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    end = tape.base + group.routers * tape.P * group.K
    parts = tensor.view(tape.pages, -1)[:, tape.base : end].numpy()
    return [part.reshape(group.routers, tape.P, group.K) for part in parts]


def _pieces(start: int, rows: int, P: int, pages: int) -> Iterator[tuple[int, int, int, int]]:
    """(page, first row in it, rows before, rows) of each page that these rows are on."""
    done = 0
    while done < rows:
        page, row = divmod(start + done, P)
        n = min(P - row, rows - done)
        yield page % pages, row, done, n
        done += n
