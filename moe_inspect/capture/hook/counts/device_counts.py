"""Counts kept on the device: what a training loop, or --counts-only, records instead of decisions.

R routers, N rows of forward passes (padding included), K slots, E experts, D domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer import CountedBatches, Document

if TYPE_CHECKING:
    from moe_inspect.capture.hook.inputs.rows import Rows
    from moe_inspect.capture.hook.router_calls import Whole

Sums = dict[torch.device, list[torch.Tensor]]
MOST_SLOTS = 2**20  # counted at once


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
    decisions stores them. `weights`: whether gate weights are summed too."""

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
        self.on_cpu = all(device.type == "cpu" for device in self.devices)
        self._sums = self._zeros(1)

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

    def count(
        self,
        routers: Sequence[int],
        fed: Sequence[Rows],
        choices: Sequence[Whole],
        domains: int,
        batch: int,
    ) -> None:
        """Counts forward passes of these routers, a stack's. `fed`: their rows; `choices`: of each
        pass; `batch`: the number of the last one."""
        self._sums = {d: _padded(sums, domains) for d, sums in self._sums.items()}
        domain_N = torch.from_numpy(np.concatenate([_domain_of(rows) for rows in fed]))
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
        self.tokens, self.decisions = self.tokens + n, self.decisions + n * len(routers)
        self._tokens_R[routers[0] : routers[-1] + 1] += n
        self.documents += [document for rows in fed for document in rows.documents]

    def _count(
        self, first: int, domain_N: torch.Tensor, ids_RNK: torch.Tensor, weights_RNK: torch.Tensor
    ) -> None:
        """The decisions of alike routers of one device, from router `first` on."""
        E, device = self.routers[first].experts, self.devices[first]
        column_R = torch.from_numpy(self._columns[first : first + len(ids_RNK)]).to(device)
        domain_N1 = domain_N[:, None]
        outside_RNK = (ids_RNK < 0) | (ids_RNK >= E) | (domain_N1 < 0)
        slot_RNK = (
            ids_RNK.long().masked_fill(outside_RNK, E)
            + domain_N1.clamp(min=0) * self._width[device]
            + column_R[:, None, None]
        )
        # the first of equal weights
        first_RN1 = (
            weights_RNK.to(self.weight_dtype)
            .masked_fill(outside_RNK, -torch.inf)
            .argmax(2, keepdim=True)
        )
        slots, first_slots = slot_RNK.view(-1), slot_RNK.gather(2, first_RN1).view(-1)
        assignments, first_choice, *weight_sum = (s.view(-1) for s in self._sums[device])
        assignments.scatter_add_(0, slots, torch.ones_like(slots))
        first_choice.scatter_add_(0, first_slots, torch.ones_like(first_slots))
        for sums in weight_sum:
            sums.scatter_add_(0, slots, weights_RNK.reshape(-1).to(sums.dtype))

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
