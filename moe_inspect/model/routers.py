"""The routers of a model, and the calls in which their choice can be read. What differs between
families is in `model/families.py`.

T tokens, K slots, E experts.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from moe_inspect.errors import MoeInspectError
from moe_inspect.model import families
from moe_inspect.model.families import (
    CALLED_CLASS,
    LAYER,
    NOT_ROUTED,
    ROUTER_CLASS,
    TOWER,
    Adapter,
    stated_size,
)

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from moe_inspect.model.choices import Called
    from moe_inspect.model.custom.choice import ChoiceReader


@dataclass(frozen=True)
class Site:
    """Where one router's choice can be seen. `adapter` is None where the choice is an argument of
    `module`'s call, else it reads `module`'s output. `experts`: E. `logits_module`: the module
    whose output holds the router logits, if known, at `logits_index`, or (None) where the last
    dimension is E."""

    module: Module
    path: str
    layer: int
    experts: int
    scoring: str
    shared_experts: int
    adapter: Adapter | None = None
    logits_module: Module | None = None
    logits_index: int | None = None
    stack: str = ""  # "encoder" or "decoder" of a model that has both
    told: ChoiceReader | None = None  # checks what a user's code says: a RouterSpec or a probe
    # of a RouterSpec: the router logits of a call, and how its rows are ordered
    logits_of: Callable[..., Tensor] | None = None
    order: str = "bs"
    rows: Callable[[Called, int, int], Called] | None = None

    @property
    def name(self) -> str:
        """Its path below the model's first module, which is the same in every block."""
        return self.path.split(".", 1)[-1]

    @property
    def drops(self) -> bool:
        """Whether what goes to no expert was dropped by the capacity of one."""
        if self.told is not None:
            return self.told.drops
        return self.adapter is not None and self.adapter.drops(self.logits_module)

    @property
    def dropped(self) -> Callable[[Called, Called], Tensor] | None:
        """`Adapter.dropped`, where there is a router to ask, and 16 bits hold its ids."""
        if self.adapter is None or self.logits_module is None or self.experts >= 2**15:
            return None
        return self.adapter.dropped

    @property
    def ids_below(self) -> int:
        """Ids are below this: E, or 2E where it is known which expert dropped a choice (id + E)."""
        if self.told is not None:
            return self.told.below
        return self.experts * (1 if self.dropped is None else 2)

    @property
    def method(self) -> str:
        """The method of `module` whose arguments hold the choice; "" where its call does."""
        name = self.adapter.method if self.adapter is not None else ""
        return name if hasattr(self.module, name) and not is_expert_parallel(self.module) else ""

    @property
    def stack_path(self) -> str:
        """The module whose calls feed this router its tokens: the model itself (""), or a stack."""
        parts = self.path.split(".")
        return ".".join(parts[: parts.index(self.stack) + 1]) if self.stack else ""


def called_experts(model: Module, known: Collection[int] = ()) -> list[Site]:
    """The routers whose experts module is called with their choice, or that an adapter reads, in
    execution order: those of transformers. Not in the layers `known`."""
    declared, stacks = _declared_logits(model), stacks_in(model)
    sites = list[Site]()
    for path, module in model.named_modules():
        adapter = _adapter_of(module)
        routes = adapter is not None or _is_called_with_choice(module)
        if TOWER.search(path) or not routes or (known and layer_of(path) in known):
            continue
        config = getattr(module, "config", None) or text_config(model)
        count = adapter.experts if adapter is not None else None
        E = count(module) if count is not None else experts_of(module, config)
        block = model.get_submodule(block_of(path))
        router = _router_module(module, block, adapter)
        logits_module, logits_index = _logits_source(router, block, adapter, E, declared)
        scoring = getattr(config, "scoring_func", None)
        if not isinstance(scoring, str):
            scoring = _scoring_in_code(type(_adapted(router) or block))
        site = Site(
            module,
            path,
            layer_of(path),
            E,
            scoring,
            _shared_experts(config, model, path),
            adapter,
            logits_module,
            logits_index,
            stack=next((part for part in path.split(".") if part in stacks), ""),
        )
        sites.append(site)
    # the encoder runs before the decoder, and a block's attention before its MLP
    return sorted(sites, key=lambda s: (s.stack == "decoder", s.layer, "attention" not in s.path))


def _adapter_of(module: Module) -> Adapter | None:
    """What reads the choice of this module, if its family needs an adapter."""
    adapter = families.ADAPTERS.get(type(module).__name__)
    return adapter if adapter is not None and adapter.applies(module) else None


