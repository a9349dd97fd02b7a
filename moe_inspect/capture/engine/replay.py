"""Routes as a trace has recorded them, for a vLLM whose own mean nothing: a benchmark with dummy
weights then has the load of real text.

    MOE_INSPECT_REPLAY=runs/a VLLM_MOE_ROUTING_SIMULATION_STRATEGY=moe_inspect \\
        vllm serve MODEL --load-format dummy

Each request is routed as a sequence of the trace was, from some token of it on. The token is drawn
from all of the trace with equal probability, so that load, co-activation and persistence are those
of the trace.

A strategy of vLLM's routing simulator is not told whose tokens it routes, nor in which layer. So
the routers of a loaded model are replaced one by one, and the rows of each step are placed before
its forward pass.

Read from vLLM 0.32.0. L routers, N tokens of the trace, T rows of a step, K slots, E experts.
"""

# pyright: reportMissingImports=false
# (vLLM is not installed where types are checked)

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_inspect.errors import MoeInspectError
from moe_inspect.text import plural
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.shard import Shard, run_edges

NAME = "moe_inspect"  # of the strategy
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


# --- in vLLM


def register_strategy() -> None:
    """vLLM refuses names that it does not know."""
    from vllm.model_executor.layers.fused_moe.router import routing_simulator_router as simulator

    class Strategy(simulator.RoutingStrategy):
        def route_tokens(self, *args: Any, **kwargs: Any) -> Any:
            raise MoeInspectError("no trace is replayed: set MOE_INSPECT_REPLAY=DIR")

    simulator.RoutingSimulator.register_strategy(NAME, Strategy())


def replay(runner: Any, path: Path, T: int) -> None:
    """From now on the routers of a worker's model choose what those of the trace chose, in steps of
    at most T rows. MoeInspectError if the trace is of another model, or vLLM does not simulate."""
    from vllm.model_executor.layers.fused_moe.layer import MoERunner
    from vllm.model_executor.layers.fused_moe.router import routing_simulator_router as simulator

    layers = [m for m in runner.get_model().modules() if isinstance(m, MoERunner)]
    layers.sort(key=lambda layer: layer.layer_id)
    routers = [layer.router for layer in layers]
    if not routers or not all(isinstance(r, simulator.RoutingSimulatorRouter) for r in routers):
        raise MoeInspectError(
            f"MOE_INSPECT_REPLAY needs VLLM_MOE_ROUTING_SIMULATION_STRATEGY={NAME}, and a model "
            "whose MoE layers take it"
        )
    moe = layers[0].moe_config
    shape = len(layers), moe.num_logical_experts, moe.experts_per_token
    replayed = _replayed["now"] = Replayed(Replay(path, shape, runner.device), T)
    for n, router in enumerate(routers):
        router._compute_routing = partial(_compute_routing, n, shape[2])
    name = "prepare_inputs" if hasattr(runner, "req_states") else "_prepare_inputs"
    prepare = getattr(runner, name)

    def prepared(*args: Any, **kwargs: Any) -> Any:
        found = prepare(*args, **kwargs)
        replayed.place(runner, found)
        return found

    setattr(runner, name, prepared)


class Replayed:
    """A trace, and the token of it as which each row of the current step is routed: [T]. Rows that
    are no request's, as those of a profiling pass, are routed as any token."""

    def __init__(self, of: Replay, T: int):
        self.of = of
        generator = torch.Generator().manual_seed(0)
        at_T = torch.randint(of.ids.shape[1], (T,), generator=generator)
        self.at_T = at_T.to(of.ids.device)

    def place(self, runner: Any, prepared: Any) -> None:
        """Before a forward pass. `prepared`: what the runner has prepared for it."""
        if hasattr(runner, "req_states"):  # model runner V2
            requests = list(prepared.req_ids)
            edges, positions = prepared.query_start_loc_np[: len(requests) + 1], prepared.positions
        else:
            requests = list(runner.input_batch.req_ids)
            edges, positions = runner.query_start_loc.np[: len(requests) + 1], runner.positions
        n = int(edges[-1])
        self.at_T[:n] = self.of.at(requests, np.array(edges), positions[:n].long())


_replayed: dict[str, Replayed] = {}  # of this process


def _routes(rows: Tensor, router: int, K: int) -> tuple[Tensor, Tensor]:
    """ids and weights of a router, [T, K]. `rows`: any tensor of T rows."""
    replayed = _replayed["now"]
    at_T = replayed.at_T[: len(rows)]
    return replayed.of.ids[router][at_T], replayed.of.weights[router][at_T]


# for torch.compile, to which tables of a trace would be constants
_routes_op = torch.library.custom_op("moe_inspect::replay", _routes, mutates_args=())


@_routes_op.register_fake
def _(rows: Tensor, router: int, K: int) -> tuple[Tensor, Tensor]:
    shape = rows.shape[0], K  # (`len` would make the size a constant)
    return rows.new_empty(shape, dtype=torch.int32), rows.new_empty(shape, dtype=torch.float32)


def _compute_routing(
    router: int,
    K: int,
    hidden_states: Tensor,
    router_logits: Tensor,
    indices_type: torch.dtype | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    ids_TK, weights_TK = _routes_op(hidden_states, router, K)
    return weights_TK, ids_TK.to(indices_type or torch.int32)
