"""Forward passes of which only counts are recorded. On a CPU the choices of small passes wait until
there are many, which are then counted together.

T rows a router sees (padding included), K slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from math import inf
from time import monotonic
from typing import TYPE_CHECKING

from torch import Tensor

from moe_inspect.capture.hook.counts.device_counts import DeviceCounts
from moe_inspect.capture.hook.decode_steps import Room
from moe_inspect.capture.hook.inputs.pass_inputs import PassInputs
from moe_inspect.capture.hook.inputs.rows import CallInputs, Rows
from moe_inspect.capture.hook.pass_buffer import PassBuffer, as_tensors
from moe_inspect.capture.hook.stack import Stack
from moe_inspect.trace.writer import CountedBatches

if TYPE_CHECKING:
    from moe_inspect.capture.options import RecordOptions
    from moe_inspect.trace.writer import TraceWriter

MOST_WAITING = 256  # forward passes


class CountedPasses:
    """`options.every`: one of so many passes is counted. `shard_tokens`: after how many tokens
    counts are due, unless `options.flush_steps` says after how many passes. `writer`: gets them,
    where they are written. `tokens`: of the passes that no longer wait."""

    def __init__(
        self,
        counts: DeviceCounts,
        inputs: PassInputs,
        options: RecordOptions,
        shard_tokens: int,
        writer: TraceWriter | None,
    ):
        self.counts, self.inputs, self.options = counts, inputs, options
        self.shard_tokens, self.writer = shard_tokens, writer
        self.tokens = 0
        self._in_group = False
        self._numbers: list[int] = []  # of the passes counted since the last write
        self._taken = monotonic()
        self._buffers: dict[str, PassBuffer | None] = {}  # of each stack
        # number, whether it is counted, and a stack that ran in it with its inputs
        self._waiting: list[tuple[int, bool, Stack, Rows | CallInputs]] = []
        self._waiting_rows = 0

    # --- a forward pass

    def add_staged(self, stack: Stack, rows: Rows | CallInputs) -> None:
        """Counts what the first forward pass of a stack has shown."""
        staged = stack.staged
        assert staged is not None
        stack.staged, stack.staged_extras, stack.seen = None, {}, [0] * len(stack.sites)
        self.feed(stack, rows, keep=False)
        for sink, choices in zip(stack.sinks, stack.routers_of, strict=True):
            for choice in [choice for r in choices for choice in staged[r]]:
                sink.take(*choice)

    def begin(self, number: int) -> None:
        self.is_counted = number % self.options.every == 0
        self._at_once = False  # its calls are counted one by one
        self._fed: list[Stack] = []  # stacks that run in it
        self.counts.begin()

    def feed(self, stack: Stack, fed: Rows | CallInputs, keep: bool) -> None:
        """A stack is about to run. `keep`: whether its calls may be kept until the pass ends."""
        stack.fed = fed
        self._fed.append(stack)
        if self._at_once:
            self._read(stack)
        elif self.is_counted and not (keep and stack.keep_pass(self._buffer(stack))):
            self.count_at_once()

    def keep_no_more(self, stack: Stack) -> None:
        """What is kept is counted, and the other calls of the current pass when they come."""
        self.count_at_once()

    def _buffer(self, stack: Stack) -> PassBuffer | None:
        if stack.name not in self._buffers:
            routers, sites = stack.router_range, stack.sites_of_routers
            self._buffers[stack.name] = self.counts.buffer(routers, sites)
        return self._buffers[stack.name]

    def count_at_once(self) -> None:
        """The calls of the current pass are counted one by one, those that were kept first."""
        self.count_waiting()
        self._at_once = True
        for stack in self._fed:
            self._read(stack)

    def _read(self, stack: Stack) -> None:
        assert stack.fed is not None
        calls, stack.scope.kept = stack.scope.kept or [], None
        stack.fed = rows = self.inputs.rows(stack.fed)
        if self.is_counted:
            self.counts.feed(stack.router_range, rows, len(self.inputs.domains))
        for n, ids, weights in map(as_tensors, calls):
            stack.sinks[n].take(ids, weights)

    def add(self, stack: Stack, n: int, row: int, ids_TK: Tensor, weights_TK: Tensor) -> None:
        """One call of the router at site n of a stack, for the rows from `row` on."""
        if self.is_counted and stack.fed is not None:
            time, row = divmod(row, max(1, stack.fed.T))
            if time < stack.times[n]:  # else the completeness check reports it
                router = stack.first_router + stack.routers_of[n][time]
                self.counts.add(router, row, ids_TK, weights_TK)

    def end(self, fed: Sequence[Stack], number: int) -> bool:
        """The pass has run. Returns whether it is counted, from the calls that were kept of it.
        MoeInspectError unless every router has seen every token once."""
        if self.is_counted and not self._at_once and not self._keep():
            self.count_at_once()  # and find what is missing
        last = fed[-1].fed
        group = last.group if isinstance(last, Rows) else None
        if self._at_once:
            self.inputs.accept()
            for stack in fed:
                assert isinstance(stack.fed, Rows)
                if self.is_counted:
                    stack.check_counted()
                self.tokens += len(stack.fed.token_id)
            if self.is_counted:
                self.counts.end(number)
        for stack in fed:
            assert stack.fed is not None
            if not self._at_once:
                self._waiting.append((number, self.is_counted, stack, stack.fed))
                self._waiting_rows += stack.fed.T
            stack.fed = stack.scope.kept = None
        if self.is_counted:
            self._numbers.append(number)
            self._in_group = group is not None
        return self.is_counted and not self._at_once

    def _keep(self) -> bool:
        """Keeps the calls of the pass; False, and none is kept, where any is missing."""
        made = []
        for stack in self._fed:
            assert stack.fed is not None
            buffer = self._buffer(stack)
            assert buffer is not None
            stacked = buffer.whole(stack.scope.kept or [], stack.fed.T)
            if stacked is None:
                return False
            made.append((buffer, stacked, stack.fed.T))
        if any(buffer.rows + T > buffer.max_rows for buffer, _, T in made):
            self.count_waiting()
        for buffer, stacked, T in made:
            buffer.keep(stacked, T)
        return True

    def room_for_steps(self, stack: Stack, T: int) -> Room | None:
        """The room for decode steps of T rows; None where not all of them are counted."""
        buffer, options = self._buffer(stack), self.options
        if buffer is None or options.every > 1:
            return None
        rows = buffer.max_rows - buffer.rows
        passes = MOST_WAITING - len(self._waiting)
        if options.flush_steps is not None:
            passes = min(passes, options.flush_steps - len(self._numbers))
        else:
            rows = min(rows, self.shard_tokens - self.counts.tokens - self._waiting_rows)
        until = self._taken + options.commit_every if options.commit_every is not None else inf
        return Room(buffer, min(passes, rows // max(1, T)), until)

    def add_steps(self, stack: Stack, fed: list[CallInputs], number: int) -> None:
        """Has decode steps wait that have been kept, and empties the list. `number`: of the
        first."""
        waiting = [(n, True, stack, call) for n, call in enumerate(fed, number)]
        self._waiting_rows += len(fed) * fed[0].T
        fed.clear()
        self._waiting.extend(waiting)
        self._numbers.extend(n for n, *_ in waiting)

    def resume(self, stack: Stack, fed: CallInputs, number: int) -> None:
        """A decode step is running, whose calls are kept."""
        kept = stack.scope.kept
        self.begin(number)
        self.feed(stack, fed, keep=True)
        stack.scope.kept = kept

    # --- those that wait

    def count_tokens(self) -> int:
        self.count_waiting()
        return self.tokens

    def count_waiting(self) -> None:
        """Counts the passes that wait."""
        waiting, self._waiting, self._waiting_rows = self._waiting, [], 0
        rows_of: dict[str, list[Rows]] = {}
        last: dict[str, tuple[Stack, int]] = {}
        for (name, is_counted), part in groupby(waiting, lambda w: (w[2].name, w[1])):
            passes = list(part)
            rows = self.inputs.rows_of_all([fed for *_, fed in passes])
            self.tokens += sum(len(r.token_id) for r in rows)
            if is_counted:
                rows_of.setdefault(name, []).extend(rows)
                last[name] = passes[-1][2], passes[-1][0]
        self.inputs.accept()
        for name, (stack, number) in last.items():
            self.counts.count_kept(
                stack.router_range, rows_of[name], len(self.inputs.domains), number
            )

    # --- commits

    def end_group(self) -> None:
        """Ends a group of passes: their counts may be committed."""
        self._in_group = False
        self._write_when_due()

    def drain_when_due(self) -> None:
        """Counts the passes that wait, where they are many. Writes the counts of whole groups,
        where they are to be committed."""
        if len(self._waiting) >= MOST_WAITING:
            self.count_waiting()
        if self.is_counted:
            self._write_when_due()

    def finish(self) -> None:
        """Writes the counts of whole groups."""
        if not self._in_group:
            self._write()

    def _write_when_due(self) -> None:
        if self.writer is not None and not self._in_group and self._is_due():
            self._write()

    def _write(self) -> None:
        if self.writer is None:
            self.count_waiting()
        elif counted := self._take():
            self.writer.write(counted)

    def _is_due(self) -> bool:
        """Whether the counts since the last write are to be committed now."""
        if self.options.flush_steps is not None:
            return len(self._numbers) >= self.options.flush_steps
        every_s = self.options.commit_every
        is_early = every_s is not None and monotonic() - self._taken >= every_s
        return is_early or self.counts.tokens + self._waiting_rows >= self.shard_tokens

    def _take(self) -> CountedBatches | None:
        """The counts since the last write; None where these passes had no tokens."""
        self.count_waiting()
        numbers, self._numbers, self._taken = self._numbers, [], monotonic()
        if not self.counts.tokens:
            return None
        return replace(self.counts.take(list(self.inputs.domains)), first_batch=numbers[0])
