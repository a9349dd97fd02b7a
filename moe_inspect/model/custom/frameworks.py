"""The routers of training frameworks: where each hands over its decision, as one entry each. None
of them is imported here.

T tokens, B batch rows, S positions, K slots, E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from moe_inspect.model.custom.spec import RouterSpec

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

Args: TypeAlias = tuple[Any, ...]
Kwargs: TypeAlias = dict[str, Any]


def local(tensor: Any) -> Tensor:
    """This rank's part of a DTensor (tensor or sequence parallel); any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def weights_first(
    module: Module, args: Args, kwargs: Kwargs, output: Any
) -> tuple[Tensor, Tensor] | None:
    """(weights [..., K], ids [..., K], …): torchtitan, OLMo-core. None where the router was
    asked for its scores only (the shared experts of OLMo-core)."""
    weights_TK, ids_TK = output[:2]
    return None if ids_TK is None else (local(ids_TK), local(weights_TK))


def ids_first(
    module: Module, args: Args, kwargs: Kwargs, output: Any
) -> tuple[Tensor, Tensor] | None:
    """(ids [T, K], weights [T, K], …): DeepSeek's own code."""
    return output[0], output[1]


def megatron(module: Any, args: Args, kwargs: Kwargs, output: Any) -> tuple[Tensor, Tensor] | None:
    """(weights [T, E], map bool [T, E]), or (weights [T, K], ids [T, K]) at inference. What
    capacity drops is not in the map; what fills an expert up to its capacity is, with weight 0."""
    weights, chosen = output
    if module.config.moe_pad_expert_input_to_capacity:
        chosen = chosen & (weights > 0)
    return chosen, weights


def nemo(module: Module, args: Args, kwargs: Kwargs, output: Any) -> tuple[Tensor, Tensor] | None:
    """(weights [T, K], ids [T, K], …) of gate(x, token mask [T], mesh). Padding has ids that no
    expert computes."""
    weights_TK, ids_TK = output[:2]
    real_T = args[1] if len(args) > 1 else kwargs.get("token_mask")
    if real_T is not None:
        ids_TK = ids_TK.masked_fill(~real_T[:, None], -1)
    return ids_TK, weights_TK


def litgpt(module: Any, args: Args, kwargs: Kwargs, output: Any) -> tuple[Tensor, Tensor] | None:
    """(weights [T, K], ids [T, K]); the block scales the weights."""
    weights_TK, ids_TK = output
    return ids_TK, weights_TK * module.config.routed_scaling_factor


def deepspeed(
    module: Module, args: Args, kwargs: Kwargs, output: Any
) -> tuple[Tensor, Tensor] | None:
    """(loss, C, E, ids [K, T], places, weights [K, T], counts), -1 where dropped by capacity;
    before release 0.19 (loss, weights [T, E, C], map bool [T, E, C], counts)."""
    if len(output) < 7:
        return output[2].any(-1), output[1].sum(-1)
    return output[3].T, output[5].T


def megatron_rows(router: Any, B: int, S: int) -> Any:
    """With sequence parallelism a rank's router sees its part of the positions, sequence-first."""
    if not router.config.sequence_parallel or router.tp_group.size() == 1:
        return None
    part = S // router.tp_group.size()
    position_S = np.arange(part) + router.tp_group.rank() * part
    return (np.arange(B) * S + position_S[:, None]).reshape(-1)


SPECS = [
    RouterSpec(
        module="torchtitan.models.common.moe.TokenChoiceTopKRouter",
        choice=weights_first,
        scoring=lambda router: router.score_func,
    ),
    RouterSpec(
        module="megatron.core.transformer.moe.router.TopKRouter",
        choice=megatron,
        # of the whole model, where the path counts those of a pipeline stage
        layer=lambda path, router: router.layer_number - 1,
        order="sb",
        rows=megatron_rows,
        drops=True,
        scoring=lambda router: (
            "sinkhorn" if router.routing_type == "sinkhorn" else router.score_function
        ),
    ),
    RouterSpec(
        module="olmo_core.nn.moe.router.MoERouter",
        choice=weights_first,
        scoring=lambda router: str(router.gating_function),
    ),
    RouterSpec(
        # MoERouterV2; another one of this class weighs the shared experts
        module="**.routed_experts_router",
        choice=weights_first,
        scoring=lambda router: str(router.gating_function),
    ),
    RouterSpec(
        module="nemo_automodel.components.moe.layers.Gate",
        choice=nemo,
        scoring=lambda gate: gate.score_func.removesuffix("_with_bias"),
    ),
    RouterSpec(
        module="MoEGate",  # DeepSeek's own code, loaded with the model: in no package
        choice=ids_first,
        # other code that has copied the name may state less
        scoring=lambda gate: getattr(gate, "scoring_func", ""),
        shared_experts=lambda gate: (
            gate.config.n_shared_experts or 0
            if hasattr(getattr(gate, "config", None), "n_shared_experts")
            else None
        ),
    ),
    RouterSpec(
        module="deepspeed.moe.sharded_moe.TopKGate",
        choice=deepspeed,
        experts=lambda gate: gate.wg.out_features,
        scoring="softmax",
        drops=True,
    ),
    RouterSpec(
        module="litgpt.model.GroupedTopkRouter",
        choice=litgpt,
        scoring="sigmoid",
        shared_experts=lambda router: router.config.n_shared_expert or 0,
    ),
]
