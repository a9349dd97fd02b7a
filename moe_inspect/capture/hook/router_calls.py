"""The calls of a stack's routers in one forward pass. On a CPU they are kept until the pass ends,
then stacked and written together: a write per router would cost more than the router itself.

What is kept are references to the routers' tensors, or copies where the model changes these later
in the same pass (see `Stack.copies`).

R routers, T rows of a forward pass, N rows of several passes, K values per row, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe_inspect.capture.hook.kernels import Tape
from moe_inspect.trace.schema import EXTRAS

# index of the site, and what was recorded of its call: (ids [T, K], weights [T, K]), or of one of
# `schema.EXTRAS` (values,)
Call = tuple[int, tuple[Tensor, ...]]
# by what is recorded: "" for choices, else one of `schema.EXTRAS`
Calls = dict[str, list[Call]]
# of each `Group`: ids and weights [R, T, K], or the values of one of the extras
Whole = list[tuple[Tensor, ...]]


class Group(NamedTuple):
    """Consecutive routers of one device and of equal K and E, `first` being the index of the first
    one; ids from E on are no expert's. `kind`: "" for choices, else one of the extras."""

    kind: str
    first: int
    routers: int
    K: int
    E: int


class PassShape:
    """What a whole pass consists of. `routers`: (device, K, E) of each, `sites`: the index of its
    site. `extras`: what else is recorded, of `schema.EXTRAS`. `below`: ids from this on are no
    expert's, of each; None: E."""

    def __init__(
        self,
        routers: Sequence[tuple[torch.device, int, int]],
        sites: Sequence[int],
        extras: Sequence[str] = (),
        below: Sequence[int] | None = None,
    ):
        ends = below or [E for *_, E in routers]
        self.sites, self.groups = list(sites), list[Group]()
        for kind in ("", *extras):
            alike = [
                (device, EXTRAS[kind].width(K, E) if kind else K, end)
                for (device, K, E), end in zip(routers, ends, strict=True)
            ]
            first = 0
            for (_, K, end), same in groupby(alike):
                self.groups.append(Group(kind, first, len(list(same)), K, end))
                first += self.groups[-1].routers

    def whole(self, calls: Calls, T: int) -> Whole | None:
        """The calls of a pass of T rows, stacked; None unless every router has seen each of the
        rows once."""
        found: Whole = []
        try:
            by_router = {kind: self._by_router(of_kind) for kind, of_kind in calls.items()}
            for kind, first, routers, K, _ in self.groups:
                of_group = by_router[kind][first : first + routers]
                stacked = tuple(map(torch.stack, zip(*of_group, strict=True)))
                if {values.shape for values in stacked} != {(routers, T, K)}:
                    return None
                found.append(stacked)
        except RuntimeError:  # of different sizes
            return None
        return found

    def _by_router(self, calls: Sequence[Call]) -> list[tuple[Tensor, ...]]:
        """One call per router, in their order; empty where there are not as many."""
        if [n for n, _ in calls] != self.sites:
            calls = list(self._in_order(calls))
            if [n for n, _ in calls] != self.sites:
                return []
        return [values for _, values in calls]

    def _in_order(self, calls: Sequence[Call]) -> Iterator[Call]:
        """The calls by site. Where one was called with some of the rows at a time, these are one
        call."""
        for n, of_site in groupby(sorted(calls, key=itemgetter(0)), itemgetter(0)):
            parts = list(of_site)
            if len(parts) == self.sites.count(n):
                yield from parts
            else:
                yield n, tuple(map(torch.cat, zip(*(values for _, values in parts), strict=True)))


class TapeWriter:
    """Writes whole passes to the tapes of the same routers, as `kernels.record` would have, call by
    call. `tapes`: by what is recorded, of each router."""

    def __init__(self, shape: PassShape, tapes: Mapping[str, Sequence[Tape]]):
        self.shape = shape
        self.cursor = tapes[""][0].cursor.numpy()  # the same memory as the tensor
        self._parts: list[tuple[Tape, list[np.ndarray], list[np.ndarray]]] = []
        for group in shape.groups:
            tape = tapes[group.kind][group.first]
            pages = _pages(group, tape, tape.ids), _pages(group, tape, tape.weights)
            self._parts.append((tape, *pages))

    def write(self, whole: Whole, T: int) -> None:
        """There must be room for all of it."""
        start = int(self.cursor[0])
        for group, values, (tape, id_pages, pages) in zip(
            self.shape.groups, whole, self._parts, strict=True
        ):
            if pages:
                assert tape.weights is not None
                bits_RTK = _bits(values[-1].to(tape.weights.dtype)).numpy()
                _write(pages, start, bits_RTK, tape.P)
            if id_pages:
                ids_RTK = expert_ids(values[0], group.E, tape.null_id)
                _write(id_pages, start, ids_RTK, tape.P)
        self.cursor += T


def expert_ids(ids_RNK: Tensor, E: int, nowhere: int) -> np.ndarray:
    """Ids as int64, `nowhere` in place of those that are no expert's."""
    found_RNK = ids_RNK.long().numpy()
    # (as unsigned numbers, negative ids are the largest)
    if found_RNK.size and found_RNK.view(np.uint64).max() >= E:
        found_RNK = np.where((found_RNK < 0) | (found_RNK >= E), nowhere, found_RNK)
    return found_RNK


def _bits(tensor: Tensor) -> Tensor:
    """NumPy has no bfloat16: its bits."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def _pages(group: Group, tape: Tape, tensor: Tensor | None) -> list[np.ndarray]:
    """The group's part of each page, [R, P, K]; bfloat16 as its bits."""
    if tensor is None:
        return []
    end = tape.base + group.routers * tape.P * group.K
    parts = _bits(tensor).view(tape.pages, -1)[:, tape.base : end].numpy()
    return [part.reshape(group.routers, tape.P, group.K) for part in parts]


def _write(pages: Sequence[np.ndarray], start: int, values_RTK: np.ndarray, P: int) -> None:
    """Writes rows to the pages that they are on, from position `start` on."""
    T, done = values_RTK.shape[1], 0
    while done < T:
        page, row = divmod(start + done, P)
        n = min(P - row, T - done)
        pages[page % len(pages)][:, row : row + n] = values_RTK[:, done : done + n]
        done += n
