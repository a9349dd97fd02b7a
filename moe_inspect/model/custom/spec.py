"""How a router that is not transformers' is described: `RouterSpec`, the register of those that
belong to a class, and those of training frameworks, of which none is imported here.

T rows a router sees, K slots, E experts, B batch rows, S positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Literal

from moe_inspect.errors import MoeInspectError
from moe_inspect.model.choices import Args, Called, Choice, Kwargs
from moe_inspect.text import first_line

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from torch.nn import Module

    ChoiceOf = Callable[[Called, Args, Kwargs, Called], Choice | None]

ENTRY_POINTS = "moe_inspect.routers"


@dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """Where a model's routers are, and how their choices are read. Where a value may also be a
    function of a module, it is called once per router.

    module          the routers: a pattern of module paths as `named_modules` gives them
                    ("layers.*.moe.router", "**.router": * is one name, ** any number), a module,
                    a class, or the name of a class
                    ("MoEGate", "torchtitan.models.common.moe.TokenChoiceTopKRouter")
    choice          (module, args, kwargs, output) of a call → expert ids, int [..., K] with -1 in a
                    slot that went to no expert, and gate weights of the same shape; or bool
                    [..., E], True for the experts chosen, and their weights [..., E]. None: nothing
                    was routed in this call
    before          read `choice` before the module runs, from its arguments (`output` is None)
    experts         E, the number of experts; by default the module's `num_experts` or the like. It
                    is never taken from the ids, as experts that are never chosen would be missing
    top_k           K, needed only for a bool map of a module that does not state its top-k
    layer           block index, or a function of the module's path and the module; by default the
                    number after "layers", "blocks" or "h" in the path
    order           how a router's rows are ordered: "bs" (batch-first: row b·S + s) or "sb"
                    (sequence-first: row s·B + b). Nothing in the values tells one from the other
    rows            (module, B, S) → int [T], the token b·S + s of each row, where a router sees
                    only a part of the tokens (a slice of a sequence-parallel rank) or is called for
                    pieces of the sequence. None: all of them, in `order`
    logits          (module, args, kwargs, output) → router logits [..., E], for `logits=True`
    scoring         scoring function of the logits: "softmax" or "sigmoid"
    shared_experts  number of experts that every token goes to; by default 1 where a module beside
                    the router has "shared" in its name
    replace         (module, args, kwargs, output, ids, weights) → the output with this choice, ids
                    int [T, K] (-1: to no expert) and weights [T, K] in its place; with `before` the
                    (args, kwargs) to run with. `intervene` needs it only where `choice` makes its
                    tensors, instead of returning some of those that the module takes or returns
    drops           whether -1 is a choice that the capacity of its expert dropped
    note            a caveat for the trace's manifest
    """

    module: str | type | Module
    choice: ChoiceOf
    before: bool = False
    experts: int | Callable[[Called], int] | None = None
    top_k: int | Callable[[Called], int] | None = None
    layer: int | Callable[[str, Called], int] | None = None
    order: Literal["bs", "sb"] = "bs"
    rows: Callable[[Called, int, int], Called] | None = None
    logits: Callable[[Called, Args, Kwargs, Called], Tensor] | None = None
    scoring: str | Callable[[Called], str] = ""
    shared_experts: int | Callable[[Called], int | None] | None = None
    replace: Callable[..., Called] | None = None
    drops: bool | Callable[[Called], bool] = False
    note: str = ""

    def __post_init__(self) -> None:
        if self.order not in ("bs", "sb"):
            either = 'choose "bs" (batch-first) or "sb" (sequence-first)'
            raise MoeInspectError(f"RouterSpec(order={self.order!r}): {either}")
        if not callable(self.choice):
            raise MoeInspectError(
                "RouterSpec(choice=…) takes a function (module, args, kwargs, output) → (ids, "
                f"weights), not {type(self.choice).__name__}"
            )


_registered: list[RouterSpec] = []


def register_router(module_class: str | type, choice: ChoiceOf, **settings: Called) -> RouterSpec:
    """Registers how the routers of a class are read, for every model recorded from now on in this
    process. `settings`: the other fields of `RouterSpec`. The class may be given by its qualified
    name, so that its module need not be imported. Returns the spec; a later one for the same class
    replaces it.

    A package that brings routers of its own declares an entry point in the group
    "moe_inspect.routers" instead: a RouterSpec, a list of them, or a function that returns one."""
    spec = RouterSpec(module=module_class, choice=choice, **settings)
    _registered[:] = [s for s in _registered if s.module != module_class]
    _registered.insert(0, spec)
    return spec


def registered() -> list[RouterSpec]:
    """Those of `register_router`, then of installed packages: the first that matches counts."""
    return [*_registered, *_of_packages()]


@cache
def _of_packages() -> tuple[RouterSpec, ...]:
    found = list[RouterSpec]()
    for entry in entry_points(group=ENTRY_POINTS):
        of = f"the entry point {entry.name!r} ({entry.value}) in {ENTRY_POINTS}"
        try:
            value: Called = entry.load()
            value = value() if callable(value) and not isinstance(value, RouterSpec) else value
            specs = list(value) if isinstance(value, Iterable) else [value]
        # whatever the code of another package raises
        except Exception as error:
            raise MoeInspectError(f"{of} cannot be loaded: {first_line(error)}") from error
        if wrong := [type(s).__name__ for s in specs if not isinstance(s, RouterSpec)]:
            raise MoeInspectError(f"{of} gives a {wrong[0]}, not a RouterSpec")
        found += specs
    return tuple(found)


# --- of training frameworks


def local(tensor: Called) -> Tensor:
    """This rank's part of a DTensor (tensor or sequence parallel); any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def weights_first(module: Called, args: Args, kwargs: Kwargs, output: Called) -> Choice | None:
    """(weights [..., K], ids [..., K], …): torchtitan, OLMo-core. None where the router was
    asked for its scores only (the shared experts of OLMo-core)."""
    weights_TK, ids_TK = output[:2]
    return None if ids_TK is None else (local(ids_TK), local(weights_TK))


