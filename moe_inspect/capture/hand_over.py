"""Moves forward passes, once they are on the host, to the writer in order: their decisions, or sums
of them. Holds the model back when too many wait.

Consecutive passes are handed over together where they can be: in decoding, what is done per batch
would otherwise cost more than the recording itself. On a CPU they wait for that until there are
HELD_ROWS, at most HELD_SECONDS."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from moe_inspect.capture.counted import Counted, Totals
from moe_inspect.capture.hook.inputs import PassInputs
from moe_inspect.capture.hook.numbering import CallInputs, Rows, joined
from moe_inspect.capture.hook.stack import Stack
from moe_inspect.capture.options import RecordOptions
from moe_inspect.capture.rows import ShownRouter, TakenPass, stored_values
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer import RoutedBatch, TraceWriter

HELD_SECONDS = 10.0  # a shard that is not full waits longer
HELD_ROWS, HELD_PASSES = 4096, 256
FORWARD_PASSES = 3  # of the largest size that may wait: one is copied to the host, two are read


@dataclass(eq=False, slots=True)
class StackPass:
    """The run of a stack in a forward pass. `taken`: what its routers chose; None if the pass is
    left out. Once it is read, `tokens`: the number of tokens that it was fed, and `rows`: the
    recorded ones."""

    stack: Stack
    fed: Rows | CallInputs
    taken: TakenPass | None
    tokens: int = 0
    rows: Rows | None = None

    def has_arrived(self, wait: bool) -> bool:
        # (counts do not tell drafts, which the next pass takes back, from other tokens)
        is_settled = isinstance(self.fed, Rows) or self.fed.is_settled or self.stack.is_summed
        return is_settled and (self.taken is None or self.taken.has_arrived(wait))


@dataclass(eq=False, slots=True)
class Forward:
    """A forward pass on its way to the writer. `passes`: one per stack that ran; the encoder comes
    before the decoder. `since`: when it was queued."""

    number: int
    passes: list[StackPass]
    since: float

    @property
    def T(self) -> int:
        """Rows that wait."""
        return sum(p.fed.T for p in self.passes if p.taken is not None)

    @property
    def rows(self) -> list[Rows]:
        """The recorded rows of each stack; [] until the pass is read."""
        return [p.rows for p in self.passes if p.rows is not None]

    def continues(self, before: Forward) -> bool:
        """Whether the two can be one batch: passes of one stack, of one kind."""
        if len(self.passes) > 1 or len(before.passes) > 1:
            return False
        (a,), (b,), (x,), (y,) = before.passes, self.passes, before.rows, self.rows
        return (
            a.stack is b.stack
            and (a.taken is None) == (b.taken is None)
            and x.phase == y.phase != "encode"
            and x.group == y.group
        )


class HandOver:
    """`counted`: sums the decisions, instead of recording each. `writer`: None until the first
    forward pass is over, which shows `weight_dtype`, the type of the gate weights. `tokens`: the
    number handed over so far."""

    def __init__(
        self,
        stacks: Mapping[str, Stack],
        inputs: PassInputs,
        options: RecordOptions,
        counted: Counted | None,
    ):
        self.stacks, self.inputs, self.options = stacks, inputs, options
        self.writer: TraceWriter | None = None
        self.weight_dtype = torch.float16
        self.counted = counted
        # how long a pass waits for others
        self._hold_s = min(HELD_SECONDS, options.commit_every or HELD_SECONDS)
        self.tokens = 0
        self._skips = False  # the current pass is left out
        self._queue: deque[Forward] = deque()
        self._queued_rows = self._largest = 0
        self._torn = False  # passes have left the queue, and are not yet with the writer
        self._depth = 0  # of calls of `end` and `drain`

    # --- a forward pass

    def begin(self, number: int) -> None:
        self._skip(self.options.counts_only and number % self.options.every != 0)

    def _skip(self, skips: bool) -> None:
        self._skips = skips
        for stack in self.stacks.values():
            stack.skips = skips and not stack.is_new

    def feed(self, stack: Stack, fed: Rows | CallInputs, in_compiled: bool) -> None:
        """A stack is about to run. Waits until there is room for its rows; where decisions may be
        dropped, the pass is left out instead. `in_compiled`: compiled code may write them."""
        stack.scope.fed, rows = fed, stack.rows
        if rows is None or self.counted is not None:
            return
        stack.scope.to_tapes = in_compiled or not rows.keeps_calls
        if stack.scope.to_tapes:
            stack.grow(fed.T)
        self._largest = max(self._largest, fed.T, self.options.ring_tokens or 0)
        most = max(HELD_ROWS if rows.keeps_calls else 0, FORWARD_PASSES * self._largest)
        if self._queued_rows + fed.T > most:
            self.drain()
        while self._queued_rows + fed.T > most and self._queue:
            if self.options.drop:
                self._skip(True)
                return
            self.drain(wait=True, once=True)

    def end(self, fed: Sequence[Stack], number: int) -> None:
        """Queues a forward pass of these stacks that has been launched (on a GPU it may still be
        running)."""
        with self._handing_over():
            passes = list[StackPass]()
            for stack in fed:
                inputs = stack.scope.fed
                assert inputs is not None
                taken = None if self._skips else stack.take(inputs)
                if taken is not None and not taken.copied:  # of a GPU, checked on arrival
                    stack.check(taken, inputs.T)
                passes.append(StackPass(stack, inputs, taken))
            for stack in fed:
                if self._skips and stack.rows is not None:
                    stack.rows.rewind()
                stack.scope.fed = None
            self._queue.append(Forward(number, passes, time.monotonic()))
            self._queued_rows += self._queue[-1].T
            self.inputs.accept()
            waits = all(p.taken is None or not p.taken.copied for p in passes)
            waited_s = time.monotonic() - self._queue[0].since
            is_full = self._queued_rows >= HELD_ROWS or len(self._queue) >= HELD_PASSES
            if not waits or is_full or waited_s > self._hold_s:
                self.drain()
            if self.counted is not None and not self._skips:
                self.counted.note(number, passes[-1].fed)
                self._commit_when_due()

    @contextmanager
    def _handing_over(self) -> Iterator[None]:
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def end_group(self) -> None:
        """Ends a group of passes: their counts may be committed."""
        if self.counted is not None:
            self.counted.in_group = False
            self._commit_when_due()

    def _commit_when_due(self) -> None:
        assert self.counted is not None
        if self.writer is not None and self.counted.is_due(self._queued_rows):
            self.drain(wait=True)
            self.counted.write(self.writer)

    # --- what there is so far

    def count_tokens(self) -> int:
        # a signal handler may ask in the middle, on the thread that holds the recorder's lock
        if not self._depth:
            self.inputs.settle()
            self.drain(wait=self.counted is not None)
        return self.tokens

    def totals(self, all_ranks: bool) -> Totals:
        assert self.counted is not None
        self.drain(wait=True)
        return self.counted.totals(all_ranks)

    # --- the end

    def finish(self) -> None:
        """Passes everything left to the writer. MoeInspectError where a router has seen rows behind
        the last forward pass."""
        self.inputs.settle()
        self.drain(wait=True)
        for stack in self.stacks.values():
            if stack.rows is not None and stack.rows.P:
                if stack.scope.fed is not None:  # the last forward pass failed
                    stack.rows.rewind()
                stack.check_seen(0, stack.rows.seen())

    def abandon(self) -> None:
        """Passes on what can be, after an exception. Where it came between queue and writer, what
        is still in the queue is left out, so that no batch in between is missing."""
        self.inputs.settle()
        on_host = all(not p.taken.copied for f in self._queue for p in f.passes if p.taken)
        can_write = self.writer is not None and not self.writer.failed
        if (can_write or self.counted is not None) and on_host and not self._torn:
            self.drain(wait=True)
        self._queue.clear()

    def finish_counts(self) -> None:
        """Writes the last counts."""
        if self.counted is not None:
            self.counted.finish(self.writer)

    # --- from the queue to the writer

    def drain(self, wait: bool = False, once: bool = False) -> None:
        """Passes arrived forward passes to the writer; `wait` blocks until they have arrived and
        the writer accepts them; `once`: at most one batch."""
        with self._handing_over():
            while self._queue and (self.writer is not None or self.counted is not None):
                if self._torn and not (self.writer is not None and self.writer.failed):
                    raise MoeInspectError(
                        "an earlier forward pass could not be handed over: this recording is over"
                    )
                drops = self.options.drop and self.counted is None and not wait
                if drops and self.writer is not None and self.writer.full:
                    return
                batch = self._next_batch(wait)
                if not batch:
                    return
                if self.counted is not None:
                    self._count(self.counted, batch)
                elif self.writer is not None:
                    self._write(self.writer, batch)
                self._torn = False
                if once:
                    return

    def _next_batch(self, wait: bool) -> list[Forward]:
        """The next passes that have arrived and can be one batch, taken off the queue. `wait`: for
        the first."""
        batch: list[Forward] = []
        while self._queue:
            first = self._queue[0]
            if not self._read(first, wait and not batch):
                break
            if batch and self.counted is None and not first.continues(batch[-1]):
                break
            self._torn = True
            self._queued_rows -= first.T
            batch.append(self._queue.popleft())
        return batch

    def _read(self, forward: Forward, wait: bool) -> bool:
        """Reads the rows of the first pass of the queue, once; False where it has not arrived."""
        if not forward.rows:
            if not all(p.has_arrived(wait) for p in forward.passes):
                return False
            for p in forward.passes:
                if p.taken is not None and p.taken.copied:
                    p.stack.check(p.taken, p.fed.T)
            for p in forward.passes:
                rows = self.inputs.rows(p.fed)
                p.tokens = len(rows.token_id)
                if self.writer is not None:
                    self.writer.unlinked += rows.unlinked
                p.rows = rows if p.taken is not None else without_tokens(rows)
            self.inputs.accept()
        return True

    def _count(self, counted: Counted, batch: list[Forward]) -> None:
        passes = [p for forward in batch for p in forward.passes]
        self.tokens += sum(p.tokens for p in passes)
        taken = [(p.stack, p.rows, p.taken) for p in passes if p.rows and p.taken]
        counted.add(taken, batch[-1].number)

    def _write(self, writer: TraceWriter, batch: list[Forward]) -> None:
        parts = [(f, p, r) for f in batch for p, r in zip(f.passes, f.rows, strict=True)]
        fed = joined([rows for *_, rows in parts])
        sizes = [len(rows.token_id) for *_, rows in parts]
        numbers = np.repeat(np.array([f.number for f, *_ in parts], np.int32), sizes)
        self.tokens += len(fed.token_id)
        for _, p, _ in parts:
            if p.taken is None:
                writer.dropped += p.tokens * len(p.stack.routers)
        writer.write(
            RoutedBatch(
                batch[-1].number,
                fed.token_id if self.options.text else np.full_like(fed.token_id, -1),
                fed.document,
                fed.sequence,
                fed.position,
                fed.domain,
                list(self.inputs.domains),
                ids=self._of_routers(batch, "ids"),
                weights=self._of_routers(batch, "weights"),
                extras={kind: self._of_routers(batch, kind) for kind in self.options.extras},
                documents=fed.documents,
                phases=fed.phase_codes(),
                group=parts[-1][2].group,
                encoded=sum(len(r.token_id) for _, p, r in parts if p.stack.name == "encoder"),
                batches=numbers if len(batch) > 1 and len(numbers) else None,
            )
        )

    def _of_routers(self, batch: list[Forward], name: str) -> list[np.ndarray]:
        """Of each router of the model its rows in the batch, without padding."""
        values = list[np.ndarray]()
        for stack in self.stacks.values():
            passes = [p for forward in batch for p in forward.passes if p.stack is stack]
            taken = [p.taken for p in passes if p.taken is not None]
            if not taken:
                for router in stack.routers:  # the stack did not run
                    values += no_rows(router, name, self.weight_dtype)
                continue
            real = np.concatenate([p.rows.real for p in passes if p.rows is not None])
            values += stored_values(taken, name, None if real.all() else np.flatnonzero(real))
        return values


def no_rows(router: Router, name: str, weight_dtype: torch.dtype) -> list[np.ndarray]:
    """Return the stored values of a router that saw no rows."""
    shown = ShownRouter(torch.device("cpu"), router.top_k, router.experts, router.experts)
    empty = torch.empty(1, 0, shown.width(name), dtype=shown.dtype(name, weight_dtype))
    return stored_values([TakenPass({name: [empty]})], name, None)


def without_tokens(rows: Rows) -> Rows:
    """The rows of a pass that is left out: documents alone, no tokens."""
    names = ("real", "token_id", "document", "sequence", "position", "domain")
    return replace(
        rows, **{name: getattr(rows, name)[:0] for name in names}, phases=rows.phase_codes()[:0]
    )
