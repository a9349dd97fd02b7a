"""Moves recorded forward passes from the rings to the writer, in order, once they have been copied
to the host. Applies back-pressure when a ring is full.

Consecutive passes are handed over together where they can be: in decoding, what is done per batch
would otherwise cost more than the recording itself. On a CPU they wait for that in the ring until a
page is full, at most HELD_SECONDS."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moe_inspect.capture.hook.call_inputs import CallInputs, Rows
from moe_inspect.capture.hook.pass_inputs import PassInputs
from moe_inspect.capture.hook.stack import Stack, StackPass
from moe_inspect.capture.options import RecordOptions
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.writer import RoutedBatch, TraceWriter

HELD_SECONDS = 10.0  # a shard that is not full waits longer


@dataclass(frozen=True)
class Forward:
    """A forward pass on its way to the writer. `passes`: one per stack that ran; the encoder comes
    before the decoder."""

    number: int
    passes: list[StackPass]

    def arrived(self, wait: bool) -> bool:
        return all(
            p.stack.rings is not None and p.stack.rings.is_on_host(p.start + p.fed.T, wait)
            for p in self.passes
        )


@dataclass(frozen=True)
class Arrived:
    """A forward pass on the host: `rows` of each stack that ran."""

    forward: Forward
    rows: list[Rows]

    def continues(self, before: Arrived) -> bool:
        """Whether the two can be one batch: whole passes of one stack, of one kind."""
        if len(self.rows) > 1 or len(before.rows) > 1:
            return False
        (a,), (b,) = before.forward.passes, self.forward.passes
        (x,), (y,) = before.rows, self.rows
        return (
            a.stack is b.stack
            and a.kept == a.fed.T
            and b.kept == b.fed.T
            and x.phase == y.phase != "encode"
            and x.group == y.group
        )


class HandOver:
    """`weight_dtype`: of the gate weights in the rings, known after the first forward pass;
    `writer`: None until then. `tokens`: passed to the writer so far."""

    def __init__(self, stacks: Mapping[str, Stack], inputs: PassInputs, options: RecordOptions):
        self.stacks, self.inputs, self.options = stacks, inputs, options
        self.writer: TraceWriter | None = None
        self.weight_dtype = torch.float16
        # fixed size: as an option, or because a CUDA graph holds the rings' addresses
        self.rings_fixed = options.ring_tokens is not None
        self.tokens = 0
        self._in_flight: deque[Forward] = deque()
        self._arrived: Arrived | None = None  # the first of them, once its rows have been read
        self._held_since = 0.0
        self._torn = False  # passes have left the queue, and are not yet with the writer

    def make_rings(self, stack: Stack, rows: int) -> None:
        assert not any(p.stack is stack for forward in self._in_flight for p in forward.passes)
        # always with weights: slots are ordered by them, even in a trace without weights
        stack.make_rings(rows, self.weight_dtype)

    def make_room(self, stack: Stack, fed: Rows | CallInputs) -> None:
        """Waits until the stack's rings have room for these rows, unless decisions may be
        dropped."""
        rings, T = stack.rings, fed.T
        assert rings is not None
        if rings.free_rows < T or not rings.synchronous:
            self.drain()
        too_large = rings.max_rows < T
        while rings.free_rows < T and self._in_flight and (too_large or not self.options.drop):
            self.drain(wait=True, once=True)
        if rings.free_rows < T and too_large:
            if self.rings_fixed:
                raise MoeInspectError(
                    f"a forward pass of {T:,} rows is more than the {rings.max_rows:,} there is "
                    f"room for on the device: record with ring_tokens={T}"
                )
            self.make_rings(stack, T)
            rings = stack.rings
            assert rings is not None
        stack.fed = fed

    def launched(self, forward: Forward) -> None:
        """Queues a forward pass that has been launched (on a GPU it may still be running)."""
        for done in forward.passes:
            assert done.stack.rings is not None
            if done.stack.rings.synchronous:  # else checked on arrival
                done.stack.check(done)
        for done in forward.passes:
            assert done.stack.rings is not None
            done.stack.rings.end(done.fed.T)
            done.stack.dropped_rows += done.fed.T - done.kept
            done.stack.fed = None
        if not self._in_flight:
            self._held_since = time.monotonic()
        self._in_flight.append(forward)
        self.inputs.accept()

    def finish(self) -> None:
        """Passes everything left to the writer. Device and host must agree on the number of dropped
        rows."""
        for stack in self.stacks.values():
            if stack.rings is not None:
                stack.rings.synchronize()
        self.drain(wait=True)
        for stack in self.stacks.values():
            if (rings := stack.rings) is None:
                continue
            if stack.fed is not None:  # the last forward pass failed
                rings.rewind(stack.dropped_rows)
            # `dropped` waits for the device, and so for the copy that `read_cursors` began
            cursors, dropped = rings.read_cursors(), rings.dropped()
            stack.check_seen(0, *rings.rows_seen(cursors, rings.head))
            assert all(n == stack.dropped_rows for n in dropped), (
                f"the device dropped {dropped} rows, the host {stack.dropped_rows}"
            )

    def abandon(self) -> None:
        """Passes on what can be, after an exception. Where it came between ring and writer, what is
        still in the rings is left out, so that no batch in between is missing."""
        on_host = all(s.rings is None or s.rings.synchronous for s in self.stacks.values())
        if self.writer is not None and on_host and not self._torn and not self.writer.failed:
            self.drain(wait=True)
        self._in_flight.clear()

    def drain_when_due(self) -> None:
        """As `drain`, but on a CPU only when a page is full, or its first pass has waited long."""
        if not self._in_flight:
            return
        first = self._in_flight[0].passes[0]
        rings = first.stack.rings
        assert rings is not None
        if (
            not rings.synchronous
            or rings.has_filled_page_since(first.start)
            or time.monotonic() - self._held_since > HELD_SECONDS
        ):
            self.drain()

    def drain(self, wait: bool = False, once: bool = False) -> None:
        """Passes arrived forward passes to the writer; `wait` blocks until they have arrived and
        the writer accepts them; `once`: at most one batch."""
        while self._in_flight:
            assert self.writer is not None
            if self._torn and not self.writer.failed:
                raise MoeInspectError(
                    "an earlier forward pass could not be handed over: this recording is over"
                )
            if self.options.drop and not wait and self.writer.full:
                return
            batch = self._next_batch(wait)
            if not batch:
                return
            self._write(self.writer, batch)
            self._torn = False
            for arrived in batch:
                for done in arrived.forward.passes:
                    assert done.stack.rings is not None
                    done.stack.rings.release(done.start + done.fed.T)
            if once:
                return

    def _next_batch(self, wait: bool) -> list[Arrived]:
        """The next passes that have arrived and can be one batch, taken off the queue. `wait`: for
        the first."""
        batch: list[Arrived] = []
        while self._in_flight:
            forward = self._in_flight[0]
            if self._arrived is None:
                if not forward.arrived(wait and not batch):
                    break
                for done in forward.passes:
                    if done.stack.rings is not None and not done.stack.rings.synchronous:
                        done.stack.check(done)
                self._arrived = Arrived(forward, [self.inputs.rows(p.fed) for p in forward.passes])
                self.inputs.accept()
            if batch and not self._arrived.continues(batch[-1]):
                break
            self._torn = True
            batch.append(self._arrived)
            self._in_flight.popleft()
            self._arrived = None
        return batch

    def _write(self, writer: TraceWriter, batch: list[Arrived]) -> None:
        parts = [
            (done, rows)
            for arrived in batch
            for done, rows in zip(arrived.forward.passes, arrived.rows, strict=True)
        ]
        kept = [rows.real[: done.kept] for done, rows in parts]
        sizes = [int(real.sum()) for real in kept]
        self.tokens += sum(sizes)
        for (done, rows), size in zip(parts, sizes, strict=True):
            lost = int(rows.real.sum()) - size
            writer.dropped += lost * len(done.stack.routers)

        def of_tokens(name: str) -> np.ndarray:
            arrays = [getattr(rows, name)[:n] for (_, rows), n in zip(parts, sizes, strict=True)]
            return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

        # stack → its first position, and which of the rows from there on are no padding
        places: dict[str, tuple[int, np.ndarray]] = {}
        for stack in {done.stack.name for done, _ in parts}:
            own = [n for n, (done, _) in enumerate(parts) if done.stack.name == stack]
            places[stack] = parts[own[0]][0].start, np.concatenate([kept[n] for n in own])
        numbers = [arrived.forward.number for arrived in batch]
        last = batch[-1].rows[-1]
        writer.write(
            RoutedBatch(
                numbers[-1],
                of_tokens("token_id"),
                of_tokens("document"),
                of_tokens("sequence"),
                of_tokens("position"),
                of_tokens("domain"),
                list(self.inputs.domains),
                ids=self._of_routers(places, "ids"),
                weights=self._of_routers(places, "weights"),
                logits=self._of_routers(places, "logits") if self.options.logits else None,
                documents=[document for _, rows in parts for document in rows.documents],
                phase=last.phase,
                group=last.group,
                encoded=sum(
                    n
                    for (done, _), n in zip(parts, sizes, strict=True)
                    if done.stack.name == "encoder"
                ),
                batches=np.repeat(np.array(numbers, np.int32), sizes) if len(batch) > 1 else None,
            )
        )

    def _of_routers(self, places: Mapping[str, tuple[int, np.ndarray]], kind: str) -> list[Any]:
        """Per router a copy of its rows in the rings, without padding. `places`: stack → position
        of the first row, and bool [rows], which rows are no padding."""
        found: list[np.ndarray] = []
        for name, stack in self.stacks.items():
            if name not in places:  # did not run
                dtype = self._dtype(kind)
                widths = [r.experts if kind == "logits" else r.top_k for r in stack.routers]
                found += [np.empty((0, width), dtype) for width in widths]
                continue
            assert stack.rings is not None
            start, kept = places[name]
            keep = None if kept.all() else np.flatnonzero(kept)
            found += [
                stack.rings.rows(kind, r, start, len(kept), keep) for r in range(len(stack.routers))
            ]
        return found

    def _dtype(self, kind: str) -> type:
        if kind == "ids":
            return np.uint8
        is_bits = kind == "weights" and self.weight_dtype == torch.bfloat16
        return np.uint16 if is_bits else np.float16
