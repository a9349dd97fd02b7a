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

import torch
from torch import Tensor

from moe_inspect.capture.hook.kernels import Tape
from moe_inspect.trace.schema import EXTRAS

# index of the site, and what was recorded of its call: (ids [T, K], weights [T, K]), or of one of
# `schema.EXTRAS` (values,)
Call = tuple[int, tuple[Tensor, ...]]
# by what is recorded: "" for choices, else one of `schema.EXTRAS`
Calls = dict[str, list[Call]]
# of each `AlikeRouters`: ids and weights [R, T, K], or the values of one of the extras
Whole = list[tuple[Tensor, ...]]


class AlikeRouters(NamedTuple):
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
        self.sites, self.groups = list(sites), list[AlikeRouters]()
        for kind in ("", *extras):
            alike = [
                (device, EXTRAS[kind].width(K, E) if kind else K, end)
                for (device, K, E), end in zip(routers, ends, strict=True)
            ]
            first = 0
            for (_, K, end), same in groupby(alike):
                self.groups.append(AlikeRouters(kind, first, len(list(same)), K, end))
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
        except torch.OutOfMemoryError:
            raise
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
    call. `tapes`: by what is recorded, of each router. (With torch alone: during decoding NumPy's
    code is not in the processor's caches.)"""

    def __init__(self, shape: PassShape, tapes: Mapping[str, Sequence[Tape]]):
        self.shape = shape
        self._tapes = [tapes[group.kind][group.first] for group in shape.groups]
        with torch.inference_mode(False):  # a view made in it could not be written outside it
            self._pages = [
                [_pages(group, tape, t) for t in (tape.ids, tape.weights) if t is not None]
                for group, tape in zip(shape.groups, self._tapes, strict=True)
            ]

    def write(self, whole: Whole, start: int, T: int) -> None:
        """`start`: the position of the first row. There must be room for all of it."""
        for group, tape, pages, values in zip(
            self.shape.groups, self._tapes, self._pages, whole, strict=True
        ):
            if not group.kind:
                ids_RTK = values[0]
                outside_RTK = (ids_RTK < 0) | (ids_RTK >= group.E)
                values = ids_RTK.masked_fill(outside_RTK, tape.null_id), values[1]
            done = 0
            while done < T:
                page, row = divmod(start + done, tape.P)
                n = min(tape.P - row, T - done)
                for to_pages, values_RTK in zip(pages, values, strict=True):
                    to_RPK = to_pages[page % tape.pages]
                    to_RPK[:, row : row + n] = values_RTK[:, done : done + n]
                done += n
        self._tapes[0].cursor.add_(T)


def _pages(group: AlikeRouters, tape: Tape, tensor: Tensor) -> list[Tensor]:
    """The group's part of each page, [R, P, K]."""
    end = tape.base + group.routers * tape.P * group.K
    parts = tensor.view(tape.pages, -1)[:, tape.base : end]
    return list(parts.unflatten(1, (group.routers, tape.P, group.K)))
