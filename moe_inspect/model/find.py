"""Finds every router of a model: those that `RouterSpec`s describe, and those of transformers; and,
where none is known, the modules that look like one.

T rows a router sees, K slots, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_inspect.errors import MoeInspectError
from moe_inspect.model.custom.choice import ChoiceReader
from moe_inspect.model.custom.spec import SPECS, RouterSpec, registered
from moe_inspect.model.families import EXPERTS, TOP_K, TOWER, Adapter, stated_size
from moe_inspect.model.routers import (
    Site,
    called_experts,
    in_layers,
    is_of_transformers,
    layer_of,
    layer_path,
)
from moe_inspect.text import and_more

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

# of a module that chooses experts: the last name in its path, or its class
ROUTER_NAME = re.compile(r"^(?:.*_)?(?:router|gate|gating|wg)$")
ROUTER_CLASS = re.compile(r"(?:Router|Gate|Gating)$")
ROUTER_WEIGHT = re.compile(r"^(?:.*_)?(?:router|gate|gating|wg)(?:_w|_weights?|_kernel)?$")
EXPERTS_CLASS = re.compile(r"Expert|MoE|MOE|Mixture|Switch")
EXPERTS_PATH = re.compile(r"expert|moe|mixture", re.IGNORECASE)
BLOCKS = ("layers", "blocks", "h")  # of a model
NUMBER = re.compile(r"\.\d+(?=\.|$)")
MOST_SHOWN = 3
TIMES = " × "  # between the length of a list and the class in it
CONTAINERS = ("ModuleList", "ModuleDict")  # hold modules, and have no forward

# of a router module or its config; `num_local_experts` is what a rank holds in some frameworks
EXPERTS_OF_MODULE = (
    *(name for name in EXPERTS if name != "num_local_experts"),
    "num_moe_experts",
    "n_experts",
    "n_expert",
)
TOP_K_OF_MODULE = ("top_k", "topk", "moe_router_topk", "k", *TOP_K)
# what a module that wraps another inserts into the paths below it
WRAPPERS = re.compile(r"(?:^|\.)(?:_checkpoint_wrapped_module|_orig_mod|_fsdp_wrapped_module)")


def find_routers(model: Any, specs: Sequence[RouterSpec] | None = None) -> list[Site]:
    """The routers of `model` in execution order of their layers. MoeInspectError where it has
    none."""
    sites = routers_in(model, specs)
    if not sites:
        raise no_routers(model)
    return sites


def routers_in(model: Any, specs: Sequence[RouterSpec] | None = None) -> list[Site]:
    """Those of `specs`, if given; else those of registered classes, and in layers that have none of
    these, those of transformers. May be none."""
    if specs is not None:
        return sites_given(model, specs)
    own = sites_registered(model, [*registered(), *SPECS])
    sites = [*own, *called_experts(model, {site.layer for site in own})]
    return sorted(sites, key=lambda site: site.layer) if own else sites


def recordable(
    model: Any,
    specs: Sequence[RouterSpec] | None,
    layers: Iterable[int] | None,
    logits: bool = False,
) -> list[Site]:
    """The routers of `model` in these layers (None: all). None at all where only probes in the
    model's own code can show them. MoeInspectError where there can be no probes either, or where
    `logits` are to be recorded and one of the routers does not show them."""
    sites = routers_in(model, specs)
    if sites:
        sites = in_layers(sites, layers)
        if logits and any(site.logits_module is None for site in sites):
            raise MoeInspectError(
                f"{type(model).__name__} does not expose its router logits: trace without --logits"
            )
        return sites
    if specs is None and is_of_transformers(model):
        raise no_routers(model)
    return []


def no_routers(model: Any, searched: bool = False, to_change: bool = False) -> MoeInspectError:
    """Why nothing can be recorded, and what would help. `searched`: for calls of topk, in vain.
    `to_change`: by an intervention."""
    name = type(model).__name__
    like = candidates(model)
    if is_of_transformers(model) and not like:
        return MoeInspectError(f"{name} is a dense model: it has no routers to trace")
    E = like.experts if like and like.experts else "E"
    probe = f"call moe_inspect.probe(ids, weights, layer=i, experts={E}) in its forward"
    spec = f"moe_inspect.RouterSpec(module={like.pattern if like else 'path'!r}, choice=f)"
    given = f"{probe}, or give routers=[{spec}] (trace --routers)"
    if searched:
        return MoeInspectError(
            f"no block of {name} called torch.topk to choose experts in this forward pass: {given}"
        )
    if not like:
        return MoeInspectError(
            f"{name} is a dense model: it has no routers to trace, judging by the names of its "
            f"modules and parameters (if it has: {probe})"
        )
    given += "; moe_inspect.record(discover=True) looks for it"
    if to_change and not is_of_transformers(model):
        given = f"give routers=[{spec}] (a probe shows a choice, and cannot replace it)"
    return MoeInspectError(f"no known router was found in {name}, but {like.described()}: {given}")


# --- what looks like a router


@dataclass(frozen=True)
class Candidates:
    """`routers`, `experts_lists`: patterns of module paths, with what is there. `experts`: E, where
    the lists or a router tell."""

    routers: dict[str, str]
    experts_lists: dict[str, str]
    experts: int | None

    @property
    def pattern(self) -> str:
        if self.routers:
            return next(iter(self.routers))
        path, kind = next(iter(self.experts_lists.items()))
        # a list is not called in a forward pass: what holds it is
        return path.rpartition(".")[0] if TIMES in kind else path

    def described(self) -> str:
        said = {"may be one": self.routers, "may be its experts": self.experts_lists}
        listed = {
            what: and_more([f"{path} ({kind})" for path, kind in found.items()], MOST_SHOWN)
            for what, found in said.items()
        }
        return " and ".join(f"{names} {what}" for what, names in listed.items() if names)


def candidates(model: Any) -> Candidates | None:
    """None where nothing in the model looks like a router or like experts."""
    import torch

    routers: dict[str, str] = {}
    lists: dict[str, str] = {}
    sizes: list[int] = []
    kinds = {path: type(module).__name__ for path, module in model.named_modules()}
    for path, module in model.named_modules():
        last, pattern, kind = path.split(".")[-1], NUMBER.sub(".*", path), kinds[path]
        of_experts = bool(
            EXPERTS_PATH.search(path) or EXPERTS_CLASS.search(kinds[path.rpartition(".")[0]])
        )
        if isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict):
            classes = {type(child).__name__ for child in module.children()}
            if of_experts and last not in BLOCKS and len(module) > 1 and len(classes) == 1:
                lists[pattern] = f"{len(module)}{TIMES}{classes.pop()}"
                sizes.append(len(module))
        elif ROUTER_NAME.match(last) or ROUTER_CLASS.search(kind):
            routers[pattern] = kind
        elif not type(module).__module__.startswith("torch.") and "shared" not in path.lower():
            own = dict(module.named_parameters(recurse=False))
            stacked = [p for p in own.values() if p.dim() == 3]
            weights = [n for n, p in own.items() if p.dim() == 2 and ROUTER_WEIGHT.match(n)]
            if stacked and (of_experts or EXPERTS_CLASS.search(kind) or weights):
                lists[pattern] = f"{kind} of {stacked[0].shape[0]}"
                sizes.append(int(stacked[0].shape[0]))
                if weights:
                    routers[pattern] = f"{kind}, with {weights[0]}"
    # a gate without experts beside it may be one of an attention
    beside = {path.rpartition(".")[0] for path in lists}
    routers = {
        path: kind
        for path, kind in routers.items()
        if path.rpartition(".")[0] in beside or "router" in path.lower() or kind != "Linear"
    }
    if not routers and not lists:
        return None
    return Candidates(routers, lists, sizes[0] if len(set(sizes)) == 1 else None)


# --- of specs


def sites_given(model: Any, specs: Sequence[RouterSpec]) -> list[Site]:
    """The sites of the specs that a caller gave. MoeInspectError where one matches no module, or
    two the same."""
    found: dict[str, Site] = {}
    for spec in checked(specs):
        matched = [(path, m) for path, m in model.named_modules() if _matches(spec, path, m)]
        if not matched:
            last = spec.module.split(".")[-1] if isinstance(spec.module, str) else None
            paths = [path for path, _ in model.named_modules() if path]
            near = [path for path in paths if path.split(".")[-1] == last]
            raise MoeInspectError(
                f"RouterSpec(module={named(spec)}) matches no module of {type(model).__name__}"
                + (f"; modules called {last}: {', '.join(near[:3])}" if near else "")
            )
        for path, module in matched:
            if path in found:
                raise MoeInspectError(f"two RouterSpecs match {path}")
            found[path] = site_of(spec, path, module, model)
    return _in_order([*found.values()])


def checked(specs: Sequence[Any]) -> Sequence[RouterSpec]:
    """MoeInspectError where one is no RouterSpec."""
    if wrong := [type(s).__name__ for s in specs if not isinstance(s, RouterSpec)]:
        raise MoeInspectError(f"routers takes RouterSpecs, not {wrong[0]}")
    return specs


def sites_registered(model: Any, specs: Sequence[RouterSpec]) -> list[Site]:
    """The sites of modules whose class is registered: the first spec that matches counts. The
    towers of a multimodal model see no text."""
    found = []
    for path, module in model.named_modules():
        if not TOWER.search(path):
            spec = next((s for s in specs if _matches(s, path, module)), None)
            found += [site_of(spec, path, module, model)] if spec is not None else []
    return _in_order(found)


def _in_order(sites: list[Site]) -> list[Site]:
    """By layer. MoeInspectError where two have the same layer and name, as those of an encoder and
    a decoder do: they would be told apart by nothing, and may see different tokens."""
    first: dict[tuple[int, str], Site] = {}
    for site in sites:
        if (other := first.setdefault((site.layer, site.name), site)) is not site:
            raise MoeInspectError(
                f"{other.path} and {site.path} are both {site.name} of layer {site.layer}: record "
                "one of them at a time, RouterSpec(module=…), and say by inputs=… what it "
                "is fed"
            )
    return sorted(sites, key=lambda site: site.layer)


def site_of(spec: RouterSpec, path: str, module: Module, model: Any) -> Site:
    kind, beside = type(module).__name__, path
    path = path or kind  # of the model itself
    if kind in CONTAINERS:
        raise MoeInspectError(
            f"RouterSpec(module={named(spec)}) matches {path}, a {kind}, which is never called: "
            f"name the module that routes, such as {path.rpartition('.')[0]}"
        )
    owners = module, getattr(module, "config", None)
    experts = _first(
        _of(spec.experts, module),
        stated_size(owners, EXPERTS_OF_MODULE),
        getattr(module, "out_features", None),  # of a linear layer that makes the logits
    )
    if not experts or int(experts) < 1:
        raise MoeInspectError(
            f"{path} ({kind}) does not say how many experts it chooses from: give "
            "RouterSpec(experts=…)"
        )
    E, top_k = int(experts), _first(_of(spec.top_k, module), stated_size(owners, TOP_K_OF_MODULE))
    order, logits_of = spec.order if spec.rows is None else "", spec.logits
    reader = ChoiceReader(path, E, top_k, "give RouterSpec(top_k=…)", order, spec.drops)

    def choice(
        module: Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> tuple[Tensor, Tensor] | None:
        """`spec.choice` with its result as ids and weights [T, K]."""
        reader.check_input(args, kwargs)
        found = spec.choice(module, args, kwargs, output)
        return None if found is None else reader.choice(found)

    def logits(*call: Any) -> Tensor:
        """`spec.logits` with its result as [T, E]."""
        assert logits_of is not None
        return reader.logits(logits_of(*call))

    return Site(
        module,
        path,
        _layer(spec, path, module),
        E,
        _of(spec.scoring, module),
        _shared_experts(spec, beside, module, model),
        Adapter(
            choice,
            at_call=spec.before,
            experts=lambda module: E,
            top_k=top_k,
            note=spec.note,
            replace=spec.replace,
        ),
        logits_module=module if logits_of is not None else None,
        told=reader,
        logits_of=logits if logits_of is not None else None,
        order=spec.order,
        rows=spec.rows,
    )


def lists_in_blocks(model: Module) -> dict[str, list[Module]]:
    """Path → modules of each list of modules of one class in a block of the model: they may be the
    experts of a router."""
    from torch.nn import ModuleDict, ModuleList

    found: dict[str, list[Module]] = {}
    for path, module in model.named_modules():
        if isinstance(module, ModuleList | ModuleDict) and layer_path(path) is not None:
            children = list(module.children())
            if len(children) > 1 and len(set(map(type, children))) == 1:
                found[path] = children
    return found


def states_experts(model: Module, path: str, E: int) -> bool:
    """Whether something in the block of the module at `path` has E experts: a list of modules,
    stacked weights, a router's weight, or a number under a usual name."""

    def states(module: Module) -> bool:
        owners = module, getattr(module, "config", None)
        return any(stated_size(owners, (size,)) == E for size in EXPERTS_OF_MODULE)

    block = layer_path(path)
    assert block is not None
    if any(
        len(modules) == E and of.startswith(block + ".")
        for of, modules in lists_in_blocks(model).items()
    ):
        return True
    for name, module in model.get_submodule(block).named_modules(prefix=block):
        if states(module):
            return True
        is_router = ROUTER_NAME.match(name.split(".")[-1])
        for of, weight in module.named_parameters(recurse=False):
            if weight.dim() > 2 and weight.shape[0] == E:
                return True
            if weight.dim() == 2 and E in weight.shape and (is_router or ROUTER_WEIGHT.match(of)):
                return True
    return states(model)


