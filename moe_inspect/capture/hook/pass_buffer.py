"""The choices of small forward passes on a CPU. During a pass only references to the routers'
tensors are kept, or a few numbers as bytes. At its end they are stacked, and once there are many
passes, these are written or counted together: in a decode step one write per router would cost more
than the router itself.

Of a model that changes these tensors later in the same pass, copies are kept (see `Scope.copies`).

R routers, T rows of a forward pass, N rows of several passes, K values per row, E experts.
"""

from __future__ import annotations

import functools
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_inspect.capture.hook.kernels import Tape

# More is written call by call: kept, it would leave the processor's caches, and every pass would
# take memory afresh from the system
BUFFER_BYTES = 2**19

# one call: index of the site, ids [T, K] or None for one of the extras, values [T, K]
Call = tuple[int, Tensor | None, Tensor]
# a whole pass: of each group ids [R, T, K], or None for one of the extras, and values [R, T, K]; or
# the numbers of one row per router
Whole = list[tuple[Tensor | None, Tensor]] | bytes


@functools.cache
def packed_type(K: int) -> np.dtype:
    """A call of one row as `pack_of` packs it. (In float64 each value is exact.)"""
    return np.dtype([("n", "=u2"), ("ids", "=i4", (K,)), ("values", "=f8", (K,))])


def pack_of(K: int) -> Callable[..., bytes]:
    """Packs (n, *ids, b"", *values) of one row; struct.error where these are not K and K numbers,
    or one has too many bits."""
    return struct.Struct(f"=H{K}i0s{K}d").pack


