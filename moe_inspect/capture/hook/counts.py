"""Counts kept on the device: what a training loop, or --counts-only, records instead of decisions.
On a CPU small passes wait until there are many, which are then counted together.

R routers, T rows a router sees and N rows of several passes (padding included), K slots, E experts,
D domains, or documents where counts are by document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from moe_inspect.capture.hook.inputs.pass_inputs import PassInputs
from moe_inspect.capture.hook.inputs.rows import CallInputs, Rows
from moe_inspect.capture.hook.ring import Whole
from moe_inspect.capture.hook.stack import Stack
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer import CountedBatches, Document

if TYPE_CHECKING:
    from moe_inspect.capture.options import RecordOptions
    from moe_inspect.trace.writer import TraceWriter

MOST_SLOTS = 2**20  # counted at once
MOST_BYTES = 2**28  # of sums by document, which are then committed


@dataclass(frozen=True)
class Totals:
    """Counts since the recording began: `load`, the assignments of each router's experts, int64
    [E] each; `tokens` of all passes, and `tokens_R` int64 [R], the tokens each router saw."""

    routers: list[Router]
    load: list[np.ndarray]
    tokens: int
    tokens_R: np.ndarray


class DeviceCounts:
    """Load by router, domain (or document) and expert, summed on each router's device; nothing
    waits for the device before `take`. First choices are by the weights rounded to `weight_dtype`,
    as a trace of decisions stores them. `weights`: whether gate weights are summed too.
    `by_document`: what is taken are whole documents; the others stay until they are."""

    def __init__(
        self,
        routers: Sequence[Router],
        devices: Sequence[torch.device],
        weight_dtype: torch.dtype,
        weights: bool,
        by_document: bool = False,
    ):
        self.routers, self.devices = list(routers), list(devices)
        self.weight_dtype, self.weights, self.by_document = weight_dtype, weights, by_document
        # by document: those whose sums these are, in this order, and the tokens each had so far
        self._began, self._row_of = list[Document](), dict[int, int]()
        self._tokens_D = np.zeros(0, np.int64)
        # since the last `take`
        self.tokens = self.decisions = self.batch = 0
        self.documents: list[Document] = []
        # since the recording began; of the load, what was taken
        self._all_tokens, self._tokens_R = 0, np.zeros(len(self.routers), np.int64)
        self._taken_load = [np.zeros(r.experts, np.int64) for r in routers]
        # a device's routers lie side by side in its sums: E + 1 columns each, from here on
        self._width = dict.fromkeys(self.devices, 0)
        self._columns = np.zeros(len(self.routers), np.int64)
        for r, (router, device) in enumerate(zip(self.routers, self.devices, strict=True)):
            self._columns[r] = self._width[device]
            self._width[device] += router.experts + 1
        self.on_cpu = all(device.type == "cpu" for device in self.devices)
        self._sums = self._zeros(1)

    def _zeros(self, domains: int) -> dict[torch.device, list[torch.Tensor]]:
        """Sums of assignments, first choices and weights, [domains, columns] each. Padding and
        slots that routed nowhere are of expert E, which is left out in the end."""
        kinds = [torch.int64, torch.int64, torch.float64][: 3 if self.weights else 2]
        with torch.inference_mode(False):
            return {
                device: [torch.zeros((domains, width), dtype=kind, device=device) for kind in kinds]
                for device, width in self._width.items()
            }

    def _of_router(self, r: int) -> list[torch.Tensor]:
        """The sums of router r, [domains, E] each."""
        first = int(self._columns[r])
        return [s[:, first : first + self.routers[r].experts] for s in self._sums[self.devices[r]]]

    def count(
        self,
        routers: range,
        fed: Sequence[Rows],
        choices: Sequence[Whole],
        domains: int,
        batch: int,
    ) -> None:
        """Counts passes of a stack's routers: their rows and choices, the last one's number."""
        code_of = self._documents(fed) if self.by_document else [rows.domain for rows in fed]
        domains = len(self._began) if self.by_document else domains
        missing = domains - len(self._of_router(0)[0])
        if missing > 0:
            for device, sums in self._sums.items():
                self._sums[device] = [torch.nn.functional.pad(s, (0, 0, 0, missing)) for s in sums]
        real_N = np.concatenate([rows.real for rows in fed])
        code_N = np.full(len(real_N), -1, np.int64)  # −1 for padding
        code_N[real_N] = np.concatenate(code_of)
        domain_N = torch.from_numpy(code_N)
        domain_of = {d: domain_N.to(d, non_blocking=True) for d in self._width}
        first = routers[0]
        for of_group in zip(*choices, strict=True):
            ids, weights = (
                parts[0] if len(parts) == 1 else torch.cat(parts, 1)
                for parts in zip(*of_group, strict=True)
            )
            at_once = max(1, MOST_SLOTS // max(1, ids[0].numel()))  # routers
            for part in zip(ids.split(at_once), weights.split(at_once), strict=True):
                self._count(first, domain_of[ids.device], *part)
                first += len(part[0])
        n = sum(len(rows.token_id) for rows in fed)
        self.batch = batch
        self.tokens += n
        self.decisions += n * len(routers)
        self._all_tokens += n
        self._tokens_R[routers[0] : routers[-1] + 1] += n
        if not self.by_document:
            self.documents += [document for rows in fed for document in rows.documents]

    def _documents(self, fed: Sequence[Rows]) -> list[np.ndarray]:
        """Of each token of passes the row of its document. MoeInspectError where a document that
        was whole goes on."""
        codes = list[np.ndarray]()
        for rows in fed:
            for document in rows.documents:
                self._row_of[document.document] = len(self._began)
                self._began.append(document)
            number, at = np.unique(rows.document, return_inverse=True)
            if unknown := set(number.tolist()) - self._row_of.keys():
                raise MoeInspectError(
                    f"document {min(unknown)} goes on after it was counted whole: counts by "
                    "document are of documents that are fed at once"
                )
            codes.append(np.array([self._row_of[d] for d in number.tolist()], np.int64)[at])
        grown = np.zeros(len(self._began) - len(self._tokens_D), np.int64)
        self._tokens_D = np.append(self._tokens_D, grown)
        self._tokens_D += np.bincount(np.concatenate(codes), minlength=len(self._began))
        return codes

    @property
    def begun_tokens(self) -> int:
        """Of documents that are not whole yet, in counts by document."""
        return int(self._tokens_D.sum())

    @property
    def nbytes(self) -> int:
        """Of the sums on all devices."""
        return sum(s.numel() * s.element_size() for sums in self._sums.values() for s in sums)

    def _count(
        self, first: int, domain_N: torch.Tensor, ids_RNK: torch.Tensor, weights_RNK: torch.Tensor
    ) -> None:
        """The decisions of alike routers of one device, from router `first` on."""
        E, device = self.routers[first].experts, self.devices[first]
        column_R = torch.from_numpy(self._columns[first : first + len(ids_RNK)]).to(device)
        domain_N1 = domain_N[:, None]
        outside_RNK = (ids_RNK < 0) | (ids_RNK >= E) | (domain_N1 < 0)
        place_RN1 = domain_N1.clamp(min=0) * self._width[device] + column_R[:, None, None]
        slot_RNK = ids_RNK.long().masked_fill(outside_RNK, E) + place_RN1
        # the first of equal weights
        rounded_RNK = weights_RNK.to(self.weight_dtype).masked_fill(outside_RNK, -torch.inf)
        first_RN1 = rounded_RNK.argmax(2, keepdim=True)
        slots, first_slots = slot_RNK.view(-1), slot_RNK.gather(2, first_RN1).view(-1)
        assignments, first_choice, *weight_sum = (s.view(-1) for s in self._sums[device])
        assignments.scatter_add_(0, slots, torch.ones_like(slots))
        first_choice.scatter_add_(0, first_slots, torch.ones_like(first_slots))
        for sums in weight_sum:
            sums.scatter_add_(0, slots, weights_RNK.reshape(-1).to(sums.dtype))

    def take(self, domains: list[str]) -> CountedBatches:
        """The counts since the last `take`, moved to the host; by document those of the documents
        that are whole."""
        # (copies: on a CPU these would be views of what is counted in next)
        host = [
            [s.cpu().numpy().copy() for s in self._of_router(r)] for r in range(len(self.routers))
        ]
        if self.by_document:
            return self._take_documents(host)
        load, first_choices, *weight_sums = map(list, zip(*host, strict=True))
        for taken_E, new_DE in zip(self._taken_load, load, strict=True):
            taken_E += new_DE.sum(0)
        known = len(load[0])
        sums = {"weight_sum": weight_sums[0]} if self.weights else {}
        counts = load, first_choices, sums, self.documents, self.decisions
        counted = CountedBatches(self.batch, self.tokens, domains[:known], *counts)
        self.tokens, self.decisions, self.documents = 0, 0, []
        self._sums = self._zeros(known)
        return counted

    def _take_documents(self, host: list[list[np.ndarray]]) -> CountedBatches:
        """host: the sums of each router, of all documents that began."""
        tokens_D = np.array([document.tokens for document in self._began], np.int64)
        whole_D = self._tokens_D >= tokens_D
        load, first_choices, *weight_sums = (
            [sums[whole_D] for sums in of] for of in zip(*host, strict=True)
        )
        for taken_E, new_DE in zip(self._taken_load, load, strict=True):
            taken_E += new_DE.sum(0)
        taken = [d for d, whole in zip(self._began, whole_D, strict=True) if whole]
        self._began = [d for d, whole in zip(self._began, whole_D, strict=True) if not whole]
        self._row_of = {d.document: row for row, d in enumerate(self._began)}
        self._tokens_D = self._tokens_D[~whole_D]
        for device, sums in self._sums.items():
            kept = torch.from_numpy(np.flatnonzero(~whole_D)).to(device)
            rest = [s.index_select(0, kept) for s in sums] if len(kept) else self._zeros(1)[device]
            self._sums[device] = rest
        tokens, self.tokens = int(tokens_D[whole_D].sum()), 0
        return CountedBatches(
            self.batch,
            tokens,
            [d.domain for d in taken],
            load,
            first_choices,
            {"weight_sum": weight_sums[0]} if self.weights else {},
            taken,
            tokens * len(self.routers),
        )

    def totals(self, all_ranks: bool = False) -> Totals:
        """The counts since the recording began; with `all_ranks`, summed over the processes of
        torch.distributed."""
        load = [
            torch.from_numpy(taken).to(self.devices[r]) + self._of_router(r)[0].sum(0)
            for r, taken in enumerate(self._taken_load)
        ]
        tokens = torch.tensor(self._all_tokens, device=load[0].device)
        tokens_R = torch.from_numpy(self._tokens_R.copy()).to(tokens.device)
        if all_ranks:
            for tensor in [*load, tokens, tokens_R]:
                torch.distributed.all_reduce(tensor)
        on_host = [t.cpu().numpy() for t in load]
        return Totals(self.routers, on_host, int(tokens), tokens_R.cpu().numpy())


MOST_WAITING = 256  # forward passes
MOST_WAITING_SLOTS = 2**16  # that they may have, of all routers


class Waiting(NamedTuple):
    """The run of a stack in a forward pass. `choices`: None where the pass is not counted."""

    number: int
    stack: Stack
    fed: Rows | CallInputs
    choices: Whole | None


class CountedPasses:
    """`shard_tokens`: after how many tokens counts are due, unless `options.flush_steps` says after
    how many passes. `writer`: gets them. `tokens`: of the passes that no longer wait."""

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
        self.tokens, self._in_group = 0, False
        self._numbers: list[int] = []  # of the passes counted since the last write
        self._taken = monotonic()
        self._waiting: list[Waiting] = []
        self._waiting_rows = self._waiting_slots = 0

    # --- a forward pass

    def begin(self, number: int) -> None:
        self.is_counted = number % self.options.every == 0

    def end(self, fed: Sequence[Stack], number: int) -> None:
        """The pass has run. MoeInspectError unless every router has seen every token once."""
        choices = [self._choices(stack) if self.is_counted else None for stack in fed]
        if self.is_counted:
            last = fed[-1].fed
            self._numbers.append(number)
            self._in_group = isinstance(last, Rows) and last.group is not None
        for stack, of_stack in zip(fed, choices, strict=True):
            assert stack.fed is not None
            self._waiting.append(Waiting(number, stack, stack.fed, of_stack))
            self._waiting_rows += stack.fed.T
            self._waiting_slots += sum(ids.numel() for ids, _ in of_stack or ())
            stack.fed = None
            stack.clear()
        full = len(self._waiting) >= MOST_WAITING or self._waiting_slots >= MOST_WAITING_SLOTS
        if full or not self.counts.on_cpu:
            self.count_waiting()
        if self.is_counted:
            self._write_when_due()

    def _choices(self, stack: Stack) -> Whole:
        assert stack.fed is not None
        assert stack.shape is not None
        T = stack.fed.T
        if (found := stack.shape.whole(stack.calls, T)) is not None:
            return found
        stack.check_calls(T)
        raise MoeInspectError(
            f"a router of {type(stack.model).__name__} chose another number of experts than in the "
            "first forward pass: record without counts_only"
        )

    # --- those that wait

    def count_tokens(self) -> int:
        self.count_waiting()
        return self.tokens

    def count_waiting(self) -> None:
        """Counts the passes that wait."""
        waiting, self._waiting = self._waiting, []
        self._waiting_rows = self._waiting_slots = 0
        rows = [self.inputs.rows(one.fed) for one in waiting]
        self.tokens += sum(len(r.token_id) for r in rows)
        self.inputs.accept()
        both = zip(waiting, rows, strict=True)
        counted = [(one, one.choices, fed) for one, fed in both if one.choices is not None]
        for stack, part in groupby(counted, lambda passed: passed[0].stack):
            passes, choices, fed = zip(*part, strict=True)
            routers = range(stack.first_router, stack.first_router + len(stack.routers))
            self.counts.count(routers, fed, choices, len(self.inputs.domains), passes[-1].number)

    # --- commits

    def end_group(self) -> None:
        """Ends a group of passes: their counts may be committed."""
        self._in_group = False
        self._write_when_due()

    def finish(self) -> None:
        """Writes the counts of whole groups. Those of documents that are not whole are dropped."""
        if not self._in_group:
            self._write()
            if self.writer is not None:
                self.writer.dropped += self.counts.begun_tokens * len(self.counts.routers)

    def _write_when_due(self) -> None:
        every_s = self.options.commit_every
        if self.options.flush_steps is not None:
            is_due = len(self._numbers) >= self.options.flush_steps
        elif every_s is not None and monotonic() - self._taken >= every_s:
            is_due = True
        else:
            is_due = self.counts.tokens + self._waiting_rows >= self.shard_tokens
            is_due |= self.counts.by_document and self.counts.nbytes >= MOST_BYTES
        if is_due and self.writer is not None and not self._in_group:
            self._write()

    def _write(self) -> None:
        self.count_waiting()
        self._taken = monotonic()
        if self.writer is not None and self.counts.tokens:
            counted = self.counts.take(list(self.inputs.domains))
            if not counted.tokens:  # of documents, none may be whole yet
                return
            self.writer.write(replace(counted, first_batch=self._numbers[0]))
        self._numbers = []
