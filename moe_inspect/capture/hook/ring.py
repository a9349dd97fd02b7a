"""The pages that the kernels record into, on the device they run on, and their way to the host.

Rows have positions: the n-th row that a router sees lies in page n // P % pages, at n % P. A page
holds the ids of all routers of its device, then, each kind in one contiguous tensor: so a full page
leaves in one copy a kind (event → side stream → pinned memory). The device writes no row at or
beyond `limit`, and only a page whose rows have been handed over moves it: nothing that is still
needed is overwritten, whoever launches the kernels. What lies beyond the limit the device counts.

R routers, K slots, E experts, P rows a page.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moe_inspect.capture.hook.kernels import Tape
from moe_inspect.errors import MoeInspectError

PAGE_ROWS = 1024  # on a CPU a page is its own host copy, and few large ones cost less
PAGE_ROWS_CPU = 4096
FORWARDS = 3  # that fit into a ring beside each other: one is written, one leaves, one is read


class SideStream:
    """Copies pages of a GPU to pinned memory, beside the stream that the model runs on."""

    def __init__(self, device: torch.device, pages: int):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.source = torch.cuda.current_stream(device)  # that the last forward pass ran on
        self.copied = [torch.cuda.Event() for _ in range(pages)]

    def pinned(self, like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=True)

    def follow(self) -> None:
        """A forward pass has been launched on the current stream."""
        self.source = torch.cuda.current_stream(self.device)

    def copy(self, page: int, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Starts copying (to, from) once the forward passes launched so far have run."""
        self.stream.wait_stream(self.source)
        with torch.cuda.stream(self.stream):
            for host, device in pairs:
                host.copy_(device, non_blocking=True)
            self.copied[page].record(self.stream)

    def arrived(self, page: int, wait: bool) -> bool:
        if wait:
            self.copied[page].synchronize()
        return self.copied[page].query()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)


def side_stream(device: torch.device, pages: int) -> SideStream | None:
    """None where the host reads the device's memory."""
    return SideStream(device, pages) if device.type == "cuda" else None