def ids_first(module: Called, args: Args, kwargs: Kwargs, output: Called) -> Choice:
    """(ids [T, K], weights [T, K], …): DeepSeek's own code."""
    return output[0], output[1]


def megatron(module: Called, args: Args, kwargs: Kwargs, output: Called) -> Choice:
    """(weights [T, E], map bool [T, E]), or (weights [T, K], ids [T, K]) at inference. What
    capacity drops is not in the map; what fills an expert up to its capacity is, with weight 0."""
    weights, chosen = output
    if module.config.moe_pad_expert_input_to_capacity:
        chosen = chosen & (weights > 0)
    return chosen, weights


def nemo(module: Called, args: Args, kwargs: Kwargs, output: Called) -> Choice:
    """(weights [T, K], ids [T, K], …) of gate(x, token mask [T], mesh). Padding has ids that no
    expert computes."""
    weights_TK, ids_TK = output[:2]
    real_T = args[1] if len(args) > 1 else kwargs.get("token_mask")
    if real_T is not None:
        ids_TK = ids_TK.masked_fill(~real_T[:, None], -1)
    return ids_TK, weights_TK


def litgpt(module: Called, args: Args, kwargs: Kwargs, output: Called) -> Choice:
    """(weights [T, K], ids [T, K]); the block scales the weights."""
    weights_TK, ids_TK = output
    return ids_TK, weights_TK * module.config.routed_scaling_factor


def deepspeed(module: Called, args: Args, kwargs: Kwargs, output: Called) -> Choice:
    """(loss, C, E, ids [K, T], places, weights [K, T], counts), -1 where dropped by capacity;
    before release 0.19 (loss, weights [T, E, C], map bool [T, E, C], counts)."""
    if len(output) < 7:
        return output[2].any(-1), output[1].sum(-1)
    return output[3].T, output[5].T


def megatron_rows(router: Called, B: int, S: int) -> np.ndarray | None:
    """With sequence parallelism a rank's router sees its part of the positions, sequence-first."""
    import numpy as np

    if not router.config.sequence_parallel or router.tp_group.size() == 1:
        return None
    part = S // router.tp_group.size()
    position_S = np.arange(part) + router.tp_group.rank() * part
    return (np.arange(B) * S + position_S[:, None]).reshape(-1)


SPECS = [
    RouterSpec(
        module="torchtitan.models.common.moe.TokenChoiceTopKRouter",
        choice=weights_first,
        logits=lambda router, args, *_: local(router.gate(args[0])),
        scoring=lambda router: router.score_func,
    ),
    RouterSpec(
        module="megatron.core.transformer.moe.router.TopKRouter",
        choice=megatron,
        # of the whole model, where the path counts those of a pipeline stage
        layer=lambda path, router: router.layer_number - 1,
        order="sb",
        rows=megatron_rows,
        logits=lambda router, args, *_: router.gating(args[0]),
        drops=lambda router: router.config.moe_expert_capacity_factor is not None,
        scoring=lambda r: "sinkhorn" if r.routing_type == "sinkhorn" else r.score_function,
    ),
    RouterSpec(
        module="olmo_core.nn.moe.router.MoERouter",
        choice=weights_first,
        logits=lambda router, args, *_: router.get_expert_logits(args[0]),
        scoring=lambda router: str(router.gating_function),
    ),
    RouterSpec(
        # MoERouterV2; another one of this class weighs the shared experts
        module="**.routed_experts_router",
        choice=weights_first,
        logits=lambda router, args, *_: router.get_expert_logits(args[0]),
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
