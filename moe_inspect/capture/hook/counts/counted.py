"""Forward passes of which only counts are recorded. On a CPU small passes wait until there are
many, which are then counted together.

T rows a router sees (padding included), K slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from moe_inspect.capture.hook.counts.device_counts import DeviceCounts
from moe_inspect.capture.hook.inputs.pass_inputs import PassInputs
from moe_inspect.capture.hook.inputs.rows import CallInputs, Rows
from moe_inspect.capture.hook.router_calls import PassShape, Whole
from moe_inspect.capture.hook.stack import Stack
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.writer import CountedBatches

if TYPE_CHECKING:
    from moe_inspect.capture.options import RecordOptions
    from moe_inspect.trace.writer import TraceWriter

MOST_WAITING = 256  # forward passes
MOST_SLOTS = 2**16  # that they may have, of all routers


class Waiting(NamedTuple):
    """The run of a stack in a forward pass. `choices`: None where the pass is not counted."""

    number: int
    stack: Stack
    fed: Rows | CallInputs
    choices: Whole | None


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
        self._shapes: dict[str, PassShape] = {}  # of each stack
        self._waiting: list[Waiting] = []
        self._waiting_rows = self._waiting_slots = 0

    # --- a forward pass

    def begin(self, number: int) -> None:
        self.is_counted = number % self.options.every == 0

    def end(self, fed: Sequence[Stack], number: int) -> None:
        """The pass has run. MoeInspectError unless every router has seen every token once."""
        choices = [self._choices(stack) if self.is_counted else None for stack in fed]
        for stack, of_stack in zip(fed, choices, strict=True):
            assert stack.fed is not None
            self._waiting.append(Waiting(number, stack, stack.fed, of_stack))
            self._waiting_rows += stack.fed.T
            self._waiting_slots += sum(ids.numel() for ids, _ in of_stack or ())
        last = fed[-1].fed
        for stack in fed:
            stack.fed = None
            stack.clear()
        if self.is_counted:
            self._numbers.append(number)
            self._in_group = isinstance(last, Rows) and last.group is not None
        if (
            len(self._waiting) >= MOST_WAITING
            or self._waiting_slots >= MOST_SLOTS
            or not self.counts.on_cpu
        ):
            self.count_waiting()
        if self.is_counted:
            self._write_when_due()

    def _choices(self, stack: Stack) -> Whole:
        if stack.name not in self._shapes:
            self._shapes[stack.name] = PassShape(stack.shape, stack.sites_of_routers)
        assert stack.fed is not None
        found = self._shapes[stack.name].whole(stack.calls, stack.fed.T)
        if found is None:
            stack.check_calls()
            raise MoeInspectError(
                f"a router of {type(stack.model).__name__} chose another number of experts than in "
                "the first forward pass: record without counts_only"
            )
        return found

    # --- those that wait

    def count_tokens(self) -> int:
        self.count_waiting()
        return self.tokens

    def count_waiting(self) -> None:
        """Counts the passes that wait."""
        waiting, self._waiting = self._waiting, []
        self._waiting_rows = self._waiting_slots = 0
        parts: list[tuple[list[Waiting], list[Rows]]] = []
        for _, part in groupby(waiting, lambda w: (w.stack.name, w.choices is None)):
            passes = list(part)
            rows = self.inputs.rows_of_all([one.fed for one in passes])
            self.tokens += sum(len(r.token_id) for r in rows)
            parts.append((passes, rows))
        self.inputs.accept()
        for passes, rows in parts:
            choices = [one.choices for one in passes if one.choices is not None]
            if choices:
                routers, domains = passes[0].stack.router_range, len(self.inputs.domains)
                self.counts.count(routers, rows, choices, domains, passes[-1].number)

    # --- commits

    def end_group(self) -> None:
        """Ends a group of passes: their counts may be committed."""
        self._in_group = False
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
