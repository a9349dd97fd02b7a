"""Counts in place of decisions: what a training loop, or --counts-only, records. They are summed on
the routers' devices.

R alike routers of a group, T rows a router sees and N rows of several passes (padding included),
K slots, E experts, D rows of sums: domains, or documents where counts are by document.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from moe_inspect.capture.hook.inputs import PassInputs
from moe_inspect.capture.hook.numbering import CallInputs, Rows
from moe_inspect.capture.hook.stack import Stack
from moe_inspect.capture.rows import Group, RouterRows, TakenPass
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


def sum_dtypes(weights: bool) -> list[str]:
    """Types of the sums: of assignments, first choices and, with `weights`, gate weights."""
    return ["int64", "int64", *(["float64"] if weights else [])]


class Sums:
    """Assignments, first choices and, with `weights`, gate weights of the routers of a stack, by
    row and expert. Nothing waits for their devices before `of_routers`."""

    def __init__(self, rows: RouterRows, weights: bool):
        self.rows = rows
        self._kinds = [getattr(torch, dtype) for dtype in sum_dtypes(weights)]
        self._sums = self._zeros(1)

    def _zeros(self, D: int) -> list[list[Tensor]]:
        """Of each group [D, R, E + 1]: padding and slots that routed nowhere are of expert E."""
        with torch.inference_mode(False):
            return [
                [
                    torch.zeros(D, g.routers, g.experts + 1, dtype=kind, device=g.device)
                    for kind in self._kinds
                ]
                for g in self.rows.groups
            ]

    @property
    def D(self) -> int:
        return len(self._sums[0][0])

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for sums in self._sums for s in sums)

    def grow(self, D: int) -> None:
        """Have at least D rows."""
        if (missing := D - self.D) > 0:
            more = (0, 0, 0, 0, 0, missing)
            with torch.inference_mode(False):
                self._sums = [[torch.nn.functional.pad(s, more) for s in of] for of in self._sums]

    def select_rows(self, rows: np.ndarray) -> None:
        """Retain only these rows, or one row of zeros if there are none."""
        if not len(rows):
            self._sums = self._zeros(1)
            return
        with torch.inference_mode(False):
            self._sums = [
                [s.index_select(0, torch.from_numpy(rows).to(s.device)) for s in sums]
                for sums in self._sums
            ]

    def add(self, passes: Sequence[TakenPass], row_N: np.ndarray) -> None:
        """Count passes. `row_N`: of the sums, for each row of these passes; −1 for padding."""
        for g, (group, sums) in enumerate(zip(self.rows.groups, self._sums, strict=True)):
            ids, weights = (
                torch.cat([taken.values[name][g] for taken in passes], 1)
                for name in ("ids", "weights")
            )
            row_1N1 = torch.from_numpy(row_N).to(group.device, non_blocking=True)[None, :, None]
            at_once = max(1, MOST_SLOTS // max(1, ids[0].numel()))  # routers
            for first in range(0, group.routers, at_once):
                part = slice(first, first + at_once)
                self._add(group, first, row_1N1, ids[part].long(), weights[part], sums)

    @staticmethod
    def _add(
        group: Group,
        first: int,
        row_1N1: Tensor,
        ids_RNK: Tensor,
        weights_RNK: Tensor,
        sums: list[Tensor],
    ) -> None:
        """Count the decisions of a group's routers from index `first` of the group on."""
        E = group.experts
        outside_RNK = (ids_RNK < 0) | (ids_RNK >= E) | (row_1N1 < 0)
        router_R11 = torch.arange(first, first + len(ids_RNK), device=ids_RNK.device)[:, None, None]
        place_RN1 = (row_1N1.clamp(min=0) * group.routers + router_R11) * (E + 1)
        slot_RNK = place_RN1 + ids_RNK.masked_fill(outside_RNK, E)
        # the first of equal weights
        first_RN1 = weights_RNK.masked_fill(outside_RNK, -torch.inf).argmax(2, keepdim=True)
        slots, first_slots = slot_RNK.view(-1), slot_RNK.gather(2, first_RN1).view(-1)
        assignments, first_choice, *weight_sum = (s.view(-1) for s in sums)
        assignments.scatter_add_(0, slots, torch.ones_like(slots))
        first_choice.scatter_add_(0, first_slots, torch.ones_like(first_slots))
        for of_weights in weight_sum:
            of_weights.scatter_add_(0, slots, weights_RNK.reshape(-1).to(of_weights.dtype))

    def of_routers(self) -> list[list[np.ndarray]]:
        """Return copies of the sums of each router, [D, E] each."""
        return [
            [s[:, r, : g.experts].cpu().numpy().copy() for s in sums]
            for g, sums in zip(self.rows.groups, self._sums, strict=True)
            for r in range(g.routers)
        ]

    def loads(self) -> list[Tensor]:
        """Return the load of each router on its device, [E] each."""
        return [
            sums[0][:, r, : g.experts].sum(0)
            for g, sums in zip(self.rows.groups, self._sums, strict=True)
            for r in range(g.routers)
        ]


