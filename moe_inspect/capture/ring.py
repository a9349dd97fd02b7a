"""Pages that a forward pass is recorded into, on the device it runs on, and their way to the host.

A page holds one forward pass: for each router r the ids [P, K_r], the weights [P, K_r] and, if asked, the logits [P, E_r],
each kind in one contiguous tensor, so that a page leaves the GPU in one copy a kind: event → side stream → pinned memory.
The ring blocks when all pages are on their way; it never overwrites one that has not been taken.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from moe_inspect.capture import kernels

PAGES = 3


class Page:
    """Device tensors, their pinned twins (the same tensors on a CPU) and the event after which the twins are whole."""

    def __init__(self, ring: Ring, capacity: int):
        self.capacity, self.rows, self.ring = capacity, [0] * len(ring.slots), ring
        slots, size = capacity * sum(ring.slots), capacity * sum(ring.experts)
        with torch.inference_mode(False):  # a page made in inference mode could not be written outside it
            self.ids = torch.empty(slots, dtype=ring.id_dtype, device=ring.device)
            self.weights = torch.empty(slots, dtype=ring.weight_dtype, device=ring.device) if ring.weight_dtype else None
            self.logits = torch.empty(size, dtype=torch.float16, device=ring.device) if ring.logits else None
            self.host = {k: self._pinned(getattr(self, k)) for k in ("ids", "weights", "logits")}
        self.copied = torch.cuda.Event() if ring.on_gpu else None

    def _pinned(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None or not self.ring.on_gpu:
            return tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)

    def view(self, tensor: torch.Tensor, r: int, widths: Sequence[int]) -> torch.Tensor:
        """Router r's part of a page tensor, [P, width_r]."""
        start = self.capacity * sum(widths[:r])
        return tensor[start : start + self.capacity * widths[r]].view(self.capacity, widths[r])

    def of(self, kind: str, r: int) -> torch.Tensor | None:
        """Router r's rows on the host: `ids`, `weights` or `logits`; None where the ring does not keep them."""
        tensor = self.host[kind]
        if tensor is None:
            return None
        widths = self.ring.experts if kind == "logits" else self.ring.slots
        return self.view(tensor, r, widths)[: self.rows[r]]


class Ring:
    """Pages of the routers of one device. `slots[r]` = K_r, `experts[r]` = E_r; `weight_dtype` None: no weights."""

    def __init__(
        self,
        device: torch.device,
        slots: Sequence[int],
        experts: Sequence[int],
        weight_dtype: torch.dtype | None,
        logits: bool = False,
        pages: int = PAGES,
    ):
        self.device, self.slots, self.experts = device, list(slots), list(experts)
        self.weight_dtype, self.logits = weight_dtype, logits
        # one value is kept for "nowhere", so 256 experts need the wider type
        self.id_dtype = torch.uint8 if max(experts) < 256 else torch.int16
        self.on_gpu = device.type == "cuda"
        self.pages = pages if self.on_gpu else 1
        self.stream = torch.cuda.Stream(device) if self.on_gpu else None
        self.free: list[Page] = []
        self.leaving: deque[Page] = deque()
        self.page: Page | None = None

    def begin(self, tokens: int) -> None:
        """Takes a free page with room for a forward pass of `tokens` rows a router. The caller has seen to it that fewer
        than `pages` are leaving (`full`)."""
        assert not self.full
        # a page leaves whole: one made for a prompt is too large for a decode step
        page = next((p for p in self.free if tokens <= p.capacity <= 8 * tokens), None) or Page(self, tokens)
        self.free = [p for p in self.free if p is not page][-self.pages :]
        page.rows = [0] * len(self.slots)
        self.page = page

    @property
    def full(self) -> bool:
        return len(self.leaving) >= self.pages

    def write(self, r: int, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
        """The decisions of one call of router r. A call beyond the page's end is counted, not written: the completeness
        check speaks of it."""
        page = self.page
        assert page is not None
        row, page.rows[r] = page.rows[r], page.rows[r] + len(ids_TK)
        if page.rows[r] <= page.capacity:
            weights = page.view(page.weights, r, self.slots) if page.weights is not None else None
            kernels.record(ids_TK, weights_TK, page.view(page.ids, r, self.slots), weights, row, self.experts[r])

    def write_logits(self, r: int, row: int, logits_TE: torch.Tensor) -> None:
        page = self.page
        assert page is not None
        assert page.logits is not None
        if row + len(logits_TE) <= page.capacity:
            page.view(page.logits, r, self.experts)[row : row + len(logits_TE)] = logits_TE

    def end(self) -> None:
        """The forward pass is over: its page starts to leave."""
        page, self.page = self.page, None
        assert page is not None
        if page.copied is not None:
            assert self.stream is not None
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                for kind in ("ids", "weights", "logits"):
                    if (pinned := page.host[kind]) is not None:
                        pinned.copy_(getattr(page, kind), non_blocking=True)
                page.copied.record(self.stream)
        self.leaving.append(page)

    def arrived(self, wait: bool) -> bool:
        """Whether the oldest leaving page is whole on the host; with `wait`, waits until it is."""
        page = self.leaving[0]
        if page.copied is None or page.copied.query():
            return True
        if wait:
            page.copied.synchronize()
        return wait

    def oldest(self) -> Page:
        return self.leaving[0]

    def take(self) -> None:
        """The oldest page's rows have been copied out: it may be written again."""
        self.free.append(self.leaving.popleft())
