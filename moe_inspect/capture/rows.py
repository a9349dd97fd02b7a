"""The rows of a forward pass: what the routers of a stack chose for each token, taken once the pass
has been launched.

On a CPU what the routers return is kept until the pass is over, and then stacked. On a GPU, and in
code that torch.compile has compiled, kernels write each call to buffers whose addresses do not
change, so that a CUDA graph repeats the writes when it is replayed. Behind the pass a side stream
copies the rows to pinned memory; the next pass waits for that copy, as it writes to the same place.

R alike routers of a group, K slots, E experts, T rows of a pass (padding included), P rows that a
buffer holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from moe_inspect.capture.hook.kernels import Tape
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.schema import EXTRAS

# by kind ("" for choices, else one of `schema.EXTRAS`): of each call the index of its site, and
# what was recorded, (ids [T, K], weights [T, K]) or (values,)
Calls: TypeAlias = dict[str, list[tuple[int, tuple[Tensor, ...]]]]
CallsOfSite: TypeAlias = list[tuple[Tensor, ...]]


def by_site(calls: Sequence[tuple[int, tuple[Tensor, ...]]], sites: int) -> list[CallsOfSite]:
    """Return what was recorded of the calls of each site."""
    grouped: list[CallsOfSite] = [[] for _ in range(sites)]
    for site, values in calls:
        grouped[site].append(values)
    return grouped


@dataclass(frozen=True)
class ShownRouter:
    """The shape of a router's rows. `below`: ids from this on are not an expert's."""

    device: torch.device
    top_k: int
    experts: int
    below: int

    def width(self, name: str) -> int:
        """Return the number of values that a row has."""
        return EXTRAS[name].width(self.top_k, self.experts) if name in EXTRAS else self.top_k

    def dtype(self, name: str, weight_dtype: torch.dtype) -> torch.dtype:
        """Return the type in which its values are stored."""
        if name == "ids":  # one value marks slots without an expert: 256 need the wider type
            return torch.uint8 if self.below < 256 else torch.int16
        if name == PHYSICALS:
            return torch.int16
        return weight_dtype if name == "weights" else getattr(torch, EXTRAS[name].dtype)


@dataclass(frozen=True)
class Group(ShownRouter):
    """Consecutive alike routers, from index `first` on."""

    first: int
    routers: int


PHYSICALS = "physicals"  # of an engine with replicas of experts: the kind of their ids
LEAST_ROWS = 1024  # of a buffer, which then grows less often; a power of two of at least 16


def names_of(kind: str) -> tuple[str, ...]:
    """Return the names of what a call of this kind brings."""
    return (kind,) if kind else ("ids", "weights")


class SideStream:
    """Copies from a GPU to pinned host memory, on another CUDA stream than the model's."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def copy(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], torch.Event]:
        """Copy the tensors behind what the model's stream has been given so far, which goes on
        behind the copies. Return them and the event after which they are complete."""
        model_stream = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(model_stream)
        with torch.cuda.stream(self.stream):
            host = [
                torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
                for t in tensors
            ]
            copied = self.stream.record_event()
        model_stream.wait_event(copied)
        return host, copied


# by the type of the device; none where the host can read its memory
SIDE_STREAMS: dict[str, type[SideStream]] = {"cuda": SideStream}


Values: TypeAlias = dict[str, list[Tensor]]  # by name: a tensor [R, T, …] per group
CURSORS = "cursors"  # name of the numbers of rows that each lane saw, a tensor per device


@dataclass(frozen=True, eq=False)
class TakenPass:
    """The rows of a pass, which are on the host once they are `copied`."""

    values: Values
    copied: tuple[torch.Event, ...] = ()

    @property
    def cursors(self) -> list[Tensor] | None:
        """The rows that each lane saw, if they were written to buffers."""
        return self.values.get(CURSORS)

    def joined(self, other: TakenPass) -> TakenPass:
        """Return the values of both."""
        return TakenPass(self.values | other.values, self.copied + other.copied)

    def has_arrived(self, wait: bool) -> bool:
        if wait:
            for event in self.copied:
                event.synchronize()
        return all(event.query() for event in self.copied)


class Lanes:
    """What the kernels keep of the routers of one device: the next row of each lane, a lane being
    a router and a kind; and whether anything is written."""

    def __init__(self, device: torch.device, lanes: int):
        self.cursor = torch.zeros(lanes, dtype=torch.int64, device=device)
        self.enabled = torch.ones(1, dtype=torch.int32, device=device)
        stream = SIDE_STREAMS.get(device.type)
        self.side = stream(device) if stream is not None else None

    def copy(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[torch.Event]]:
        if self.side is None:
            return [t.clone() for t in tensors], []
        host, copied = self.side.copy(tensors)
        return host, [copied]