def _is_called_with_choice(module: Module) -> bool:
    """Whether this module holds experts that are called with the router's choice."""
    kind = type(module).__name__
    return bool(CALLED_CLASS.search(kind) and kind not in NOT_ROUTED and _takes_choice(module))


def _router_module(module: Module, block: Module, adapter: Adapter | None) -> Module | None:
    """The router of these experts; None if their block makes the choice itself."""
    if adapter is not None and not adapter.at_call:
        return module
    return next((m for m in block.children() if ROUTER_CLASS.search(_kind(m))), None)


def _logits_source(
    router: Module | None,
    block: Module,
    adapter: Adapter | None,
    E: int,
    declared: dict[type, int],
) -> tuple[Module | None, int | None]:
    """The module whose output holds the router logits, if any, and their index in that output."""
    if adapter is not None and adapter.block_logits is not None:
        return block, adapter.block_logits
    if router is None:
        return _linear_in(block, E), None
    if adapter is None or adapter.at_call:
        return router, declared.get(type(_adapted(router)))
    return (None if adapter.logits_index is None else router), adapter.logits_index


def _kind(module: Module) -> str:
    return type(_adapted(module)).__name__


def stacks_in(model: Module) -> set[str]:
    """ "encoder" and "decoder" where the model has both."""
    paths = (path for path, _ in model.named_modules() if not TOWER.search(path))
    names = {part for path in paths for part in path.split(".")}
    return families.STACKS if names >= families.STACKS else set()


def text_config(model: object) -> Called:
    """The config of a transformers model's language model, else the model's own, if any."""
    config: Called = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def in_layers(sites: list[Site], layers: Iterable[int] | None) -> list[Site]:
    """The sites in these layers; None: all. MoeInspectError where a layer has none."""
    known = [site.layer for site in sites]
    wanted = set(known if layers is None else layers)
    if unknown := sorted(wanted.difference(known)):
        raise MoeInspectError(
            f"no router in layer {unknown[0]}: the MoE layers are {', '.join(map(str, known))}"
        )
    return [site for site in sites if site.layer in wanted]


def layer_of(path: str) -> int:
    """The block index in a module path: "model.layers.3.mlp.experts" → 3."""
    found = LAYER.search(path + ".")
    if found is None:
        said = f"no layer number in the module path {path}"
        raise MoeInspectError(f"{said}: this model's structure is not supported")
    return int(found.group(1))


def layer_path(path: str) -> str | None:
    """The path of a module's block: "model.layers.3.mlp.experts" → "model.layers.3"."""
    found = LAYER.search(path + ".")
    return path[: found.end() - 1] if found is not None else None


def experts_of(module: Module, config: object) -> int:
    """E of a module, as stated; under expert parallelism, where it holds some, by the config."""
    kind = type(module).__name__
    if is_expert_parallel(module):
        if (experts := stated_size([config], families.EXPERTS)) is None:
            raise MoeInspectError(
                f"{kind} is expert-parallel, and its config does not say how many experts there are"
            )
        return experts
    names = ("total_experts", "num_experts", "n_routed_experts")
    if (experts := stated_size([module], names)) is not None:
        return experts
    if stacked := [p for p in module.parameters() if p.dim() == 3]:
        return len(stacked[0])
    lists = [m for m in module.modules() if type(m).__name__ == "ModuleList"]
    if len(lists) == 1:
        return len(list(lists[0].children()))
    raise MoeInspectError(
        f"cannot tell how many experts {kind} has: give it an attribute num_experts, or give "
        "routers=[…] a RouterSpec of its router ([] for probes alone)"
    )


def top_k_of(site: Site, model: Module) -> int:
    """The k that a router, its block or the config declares, which a pass may contradict."""
    if site.adapter is not None and site.adapter.top_k is not None:
        return site.adapter.top_k
    block, config = model.get_submodule(block_of(site.path)), getattr(site.module, "config", None)
    owners = site.logits_module, site.module, block, config, text_config(model)
    if (top_k := stated_size(owners, ("top_k", *families.TOP_K))) is not None:
        return top_k
    raise MoeInspectError(
        f"cannot tell the top-k of {site.path}: no module and no config states it"
    )


def is_of_transformers(module: object) -> bool:
    """Whether its code is a release of transformers, and not loaded with the model."""
    return type(module).__module__.startswith("transformers.")


