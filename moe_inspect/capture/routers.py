"""Finds every router of a model: the seam where its choice is handed over.

A family on transformers' experts interface, or with the same call, needs no entry here: its experts module is called with
the router's choice. `ADAPTERS` holds the few families with no such call: a router class → a function of that router's
output. T tokens, K slots, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_inspect.errors import MoeInspectError

if TYPE_CHECKING:
    import torch

Choice = tuple["torch.Tensor", "torch.Tensor"]  # expert ids int [T, K], gate weights float [T, K]


@dataclass(frozen=True)
class Adapter:
    """`choice`: what the router chose, from its output. `logits_index`: where its logits are in it."""

    choice: Callable[[torch.nn.Module, Any], Choice]
    logits_index: int


@dataclass(frozen=True)
class Site:
    """Where one router's choice can be seen. `adapter` is None where the choice is an argument of `module`'s call, else it
    reads `module`'s output. `experts`: E. `logits_module`: the module whose output holds the router logits, if known, at
    `logits_index`, or (None) wherever E values a row stand."""

    module: torch.nn.Module
    path: str
    layer: int
    experts: int
    scoring: str
    shared_experts: int
    adapter: Adapter | None = None
    logits_module: torch.nn.Module | None = None
    logits_index: int | None = None


def _llama4(router: torch.nn.Module, output: Any) -> Choice:
    # the score multiplies the expert's input; every expert is called, with zeros where it was not chosen
    scores_TE, logits_TE = output
    ids_TK = logits_TE.topk(router.top_k, dim=1).indices  # the router's own call on its own logits
    return ids_TK, scores_TE.gather(1, ids_TK)


ADAPTERS = {"Llama4Router": Adapter(_llama4, logits_index=1)}
NOT_ROUTED = {"Llama4TextExperts", "JetMoeParallelExperts", "InklingSharedExperts"}  # *Experts that no choice is handed to
SIGMOID = {"deepseek_v3", "glm4_moe", "llama4_text", "llama4"}  # where the config does not say


def find_routers(model: Any) -> list[Site]:
    """The routers of `model` in execution order of their layers. MoeInspectError where it has none."""
    declared = _declared_logits(model)
    sites = []
    for path, module in model.named_modules():
        kind = type(module).__name__
        adapter = ADAPTERS.get(kind)
        if adapter is None and (not kind.endswith("Experts") or kind in NOT_ROUTED):
            continue
        config = getattr(module, "config", None) or model.config.get_text_config()
        router = module if adapter is not None else _router_beside(model, path)
        index = adapter.logits_index if adapter is not None else declared.get(type(router))
        facts = (experts_of(module), scoring_of(config), shared_experts_of(config))
        sites.append(Site(module, path, layer_of(path), *facts, adapter, router, index))
    if not sites:
        raise MoeInspectError(f"{type(model).__name__} is a dense model: it has no router, so there is nothing to trace")
    return sorted(sites, key=lambda s: s.layer)


def layer_of(path: str) -> int:
    """The block index in a module path: "model.layers.3.mlp.experts" → 3."""
    found = re.search(r"(?:layers|blocks|h|block|layer)\.(\d+)\.", path + ".")
    if found is None:
        raise MoeInspectError(f"no layer number in the module path {path}: this model's layout is not known")
    return int(found.group(1))


def experts_of(module: torch.nn.Module) -> int:
    """E of a module: never the largest id seen, or dead experts would vanish. Under expert parallelism the module holds some of
    them, and the config tells how many there are."""
    if is_expert_parallel(module):
        config = module.config
        for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
            if isinstance(getattr(config, name, None), int):
                return getattr(config, name)
        raise MoeInspectError(f"{type(module).__name__} is expert-parallel, and its config does not say how many experts there are")
    for name in ("total_experts", "num_experts", "n_routed_experts"):
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    stacked = next((p for p in module.parameters() if p.dim() == 3), None)
    if stacked is None:
        raise MoeInspectError(f"cannot tell how many experts {type(module).__name__} has")
    return int(stacked.shape[0])


TOP_K = ("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")


def top_k_of(site: Site) -> int:
    """The k that a router declares. What it hands over shows only when it runs."""
    config = getattr(site.module, "config", None)
    for owner in (site.logits_module, site.module, config):
        for name in TOP_K:
            if isinstance(value := getattr(owner, name, None), int) and not isinstance(value, bool):
                return value
    raise MoeInspectError(f"cannot tell how many experts a token {site.path} chooses")


def is_expert_parallel(module: torch.nn.Module) -> bool:
    """Whether this module's experts are some of those its router chooses from: at its call ids are global, within its forward
    local ones or another rank's."""
    return getattr(module, "_is_expert_parallel", False)


def wants_expert_parallel(model: Any) -> bool:
    """Whether the model was loaded with its experts shared out over ranks."""
    distributed = getattr(model.config, "distributed_config", None)
    return bool(getattr(distributed, "enable_expert_parallel", False) or (getattr(distributed, "ep_size", None) or 1) > 1)


def scoring_of(config: Any) -> str:
    """How logits become scores."""
    stated = getattr(config, "scoring_func", None)
    return stated if isinstance(stated, str) else "sigmoid" if config.model_type in SIGMOID else "softmax"


def shared_experts_of(config: Any) -> int:
    for name in ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    return int(bool(getattr(config, "shared_expert_intermediate_size", 0)) or config.model_type == "llama4_text")


def choice_among(arguments: list[Any]) -> Choice | None:
    """The router's choice among the arguments of an experts call, by dtype and shape, never by position: the 2-D integer
    tensor and the floating-point tensor of its shape. None where there is none."""
    tensors = [a for a in arguments if hasattr(a, "dtype") and hasattr(a, "dim")][1:]  # the first holds the hidden states
    ids = [t for t in tensors if t.dim() == 2 and not t.dtype.is_floating_point and t.element_size() > 1]
    weights = [t for t in tensors if ids and t.dtype.is_floating_point and t.shape == ids[0].shape]
    return (ids[0], weights[0]) if ids and weights else None


def logits_among(output: Any, site: Site) -> torch.Tensor | None:
    """The router logits [T, E] in the output of `site.logits_module`: at the declared index, else the one tensor of E
    floating-point values a row (the order of the others has changed between releases). None where that is not one."""
    parts = output if isinstance(output, tuple | list) else (output,)
    if site.logits_index is not None:
        parts = parts[site.logits_index : site.logits_index + 1]
    found = [t for t in parts if hasattr(t, "dtype") and t.dtype.is_floating_point and t.shape[-1] == site.experts]
    return found[0].detach().reshape(-1, site.experts) if len(found) == 1 else None


def _declared_logits(model: Any) -> dict[type, int]:
    """Router class → index of the logits in its output, where the family declares it for `output_router_logits`."""
    declared: dict[type, int] = {}
    for module in model.modules():
        entries = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", [])
        for entry in entries if isinstance(entries, list | tuple) else [entries]:
            if hasattr(entry, "target_class"):
                declared[entry.target_class] = entry.index
    return declared


def _router_beside(model: Any, experts_path: str) -> torch.nn.Module | None:
    """The router module among the siblings of these experts."""
    parent = model.get_submodule(experts_path.rpartition(".")[0])
    return next((m for m in parent.children() if re.search(r"(Router|Gate|Gating)$", type(m).__name__)), None)