class Counted:
    """Counts of passes that are over, and when they are written: after `shard_tokens`, unless an
    option says another time; counts by document once the document is whole. `in_group`: the last
    pass is one of a group, which is committed together or not at all."""

    def __init__(
        self,
        stacks: Mapping[str, Stack],
        inputs: PassInputs,
        options: RecordOptions,
        shard_tokens: int,
    ):
        self.stacks, self.inputs, self.options = stacks, inputs, options
        self.shard_tokens, self.in_group = shard_tokens, False
        self._sums: dict[str, Sums] = {}  # of each stack that has run
        # since the last write; by document: those that are not whole, and the tokens each had
        self._documents, self._row_of = list[Document](), dict[int, int]()
        self._tokens_D = np.zeros(0, np.int64)
        self._tokens = self._decisions = self._batch = 0
        self._numbers: list[int] = []  # of the passes
        self._written = monotonic()
        # since the recording began
        self._all_tokens, self._tokens_of = 0, dict.fromkeys(stacks, 0)
        self._written_load: list[np.ndarray] = []  # of each router

    @property
    def routers(self) -> list[Router]:
        return [router for stack in self.stacks.values() for router in stack.routers]

    # --- a forward pass

    def note(self, number: int, fed: Rows | CallInputs) -> None:
        """A pass is over, which will be added."""
        self._numbers.append(number)
        self.in_group = isinstance(fed, Rows) and fed.group is not None

    def add(self, passes: Sequence[tuple[Stack, Rows, TakenPass]], batch: int) -> None:
        """Count passes, in order. `batch`: the number of the last one."""
        if not passes:
            return
        fed = [rows for _, rows, _ in passes]
        by_document = self.options.by_document
        rows_of = self._rows_of_documents(fed) if by_document else [rows.domain for rows in fed]
        D = len(self._documents) if by_document else len(self.inputs.domains)
        for stack in dict.fromkeys(stack for stack, *_ in passes):
            assert stack.rows is not None
            if stack.name not in self._sums:
                self._sums[stack.name] = Sums(stack.rows, self.options.weights)
            sums = self._sums[stack.name]
            sums.grow(D)
            mine = [n for n, (other, *_) in enumerate(passes) if other is stack]
            real_N = np.concatenate([fed[n].real for n in mine])
            row_N = np.full(len(real_N), -1, np.int64)
            row_N[real_N] = np.concatenate([rows_of[n] for n in mine])
            sums.add([passes[n][2] for n in mine], row_N)
            tokens = int(real_N.sum())
            self._tokens += tokens
            self._decisions += tokens * len(stack.routers)
            self._all_tokens += tokens
            self._tokens_of[stack.name] += tokens
        if not by_document:
            self._documents += [document for rows in fed for document in rows.documents]
        self._batch = batch

    def _rows_of_documents(self, fed: Sequence[Rows]) -> list[np.ndarray]:
        """Return the row of the sums of each token. MoeInspectError where a document that was whole
        goes on."""
        rows_of = list[np.ndarray]()
        for rows in fed:
            for document in rows.documents:
                self._row_of[document.document] = len(self._documents)
                self._documents.append(document)
            number, at = np.unique(rows.document, return_inverse=True)
            if unknown := set(number.tolist()) - self._row_of.keys():
                raise MoeInspectError(
                    f"document {min(unknown)} goes on after it was counted whole: counts by "
                    "document are of documents that are fed at once"
                )
            rows_of.append(np.array([self._row_of[d] for d in number.tolist()], np.int64)[at])
        more = np.zeros(len(self._documents) - len(self._tokens_D), np.int64)
        self._tokens_D = np.append(self._tokens_D, more)
        self._tokens_D += np.bincount(np.concatenate(rows_of), minlength=len(self._documents))
        return rows_of

    # --- to the writer

    def is_due(self, queued_rows: int) -> bool:
        """Whether the counts are to be written now. `queued_rows`: of passes to be added."""
        every_s = self.options.commit_every
        if self.in_group:
            return False
        if self.options.flush_steps is not None:
            return len(self._numbers) >= self.options.flush_steps
        if every_s is not None and monotonic() - self._written >= every_s:
            return True
        nbytes = sum(sums.nbytes for sums in self._sums.values())
        too_large = self.options.by_document and nbytes >= MOST_BYTES
        return too_large or self._tokens + queued_rows >= self.shard_tokens

    def finish(self, writer: TraceWriter | None) -> None:
        """Write the counts of whole groups. Those of documents that are not whole are dropped."""
        if not self.in_group:
            self.write(writer)
            if writer is not None:
                writer.dropped += int(self._tokens_D.sum()) * len(self.routers)

    def write(self, writer: TraceWriter | None) -> None:
        """Write the counts since the last write."""
        self._written = monotonic()
        if writer is not None and self._tokens:
            counted = self._take()
            if not counted.tokens:  # of documents, none may be whole yet
                return
            writer.write(replace(counted, first_batch=self._numbers[0]))
        self._numbers = []

    def _take(self) -> CountedBatches:
        """Take the counts of the passes, by document those of whole documents."""
        D = max(sums.D for sums in self._sums.values())
        taken_D = np.arange(D)
        documents, labels = self._documents, list(self.inputs.domains)[:D]
        tokens, decisions = self._tokens, self._decisions
        left_D = taken_D[:0]
        if self.options.by_document:
            is_whole_D = self._tokens_D >= [document.tokens for document in self._documents]
            taken_D, left_D = np.flatnonzero(is_whole_D), np.flatnonzero(~is_whole_D)
            documents = [self._documents[d] for d in taken_D]
            labels = [document.domain for document in documents]
            tokens = sum(document.tokens for document in documents)
            decisions = tokens * len(self.routers)
        load, first_choices, *weight_sums = (
            [sums[taken_D] for sums in of_kind]
            for of_kind in zip(*self._of_routers(D), strict=True)
        )
        self._written_load = [
            written_E + load_DE.sum(0)
            for written_E, load_DE in zip(self._written_loads(), load, strict=True)
        ]
        for sums in self._sums.values():
            sums.select_rows(left_D)
        self._documents = [self._documents[d] for d in left_D]
        self._row_of = {document.document: d for d, document in enumerate(self._documents)}
        self._tokens_D = self._tokens_D[left_D] if self.options.by_document else self._tokens_D
        self._tokens = self._decisions = 0
        return CountedBatches(
            self._batch,
            tokens,
            labels,
            load,
            first_choices,
            {"weight_sum": weight_sums[0]} if weight_sums else {},
            documents,
            decisions,
        )

    def _of_routers(self, D: int) -> list[list[np.ndarray]]:
        """Return the sums of each router of the model, [D, E] each."""
        found = list[list[np.ndarray]]()
        for name, stack in self.stacks.items():
            if (sums := self._sums.get(name)) is not None:
                sums.grow(D)
                found += sums.of_routers()
            else:  # it has not run
                dtypes = sum_dtypes(self.options.weights)
                found += [[np.zeros((D, r.experts), d) for d in dtypes] for r in stack.routers]
        return found

    def _written_loads(self) -> list[np.ndarray]:
        return self._written_load or [np.zeros(r.experts, np.int64) for r in self.routers]

    # --- what there is so far

    def totals(self, all_ranks: bool = False) -> Totals:
        """Return the counts since the recording began; with `all_ranks`, summed over the processes
        of torch.distributed."""
        written, load = iter(self._written_loads()), list[Tensor]()
        for name, stack in self.stacks.items():
            new = self._sums[name].loads() if name in self._sums else None
            for r, device in enumerate(stack.devices()):
                written_E = torch.from_numpy(next(written)).to(device)
                load.append(written_E + new[r] if new is not None else written_E.clone())
        tokens = torch.tensor(self._all_tokens, device=load[0].device)
        tokens_R = torch.tensor(
            [self._tokens_of[name] for name, stack in self.stacks.items() for _ in stack.routers]
        ).to(tokens.device)
        if all_ranks:
            for tensor in [*load, tokens, tokens_R]:
                torch.distributed.all_reduce(tensor)
        on_host = [load_E.cpu().numpy() for load_E in load]
        return Totals(self.routers, on_host, int(tokens), tokens_R.cpu().numpy())
