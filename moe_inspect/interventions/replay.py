"""The routing of a trace, looked up for the tokens that a model is fed.

T rows of a forward pass, N tokens of the trace that a stack sees, K slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from moe_inspect.capture.hook.inputs.rows import Rows
from moe_inspect.errors import MoeInspectError
from moe_inspect.interventions.sequences import Sequences
from moe_inspect.model.routers import Site
from moe_inspect.trace.reader import Trace


@dataclass
class Replay:
    """The decisions of `trace`, for a model with the routers `sites`. They are held in memory.

    A sequence is recognised by its token ids when it is first fed, whole or from its beginning on:
    the order of the passes need not be the trace's. Of sequences with the same tokens each is used
    once before one is used again. In an encoder-decoder each stack has sequences of its own.
    Raises MoeInspectError where a router of the trace has no counterpart, and for a sequence that
    is not in the trace."""

    trace: Trace
    sites: Sequence[Site]
    _routes: dict[int, tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.trace.counts_only:
            raise MoeInspectError(f"{self.trace.path} holds counts only, no decisions to replay")
        self._router_of = self._routers()
        tokens = self.trace.tokens()
        encoded = (tokens["phase"] == "encode").to_numpy()
        self._of = {
            stack: Sequences(
                self.trace.path, tokens[encoded == (stack == "encoder")] if stack else tokens
            )
            for stack in sorted({site.stack for site in self.sites})
        }

    @property
    def beyond(self) -> int:
        """Tokens fed behind the end of their sequence in the trace."""
        return sum(of.beyond for of in self._of.values())

    def at(self, rows: Rows) -> Tensor:
        """For each row of a forward pass the number of its token in the trace, int64 [T]; -1 for
        padding and for a token beyond the end of its sequence there."""
        # a decoder's sequences often begin alike: it continues what its encoder read
        read = self._of["encoder"].found if rows.stack == "decoder" else {}
        found = np.full(rows.T, -1, np.int64)
        found[rows.real] = self._of[rows.stack].at(rows, read)
        return torch.from_numpy(found)

    def routes(self, r: int, time: int, at_T: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """(ids, weights) [T, K] of these tokens in the `time`-th run of the router at site r: ids
        -1 where the trace has none; no weights where it was recorded without. None where it does
        not have the router."""
        router = self._router_of.get((r, time))
        if router is None:
            return None
        if router not in self._routes:
            self._routes[router] = self._load(router)
        ids_NK, weights_NK = self._routes[router]
        n_T = at_T.clamp(min=0)
        return ids_NK[n_T].long(), weights_NK[n_T] if weights_NK is not None else None

    def _routers(self) -> dict[tuple[int, int], int]:
        """Site and run of its layer → the trace's router: by path, else by its place in its
        layer."""
        found: dict[tuple[int, int], int] = {}
        by_path = {router.path: n for n, router in enumerate(self.trace.routers)}
        for r, site in enumerate(self.sites):
            time = 0
            while (
                n := by_path.get(site.path + (f" (run {time + 1})" if time else ""))
            ) is not None:
                found[r, time], time = n, time + 1
        if not found:
            for n, router in enumerate(self.trace.routers):
                place = sum(o.layer == router.layer for o in self.trace.routers[:n])
                like = [r for r, site in enumerate(self.sites) if site.layer == router.layer]
                if place < len(like):
                    found[like[place], 0] = n
        for n, router in enumerate(self.trace.routers):
            r = next((r for (r, _), m in found.items() if m == n), None)
            if r is not None and self.sites[r].stack != router.stack:
                raise MoeInspectError(
                    f"{router.path} of {self.trace.path} is in "
                    f"{f'the {router.stack}' if router.stack else 'a model of one stack'}, and in "
                    f"{self.sites[r].stack or 'one stack'} here: a trace is replayed on the model "
                    "it is of"
                )
            if r is None or self.sites[r].experts != router.experts:
                has = f"{self.sites[r].experts}" if r is not None else "no router there"
                raise MoeInspectError(
                    f"{router.path} of {self.trace.path} has {router.experts} experts in layer "
                    f"{router.layer}, this model {has}: a trace is replayed on the model it is of"
                )
        return found

    def _load(self, router: int) -> tuple[Tensor, Tensor | None]:
        table = self.trace.routing(router=router)
        token_N = self._of[self.trace.routers[router].stack].token_N
        table = table.set_index("token").reindex(token_N)
        K = self.trace.routers[router].top_k
        ids = np.stack([table[f"expert_{k}"].fillna(-1).to_numpy(np.int32) for k in range(K)], 1)
        if not self.trace.has_weights:
            return torch.from_numpy(ids), None
        weights = np.stack(
            [table[f"weight_{k}"].fillna(0).to_numpy(np.float32) for k in range(K)], 1
        )
        return torch.from_numpy(ids), torch.from_numpy(weights)
