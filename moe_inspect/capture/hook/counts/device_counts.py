"""Counts kept on the device: what a training loop, or --counts-only, records instead of decisions.

T rows (padding included), K slots, E experts, D domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from moe_inspect.capture.hook.pass_buffer import PassBuffer
from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer import CountedBatches, Document

if TYPE_CHECKING:
    from moe_inspect.capture.hook.inputs.rows import Rows

Sums = dict[torch.device, list[torch.Tensor]]


@dataclass(frozen=True)
class Totals:
    """Counts since the recording began: `load`, the assignments of each router's experts, int64
    [E] each; `tokens` of all passes, and `tokens_R` int64 [R], the tokens each router saw."""

    routers: list[Router]
    load: list[np.ndarray]
    tokens: int
    tokens_R: np.ndarray


class DeviceCounts:
    """Load by router, domain and expert, summed on each router's device; nothing waits for the
    device before `take`. First choices are by the weights rounded to `weight_dtype`, as a trace of
    decisions stores them. `weights`: whether gate weights are summed too.

    On a CPU small passes are kept (`buffer`), and many are counted together (`count_kept`)."""

    def __init__(
        self,
        routers: Sequence[Router],
        devices: Sequence[torch.device],
        weight_dtype: torch.dtype,
        weights: bool,
    ):
        self.routers, self.devices, self.weight_dtype, self.weights = (
            list(routers),
            list(devices),
            weight_dtype,
            weights,
        )
        self.tokens = self.batch = self.taken_tokens = 0
        self.documents: list[Document] = []
        self._taken_load = [np.zeros(r.experts, np.int64) for r in routers]
        self.decisions = 0
        self._tokens_R = np.zeros(len(self.routers), np.int64)  # seen since the recording began
        # a device's routers lie side by side in its sums: E + 1 columns each, from here on
        self._columns = np.zeros(len(self.routers), np.int64)
        self._width: dict[torch.device, int] = {}
        for r, (router, device) in enumerate(zip(self.routers, self.devices, strict=True)):
            self._columns[r] = self._width.get(device, 0)
            self._width[device] = int(self._columns[r]) + router.experts + 1
        # router → domain code of each row of the forward pass, −1 for padding; on its device
        self._domain_of_row: dict[int, torch.Tensor] = {}
        self._buffers: dict[int, PassBuffer] = {}  # by the first router of a stack
        self._sums = self._zeros(1)
        self.begin()

    def _zeros(self, domains: int) -> Sums:
        """Zeroed sums for `domains`: assignments, first choices and weights, [domains, columns]
        each. Padding and slots that routed nowhere are counted as expert E, which is left out in
        the end."""
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

    def begin(self) -> None:
        """A forward pass begins. Nothing of it is counted unless `end` follows."""
        self._pass_sums: Sums = {}
        self._pass_rows: list[tuple[Rows, Sequence[int]]] = []  # and the routers that saw them

    def feed(self, routers: Sequence[int], rows: Rows, domains: int) -> None:
        """Sets the rows that these routers see in the forward pass."""
        self._domains = max(1, domains)  # none is known before the first row
        self._pass_sums = {d: _padded(sums, domains) for d, sums in self._pass_sums.items()}
        domain_T = _domain_of(rows)
        base = {
            d: torch.from_numpy(domain_T).to(d, non_blocking=True)
            for d in {self.devices[r] for r in routers}
        }
        self._domain_of_row |= {r: base[self.devices[r]] for r in routers}
        self._pass_rows.append((rows, routers))

    def buffer(self, routers: Sequence[int], sites: Sequence[int]) -> PassBuffer | None:
        """Keeps small passes of these routers, a stack's, until `count_kept`; None where the calls
        are to be added one by one. `sites`: the index of each router's site."""
        if any(self.devices[r].type != "cpu" for r in routers):
            return None
        if routers[0] not in self._buffers:
            sizes = [(self.routers[r].top_k, self.routers[r].experts) for r in routers]
            self._buffers[routers[0]] = PassBuffer(sizes, sites)
        return self._buffers[routers[0]]

    def add(self, r: int, row: int, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
        """The decisions of one call of router r, for the rows from `row` on."""
        E, device = self.routers[r].experts, self.devices[r]
        if not self._pass_sums:
            self._pass_sums = self._zeros(self._domains)
        domain_T1 = self._domain_of_row[r][row : row + len(ids_TK), None]
        outside_TK = (ids_TK < 0) | (ids_TK >= E) | (domain_T1 < 0)
        slot_TK = (
            domain_T1.clamp(min=0) * self._width[device]
            + int(self._columns[r])
            + ids_TK.long().masked_fill(outside_TK, E)
        )
        assignments, first_choice, *weight_sum = (s.view(-1) for s in self._pass_sums[device])
        assignments.scatter_add_(0, slot_TK.reshape(-1), torch.ones_like(slot_TK).reshape(-1))
        # the first of equal weights
        first_T1 = (
            weights_TK.to(self.weight_dtype)
            .masked_fill(outside_TK, -torch.inf)
            .argmax(1, keepdim=True)
        )
        first_choice.scatter_add_(
            0, slot_TK.gather(1, first_T1)[:, 0], torch.ones_like(slot_TK[:, 0])
        )
        for sums in weight_sum:
            sums.scatter_add_(0, slot_TK.reshape(-1), weights_TK.reshape(-1).to(sums.dtype))

    def count_kept(
        self, routers: Sequence[int], fed: Sequence[Rows], domains: int, batch: int
    ) -> None:
        """Counts what the buffer of these routers has kept, as `add` would have, for all of them at
        once. `fed`: the rows of its passes; `batch`: the number of the last one."""
        device, buffer = torch.device("cpu"), self._buffers[routers[0]]
        self._sums = {d: _padded(sums, domains) for d, sums in self._sums.items()}
        assignments, first_choice, *weight_sum = (s.view(-1).numpy() for s in self._sums[device])
        domain_N = np.concatenate([_domain_of(rows) for rows in fed])
        padded = int(domain_N.min(initial=0)) < 0
        for group, ids_RNK, values_RNK in buffer.joined():
            assert ids_RNK is not None
            rounded_RNK = values_RNK.to(self.weight_dtype).double().numpy()
            if padded or (ids_RNK.view(np.uint64) >= group.E).any():
                outside_RNK = (ids_RNK < 0) | (ids_RNK >= group.E) | (domain_N < 0)[:, None]
                ids_RNK = np.where(outside_RNK, group.E, ids_RNK)
                rounded_RNK = np.where(outside_RNK, -np.inf, rounded_RNK)
            first = routers[0] + group.first
            slot_RNK = ids_RNK + self._columns[first : first + group.routers, None, None]
            slot_RNK += (domain_N.clip(min=0) * self._width[device])[:, None]
            first_RN1 = rounded_RNK.argmax(2)[..., None]  # the first of equal weights
            first_RN = np.take_along_axis(slot_RNK, first_RN1, 2)
            slots, bins = slot_RNK.reshape(-1), len(assignments)
            assignments += np.bincount(slots, minlength=bins)
            first_choice += np.bincount(first_RN.reshape(-1), minlength=bins)
            for sums in weight_sum:
                sums += np.bincount(slots, values_RNK.double().numpy().reshape(-1), bins)
        buffer.clear()
        self._count_rows(fed, routers, batch)

    def end(self, batch: int) -> None:
        """The forward pass is over and complete: adds what it counted to the sums."""
        if self._pass_rows:
            self._sums = {d: _padded(sums, self._domains) for d, sums in self._sums.items()}
        for device, sums in self._pass_sums.items():
            for total, of_pass in zip(self._sums[device], sums, strict=True):
                total += of_pass
        for rows, routers in self._pass_rows:
            self._count_rows([rows], routers, batch)

    def _count_rows(self, fed: Sequence[Rows], routers: Sequence[int], batch: int) -> None:
        n = sum(len(rows.token_id) for rows in fed)
        self.batch = batch
        self.tokens, self.decisions = self.tokens + n, self.decisions + n * len(routers)
        self._tokens_R[routers[0] : routers[-1] + 1] += n
        self.documents += [document for rows in fed for document in rows.documents]

    def take(self, domains: list[str]) -> CountedBatches:
        """The counts since the last `take`, moved to the host."""
        # (copies: on a CPU these would be views of what is counted in next)
        host = [
            [s.cpu().numpy().copy() for s in self._of_router(r)] for r in range(len(self.routers))
        ]
        self._taken_load = [t + h[0].sum(0) for t, h in zip(self._taken_load, host, strict=True)]
        self.taken_tokens += self.tokens
        known = len(host[0][0])
        counted = CountedBatches(
            self.batch,
            self.tokens,
            domains[:known],
            [h[0] for h in host],
            [h[1] for h in host],
            [h[2] for h in host] if self.weights else None,
            self.documents,
            self.decisions,
        )
        self.tokens, self.decisions, self.documents = 0, 0, []
        self._sums = self._zeros(known)
        return counted

    def totals(self, all_ranks: bool = False) -> Totals:
        """The counts since the recording began; with `all_ranks`, summed over the processes of
        torch.distributed."""
        load = [
            torch.from_numpy(taken).to(self.devices[r]) + self._of_router(r)[0].sum(0)
            for r, taken in enumerate(self._taken_load)
        ]
        tokens = torch.tensor(self.taken_tokens + self.tokens, device=load[0].device)
        tokens_R = torch.from_numpy(self._tokens_R.copy()).to(tokens.device)
        if all_ranks:
            for tensor in [*load, tokens, tokens_R]:
                torch.distributed.all_reduce(tensor)
        return Totals(
            self.routers, [t.cpu().numpy() for t in load], int(tokens), tokens_R.cpu().numpy()
        )


def _domain_of(rows: Rows) -> np.ndarray:
    """The domain code of each row, int64 [T], −1 for padding."""
    domain_T = np.full(len(rows.real), -1, np.int64)
    domain_T[rows.real] = rows.domain
    return domain_T


def _padded(sums: list[torch.Tensor], domains: int) -> list[torch.Tensor]:
    missing = domains - len(sums[0])
    return [torch.nn.functional.pad(s, (0, 0, 0, missing)) for s in sums] if missing > 0 else sums
