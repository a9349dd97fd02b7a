"""The strategy `moe_inspect` of vLLM's routing simulator, which replays a trace:

    MOE_INSPECT_REPLAY=runs/a VLLM_MOE_ROUTING_SIMULATION_STRATEGY=moe_inspect \\
        vllm serve MODEL --load-format dummy

A strategy is not told whose tokens it routes, nor in which layer. So the routers of a loaded model
are replaced one by one, and the rows of each step are placed before its forward pass.

Read from vLLM 0.32.0. L routers, T rows, K slots, E experts.
"""

# pyright: reportMissingImports=false
# (vLLM is not installed where types are checked)

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_inspect.capture.engine.replay import Replay
from moe_inspect.errors import MoeInspectError

NAME = "moe_inspect"


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
