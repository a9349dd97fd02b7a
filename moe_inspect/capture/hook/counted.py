"""Forward passes of which only counts are recorded. On a CPU the choices of small passes wait until
there are many, which are then counted together.

T rows a router sees (padding included), K slots.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from time import monotonic
from typing import TYPE_CHECKING

from torch import Tensor

from moe_inspect.capture.hook.device_counts import DeviceCounts
from moe_inspect.capture.hook.inputs.pass_inputs import PassInputs
from moe_inspect.capture.hook.inputs.rows import CallInputs, Rows
from moe_inspect.capture.hook.pass_buffer import PassBuffer, as_tensors
from moe_inspect.capture.hook.stack import Stack
from moe_inspect.trace.writer import CountedBatches

if TYPE_CHECKING:
    from moe_inspect.capture.options import RecordOptions

MOST_WAITING = 256  # forward passes


class CountedPasses:
    """`options.every`: one of so many passes is counted. `shard_tokens`: after how many tokens
    counts are due, unless `options.flush_steps` says after how many passes. `tokens`: of the passes
    that no longer wait."""

    def __init__(
        self, counts: DeviceCounts, inputs: PassInputs, options: RecordOptions, shard_tokens: int
    ):
        self.counts, self.inputs, self.options = counts, inputs, options
        self.shard_tokens = shard_tokens
        self.tokens = 0
        self._numbers: list[int] = []  # of the passes counted since the last `take`
        self._taken = monotonic()
        self._buffers: dict[str, PassBuffer | None] = {}  # of each stack
        # number, whether it is counted, and a stack that ran in it with its inputs
        self._waiting: list[tuple[int, bool, Stack, Rows | CallInputs]] = []
        self._waiting_rows = 0

    # --- a forward pass

    def begin(self, number: int) -> None:
        self.number, self.is_counted = number, number % self.options.every == 0
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

    def end(self) -> None:
        """The pass has run. MoeInspectError unless every router has seen every token once."""
        if self.is_counted and not self._at_once and not self._keep():
            self.count_at_once()  # and find what is missing
        if self._at_once:
            self.inputs.accept()
            for stack in self._fed:
                assert isinstance(stack.fed, Rows)
                if self.is_counted:
                    stack.check_counted()
                self.tokens += len(stack.fed.token_id)
            if self.is_counted:
                self.counts.end(self.number)
        for stack in self._fed:
            assert stack.fed is not None
            if not self._at_once:
                self._waiting.append((self.number, self.is_counted, stack, stack.fed))
                self._waiting_rows += stack.fed.T
            stack.fed = stack.scope.kept = None
        if self.is_counted:
            self._numbers.append(self.number)
        if len(self._waiting) >= MOST_WAITING:
            self.count_waiting()

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

    # --- those that wait

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

    @property
    def is_due(self) -> bool:
        """Whether the counts since the last `take` are to be committed now."""
        if self.options.flush_steps is not None:
            return len(self._numbers) >= self.options.flush_steps
        every_s = self.options.commit_every
        is_early = every_s is not None and monotonic() - self._taken >= every_s
        return is_early or self.counts.tokens + self._waiting_rows >= self.shard_tokens

    def take(self) -> CountedBatches | None:
        """The counts since the last `take`; None where these passes had no tokens."""
        self.count_waiting()
        numbers, self._numbers, self._taken = self._numbers, [], monotonic()
        if not self.counts.tokens:
            return None
        return replace(self.counts.take(list(self.inputs.domains)), first_batch=numbers[0])
