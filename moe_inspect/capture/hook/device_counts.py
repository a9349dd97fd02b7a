"""Counts kept on the device: what a training loop, or --counts-only, records instead of decisions.

T rows (padding included), K slots, E experts, D domains.
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
    from moe_inspect.capture.hook.call_inputs import Rows


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
        # router → domain code of each row of the forward pass, −1 for padding; on its device
        self._domain_of_row: dict[int, torch.Tensor] = {}
        self._sums = self._zeros(1)
        self.begin()

    def _zeros(self, domains: int) -> list[list[torch.Tensor]]:
        """Zeroed sums for `domains`, [domains, E + 1] each. Padding and slots that routed nowhere
        are counted as expert E, which is left out in the end."""
        kinds = [torch.int64, torch.int64, torch.float64][: 3 if self.weights else 2]
        with torch.inference_mode(False):
            return [
                [
                    torch.zeros((domains, router.experts + 1), dtype=kind, device=device)
                    for kind in kinds
                ]
                for router, device in zip(self.routers, self.devices, strict=True)
            ]

    def begin(self) -> None:
        """A forward pass begins. Nothing of it is counted unless `end` follows."""
        self._pass_sums = self._zeros(len(self._sums[0][0]))
        self._pass_rows: list[tuple[Rows, Sequence[int]]] = []  # and the routers that saw them

    def feed(self, routers: Sequence[int], rows: Rows, domains: int) -> None:
        """Sets the rows that these routers see in the forward pass."""
        self._pass_sums = [_padded(sums, domains) for sums in self._pass_sums]
        domain_T = np.full(len(rows.real), -1, np.int64)
        domain_T[rows.real] = rows.domain
        base = {
            d: torch.from_numpy(domain_T).to(d, non_blocking=True)
            for d in {self.devices[r] for r in routers}
        }
        self._domain_of_row |= {r: base[self.devices[r]] for r in routers}
        self._pass_rows.append((rows, routers))

    def add(self, r: int, row: int, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
        """The decisions of one call of router r, for the rows from `row` on."""
        E = self.routers[r].experts
        domain_T1 = self._domain_of_row[r][row : row + len(ids_TK), None]
        outside_TK = (ids_TK < 0) | (ids_TK >= E) | (domain_T1 < 0)
        slot_TK = domain_T1.clamp(min=0) * (E + 1) + ids_TK.long().masked_fill(outside_TK, E)
        assignments, first_choice, *weight_sum = (s.view(-1) for s in self._pass_sums[r])
        assignments.scatter_add_(0, slot_TK.reshape(-1), torch.ones_like(slot_TK).reshape(-1))
        first_T1 = (
            weights_TK.to(self.weight_dtype)
            .masked_fill(outside_TK, -torch.inf)
            .argmax(1, keepdim=True)
        )  # the first of equal weights
        first_choice.scatter_add_(
            0, slot_TK.gather(1, first_T1)[:, 0], torch.ones_like(slot_TK[:, 0])
        )
        for sums in weight_sum:
            sums.scatter_add_(0, slot_TK.reshape(-1), weights_TK.reshape(-1).to(sums.dtype))

    def end(self, batch: int) -> None:
        """The forward pass is over and complete: adds what it counted to the sums."""
        for now, before in zip(self._pass_sums, self._sums, strict=True):
            for sums, older in zip(now, before, strict=True):
                sums[: len(older)] += older
        self._sums, self.batch = self._pass_sums, batch
        for rows, routers in self._pass_rows:
            n = int(rows.real.sum())
            self.tokens, self.decisions = self.tokens + n, self.decisions + n * len(routers)
            self._tokens_R[list(routers)] += n
            self.documents += rows.documents

    def take(self, domains: list[str]) -> CountedBatches:
        """The counts since the last `take`, moved to the host."""
        host = [[s[:, :-1].cpu().numpy() for s in sums] for sums in self._sums]
        self._taken_load = [t + h[0].sum(0) for t, h in zip(self._taken_load, host, strict=True)]
        self.taken_tokens += self.tokens
        counted = CountedBatches(
            self.batch,
            self.tokens,
            domains[: len(host[0][0])],
            [h[0] for h in host],
            [h[1] for h in host],
            [h[2] for h in host] if self.weights else None,
            self.documents,
            self.decisions,
        )
        self.tokens, self.decisions, self.documents = 0, 0, []
        self._sums = self._zeros(len(self._sums[0][0]))
        return counted

    def totals(self, all_ranks: bool = False) -> Totals:
        """The counts since the recording began; with `all_ranks`, summed over the processes of
        torch.distributed."""
        load = [
            torch.from_numpy(t).to(s[0].device) + s[0][:, :-1].sum(0)
            for t, s in zip(self._taken_load, self._sums, strict=True)
        ]
        tokens = torch.tensor(self.taken_tokens + self.tokens, device=load[0].device)
        tokens_R = torch.from_numpy(self._tokens_R.copy()).to(tokens.device)
        if all_ranks:
            for tensor in [*load, tokens, tokens_R]:
                torch.distributed.all_reduce(tensor)
        return Totals(
            self.routers, [t.cpu().numpy() for t in load], int(tokens), tokens_R.cpu().numpy()
        )


def _padded(sums: list[torch.Tensor], domains: int) -> list[torch.Tensor]:
    missing = domains - len(sums[0])
    return [torch.nn.functional.pad(s, (0, 0, 0, missing)) for s in sums] if missing > 0 else sums
