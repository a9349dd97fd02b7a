"""Moves recorded forward passes from the rings to the writer, in order, once they have been copied
to the host. Applies back-pressure when a ring is full.

Consecutive passes are handed over together where they can be: in decoding, what is done per batch
would otherwise cost more than the recording itself. On a CPU they wait for that in the ring until a
page is full, at most HELD_SECONDS."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from moe_inspect.capture.hook.inputs.pass_inputs import PassInputs
from moe_inspect.capture.hook.inputs.rows import CallInputs, Rows, joined
from moe_inspect.capture.hook.ring import Rings
from moe_inspect.capture.hook.stack import Stack, StackPass
from moe_inspect.capture.options import RecordOptions
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.schema import EXTRAS
from moe_inspect.trace.writer import RoutedBatch, TraceWriter

HELD_SECONDS = 10.0  # a shard that is not full waits longer


@dataclass(eq=False, slots=True)
class Forward:
    """A forward pass on its way to the writer. `passes`: one per stack that ran; the encoder comes
    before the decoder. `since`: when it was queued. `rows`: of each stack that ran, once it is on
    the host."""

    number: int
    passes: list[StackPass]
    since: float
    rows: list[Rows] = field(default_factory=list)

    def arrived(self, wait: bool) -> bool:
        if not all(isinstance(p.fed, Rows) or p.fed.is_settled for p in self.passes):
            return False
        return all(p.rings.is_on_host(p.start + p.fed.T, wait) for p in self.passes)

    def continues(self, before: Forward) -> bool:
        """Whether the two can be one batch: whole passes of one stack, of one kind."""
        if len(self.rows) > 1 or len(before.rows) > 1:
            return False
        (a,), (b,), (x,), (y,) = before.passes, self.passes, before.rows, self.rows
        return (
            a.stack is b.stack
            and a.kept == a.fed.T
            and b.kept == b.fed.T
            and x.phase == y.phase != "encode"
            and x.group == y.group
        )


# stack → its first pass of a batch, and which of the rows from there on are no padding
Places = dict[str, tuple[StackPass, list[np.ndarray]]]


class HandOver:
    """`weight_dtype`: of the gate weights in the rings, known after the first forward pass;
    `writer`: None until then. `tokens`: passed to the writer so far. `rings_fixed`: whether the
    rings keep their size, because an option says it or a CUDA graph has their addresses."""

    def __init__(self, stacks: Mapping[str, Stack], inputs: PassInputs, options: RecordOptions):
        self.stacks, self.inputs, self.options = stacks, inputs, options
        self.writer: TraceWriter | None = None
        self.weight_dtype = torch.float16
        # how long a pass waits for others on a CPU
        self._hold_s = min(HELD_SECONDS, options.commit_every or HELD_SECONDS)
        self.rings_fixed = options.ring_tokens is not None
        self.tokens = 0
        self._in_flight: deque[Forward] = deque()
        self._torn = False  # passes have left the queue, and are not yet with the writer
        self._depth = 0  # of calls of `end` and `drain`

    def feed(self, stack: Stack, fed: Rows | CallInputs) -> Rings:
        """A stack is about to run. Waits until its rings, which it returns, have room for these
        rows, unless decisions may be dropped."""
        T = fed.T
        # they hold weights, by which slots are ordered, even in a trace without weights
        rings = stack.rings or stack.make_rings(self.options.ring_tokens or T, self.weight_dtype)
        if not (rings.synchronous and rings.free_rows >= T):
            self.drain()
            too_large = rings.max_rows < T
            while rings.free_rows < T and self._in_flight and (too_large or not self.options.drop):
                self.drain(wait=True, once=True)
            if rings.free_rows < T and too_large:
                if self.rings_fixed:
                    raise MoeInspectError(
                        f"a forward pass of {T:,} rows exceeds the room on the device "
                        f"({rings.max_rows:,}): record with ring_tokens={T}"
                    )
                rings = stack.make_rings(T, self.weight_dtype)
        stack.fed = fed
        return rings

    def end(self, fed: Sequence[Stack], number: int) -> None:
        """Queues a forward pass of these stacks that has been launched (on a GPU it may still be
        running)."""
        with self._handing_over():
            for stack in fed:
                if stack.rings is None and stack.fed is not None:  # it has run for the first time
                    self.feed(stack, stack.fed)
            passes = [stack.end() for stack in fed]
            for done in passes:  # (of a GPU, checked on arrival)
                if done.rings.synchronous:
                    done.stack.check(done)
            for done in passes:
                done.rings.end(done.fed.T)
                done.stack.dropped_rows += done.fed.T - done.kept
                done.stack.fed = None
            self._in_flight.append(Forward(number, passes, time.monotonic()))
            self.inputs.accept()
            # on a CPU, passes wait until a page is full, or the first of them has waited long
            first = self._in_flight[0]
            rings, waited_s = first.passes[0].rings, time.monotonic() - first.since
            is_full = rings.head // rings.P > first.passes[0].start // rings.P
            if not rings.synchronous or is_full or waited_s > self._hold_s:
                self.drain()

    @contextmanager
    def _handing_over(self) -> Iterator[None]:
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def count_tokens(self) -> int:
        # a signal handler may ask in the middle, on the thread that holds the recorder's lock
        if not self._depth:
            self.inputs.settle()
            self.drain()
        return self.tokens

    def finish(self) -> None:
        """Passes everything left to the writer. Device and host must agree on the number of dropped
        rows."""
        self.inputs.settle()
        in_use = [(stack, stack.rings) for stack in self.stacks.values() if stack.rings is not None]
        for _, rings in in_use:
            rings.synchronize()
        self.drain(wait=True)
        for stack, rings in in_use:
            if stack.fed is not None:  # the last forward pass failed
                rings.rewind(stack.dropped_rows)
            # `dropped` waits for the device, and so for the copy that `read_cursors` began
            cursors, dropped = rings.read_cursors(), rings.dropped()
            stack.check_seen(0, rings.rows_seen(cursors, rings.head))
            assert all(n == stack.dropped_rows for n in dropped), (
                f"the device dropped {dropped} rows, the host {stack.dropped_rows}"
            )

    def abandon(self) -> None:
        """Passes on what can be, after an exception. Where it came between ring and writer, what is
        still in the rings is left out, so that no batch in between is missing."""
        self.inputs.settle()
        on_host = all(s.rings is None or s.rings.synchronous for s in self.stacks.values())
        if self.writer is not None and on_host and not self._torn and not self.writer.failed:
            self.drain(wait=True)
        self._in_flight.clear()

    def drain(self, wait: bool = False, once: bool = False) -> None:
        """Passes arrived forward passes to the writer; `wait` blocks until they have arrived and
        the writer accepts them; `once`: at most one batch."""
        with self._handing_over():
            while self._in_flight and (writer := self.writer) is not None:
                if self._torn and not writer.failed:
                    raise MoeInspectError(
                        "an earlier forward pass could not be handed over: this recording is over"
                    )
                if self.options.drop and not wait and writer.full:
                    return
                batch = self._next_batch(wait)
                if not batch:
                    return
                self._write(writer, batch)
                self._torn = False
                for done in (done for forward in batch for done in forward.passes):
                    done.rings.release(done.start + done.fed.T)
                if once:
                    return

    def _next_batch(self, wait: bool) -> list[Forward]:
        """The next passes that have arrived and can be one batch, taken off the queue. `wait`: for
        the first."""
        batch: list[Forward] = []
        while self._in_flight:
            first = self._in_flight[0]
            if not self._read(first, wait and not batch):
                break
            if batch and not first.continues(batch[-1]):
                break
            self._torn = True
            batch.append(self._in_flight.popleft())
        return batch

    def _read(self, forward: Forward, wait: bool) -> bool:
        """Reads the rows of the first pass of the queue, once; False where it has not arrived."""
        if not forward.rows:
            if not forward.arrived(wait):
                return False
            for done in forward.passes:
                if not done.rings.synchronous:
                    done.stack.check(done)
            forward.rows = [self.inputs.rows(done.fed) for done in forward.passes]
            self.inputs.accept()
        return True

    def _write(self, writer: TraceWriter, batch: list[Forward]) -> None:
        parts: list[Rows] = []  # those that are in the rings
        numbers: list[np.ndarray] = []  # of the forward pass that each token is of
        places: Places = {}
        encoded = 0
        for forward in batch:
            for done, rows in zip(forward.passes, forward.rows, strict=True):
                stack, there = done.stack, first_rows(rows, done.kept)
                parts.append(there)
                tokens = len(there.token_id)
                writer.dropped += (len(rows.token_id) - tokens) * len(stack.routers)
                places.setdefault(stack.name, (done, []))[1].append(there.real)
                encoded += tokens if stack.name == "encoder" else 0
                numbers.append(np.full(tokens, forward.number, np.int32))
        fed = joined(parts)
        self.tokens += len(fed.token_id)
        writer.write(
            RoutedBatch(
                batch[-1].number,
                fed.token_id if self.options.text else np.full_like(fed.token_id, -1),
                fed.document,
                fed.sequence,
                fed.position,
                fed.domain,
                list(self.inputs.domains),
                ids=self._of_routers(places, "ids"),
                weights=self._of_routers(places, "weights"),
                extras={kind: self._of_routers(places, kind) for kind in self.options.extras},
                documents=fed.documents,
                phases=fed.phase_codes(),
                group=batch[-1].rows[-1].group,
                encoded=encoded,
                batches=np.concatenate(numbers) if len(batch) > 1 else None,
            )
        )

    def _of_routers(self, places: Places, kind: str) -> list[np.ndarray]:
        """Per router a copy of its rows in the rings, without padding."""
        is_bf16, extra = self.weight_dtype == torch.bfloat16, EXTRAS.get(kind)
        dtype = {"ids": "uint8", "weights": "uint16" if is_bf16 else "float16"}.get(kind)
        found: list[np.ndarray] = []
        for name, stack in self.stacks.items():
            if name not in places:  # did not run
                for router in stack.routers:
                    K, E = router.top_k, router.experts
                    width = extra.width(K, E) if extra else K
                    found.append(np.empty((0, width), extra.dtype if extra else dtype))
                continue
            first, parts = places[name]
            real = np.concatenate(parts)
            keep = None if real.all() else np.flatnonzero(real)
            rows = first.rings.rows
            found += [
                rows(kind, r, first.start, len(real), keep) for r in range(len(stack.routers))
            ]
        return found


def first_rows(rows: Rows, kept: int) -> Rows:
    """The first `kept` of the rows, padding included."""
    if kept == rows.T:
        return rows
    n = int(rows.real[:kept].sum())
    names = ("token_id", "document", "sequence", "position", "domain", "phases")
    of_tokens = {name: values[:n] for name in names if (values := getattr(rows, name)) is not None}
    return replace(rows, real=rows.real[:kept], **of_tokens)
