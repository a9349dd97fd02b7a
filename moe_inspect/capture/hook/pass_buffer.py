"""The choices of small forward passes on a CPU. During a pass only references to the routers'
tensors are kept, or of a few numbers lists of them. At its end tensors are stacked, and once there
are many passes, these are written or counted together: in a decode step one write per router would
cost more than the router itself.

Of a model that changes these tensors later in the same pass, copies are kept (see `Scope.copies`).

R routers, T rows of a forward pass, N rows of several passes, K values per row, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, Union

import numpy as np
import torch
from torch import Tensor

from moe_inspect.capture.hook.kernels import Tape

# More is written call by call: kept, it would leave the processor's caches, and every pass would
# take memory afresh from the system
BUFFER_BYTES = 2**19

# Of calls with no more values, T·K, the numbers are kept: of a decode step of one or two rows
FEW_VALUES = 16

# (index of the site, ids [T, K] or None for one of the extras, values [T, K]) of one call
Call = tuple[int, "Tensor | list[Any] | None", "Tensor | list[Any]"]
Part = Union["Tensor", "np.ndarray"]  # of a group in one pass, [R, T, K]
# ids, or None for one of the extras, and values
Stacked = tuple["Part | None", Part]


class Group:
    """Consecutive routers of equal K and E, `first` being the index of the first one. `ids` int
    [R, T, K] (none for one of the extras) and `values` float [R, T, K]: of each pass that is
    kept."""

    def __init__(self, first: int, routers: int, K: int, E: int, with_ids: bool):
        self.first, self.routers, self.K, self.E, self.with_ids = first, routers, K, E, with_ids
        self.of_all = slice(first, first + routers)
        self.ids: list[Part] = []
        self.values: list[Part] = []

    def joined(self) -> tuple[np.ndarray | None, Tensor]:
        """All kept passes: ids int64 [R, N, K] and values [R, N, K]."""
        ids = _joined(self.ids).long().numpy() if self.with_ids else None
        return ids, _joined(self.values)


def _joined(parts: list[Part]) -> Tensor:
    tensors = [p if isinstance(p, Tensor) else torch.from_numpy(p) for p in parts]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, 1)


def as_tensors(call: Call) -> tuple[int, Tensor | None, Tensor]:
    """A call of which lists may have been kept. (Numbers in float64: each value is exact.)"""
    n, ids, values = call
    return (
        n,
        torch.tensor(ids) if isinstance(ids, list) else ids,
        torch.tensor(values, dtype=torch.float64) if isinstance(values, list) else values,
    )


class PassBuffer:
    """`routers`: (K, E) of each, `sites`: the index of its site. `extras`, of `options.EXTRAS`, are
    kept too."""

    def __init__(
        self,
        routers: Sequence[tuple[int, int]],
        sites: Sequence[int],
        extras: Sequence[str] = (),
    ):
        kinds = [(K, E, "") for K, E in routers]
        for kind in extras:
            kinds += [(E if kind == "logits" else K, E, kind) for K, E in routers]
        self.groups: list[Group] = []
        first = 0
        for (K, E, kind), same in groupby(kinds):
            self.groups.append(Group(first, len(list(same)), K, E, with_ids=not kind))
            first += self.groups[-1].routers
        # whose calls a whole pass consists of, in the order of the routers and then of the extras
        after = max(sites, default=-1) + 1
        times = range(1 + len(extras))
        self.sites = tuple(n * after + site for n in times for site in sites)
        values = sum(group.routers * group.K for group in self.groups)
        self.max_rows = BUFFER_BYTES // (12 * values)  # ids of 8 bytes, weights of 4
        self.few_rows = FEW_VALUES // max((group.K for group in self.groups), default=1)
        self.rows = 0  # of all passes that are kept

    def fits(self, T: int) -> bool:
        """Whether a pass of T rows is small enough to be kept."""
        return self.max_rows >= T

    @property
    def is_full(self) -> bool:
        return self.rows >= self.max_rows

    def whole(self, calls: list[Call], T: int) -> list[Stacked] | None:
        """The calls of a pass of T rows, by group, for `keep`; None unless every router has seen
        each of the rows once."""
        sites, ids, values = zip(*calls, strict=True) if calls else ((), (), ())
        if sites != self.sites:  # not one call per router, in their order
            calls = self._in_order(calls)
            sites, ids, values = zip(*calls, strict=True) if calls else ((), (), ())
            if sites != self.sites:
                return None
        found: list[Stacked] = []
        for group in self.groups:
            routers, shape = group.of_all, (group.routers, T, group.K)
            try:
                values_RTK = _stacked(values[routers])
                ids_RTK = _stacked(ids[routers]) if group.with_ids else None
            except (RuntimeError, ValueError):  # of different sizes
                return None
            if values_RTK.shape != shape or (ids_RTK is not None and ids_RTK.shape != shape):
                return None
            found.append((ids_RTK, values_RTK))
        return found

    def keep(self, stacked: list[Stacked], T: int) -> None:
        for group, (ids, values) in zip(self.groups, stacked, strict=True):
            if ids is not None:
                group.ids.append(ids)
            group.values.append(values)
        self.rows += T

    def _in_order(self, calls: list[Call]) -> list[Call]:
        """The calls by site, those of one site in their order. Where a site was called with some of
        the rows at a time, these are one call."""
        found: list[Call] = []
        for n, of_site in groupby(sorted(calls, key=itemgetter(0)), itemgetter(0)):
            parts = [as_tensors(call) for call in of_site]
            if len(parts) == self.sites.count(n):
                found += parts
                continue
            ids = [i for _, i, _ in parts if i is not None]
            found.append((n, torch.cat(ids) if ids else None, torch.cat([v for _, _, v in parts])))
        return found

    def clear(self) -> None:
        self.rows = 0
        for group in self.groups:
            group.ids, group.values = [], []


def _stacked(parts: Sequence[Any]) -> Part:
    """RuntimeError or ValueError where they differ in shape."""
    if type(parts[0]) is list:
        # (at once: lists that wait are in nobody's cache when they are read, and as many objects
        # have Python look for garbage)
        return np.array(parts)
    stacked = torch.stack(parts)
    return stacked.detach() if stacked.requires_grad else stacked


class TapeWriter:
    """Writes what a buffer has kept to the tapes of the same routers, as `kernels.record` would
    have, call by call."""

    def __init__(self, buffer: PassBuffer, tapes: Sequence[Tape]):
        self.buffer = buffer
        self.cursor = tapes[0].cursor.numpy()  # the same memory as the tensor
        self.groups = [
            (
                group,
                tapes[group.first],
                _pages(group, tapes[group.first], "ids"),
                _pages(group, tapes[group.first], "weights"),
            )
            for group in buffer.groups
        ]

    def write(self) -> None:
        """There must be room for all of it."""
        if not self.buffer.rows:
            return
        N, start = self.buffer.rows, int(self.cursor[0])
        for group, tape, ids, values in self.groups:
            ids_RNK, values_RNK = group.joined()
            # (as unsigned numbers, negative ids are the largest)
            if ids_RNK is not None and ids_RNK.size and ids_RNK.view(np.uint64).max() >= group.E:
                outside_RNK = (ids_RNK < 0) | (ids_RNK >= group.E)
                ids_RNK = np.where(outside_RNK, tape.null_id, ids_RNK)
            assert tape.weights is not None
            bits_RNK = _bits(values_RNK.to(tape.weights.dtype)).numpy()
            for page, row, done, n in _pieces(start, N, tape.P, tape.pages):
                values[page][:, row : row + n] = bits_RNK[:, done : done + n]
                if ids_RNK is not None:
                    ids[page][:, row : row + n] = ids_RNK[:, done : done + n]
        self.cursor += N
        self.buffer.clear()


def _bits(tensor: Tensor) -> Tensor:
    """NumPy has no bfloat16: its bits."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def _pages(group: Group, tape: Tape, kind: str) -> list[np.ndarray]:
    """The group's part of each page, [R, P, K]; bfloat16 as its bits."""
    tensor = getattr(tape, kind)
    if tensor is None:
        return []
    end = tape.base + group.routers * tape.P * group.K
    parts = _bits(tensor).view(tape.pages, -1)[:, tape.base : end].numpy()
    return [part.reshape(group.routers, tape.P, group.K) for part in parts]


def _pieces(start: int, rows: int, P: int, pages: int) -> Iterator[tuple[int, int, int, int]]:
    """(page, first row in it, rows before, rows) of each page that these rows are on."""
    done = 0
    while done < rows:
        page, row = divmod(start + done, P)
        n = min(P - row, rows - done)
        yield page % pages, row, done, n
        done += n
