"""The ring buffer of pages that the kernels record into, and the copy of full pages to the host.

The n-th row that a router sees, counted from 0, is row n % P of page n // P % pages. A page holds
the rows of all routers of one device, in one contiguous tensor per kind of value (ids, weights,
and `schema.EXTRAS`), so that a full page needs one copy per kind: event → side stream → pinned
memory. The device writes no row at or beyond the position `limit`, which moves only when a page has
been released: no row that is still needed is overwritten, also when a CUDA graph is replayed
without any Python. Rows beyond the limit are dropped, and the device counts them.

On a CPU the calls of a pass are kept until it ends, then stacked and written together: a write per
router would cost more than the router itself. What is kept are references to the routers' tensors,
or copies where the model changes these later in the same pass (see `Stack.copies`).

R routers, K slots, E experts, P rows per page, T rows of a forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe_inspect.capture.hook import kernels
from moe_inspect.capture.hook.kernels import Tape
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.schema import EXTRAS

# by what is recorded ("" for choices, else one of `schema.EXTRAS`): the index of the site of each
# call, and what was recorded of it, (ids [T, K], weights [T, K]) or (values,)
Calls = dict[str, list[tuple[int, tuple[Tensor, ...]]]]
# of each `AlikeRouters`: ids and weights [R, T, K], or the values of one of the extras
Whole = list[tuple[Tensor, ...]]
OfSite = list[tuple[Tensor, ...]]  # its calls


def by_site(calls: Sequence[tuple[int, tuple[Tensor, ...]]], n: int) -> list[OfSite]:
    """What was recorded of the calls of each of n sites."""
    found: list[OfSite] = [[] for _ in range(n)]
    for site, values in calls:
        found[site].append(values)
    return found


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
        self.routers, self.sites, self.kinds = routers, list(sites), ("", *extras)
        self.below = below or [E for *_, E in routers]
        self.runs = [sites.count(n) for n in range(max(sites) + 1)]  # of each site in a pass
        self.groups: list[AlikeRouters] = []
        for kind in self.kinds:
            alike = [
                (device, EXTRAS[kind].width(K, E) if kind else K, end)
                for (device, K, E), end in zip(routers, self.below, strict=True)
            ]
            first = 0
            for (_, K, end), same in groupby(alike):
                self.groups.append(AlikeRouters(kind, first, len(list(same)), K, end))
                first += self.groups[-1].routers

    def whole(self, calls: Calls, T: int) -> Whole | None:
        """The calls of a pass of T rows, stacked; None unless every router saw each row once."""
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

    def _by_router(self, calls: Sequence[tuple[int, tuple[Tensor, ...]]]) -> OfSite:
        """One call per router, in their order; empty where there are not as many. Where one was
        called with some of the rows at a time, these are one call."""
        if [n for n, _ in calls] == self.sites:
            return [values for _, values in calls]
        found: OfSite = []
        for parts, runs in zip(by_site(calls, len(self.runs)), self.runs, strict=True):
            if runs == 1 and len(parts) > 1:
                parts = [tuple(map(torch.cat, zip(*parts, strict=True)))]
            if len(parts) != runs:
                return []
            found += parts
        return found


# by the type of the device: on a CPU pages are read in place, and few large ones cost less
PAGE_ROWS = {"cuda": 1024, "cpu": 4096}
FORWARD_PASSES = 3  # that a GPU's ring holds: one is written, one copied to the host, one read


class SideStream:
    """Copies pages of a GPU to pinned host memory, on another CUDA stream than the model's."""

    def __init__(self, device: torch.device, pages: int):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.model_stream = torch.cuda.current_stream(device)  # of the last forward pass
        self.copied = [torch.cuda.Event() for _ in range(pages)]

    def pinned(self, like: Tensor) -> Tensor:
        """An uninitialized pinned host tensor of the same shape and type."""
        return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=True)

    def pass_launched(self) -> None:
        """To be called after a forward pass was launched, on the stream that it runs on."""
        self.model_stream = torch.cuda.current_stream(self.device)

    def copy(self, page: int, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Copies each (host, device) pair after the passes launched so far. Does not wait."""
        self.stream.wait_stream(self.model_stream)
        with torch.cuda.stream(self.stream):
            for host, device in pairs:
                host.copy_(device, non_blocking=True)
            self.copied[page].record(self.stream)

    def is_copied(self, page: int, wait: bool) -> bool:
        """Whether the last copy of the page has ended; with `wait`, waits for it."""
        if wait:
            self.copied[page].synchronize()
        return self.copied[page].query()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)


# by the type of the device; none where the host can read its memory
SIDE_STREAMS: dict[str, type[SideStream]] = {"cuda": SideStream}


class Ring:
    """The pages of the routers of one device, and on it the next position of each lane (`cursor`),
    what was dropped, the limit, and whether anything is written.

    routers   K and E of each, and what its ids are below: from this on they are no expert's
    rows      the largest forward pass that must fit into so many `pages` of P rows
    tapes     of each router, by what is written: choices (""), and each of the extras
    """

    def __init__(
        self,
        device: torch.device,
        routers: Sequence[tuple[int, int, int]],
        weight_dtype: torch.dtype,
        extras: Sequence[str],
        rows: int,
        pages: int,
        P: int,
    ):
        self.pages, self.R = pages, len(routers)
        slots, experts, below = map(list[int], zip(*routers, strict=True))
        side_of = SIDE_STREAMS.get(device.type)
        self.side = side_of(device, pages) if side_of is not None else None
        # one value marks slots without an expert, so 256 experts need the wider type
        kinds = {"ids": torch.uint8 if max(below) < 256 else torch.int16, "weights": weight_dtype}
        kinds |= {kind: getattr(torch, EXTRAS[kind].dtype) for kind in extras}
        widths = {"ids": slots, "weights": slots}
        widths |= {kind: list(map(EXTRAS[kind].width, slots, experts)) for kind in extras}
        lanes, widest = self.R * (1 + len(extras)), max(map(sum, widths.values()))
        if pages * P * widest >= 2**31:  # the kernels compute offsets in 32 bits
            most = 2**31 // widest // P // 2 * P
            raise MoeInspectError(
                f"a forward pass of {rows:,} tokens with {widest:,} recorded values each is too "
                f"large to record: pass at most {most:,} tokens per forward pass"
            )
        # a tensor made in inference mode could not be written outside it
        with torch.inference_mode(False):
            made = self._made = {
                name: torch.empty(pages * P * sum(w), dtype=kinds[name], device=device)
                for name, w in widths.items()
            }
            self.host = {name: self.side.pinned(t) if self.side else t for name, t in made.items()}
            self.cursor, self.dropped = (
                torch.zeros(lanes, dtype=torch.int64, device=device) for _ in range(2)
            )
            self.limit = torch.full((1,), pages * P, dtype=torch.int64, device=device)
            self.enabled = torch.ones(1, dtype=torch.int32, device=device)
        self.tapes: dict[str, list[Tape]] = {}
        state = self.cursor, self.dropped, self.limit, self.enabled
        for n, kind in enumerate(("", *extras)):
            values = kind or "weights"
            tensors, of = (made.get("ids") if not kind else None, made.get(values)), widths[values]
            for r in range(self.R):
                places = {"base": P * sum(of[:r]), "page_values": P * sum(of)}
                places |= {"P": P, "pages": pages}
                tape = Tape(*tensors, *state, n * self.R + r, of[r], below[r], **places)
                self.tapes.setdefault(kind, []).append(tape)
        if device.type == "cuda":  # torch.compile's CUDA graphs then write there, without a copy
            for tensor in (*made.values(), *state):
                torch._dynamo.mark_static_address(tensor, guard=False)

    def copy(self, page: int) -> None:
        """Starts the copy of a page to the host, where that cannot read it in place."""
        if self.side is not None:
            both = ((self.host[name], made) for name, made in self._made.items())
            pages = [(to.view(self.pages, -1), of.view(self.pages, -1)) for to, of in both]
            self.side.copy(page, [(to[page], of[page]) for to, of in pages])


class Rings:
    """The ring buffers of a model, one per device, which all hold the same forward passes. On a
    CPU whole passes are written by `write`; elsewhere kernels write each call.

    weight_dtype   of the recorded gate weights: float16 or bfloat16
    rows           the largest forward pass that must fit
    page_rows      P, a power of two of at least 16; None: PAGE_ROWS

    Raises MoeInspectError if the kernels' 32-bit offsets cannot address that many values."""

    def __init__(
        self, shape: PassShape, weight_dtype: torch.dtype, rows: int, page_rows: int | None = None
    ):
        self.shape, self.kinds, (_, *extras) = shape, shape.kinds, shape.kinds
        routers, devices = shape.routers, dict.fromkeys(d for d, *_ in shape.routers)
        self.P = page_rows or min(PAGE_ROWS.get(d.type, PAGE_ROWS["cpu"]) for d in devices)
        on_gpu = any(device.type == "cuda" for device in devices)
        passes = FORWARD_PASSES if on_gpu and "logits" not in extras else 1
        # one more, since a forward pass may begin at the end of a page
        self.pages = passes * -(-rows // self.P) + 1
        self._rings: list[Ring] = []
        self._of = [(0, 0)] * len(routers)  # the ring of each, and its place there
        for device in devices:
            local = [r for r, (d, _, _) in enumerate(routers) if d == device]
            for place, r in enumerate(local):
                self._of[r] = len(self._rings), place
            of = [(*routers[r][1:], shape.below[r]) for r in local]
            made = Ring(device, of, weight_dtype, extras, rows, self.pages, self.P)
            self._rings.append(made)
        self.tapes = {
            kind: [self._rings[i].tapes[kind][n] for i, n in self._of] for kind in self.kinds
        }
        self._sides = [ring.side for ring in self._rings if ring.side is not None]
        # what the model has written can be read without waiting
        self.synchronous = not self._sides
        first = self._rings[0].cursor
        self.writes_whole = self.synchronous and first.is_cpu and not kernels.runs_triton(first)
        if self.writes_whole:
            with torch.inference_mode(False):  # a view made in it could not be written outside it
                self._pages = list(map(self._pages_of, shape.groups))
        self.head = 0  # the position at which the next forward pass begins
        self.copying = 0  # pages whose copy to the host has been started, since the beginning
        self.released = 0  # pages that may be written again, since the beginning

    def _pages_of(self, group: AlikeRouters) -> list[list[Tensor]]:
        """The group's part of each page, [R, P, K]: of ids and weights, or of what else it is."""
        tape, shape = self.tapes[group.kind][group.first], (group.routers, -1, group.K)
        of_group = slice(tape.base, tape.base + group.routers * tape.P * group.K)
        return [
            list(tensor.view(tape.pages, -1)[:, of_group].unflatten(1, shape))
            for tensor in (tape.ids, tape.weights)
            if tensor is not None
        ]

    @property
    def max_rows(self) -> int:
        """Rows of the largest forward pass that fits, wherever in a page it begins."""
        return (self.pages - 1) * self.P

    @property
    def free_rows(self) -> int:
        """Rows that can be written now; negative after rows were dropped."""
        return (self.released + self.pages) * self.P - self.head

    def enable(self, on: bool) -> None:
        for ring in self._rings:
            ring.enabled.fill_(int(on))

    def rewind(self, dropped: int) -> None:
        """Undoes a forward pass that failed: the cursors go back to the end of the one before it,
        the counts of dropped rows to `dropped`."""
        for ring in self._rings:
            ring.cursor.fill_(self.head)
            ring.dropped.fill_(dropped)

    def synchronize(self) -> None:
        for side in self._sides:
            side.synchronize()

    def end(self, rows: int) -> None:
        """A forward pass of `rows` rows has been launched: starts copying the pages it fills."""
        self.head += rows
        for side in self._sides:
            side.pass_launched()
        self._copy_pages(self.head // self.P)

    def _copy_pages(self, until: int) -> None:
        """Starts the copy to the host of all pages before `until` that is not started yet."""
        for page in range(self.copying, until):
            for ring in self._rings:
                ring.copy(page % self.pages)
        self.copying = max(self.copying, until)

    def is_on_host(self, position: int, wait: bool) -> bool:
        """Whether all rows before `position` are on the host. With `wait`, waits until they are: a
        page that is not full is copied now and again."""
        last = (position - 1) // self.P
        if self.synchronous or position == 0:
            return True
        if last >= self.copying:
            if not wait:
                return False
            self._copy_pages(last + 1)
            self.copying = self.head // self.P
        return all(side.is_copied(last % self.pages, wait) for side in self._sides)

    def release(self, position: int) -> None:
        """Whole pages before `position` may be overwritten."""
        if position // self.P > self.released:
            self.released = position // self.P
            for ring in self._rings:
                ring.limit.fill_((self.released + self.pages) * self.P)

    def write(self, calls: Calls, T: int) -> bool:
        """Writes the calls of a pass of T rows as `kernels.record` would have, call by call, if it
        is whole and there is room for it. Returns whether it did. (With torch alone: during
        decoding NumPy's code is not in the processor's caches.)"""
        if not self.writes_whole or self.free_rows < T:
            return False
        if (whole := self.shape.whole(calls, T)) is None:
            return False
        for group, pages, values in zip(self.shape.groups, self._pages, whole, strict=True):
            tape = self.tapes[group.kind][group.first]
            if not group.kind and T:
                ids_RTK = values[0]
                least, most = ids_RTK.aminmax()
                if least.item() < 0 or most.item() >= group.E:
                    outside_RTK = (ids_RTK < 0) | (ids_RTK >= group.E)
                    values = ids_RTK.masked_fill(outside_RTK, tape.null_id), values[1]
            done = 0
            while done < T:
                page, row = divmod(self.head + done, tape.P)
                n = min(tape.P - row, T - done)
                for to_pages, values_RTK in zip(pages, values, strict=True):
                    to_RnK = to_pages[page % tape.pages].narrow(1, row, n)
                    to_RnK.copy_(values_RTK.narrow(1, done, n))
                done += n
        self._rings[0].cursor.add_(T)
        return True

    def read_cursors(self) -> list[Tensor]:
        """The cursors of each ring on the host, int64 [lanes]: from a GPU once what was launched
        has run."""
        return [
            ring.side.pinned(ring.cursor).copy_(ring.cursor, non_blocking=True)
            if ring.side is not None
            else ring.cursor
            for ring in self._rings
        ]

    def rows_seen(self, cursors: list[Tensor], start: int) -> dict[str, list[int]]:
        """Rows of each router from position `start` to `cursors`, by what is recorded."""
        rows_of = [(cursor - start).tolist() for cursor in cursors]
        return {
            kind: [rows_of[i][place * self._rings[i].R + n] for i, n in self._of]
            for place, kind in enumerate(self.kinds)
        }

    def dropped(self) -> list[int]:
        """Rows of each router that were dropped, as counted on its device. Waits for the device."""
        dropped = [ring.dropped.tolist() for ring in self._rings]
        return [dropped[i][n] for i, n in self._of]

    def rows(
        self, kind: str, r: int, start: int, count: int, keep: np.ndarray | None = None
    ) -> np.ndarray:
        """A copy of router r's rows [start, start + count), or of those at the indices `keep`:
        [rows, K], or [rows, E] for logits. `kind`: ids (uint8 or uint16, their maximum where a slot
        has no expert), weights or one of the extras; bfloat16 values are given as their bits,
        uint16."""
        ring, parts = self._rings[self._of[r][0]], list[np.ndarray]()
        tape, tensor = self.tapes.get(kind, self.tapes[""])[r], ring.host[kind]
        if tensor.dtype in (torch.int16, torch.bfloat16):
            tensor = tensor.view(torch.uint16)
        while count > 0 or not parts:
            page, row = divmod(start, self.P)
            n = min(self.P - row, count)
            parts.append(tape.part(tensor, page % self.pages)[row : row + n].numpy())
            start, count = start + n, count - n
        values = np.concatenate(parts) if len(parts) > 1 or keep is None else parts[0]
        return values if keep is None else values[keep]