class RouterRows:
    """The rows of the routers of a stack.

    routers       what the first pass has shown of each
    sites         the index of the site of each; a layer that runs twice has two routers of one site
    kinds         what is recorded: choices (""), and of `schema.EXTRAS`
    weight_dtype  of gate weights: float16 or bfloat16
    appends       whether the calls of a router in a pass follow each other in the buffers. If not,
                  each begins at the first row: passes that nobody takes need not be rewound, and a
                  call is one launch
    """

    def __init__(
        self,
        routers: Sequence[ShownRouter],
        sites: Sequence[int],
        kinds: Sequence[str],
        weight_dtype: torch.dtype,
        appends: bool = True,
    ):
        self.appends = appends
        self.routers, self.sites, self.kinds = routers, list(sites), tuple(kinds)
        self.weight_dtype = weight_dtype
        self.runs = [self.sites.count(n) for n in range(max(sites) + 1)]  # of each site in a pass
        self.groups = list[Group]()
        for shown, alike in groupby(routers):
            first = self.groups[-1].first + self.groups[-1].routers if self.groups else 0
            self.groups.append(Group(**vars(shown), first=first, routers=len(list(alike))))
        # whether the calls can be kept as they are: nothing reads them while a model goes on
        self.keeps_calls = not any(group.device.type in SIDE_STREAMS for group in self.groups)
        self.P = 0  # rows that the buffers hold; 0: there are none
        self.tapes: dict[str, list[Tape]] = {}
        self._buffers: dict[str, list[Tensor]] = {}
        self._lanes: dict[torch.device, Lanes] = {}

    # --- calls that were kept

    def whole(self, calls: Calls, T: int) -> TakenPass | None:
        """Return the calls of a pass of T rows, stacked; None unless every router saw each row
        once."""
        values: dict[str, list[Tensor]] = {}
        try:
            for kind, of_kind in calls.items():
                by_router = self._by_router(of_kind)
                for group in self.groups:
                    of_group = by_router[group.first : group.first + group.routers]
                    columns = zip(*of_group, strict=True)
                    for name, column in zip(names_of(kind), columns, strict=True):
                        stacked = torch.stack(column)
                        if stacked.shape != (group.routers, T, group.width(name)):
                            return None
                        stored = self._stored(stacked, name, group)
                        values.setdefault(name, []).append(stored)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError):  # of different sizes, or numbers
            return None
        return TakenPass(values)

    def _by_router(self, calls: Sequence[tuple[int, tuple[Tensor, ...]]]) -> CallsOfSite:
        """Return one call per router, in their order; none where there are not as many. Where one
        was called with some of the rows at a time, these are one call."""
        if [n for n, _ in calls] == self.sites:
            return [values for _, values in calls]
        found: CallsOfSite = []
        for parts, runs in zip(by_site(calls, len(self.runs)), self.runs, strict=True):
            if runs == 1 and len(parts) > 1:
                parts = [tuple(map(torch.cat, zip(*parts, strict=True)))]
            if len(parts) != runs:
                return []
            found += parts
        return found

    def _stored(self, values: Tensor, name: str, group: Group) -> Tensor:
        """Return the values in the type in which they are stored."""
        dtype = group.dtype(name, self.weight_dtype)
        if name != "ids" or not values.numel():
            return values.to(dtype)
        if values.is_cpu:  # most often all are experts, which is cheap to tell on a CPU
            least, most = values.aminmax()
            if least.item() >= 0 and most.item() < group.below:
                return values.to(dtype)
        outside = (values < 0) | (values >= group.below)
        return values.masked_fill(outside, 255 if dtype == torch.uint8 else -1).to(dtype)

    # --- buffers that kernels write to

    def grow(self, rows: int) -> bool:
        """Make buffers for passes of so many rows, unless there are such. The passes so far must
        have been taken. Return whether `tapes` are new. MoeInspectError if the kernels' 32-bit
        offsets cannot address that many values."""
        P = max(LEAST_ROWS, 1 << (rows - 1).bit_length())
        if P <= self.P:
            return False
        names = [name for kind in self.kinds for name in names_of(kind)]
        widest = max(g.routers * g.width(name) for g in self.groups for name in names)
        if P * widest >= 2**31:
            most = 1 << ((2**31 - 1) // widest).bit_length() - 1
            raise MoeInspectError(
                f"a forward pass of {rows:,} tokens with {widest:,} recorded values each is too "
                f"large to record: pass at most {most:,} tokens per forward pass"
            )
        enabled = all(int(lanes.enabled) for lanes in self._lanes.values())
        self.P = P
        # a tensor made in inference mode could not be written outside it
        with torch.inference_mode(False):
            self._buffers = {
                name: [
                    torch.empty(
                        g.routers * P * g.width(name),
                        dtype=g.dtype(name, self.weight_dtype),
                        device=g.device,
                    )
                    for g in self.groups
                ]
                for name in names
            }
            devices = [shown.device for shown in self.routers]
            self._lanes = {
                device: Lanes(device, devices.count(device) * len(self.kinds))
                for device in dict.fromkeys(devices)
            }
        self.enable(enabled)
        self._make_tapes()
        for device, lanes in self._lanes.items():
            # CUDA graphs of torch.compile then write to these addresses, without a copy
            if device.type == "cuda":
                own = (b for of in self._buffers.values() for b in of if b.device == device)
                for tensor in (*own, lanes.cursor, lanes.enabled):
                    torch._dynamo.mark_static_address(tensor, guard=False)
        return True

    def _make_tapes(self) -> None:
        free = dict.fromkeys(self._lanes, 0)  # the next lane of each device
        self.tapes = {kind: [] for kind in self.kinds}
        for kind, tapes in self.tapes.items():
            for g, group in enumerate(self.groups):
                ids = None if kind else self._buffers["ids"][g]
                values, width = self._buffers[kind or "weights"][g], group.width(kind or "weights")
                for i in range(group.routers):
                    tapes.append(
                        Tape(
                            ids,
                            values,
                            self._lanes[group.device].cursor if self.appends else None,
                            self._lanes[group.device].enabled,
                            lane=free[group.device],
                            K=width,
                            experts=group.below,
                            base=i * self.P * width,
                            rows=self.P,
                        )
                    )
                    free[group.device] += 1

    @property
    def nbytes(self) -> int:
        """Return the size of the buffers."""
        return sum(buffer.nbytes for buffers in self._buffers.values() for buffer in buffers)

    def written(self, T: int) -> Values:
        """Return the first T rows of the buffers, which the next pass overwrites."""
        return {
            name: [
                buffer.view(group.routers, self.P, -1)[:, :T]
                for buffer, group in zip(buffers, self.groups, strict=True)
            ]
            for name, buffers in self._buffers.items()
        }

    def copy(self, values: Values) -> TakenPass:
        """Copy values to the host, after the work that their devices have been given so far."""
        host, events = {name: [*tensors] for name, tensors in values.items()}, list[torch.Event]()
        for device, lanes in self._lanes.items():
            places = [
                (name, n)
                for name, tensors in values.items()
                for n, tensor in enumerate(tensors)
                if tensor.device == device
            ]
            tensors, copied = lanes.copy([values[name][n] for name, n in places])
            for (name, n), tensor in zip(places, tensors, strict=True):
                host[name][n] = tensor
            events += copied
        return TakenPass(host, tuple(events))

    def take(self, T: int) -> TakenPass:
        """Take the first T rows of the buffers, which the next pass writes anew."""
        cursors = [lanes.cursor for lanes in self._lanes.values()]
        taken = self.copy(self.written(T) | {CURSORS: cursors})
        self.rewind()
        return taken

    def rewind(self) -> None:
        """Let the next pass write from the first row on."""
        for lanes in self._lanes.values():
            lanes.cursor.zero_()

    def enable(self, on: bool) -> None:
        """Whether the kernels write anything."""
        for lanes in self._lanes.values():
            lanes.enabled.fill_(int(on))

    def seen(self, cursors: Sequence[Tensor] | None = None) -> dict[str, list[int]]:
        """Return the rows that each router saw, by kind: of a pass that was taken, or since."""
        cursors = [lanes.cursor for lanes in self._lanes.values()] if cursors is None else cursors
        rows = {d: c.tolist() for d, c in zip(self._lanes, cursors, strict=True)}
        devices = [shown.device for shown in self.routers]
        return {
            kind: [rows[device][tape.lane] for device, tape in zip(devices, tapes, strict=True)]
            for kind, tapes in self.tapes.items()
        }


def stored_values(
    passes: Sequence[TakenPass], name: str, keep: np.ndarray | None
) -> list[np.ndarray]:
    """Return what consecutive passes recorded, of each router [rows, …]: those at `keep`, or all.
    Ids are uint8 or uint16, their maximum where a slot has no expert; bfloat16 values are given as
    their bits, uint16."""
    found = list[np.ndarray]()
    for parts in zip(*(taken.values[name] for taken in passes), strict=True):
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        if whole.dtype in (torch.int16, torch.bfloat16):
            whole = whole.view(torch.uint16)
        found += [rows if keep is None else rows[keep] for rows in whole.cpu().numpy()]
    return found
