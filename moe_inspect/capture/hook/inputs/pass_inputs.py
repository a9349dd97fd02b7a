"""The inputs of the current forward pass: as planned by the caller, else by the arguments of the
model's calls."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from moe_inspect.capture.hook.inputs.arguments import InputsOf
from moe_inspect.capture.hook.inputs.call_inputs import RowReader
from moe_inspect.capture.hook.inputs.row_order import RowOrder
from moe_inspect.capture.hook.inputs.rows import CallInputs, Rows, steps_at


class Follower(Protocol):
    """Is told of each forward pass: its begin, what each stack is fed, the model's output."""

    def begin(self) -> None: ...
    def feed(self, fed: Rows | CallInputs) -> None: ...
    def returned(self, output: Any) -> None: ...


class PassInputs:
    """`modules`: stack → its module. `documents`, `domains`: labels of each batch row, unless
    `label` sets others. `inputs`: reads the arguments of a call in place of their names.
    `row_order`: see `RowOrder`. `follower`: is told of each pass."""

    def __init__(
        self,
        modules: Mapping[str, torch.nn.Module],
        documents: Sequence[Any] | None,
        domains: Sequence[str] | None,
        inputs: InputsOf | None = None,
        row_order: RowOrder | None = None,
        follower: Follower | None = None,
    ):
        self._follower = follower
        names = {
            stack: list(inspect.signature(module.forward).parameters)
            for stack, module in modules.items()
        }
        self._reader = RowReader(names, documents, domains, inputs, row_order)
        self._next_plan: dict[str, Rows] = {}  # of the next forward pass, by stack
        self._plan: dict[str, Rows] = {}  # of the current one
        self._calls: dict[str, CallInputs] = {}  # by stack, where it was not planned
        self._outputs: list[tuple[CallInputs, Any]] = []

    @property
    def domains(self) -> list[str]:
        """Domain labels by code."""
        return self._reader.numbering.domains

    def domain_code(self, label: str) -> int:
        """The code of a domain label, new or known."""
        return self._reader.numbering.domain_code(label)

    def label(self, documents: Sequence[Any] | None, domains: Sequence[str] | None) -> None:
        self._reader.label(documents, domains)

    def expect(self, *rows: Rows) -> None:
        self._next_plan = {r.stack: r for r in rows}

    def begin(self) -> int | None:
        """Begins a forward pass. Returns its number if it was planned."""
        self._reader.numbering.discard()  # of the previous forward pass, if it failed
        self._reader.settle_caches()
        self._plan, self._next_plan, self._calls, self._outputs = self._next_plan, {}, {}, []
        if self._follower is not None:
            self._follower.begin()
        for rows in self._plan.values():
            if rows.number is not None:
                return rows.number
        return None

    def of_call(
        self, stack: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Rows | CallInputs:
        """The inputs of the next call of a stack."""
        if stack in self._plan:
            fed: Rows | CallInputs = self._plan[stack]
        else:
            encoder = self._calls.get("encoder") if stack == "decoder" else None
            fed = self._calls[stack] = self._reader.read_call(args, kwargs, stack, encoder)
        self._reader.settle(fed)
        if self._follower is not None:
            self._follower.feed(fed)
        return fed

    def settle(self) -> None:
        """No pass follows: what was taken back from the caches so far is what the trace says."""
        self._reader.settle_caches()
        self._reader.settle(None)

    def rows(self, fed: Rows | CallInputs) -> Rows:
        return fed if isinstance(fed, Rows) else self._reader.rows(fed)

    def rows_of_steps(self, steps: Sequence[Any]) -> Rows:
        """The rows of passes that `steps_at` found, one after the other."""
        return self._reader.rows_of_steps(steps)

    def rows_of_all(self, fed: Sequence[Rows | CallInputs]) -> list[Rows]:
        """The rows of passes in their order, those of consecutive decode steps as one."""
        found: list[Rows] = []
        at = 0
        while at < len(fed):
            steps = steps_at(fed[n] for n in range(at, len(fed)))
            found.append(self.rows_of_steps(steps) if len(steps) > 1 else self.rows(fed[at]))
            at += max(1, len(steps))
        return found

    def returned(self, stack: str, output: Any) -> None:
        """A stack's output, or ("") the whole model's."""
        if stack in self._calls:
            self._outputs.append((self._calls[stack], output))
            self._reader.returned(self._calls[stack], output)
        if self._follower is not None and not stack:
            self._follower.returned(output)

    def accept(self) -> None:
        """Commits the document and sequence numbers of the rows read, which have been recorded."""
        self._reader.numbering.accept()

    def end(self) -> None:
        """Ends a launched forward pass: remembers what its key-value caches hold."""
        for call, output in self._outputs:
            self._reader.remember(call, output)
        self._outputs.clear()