class Ring:
    """Pages of the routers of one device. `slots[r]` = K_r, `experts[r]` = E_r. It holds
    forward passes of at least `rows` rows."""

    def __init__(
        self,
        device: torch.device,
        slots: Sequence[int],
        experts: Sequence[int],
        weight_dtype: torch.dtype,
        logits: bool = False,
        rows: int = 1,
        page_rows: int | None = None,
    ):
        on_gpu = device.type == "cuda"
        self.P = page_rows or (PAGE_ROWS if on_gpu else PAGE_ROWS_CPU)
        # one more, since a forward pass may begin at a page's end
        self.pages = (FORWARDS if on_gpu and not logits else 1) * -(-rows // self.P) + 1
        self.side = side_stream(device, self.pages)
        self.slots, self.experts = list(slots), list(experts)
        widths = {
            "ids": self.slots,
            "weights": self.slots,
            "logits": self.experts if logits else [],
        }
        # one value is kept for "nowhere", so 256 experts need the wider type
        kinds = {
            "ids": torch.uint8 if max(experts) < 256 else torch.int16,
            "weights": weight_dtype,
            "logits": torch.float16,
        }
        lanes = len(self.slots) * (2 if logits else 1)
        widest = max(map(sum, widths.values()))
        if self.capacity * widest >= 2**31:  # the kernels reckon offsets in 32 bits
            most = 2**31 // widest // self.P // 2 * self.P
            raise MoeInspectError(
                f"{rows:,} rows a forward pass of {widest:,} values each are too many at once: "
                f"feed at most {most:,} tokens"
            )
        with torch.inference_mode(
            False
        ):  # a page made in inference mode could not be written outside it
            made = {
                name: torch.empty(self.pages * self.P * sum(w), dtype=kinds[name], device=device)
                for name, w in widths.items()
                if w
            }
            self.host = {name: self.side.pinned(t) if self.side else t for name, t in made.items()}
            self.cursor, self.dropped = (
                torch.zeros(lanes, dtype=torch.int64, device=device) for _ in range(2)
            )
            self.limit = torch.full((1,), self.capacity, dtype=torch.int64, device=device)
            self.enabled = torch.ones(1, dtype=torch.int32, device=device)
        self._made = made
        self.tapes = [self._tape(r, self.slots, "ids", "weights") for r in range(len(slots))]
        self.logit_tapes = (
            [self._tape(r, self.experts, None, "logits", len(slots)) for r in range(len(slots))]
            if logits
            else []
        )
        if on_gpu:  # so that torch.compile's CUDA graphs write where these are, and copy nothing
            for tensor in (*made.values(), self.cursor, self.dropped, self.limit, self.enabled):
                torch._dynamo.mark_static_address(tensor, guard=False)
        self.head = 0  # the position at which the next forward pass begins
        self.left = 0  # pages that have started to leave
        self.drained = 0  # pages that have been handed over

    def _tape(
        self, r: int, widths: list[int], ids: str | None, weights: str, lane: int = 0
    ) -> Tape:
        return Tape(
            self._made.get(ids) if ids else None,
            self._made.get(weights),
            self.cursor,
            self.dropped,
            self.limit,
            self.enabled,
            lane=lane + r,
            K=widths[r],
            experts=self.experts[r],
            base=self.P * sum(widths[:r]),
            page_values=self.P * sum(widths),
            P=self.P,
            pages=self.pages,
        )

    @property
    def capacity(self) -> int:
        return self.pages * self.P

    @property
    def fits(self) -> int:
        """Rows of the largest forward pass that can always be held, wherever it begins."""
        return self.capacity - self.P

    @property
    def room(self) -> int:
        """Rows that can be written now."""
        return (self.drained + self.pages) * self.P - self.head

    def stand(self) -> Tensor:
        """Where the cursors stand, [lanes]: on a GPU, once what has been launched so far has
        run."""
        stand = self.side.pinned(self.cursor) if self.side else torch.empty_like(self.cursor)
        return stand.copy_(self.cursor, non_blocking=True)

    def end(self, rows: int) -> None:
        """A forward pass of `rows` rows has been launched: the pages it filled start to leave."""
        if self.side is not None:
            self.side.follow()
        self.head += rows
        self._leave(self.head // self.P)

    def _leave(self, until: int) -> None:
        if self.side is not None:
            for page in range(self.left, until):
                n = page % self.pages
                parts = [
                    (self.host[name].view(self.pages, -1)[n], t.view(self.pages, -1)[n])
                    for name, t in self._made.items()
                ]
                self.side.copy(n, parts)
        self.left = max(self.left, until)

    def arrived(self, position: int, wait: bool) -> bool:
        """Whether all rows before `position` are on the host. With `wait`, sees to it, if need be
        with a page that is not full (which leaves again when it is)."""
        last = (position - 1) // self.P
        if self.side is None or position == 0:
            return True
        if last >= self.left:
            if not wait:
                return False
            self._leave(last + 1)
            self.left = self.head // self.P
        return self.side.arrived(last % self.pages, wait)

    def rows(self, kind: str, r: int, start: int, count: int) -> list[np.ndarray]:
        """Rows [start, start + count) of router r on the host, as views into the pages they lie in:
        `ids`, `weights` or `logits` (16-bit integers and bfloat16 as uint16)."""
        tape, tensor = (self.logit_tapes if kind == "logits" else self.tapes)[r], self.host[kind]
        if tensor.dtype in (torch.int16, torch.bfloat16):
            tensor = tensor.view(torch.uint16)
        found: list[np.ndarray] = []
        while count > 0 or not found:
            page, row = divmod(start, self.P)
            n = min(self.P - row, count)
            found.append(tape.part(tensor, page % self.pages)[row : row + n].numpy())
            start, count = start + n, count - n
        return found

    def handed_over(self, position: int) -> None:
        """The rows before `position` have been copied out: pages that lie before it may be written
        again."""
        if position // self.P > self.drained:
            self.drained = position // self.P
            self.limit.fill_((self.drained + self.pages) * self.P)

    def rewind(self, dropped: int) -> None:
        """Back to the end of the last forward pass that ended, with `dropped` rows then: one
        failed, and its rows are written over."""
        self.cursor.fill_(self.head)
        self.dropped.fill_(dropped)


class Rings:
    """The rings of a model, one a device, in step. `routers`: device, top-k and experts of each
    router."""

    def __init__(
        self,
        routers: Sequence[tuple[torch.device, int, int]],
        weight_dtype: torch.dtype,
        logits: bool,
        rows: int,
    ):
        self._of: list[tuple[Ring, int]] = [None] * len(routers)  # type: ignore[list-item]
        self._rings: list[Ring] = []
        for device in dict.fromkeys(d for d, _, _ in routers):
            local = [r for r, (d, _, _) in enumerate(routers) if d == device]
            ring = Ring(
                device,
                [routers[r][1] for r in local],
                [routers[r][2] for r in local],
                weight_dtype,
                logits,
                rows,
            )
            self._rings.append(ring)
            for n, r in enumerate(local):
                self._of[r] = (ring, n)
        self.tapes = [ring.tapes[n] for ring, n in self._of]
        self.logit_tapes = [ring.logit_tapes[n] for ring, n in self._of] if logits else []
        self.synchronous = all(
            ring.side is None for ring in self._rings
        )  # the host sees what has been written when it has been

    @property
    def head(self) -> int:
        return self._rings[0].head

    @property
    def fits(self) -> int:
        return min(ring.fits for ring in self._rings)

    @property
    def room(self) -> int:
        return min(ring.room for ring in self._rings)

    def enable(self, on: bool) -> None:
        for ring in self._rings:
            ring.enabled.fill_(int(on))

    def rewind(self, dropped: int) -> None:
        for ring in self._rings:
            ring.rewind(dropped)

    def synchronize(self) -> None:
        for ring in self._rings:
            if ring.side is not None:
                ring.side.synchronize()

    def end(self, rows: int) -> None:
        for ring in self._rings:
            ring.end(rows)

    def arrived(self, position: int, wait: bool) -> bool:
        return all(ring.arrived(position, wait) for ring in self._rings)

    def handed_over(self, position: int) -> None:
        for ring in self._rings:
            ring.handed_over(position)

    def stands(self) -> list[Tensor]:
        return [ring.stand() for ring in self._rings]

    def seen(self, stands: list[Tensor], start: int) -> tuple[list[int], list[int] | None]:
        """Rows that each router saw after position `start`, up to where its ring's cursors stood,
        and those of logits."""
        stand_of = {
            id(ring): (stand - start).tolist()
            for ring, stand in zip(self._rings, stands, strict=True)
        }
        seen = [stand_of[id(ring)][n] for ring, n in self._of]
        return seen, [
            stand_of[id(ring)][len(ring.tapes) + n] for ring, n in self._of
        ] if self.logit_tapes else None

    def dropped(self) -> list[int]:
        """Rows that each router's device left out, by its own count. Waits for the device."""
        dropped_of = {id(ring): ring.dropped.tolist() for ring in self._rings}
        return [dropped_of[id(ring)][n] for ring, n in self._of]

    def rows(
        self, kind: str, r: int, start: int, count: int, keep: np.ndarray | None
    ) -> np.ndarray:
        """A copy of router r's rows [start, start + count), or of those at `keep` among them;
        bfloat16 as its bits, uint16."""
        ring, n = self._of[r]
        parts = ring.rows(kind, n, start, count)
        values = np.concatenate(parts) if len(parts) > 1 else parts[0]
        if keep is not None:
            values = values[keep]
        elif len(parts) == 1:
            values = values.copy()
        return values