def as_tensors(call: Call | bytes) -> Call:
    """A call, of which the numbers may have been kept."""
    if not isinstance(call, bytes):
        return call
    found = np.frombuffer(call, packed_type((len(call) - 2) // 12))
    ids_1K, values_1K = (torch.from_numpy(found[name].copy()) for name in ("ids", "values"))
    return int(found["n"][0]), ids_1K, values_1K


class Group:
    """Consecutive routers of equal K and E, `first` being the index of the first one; ids from E on
    are no expert's. `ids` int
    [R, N, K] (none for one of the extras) and `values` float [R, N, K]: parts of the passes that
    are kept."""

    def __init__(self, first: int, routers: int, K: int, E: int, with_ids: bool):
        self.first, self.routers, self.K, self.E, self.with_ids = first, routers, K, E, with_ids
        self.of_all = slice(first, first + routers)
        self.ids: list[Tensor] = []
        self.values: list[Tensor] = []


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class PassBuffer:
    """`routers`: (K, E) of each, `sites`: the index of its site. `extras`, of `options.EXTRAS`, are
    kept too. `below`: ids from this on are no expert's, of each; None: E."""

    def __init__(
        self,
        routers: Sequence[tuple[int, int]],
        sites: Sequence[int],
        extras: Sequence[str] = (),
        below: Sequence[int] | None = None,
    ):
        ends = below or [E for _, E in routers]
        kinds = [(K, end, "") for (K, _), end in zip(routers, ends, strict=True)]
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
        # packs a call of one row: of routers with one K, and no extras
        kinds_of_groups = {(group.K, group.with_ids) for group in self.groups}
        self.pack = pack_of(self.groups[0].K) if len(kinds_of_groups) == 1 else None
        # what the packed calls of a whole pass begin with: of all the first byte, and the second
        self._heads = tuple(
            bytes(site.to_bytes(2, sys.byteorder)[at] for site in self.sites) for at in (0, 1)
        )
        self._packed_size = packed_type(self.groups[0].K).itemsize if self.pack is not None else 1
        self._packed: list[bytes] = []  # the passes kept last
        self.rows = 0  # of all passes that are kept

    def fits(self, T: int) -> bool:
        """Whether a pass of T rows is small enough to be kept."""
        return self.max_rows >= T

    @property
    def is_full(self) -> bool:
        return self.rows >= self.max_rows

    def whole(self, calls: Sequence[Call | bytes], T: int) -> Whole | None:
        """The calls of a pass of T rows, for `keep`; None unless every router has seen each of the
        rows once."""
        if T == 1 and (packed := self._whole_packed(calls)) is not None:
            return packed
        return self._stacked([as_tensors(call) for call in calls], T)

    def _whole_packed(self, calls: Sequence[Any]) -> bytes | None:
        """The packed calls of a pass of one row; None unless all are packed, and of each router."""
        try:
            packed = b"".join(calls)
        except TypeError:  # of some the tensors are kept
            return None
        heads = packed[:: self._packed_size], packed[1 :: self._packed_size]
        return packed if heads == self._heads else None

    def _stacked(self, calls: list[Call], T: int) -> Whole | None:
        sites, ids, values = zip(*calls, strict=True) if calls else ((), (), ())
        if sites != self.sites:  # not one call per router, in their order
            calls = self._in_order(calls)
            sites, ids, values = zip(*calls, strict=True) if calls else ((), (), ())
            if sites != self.sites:
                return None
        found: list[tuple[Tensor | None, Tensor]] = []
        for group in self.groups:
            routers, shape = group.of_all, (group.routers, T, group.K)
            try:
                values_RTK = torch.stack(values[routers])
                ids_RTK = torch.stack(ids[routers]) if group.with_ids else None
            except RuntimeError:  # of different sizes
                return None
            if values_RTK.shape != shape or (ids_RTK is not None and ids_RTK.shape != shape):
                return None
            found.append((ids_RTK, values_RTK.detach() if values_RTK.requires_grad else values_RTK))
        return found

    def keep(self, whole: Whole, T: int) -> None:
        if isinstance(whole, bytes):
            self._packed.append(whole)
        else:
            self._unpack()
            for group, (ids, values) in zip(self.groups, whole, strict=True):
                if ids is not None:
                    group.ids.append(ids)
                group.values.append(values)
        self.rows += T

    def _unpack(self) -> None:
        """Turns the numbers of passes into tensors: of many together, as during decoding NumPy's
        code is not in the processor's caches."""
        if not self._packed:
            return
        packed = np.frombuffer(b"".join(self._packed), packed_type(self.groups[0].K))
        packed_RN = packed.reshape(len(self._packed), -1).T
        for group in self.groups:
            of_group = packed_RN[group.of_all]
            group.ids.append(torch.from_numpy(of_group["ids"].copy()))
            group.values.append(torch.from_numpy(of_group["values"].copy()))
        self._packed = []

    def joined(self) -> Iterator[tuple[Group, np.ndarray | None, Tensor]]:
        """Each group with what is kept of it: ids int64 [R, N, K], or None for one of the extras,
        and values [R, N, K]."""
        self._unpack()
        for group in self.groups:
            ids = _joined(group.ids).long().numpy() if group.with_ids else None
            yield group, ids, _joined(group.values)

    def _in_order(self, calls: list[Call]) -> list[Call]:
        """The calls by site, those of one site in their order. Where a site was called with some of
        the rows at a time, these are one call."""
        found: list[Call] = []
        for n, of_site in groupby(sorted(calls, key=itemgetter(0)), itemgetter(0)):
            parts = list(of_site)
            if len(parts) == self.sites.count(n):
                found += parts
                continue
            ids = [i for _, i, _ in parts if i is not None]
            found.append((n, torch.cat(ids) if ids else None, torch.cat([v for _, _, v in parts])))
        return found

    def clear(self) -> None:
        self.rows, self._packed = 0, []
        for group in self.groups:
            group.ids, group.values = [], []


class TapeWriter:
    """Writes what a buffer has kept to the tapes of the same routers, as `kernels.record` would
    have, call by call."""

    def __init__(self, buffer: PassBuffer, tapes: Sequence[Tape]):
        self.buffer = buffer
        self.cursor = tapes[0].cursor.numpy()  # the same memory as the tensor
        self.pages = [
            (
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
        for (group, ids_RNK, values_RNK), (tape, ids, values) in zip(
            self.buffer.joined(), self.pages, strict=True
        ):
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