def _takes_choice(module: Module) -> bool:
    """Whether experts can be called with ids and weights: others may give a block their name."""
    parameters = inspect.signature(module.forward).parameters.values()
    any_number = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return is_of_transformers(module) or len(parameters) > 2 or any_number


def is_expert_parallel(module: Module) -> bool:
    """Whether this module holds only some experts. It is called with global ids; its forward sees
    local ones, or sentinels for other ranks' experts."""
    return getattr(module, "_is_expert_parallel", False)


def wants_expert_parallel(model: object) -> bool:
    """Whether the model was loaded with its experts distributed over ranks."""
    distributed = getattr(getattr(model, "config", None), "distributed_config", None)
    several = (getattr(distributed, "ep_size", None) or 1) > 1
    return several or bool(getattr(distributed, "enable_expert_parallel", False))


@cache
def _scoring_in_code(kind: type) -> str:
    """Of the router logits, by the source code of a router (or of its block)."""
    try:
        code = inspect.getsource(kind)
    except (OSError, TypeError):
        return ""
    return next((name for name in ("sparsemixer", "sigmoid", "softmax") if name in code), "softmax")


# names of the bias that is added to a router's scores for the selection alone
SELECTION_BIAS = (
    *("e_score_correction_bias", "score_correction_bias", "score_bias"),
    *("expert_bias", "expert_bias_E", "expert_biases"),
)


def selection_bias(site: Site, model: Module) -> Tensor | None:
    """The bias that is added to the scores of a router for the selection alone, [E]."""
    if site.module is model:  # of a probe
        return None
    block = model.get_submodule(site.path.rpartition(".")[0])
    owners = [m for m in (site.logits_module, site.module, block) if m is not None]
    tensors = (of for m in owners for of in (*m.named_parameters(), *m.named_buffers()))
    names = ((name.rpartition(".")[2], tensor) for name, tensor in tensors)
    return next((t for n, t in names if n in SELECTION_BIAS and t.numel() == site.experts), None)


def _shared_experts(config: object, model: Module, experts_path: str) -> int:
    """How many experts every token goes to: as the config states, or one where there is one."""
    block = block_of(experts_path)
    # in some families the shared expert is a sibling of the block
    owners = map(model.get_submodule, (block, block.rpartition(".")[0]))
    if not any("shared" in name for owner in owners for name, _ in owner.named_children()):
        return 0
    stated = (stated_size([config], [name]) or 0 for name in families.SHARED_EXPERTS)
    return next((n for n in stated if n > 0), 1)


def logits_among(output: Called, site: Site) -> Tensor | None:
    """The router logits [T, E] in the output of `site.logits_module`: at the declared index, else
    the only floating-point tensor whose last dimension is E. None where there is not one."""
    parts = output if isinstance(output, tuple | list) else (output,)
    if site.logits_index is not None:
        parts = parts[site.logits_index : site.logits_index + 1]
    found = [t for t in parts if hasattr(t, "dtype") and t.dtype.is_floating_point]
    found = [t for t in found if t.shape[-1] == site.experts]
    return found[0].reshape(-1, site.experts) if len(found) == 1 else None


def _declared_logits(model: Module) -> dict[type, int]:
    """Router class → index of its logits, where `output_router_logits` declares it."""
    declared: dict[type, int] = {}
    for module in model.modules():
        entries = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", [])
        for entry in entries if isinstance(entries, list | tuple) else [entries]:
            if hasattr(entry, "target_class"):
                declared[entry.target_class] = entry.index
    return declared


def _linear_in(block: Module, E: int) -> Module | None:
    """The matrix by whose logits alone a block of E experts chooses, without a selection bias."""
    if any(name in SELECTION_BIAS for name, _ in block.named_buffers(recurse=False)):
        return None
    for name, module in block.named_children():
        linear = _adapted(module)
        is_linear = type(linear).__name__ == "Linear" and getattr(linear, "out_features", 0) == E
        if is_linear and name in ("router", "gate"):
            return module
    return None


def block_of(experts_path: str) -> str:
    """The path of the block of these experts, also where they are a `base_layer` of PEFT's."""
    return re.sub(r"(\.base_layer)+$", "", experts_path).rpartition(".")[0]


def _adapted(module: Module | None) -> Module | None:
    """What a module of PEFT adapts, or `module`."""
    while (inner := getattr(module, "base_layer", None)) is not None:
        module = inner
    return module
