"""Routes as a trace has recorded them, for an engine whose own mean nothing: a benchmark with dummy
weights then has the load of real text.

Each request is routed as a sequence of the trace was, from some token of it on. The token is drawn
from all of the trace with equal probability, so that load, co-activation and persistence are those
of the trace.

L routers, N tokens of the trace, T rows of a step, K slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moe_inspect.errors import MoeInspectError
from moe_inspect.text import plural
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.shard import Shard, run_edges

MOST_TOKENS = 2**18  # of a trace in memory: 61 layers of 8 slots take .5 GB


class Replay:
    """The decisions of a trace of L routers with E experts and K slots each, on a device.

    ids    int32 [L, N, K], sequence after sequence, in the order of their positions
    weights  float32 [L, N, K]; 1 / K where the trace has none

    MoeInspectError where its routers are other ones, where it has no decisions, too many of them,
    or slots that routed nowhere."""

    def __init__(self, path: Path, routers: tuple[int, int, int], device: torch.device):
        trace, (L, E, K) = Trace(path), routers
        _check(trace, L, E, K)
        shards = list(trace.shards)
        columns = ["document", "sequence", "position"]
        tables = [shard.tokens(columns) for shard in shards]
        document_N, sequence_N, position_N = (
            np.concatenate([table[name].to_numpy() for table in tables]) for name in columns
        )
        by_N = np.lexsort((position_N, sequence_N, document_N))

        def of_routers(values: Callable[[Shard, int], np.ndarray], dtype: torch.dtype) -> Tensor:
            found = [np.concatenate([values(s, r) for s in shards])[by_N] for r in range(L)]
            return torch.from_numpy(np.stack(found)).to(device, dtype)

        self.ids = of_routers(Shard.ids, torch.int32)
        if (self.ids < 0).any():
            raise MoeInspectError(f"{path} has slots that routed nowhere, which cannot be replayed")
        if trace.has_weights:
            self.weights = of_routers(Shard.weights, torch.float32)
        else:
            self.weights = torch.full(self.ids.shape, 1 / K, device=device)
        # of the sequence of each token
        edges = run_edges(document_N[by_N], sequence_N[by_N])
        self._first_N, self._length_N = np.repeat([edges[:-1], np.diff(edges)], np.diff(edges), 1)

    def place(self, request: str) -> tuple[int, int, int]:
        """Of the sequence that a request is routed as: its first token, its length, and at which of
        its tokens the request begins. The same in every process."""
        drawn = int.from_bytes(blake2b(request.encode(), digest_size=8).digest(), "big")
        n = drawn % len(self._first_N)
        first = int(self._first_N[n])
        return first, int(self._length_N[n]), n - first

    def at(self, requests: Sequence[str], edges: np.ndarray, positions: Tensor) -> Tensor:
        """The token of the trace as which each row is routed, int64 [T]. `edges`: int [requests +
        1], where the rows of each request begin. `positions`: [T]. A request that is longer than
        its sequence goes through it again."""
        places_R3 = np.array([self.place(request) for request in requests]).reshape(-1, 3)
        places_3T = torch.from_numpy(np.repeat(places_R3, np.diff(edges), 0).T)
        first_T, length_T, begins_T = places_3T.to(positions.device, non_blocking=True)
        return first_T + (begins_T + positions) % length_T


def _check(trace: Trace, L: int, E: int, K: int) -> None:
    if trace.counts_only:
        raise MoeInspectError(f"{trace.path} holds counts only, no decisions to replay")
    found = {(router.experts, router.top_k) for router in trace.routers}
    if (
        len(trace.routers) != L
        or found != {(E, K)}
        or any(router.stack for router in trace.routers)
    ):
        of = " and ".join(f"{k} of {e}" for e, k in sorted(found))
        raise MoeInspectError(
            f"{trace.path} has {plural(len(trace.routers), 'router')} that choose {of} experts: "
            f"the model has {L} that choose {K} of {E}"
        )
    if not trace.n_tokens:
        raise MoeInspectError(f"{trace.path} holds no tokens to replay")
    if trace.n_tokens > MOST_TOKENS:
        raise MoeInspectError(
            f"{trace.path} has {trace.n_tokens:,} tokens, and at most {MOST_TOKENS:,} can be "
            "replayed: record a smaller share of the requests, with MOE_INSPECT_SAMPLE"
        )