def _matches(spec: RouterSpec, path: str, module: Module) -> bool:
    wanted = spec.module
    if isinstance(wanted, type):
        return isinstance(module, wanted)
    if not isinstance(wanted, str):
        return module is wanted
    names = {
        n for c in type(module).__mro__ for n in (c.__name__, f"{c.__module__}.{c.__qualname__}")
    }
    if wanted in names:
        return True
    return not _wraps(module) and bool(_pattern(wanted).fullmatch(WRAPPERS.sub("", path)))


def _wraps(module: Module) -> bool:
    return any(WRAPPERS.fullmatch(name) for name, _ in module.named_children())


def _pattern(glob: str) -> re.Pattern[str]:
    """Of module paths: "*" is anything within one name, "**." any number of names."""
    escaped = re.escape(glob).replace(r"\*\*\.", r"(?:.*\.)?")
    return re.compile(escaped.replace(r"\*", r"[^.]*"))


def _layer(spec: RouterSpec, path: str, module: Module) -> int:
    if callable(spec.layer):
        return spec.layer(path, module)
    if spec.layer is not None:
        return spec.layer
    try:
        return layer_of(path)
    except MoeInspectError:
        raise MoeInspectError(
            f"no layer number in the module path {path}: give RouterSpec(layer=…), a number or a "
            "function of the path and the module"
        ) from None


def _shared_experts(spec: RouterSpec, path: str, module: Module, model: Any) -> int:
    if (stated := _of(spec.shared_experts, module)) is not None:
        return int(stated)
    while True:
        path = path.rpartition(".")[0]
        block = model.get_submodule(path)
        if not path or not _wraps(block):
            return int(any("shared" in name for name, _ in block.named_children()))


def _of(value: Any, module: Module) -> Any:
    return value(module) if callable(value) else value


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def named(spec: RouterSpec) -> str:
    """The modules of a spec, for people."""
    if isinstance(spec.module, str):
        return repr(spec.module)
    return spec.module.__name__ if isinstance(spec.module, type) else type(spec.module).__name__
