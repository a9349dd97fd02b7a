"""Moves recorded forward passes from the rings to the writer, in order, once they have been copied
to the host. Applies back-pressure when a ring is full.

Consecutive passes are handed over together where they can be: in decoding, what is done per batch
would otherwise cost more than the recording itself. On a CPU they wait for that in the ring until a
page is full, at most HELD_SECONDS."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from moe_inspect.capture.hook.inputs.pass_inputs import PassInputs
from moe_inspect.capture.hook.inputs.rows import CallInputs, Rows, steps_at
from moe_inspect.capture.hook.inputs.sequences import DRAFT
from moe_inspect.capture.hook.stack import Stack, StackPass
from moe_inspect.capture.options import RecordOptions
from moe_inspect.capture.token_loss import PassLosses, TokenLosses
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.schema import EXTRAS, Router
from moe_inspect.trace.writer import RoutedBatch, TraceWriter

HELD_SECONDS = 10.0  # a shard that is not full waits longer


class Forward(NamedTuple):
    """A forward pass on its way to the writer. `passes`: one per stack that ran; the encoder comes
    before the decoder. `losses`: of the tokens of the last stack."""

    number: int
    passes: list[StackPass]
    losses: PassLosses | None = None

    def arrived(self, wait: bool) -> bool:
        if self.losses is not None and not self.losses.complete:
            return False  # the next pass completes them
        if not all(isinstance(p.fed, Rows) or p.fed.is_settled for p in self.passes):
            return False
        return all(
            p.stack.rings is not None and p.stack.rings.is_on_host(p.start + p.fed.T, wait)
            for p in self.passes
        )


class Arrived(NamedTuple):
    """Forward passes on the host: one, or several that are one stack's consecutive decode steps.
    `rows` of each stack that ran, those of all passes."""

    forwards: list[Forward]
    rows: list[Rows]

    def continues(self, before: Arrived) -> bool:
        """Whether the two can be one batch: whole passes of one stack, of one kind."""
        if len(self.rows) > 1 or len(before.rows) > 1:
            return False
        (a,), (b,) = before.forwards[-1].passes, self.forwards[-1].passes
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
    `writer`: None until then. `losses`: of the passes' tokens. `tokens`: passed to the writer so
    far."""

    def __init__(
        self,
        stacks: Mapping[str, Stack],
        inputs: PassInputs,
        options: RecordOptions,
        losses: TokenLosses | None = None,
    ):
        self.stacks, self.inputs, self.options = stacks, inputs, options
        self.losses = losses
        self.writer: TraceWriter | None = None
        self.weight_dtype = torch.float16
        # how long a pass waits for others on a CPU
        self._hold_s = min(HELD_SECONDS, options.commit_every or HELD_SECONDS)
        # whether the rings keep their size: an option says it, or a CUDA graph has their addresses
        self.rings_fixed = options.ring_tokens is not None
        self.tokens = 0
        self._in_flight: deque[Forward] = deque()
        self._arrived: Arrived | None = None  # the first of them, once its rows have been read
        self._held_since = 0.0  # when the first of them began to wait
        self._due_at = 0  # the position at which its page is full
        self._torn = False  # passes have left the queue, and are not yet with the writer

    def make_rings(self, stack: Stack, rows: int) -> None:
        assert not any(p.stack is stack for forward in self._in_flight for p in forward.passes)
        # always with weights: slots are ordered by them, even in a trace without weights
        stack.make_rings(rows, self.weight_dtype)

    def feed(self, stack: Stack, fed: Rows | CallInputs) -> None:
        """A stack is about to run. Waits until its rings have room for these rows, unless decisions
        may be dropped."""
        rings, T = stack.rings, fed.T
        assert rings is not None
        if not (rings.synchronous and rings.free_rows >= T):
            self._make_room(stack, T)
        stack.fed = fed

    def _make_room(self, stack: Stack, T: int) -> None:
        rings = stack.rings
        assert rings is not None
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
            self.make_rings(stack, T)

    def end(self, fed: Sequence[Stack], number: int) -> None:
        """Queues a forward pass of these stacks that has been launched (on a GPU it may still be
        running)."""
        for stack in fed:
            if stack.rings is None:  # it has run for the first time
                assert stack.fed is not None
                self.make_rings(stack, self.options.ring_tokens or stack.fed.T)
                self.feed(stack, stack.fed)
        forward = Forward(number, [stack.end() for stack in fed])
        for done in forward.passes:
            assert done.stack.rings is not None
            # (if not synchronous, checked on arrival)
            if done.cursors is not None and done.stack.rings.synchronous:
                done.stack.check(done)
        for done in forward.passes:
            assert done.stack.rings is not None
            done.stack.rings.end(done.fed.T)
            done.stack.dropped_rows += done.fed.T - done.kept
            done.stack.fed = None
        if self.losses is not None:
            forward = forward._replace(losses=self.losses.take())
        self._in_flight.append(forward)
        if len(self._in_flight) == 1:
            first = forward.passes[0]
            self._begin_to_hold(first.stack, first.start)
        self.inputs.accept()
        self._drain_when_due()

    def _begin_to_hold(self, stack: Stack, start: int) -> None:
        assert stack.rings is not None
        self._held_since = time.monotonic()
        self._due_at = stack.rings.end_of_page(start)

    def count_tokens(self) -> int:
        self.inputs.settle()
        self.drain()
        return self.tokens

    def finish(self) -> None:
        """Passes everything left to the writer. Device and host must agree on the number of dropped
        rows."""
        self.inputs.settle()
        for stack in self.stacks.values():
            if stack.rings is not None:
                stack.rings.synchronize()
        if self.losses is not None:
            self.losses.close()
        self.drain(wait=True)
        for stack in self.stacks.values():
            if (rings := stack.rings) is None:
                continue
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
        if self.losses is not None:
            self.losses.close()
        on_host = all(s.rings is None or s.rings.synchronous for s in self.stacks.values())
        if self.writer is not None and on_host and not self._torn and not self.writer.failed:
            self.drain(wait=True)
        self._in_flight.clear()

    def _drain_when_due(self) -> None:
        """As `drain`, but on a CPU only when a page is full, or its first pass has waited long."""
        first = self._in_flight[0].passes[0]
        rings = first.stack.rings
        assert rings is not None
        if (
            not rings.synchronous
            or rings.head >= self._due_at
            or time.monotonic() - self._held_since > self._hold_s
        ):
            self.drain()

    def drain(self, wait: bool = False, once: bool = False) -> None:
        """Passes arrived forward passes to the writer; `wait` blocks until they have arrived and
        the writer accepts them; `once`: at most one batch."""
        before = self._in_flight[0] if self._in_flight else None
        self._drain(wait, once)
        if self._in_flight and self._in_flight[0] is not before:
            first = self._in_flight[0].passes[0]
            self._begin_to_hold(first.stack, first.start)

    def _drain(self, wait: bool, once: bool) -> None:
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
                for done in arrived.forwards[-1].passes:
                    assert done.stack.rings is not None
                    done.stack.rings.release(done.start + done.fed.T)
            if once:
                return

    def _next_batch(self, wait: bool) -> list[Arrived]:
        """The next passes that have arrived and can be one batch, taken off the queue. `wait`: for
        the first."""
        batch: list[Arrived] = []
        while self._in_flight:
            if self._arrived is None:
                self._arrived = self._read(wait and not batch)
                if self._arrived is None:
                    break
            if batch and not self._arrived.continues(batch[-1]):
                break
            self._torn = True
            batch.append(self._arrived)
            for _ in self._arrived.forwards:
                self._in_flight.popleft()
            self._arrived = None
        return batch

    def _read(self, wait: bool) -> Arrived | None:
        """The first pass of the queue with its rows, or as many as are consecutive decode steps;
        None where it has not arrived."""
        first = self._in_flight[0]
        if not first.arrived(wait):
            return None
        steps = len(steps_at(done.fed for done in self._whole_passes()))
        forwards = list(islice(self._in_flight, max(1, steps)))
        for done in (done for forward in forwards for done in forward.passes):
            if done.stack.rings is not None and not done.stack.rings.synchronous:
                done.stack.check(done)
        if steps > 1:
            rows = [self.inputs.rows_of_steps([forward.passes[0].fed for forward in forwards])]
        else:
            rows = [self.inputs.rows(done.fed) for done in first.passes]
        self.inputs.accept()
        return Arrived(forwards, rows)

    def _whole_passes(self) -> Iterator[StackPass]:
        """The first passes of the queue that have arrived, up to one of another stack or of two, or
        one whose decisions were dropped in part."""
        for forward in self._in_flight:
            done = forward.passes[0]
            of_one = len(forward.passes) == 1 and done.stack is self._in_flight[0].passes[0].stack
            if not of_one or done.kept < done.fed.T or not forward.arrived(wait=False):
                return
            yield done

    def _write(self, writer: TraceWriter, batch: list[Arrived]) -> None:
        parts = [
            (stack, [forward.passes[n] for forward in arrived.forwards], rows)
            for arrived in batch
            for n, rows in enumerate(arrived.rows)
            for stack in [arrived.forwards[0].passes[n].stack]
        ]
        # of these rows, those that are in the rings; and how many are no padding
        kept = [rows.real[: sum(done.kept for done in passes)] for _, passes, rows in parts]
        sizes = [int(real.sum()) for real in kept]
        self.tokens += sum(sizes)
        for (stack, _, rows), size in zip(parts, sizes, strict=True):
            writer.dropped += (len(rows.token_id) - size) * len(stack.routers)

        def of_tokens(name: str) -> np.ndarray:
            arrays = [getattr(rows, name)[:n] for (*_, rows), n in zip(parts, sizes, strict=True)]
            return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

        # stack → its first position, and which of the rows from there on are no padding
        places: dict[str, tuple[int, np.ndarray]] = {}
        for name in {stack.name for stack, _, _ in parts}:
            own = [n for n, (stack, _, _) in enumerate(parts) if stack.name == name]
            places[name] = parts[own[0]][1][0].start, np.concatenate([kept[n] for n in own])
        last = batch[-1].rows[-1]
        token_id = of_tokens("token_id")
        phases = None
        if len({rows.phase for *_, rows in parts if rows.phase != "encode"} | {last.phase}) > 1 or (
            last.phases is not None
        ):
            codes = [rows.phase_codes()[:n] for (*_, rows), n in zip(parts, sizes, strict=True)]
            phases = np.concatenate(codes)
        extras: dict[str, Any] = {k: self._of_routers(places, k) for k in self.options.extras}
        if self.options.token_loss:
            extras["loss"], extras["entropy"] = losses_of(batch, sizes)
        writer.write(
            RoutedBatch(
                batch[-1].forwards[-1].number,
                token_id if self.options.text else np.full_like(token_id, -1),
                of_tokens("document"),
                of_tokens("sequence"),
                of_tokens("position"),
                of_tokens("domain"),
                list(self.inputs.domains),
                ids=self._of_routers(places, "ids"),
                weights=self._of_routers(places, "weights"),
                **extras,
                documents=[document for *_, rows in parts for document in rows.documents],
                phase=last.phase or "decode",
                phases=phases,
                group=last.group,
                encoded=sum(
                    n
                    for (stack, _, _), n in zip(parts, sizes, strict=True)
                    if stack.name == "encoder"
                ),
                batches=numbers_of(batch, kept),
            )
        )

    def _of_routers(self, places: Mapping[str, tuple[int, np.ndarray]], kind: str) -> list[Any]:
        """Per router a copy of its rows in the rings, without padding. `places`: stack → position
        of the first row, and bool [rows], which rows are no padding."""
        found: list[np.ndarray] = []
        for name, stack in self.stacks.items():
            if name not in places:  # did not run
                found += [self._no_rows(kind, router) for router in stack.routers]
                continue
            assert stack.rings is not None
            start, kept = places[name]
            keep = None if kept.all() else np.flatnonzero(kept)
            found += [
                stack.rings.rows(kind, r, start, len(kept), keep) for r in range(len(stack.routers))
            ]
        return found

    def _no_rows(self, kind: str, router: Router) -> np.ndarray:
        if kind in EXTRAS:
            extra = EXTRAS[kind]
            return np.empty((0, extra.width(router.top_k, router.experts)), extra.dtype)
        bits = np.uint16 if self.weight_dtype == torch.bfloat16 else np.float16
        return np.empty((0, router.top_k), bits if kind == "weights" else np.uint8)


def losses_of(batch: Sequence[Arrived], sizes: Sequence[int]) -> np.ndarray:
    """Losses and entropies of the tokens, float32 [2, tokens], NaN where there is none. `sizes`:
    how many tokens there are of each stack's rows."""
    found: list[np.ndarray] = []
    for arrived in batch:
        for rows in arrived.rows[:-1]:  # an encoder's
            found.append(np.full((2, len(rows.token_id)), np.nan, np.float32))
        found.append(
            np.concatenate(
                [
                    forward.losses.values()
                    if forward.losses is not None
                    else np.full((2, forward.passes[-1].fed.T), np.nan, np.float32)
                    for forward in arrived.forwards
                ],
                axis=1,
            )[:, arrived.rows[-1].real]
        )
        # what follows the last token before a rejected draft was not known when it was fed
        is_draft = arrived.rows[-1].phase_codes() == DRAFT
        found[-1][:, :-1][:, is_draft[1:] & ~is_draft[:-1]] = np.nan
    return np.concatenate([v[:, :n] for v, n in zip(found, sizes, strict=True)], axis=1)


def numbers_of(batch: Sequence[Arrived], kept: Sequence[np.ndarray]) -> np.ndarray | None:
    """The number of the forward pass that each token is of, int32; None where all are of one.
    `kept`: per pass, or consecutive steps, which rows are no padding."""
    if len(batch) == len(batch[0].forwards) == 1:
        return None
    numbers: list[int] = []
    sizes: list[int] = []
    for arrived, real in zip(batch, kept, strict=True):
        numbers += [forward.number for forward in arrived.forwards]
        sizes += real.reshape(len(arrived.forwards), -1).sum(1).tolist()
    return np.repeat(np.array(numbers, np.int32), sizes)
