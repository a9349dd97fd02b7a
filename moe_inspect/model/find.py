"""Finds every router of a model: those that `RouterSpec`s describe, and those of transformers; and,
where none is known, the modules that look like one.

T rows a router sees, K slots, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch.nn import Module, ModuleDict, ModuleList

from moe_inspect.errors import MoeInspectError
from moe_inspect.model import routers
from moe_inspect.model.choices import Args, Called, Choice, Kwargs
from moe_inspect.model.custom.choice import ChoiceReader
from moe_inspect.model.custom.spec import SPECS, RouterSpec, registered
from moe_inspect.model.families import EXPERTS, ROUTER_CLASS, TOP_K, TOWER, Adapter, stated_size
from moe_inspect.model.routers import Site
from moe_inspect.text import join_first

# of a module that chooses experts: the last name in its path, or its class
ROUTER_NAME = re.compile(r"^(?:.*_)?(?:router|gate|gating|wg)$")
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
    *("num_moe_experts", "n_experts", "n_expert"),
)
TOP_K_OF_MODULE = ("top_k", "topk", "moe_router_topk", "k", *TOP_K)
# what a module that wraps another inserts into the paths below it
WRAPPERS = re.compile(r"(?:^|\.)(?:_checkpoint_wrapped_module|_orig_mod|_fsdp_wrapped_module)")


def find_routers(model: Module, specs: Sequence[RouterSpec] | None = None) -> list[Site]:
    """The routers of `model` in execution order of their layers. MoeInspectError for none."""
    if sites := routers_in(model, specs):
        return sites
    raise no_routers(model)


def routers_in(model: Module, specs: Sequence[RouterSpec] | None = None) -> list[Site]:
    """Those of `specs`, if given; else those of registered classes, and of transformers in layers
    without one. May be none."""
    if specs is not None:
        return sites_given(model, specs)
    known, own = [*registered(), *SPECS], list[Site]()
    for path, module in model.named_modules():
        spec = next((s for s in known if _matches(s, path, module)), None)
        if spec is not None and not TOWER.search(path):  # the towers see no text
            own.append(_site_of(spec, path, module, model))
    own = _in_order(own)
    sites = [*own, *routers.called_experts(model, {site.layer for site in own})]
    return sorted(sites, key=lambda site: site.layer) if own else sites


def recordable(
    model: Module,
    specs: Sequence[RouterSpec] | None,
    layers: Iterable[int] | None,
    logits: bool = False,
) -> list[Site]:
    """The routers of `model` in these layers (None: all); [] where only probes in the model's own
    code can show them. MoeInspectError where these cannot, or a router hides its `logits`."""
    sites = routers_in(model, specs)
    if not sites:
        if specs is None and routers.is_of_transformers(model):
            raise no_routers(model)
        return []
    sites = routers.in_layers(sites, layers)
    if logits and any(site.logits_module is None for site in sites):
        hides = f"{type(model).__name__} does not expose its router logits"
        raise MoeInspectError(f"{hides}: trace without --logits")
    return sites


def no_routers(model: Module, to_change: bool = False) -> MoeInspectError:
    """Why there is nothing to record (`to_change`: or change)."""
    name, like = type(model).__name__, candidates(model)
    dense = f"{name} is a dense model: it has no routers to trace"
    if routers.is_of_transformers(model) and not like:
        return MoeInspectError(dense)
    E = like.experts if like and like.experts else "E"
    probe = f"add one line to its forward: moe_inspect.probe(ids, weights, layer=i, experts={E})"
    spec = f"moe_inspect.RouterSpec(module={like.pattern if like else 'path'!r}, choice=f)"
    given = f"{probe}, or give routers=[{spec}]"
    if not like:
        judged = "judging by the names of its modules and parameters"
        return MoeInspectError(f"{dense}, {judged} (if it has: {probe})")
    if to_change and not routers.is_of_transformers(model):
        given = f"give routers=[{spec}] (a probe shows a choice, and cannot replace it)"
    return MoeInspectError(f"no known router was found in {name}, but {like.described()}: {given}")


# --- what looks like a router


@dataclass(frozen=True)
class Candidates:
    """`routers`, `experts_lists`: pattern of paths → what is there. `experts`: E, if known."""

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
            what: join_first([f"{path} ({kind})" for path, kind in found.items()], MOST_SHOWN)
            for what, found in said.items()
        }
        return " and ".join(f"{names} {what}" for what, names in listed.items() if names)


class ExpertsLike(NamedTuple):
    """What looks like the experts of a layer. `gate`: the parameter that may be their router."""

    description: str
    experts: int
    gate: str = ""


def candidates(model: Module) -> Candidates | None:
    """Modules that look like a router or like experts; None if there are none."""
    routers, lists, sizes = dict[str, str](), dict[str, str](), set[int]()
    modules = dict(model.named_modules())
    for path, module in modules.items():
        pattern, kind = NUMBER.sub(".*", path), type(module).__name__
        owner = modules[_parent(path)]
        if _is_named_as_router(path, module):
            routers[pattern] = kind
        elif (like := _experts_like(path, module, owner)) is not None:
            lists[pattern] = like.description
            sizes.add(like.experts)
            if like.gate:
                routers[pattern] = f"{kind}, with {like.gate}"
    # a gate without experts next to it may be part of an attention
    with_experts = {_parent(path) for path in lists}
    routers = {
        path: kind
        for path, kind in routers.items()
        if kind != "Linear" or _parent(path) in with_experts or "router" in path.lower()
    }
    if not routers and not lists:
        return None
    return Candidates(routers, lists, sizes.pop() if len(sizes) == 1 else None)


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _is_named_as_router(path: str, module: Module) -> bool:
    """Whether the name or the class of a module that is called is usual for a router."""
    if isinstance(module, ModuleList | ModuleDict):
        return False
    name, kind = path.split(".")[-1], type(module).__name__
    return bool(ROUTER_NAME.match(name) or ROUTER_CLASS.search(kind))


def _experts_like(path: str, module: Module, owner: Module) -> ExpertsLike | None:
    """The experts that a module seems to hold: as a list of modules, or stacked in a parameter."""
    in_experts = EXPERTS_PATH.search(path) or EXPERTS_CLASS.search(type(owner).__name__)
    kind = type(module).__name__
    if isinstance(module, ModuleList | ModuleDict):
        E, classes = len(module), {type(child).__name__ for child in module.children()}
        are_experts = in_experts and path.split(".")[-1] not in BLOCKS and E > 1
        if not are_experts or len(classes) != 1:
            return None
        return ExpertsLike(f"{E}{TIMES}{classes.pop()}", E)
    if type(module).__module__.startswith("torch.") or "shared" in path.lower():
        return None
    parameters = dict(module.named_parameters(recurse=False))
    stacked = [len(p) for p in parameters.values() if p.dim() == 3]
    gates = [n for n, p in parameters.items() if p.dim() == 2 and ROUTER_WEIGHT.match(n)]
    if not stacked or not (in_experts or EXPERTS_CLASS.search(kind) or gates):
        return None
    return ExpertsLike(f"{kind} of {stacked[0]}", stacked[0], *gates[:1])


# --- of specs


def sites_given(model: Module, specs: Sequence[RouterSpec]) -> list[Site]:
    """The sites of given specs. MoeInspectError where one matches no module, or two the same."""
    found, modules = dict[str, Site](), dict(model.named_modules())
    for spec in checked(specs):
        matched = {path: m for path, m in modules.items() if _matches(spec, path, m)}
        if not matched:
            last = spec.module.split(".")[-1] if isinstance(spec.module, str) else None
            near = [path for path in modules if path and path.split(".")[-1] == last]
            raise MoeInspectError(
                f"RouterSpec(module={named(spec)}) matches no module of {type(model).__name__}"
                + (f"; modules called {last}: {', '.join(near[:3])}" if near else "")
            )
        if twice := found.keys() & matched:
            raise MoeInspectError(f"two RouterSpecs match {min(twice, key=[*matched].index)}")
        found |= {path: _site_of(spec, path, m, model) for path, m in matched.items()}
    return _in_order([*found.values()])


def checked(specs: Sequence[RouterSpec]) -> Sequence[RouterSpec]:
    """MoeInspectError where one is no RouterSpec."""
    if wrong := [type(s).__name__ for s in specs if not isinstance(s, RouterSpec)]:
        raise MoeInspectError(f"routers takes RouterSpecs, not {wrong[0]}")
    return specs


def _in_order(sites: list[Site]) -> list[Site]:
    """By layer. MoeInspectError where two have the same layer and name (of encoder and decoder)."""
    first: dict[tuple[int, str], Site] = {}
    for site in sites:
        if (other := first.setdefault((site.layer, site.name), site)) is not site:
            raise MoeInspectError(
                f"{other.path} and {site.path} are both {site.name} of layer {site.layer}: record "
                "one of them at a time, RouterSpec(module=…), and say by inputs=… what it "
                "is fed"
            )
    return sorted(sites, key=lambda site: site.layer)


def _site_of(spec: RouterSpec, path: str, module: Module, model: Module) -> Site:
    kind, beside = type(module).__name__, path
    path = path or kind  # of the model itself
    if kind in CONTAINERS:
        raise MoeInspectError(
            f"RouterSpec(module={named(spec)}) matches {path}, a {kind}, which is never called: "
            f"name the module that routes, such as {path.rpartition('.')[0]}"
        )
    owners = module, getattr(module, "config", None)

    def stated(value: Called, *otherwise: object) -> Called:
        """What a field of the spec says of this module, else the first that is known otherwise."""
        values = value(module) if callable(value) else value, *otherwise
        return next((v for v in values if v is not None), None)

    width = getattr(module, "out_features", None)  # of a linear layer that makes the logits
    experts = stated(spec.experts, stated_size(owners, EXPERTS_OF_MODULE), width)
    if not experts or int(experts) < 1:
        raise MoeInspectError(
            f"{path} ({kind}) does not say how many experts it chooses from: give "
            "RouterSpec(experts=…)"
        )
    E, top_k = int(experts), stated(spec.top_k, stated_size(owners, TOP_K_OF_MODULE))
    order = spec.order if spec.rows is None else ""
    logits_of, replace, drops = spec.logits, spec.replace, bool(stated(spec.drops))
    reader = ChoiceReader(path, E, top_k, "give RouterSpec(top_k=…)", order, drops)

    def choice(module: Module, args: Args, kwargs: Kwargs, output: Called) -> Choice | None:
        """`spec.choice` with its result as ids and weights [T, K]."""
        reader.check_input(args, kwargs)
        found = spec.choice(module, args, kwargs, output)
        return None if found is None else reader.choice(found)

    read = Adapter(
        choice,
        at_call=spec.before,
        experts=lambda module: E,
        top_k=top_k,
        note=spec.note,
        replace=(lambda call, *new: replace(*call, *new)) if replace else None,
    )
    layer = spec.layer(path, module) if callable(spec.layer) else spec.layer
    if layer is None and routers.layer_path(path) is None:
        raise MoeInspectError(
            f"no layer number in the module path {path}: give RouterSpec(layer=…), a number or a "
            "function of the path and the module"
        )
    block = beside.rpartition(".")[0]
    while block and _wraps(model.get_submodule(block)):
        block = block.rpartition(".")[0]
    shared = any("shared" in name for name, _ in model.get_submodule(block).named_children())
    return Site(
        module,
        path,
        layer if layer is not None else routers.layer_of(path),
        E,
        stated(spec.scoring),
        int(stated(spec.shared_experts, shared)),
        read,
        logits_module=module if logits_of is not None else None,
        told=reader,
        logits_of=(lambda *call: reader.logits(logits_of(*call))) if logits_of else None,
        order=spec.order,
        rows=spec.rows,
    )


def _matches(spec: RouterSpec, path: str, module: Module) -> bool:
    wanted = spec.module
    if isinstance(wanted, type):
        return isinstance(module, wanted)
    if not isinstance(wanted, str):
        return module is wanted
    kinds = type(module).__mro__
    if any(wanted in (kind.__name__, f"{kind.__module__}.{kind.__qualname__}") for kind in kinds):
        return True
    # "*" is anything within one name, "**." any number of names
    pattern = re.escape(wanted).replace(r"\*\*\.", r"(?:.*\.)?").replace(r"\*", r"[^.]*")
    return not _wraps(module) and bool(re.fullmatch(pattern, WRAPPERS.sub("", path)))


def _wraps(module: Module) -> bool:
    return any(WRAPPERS.fullmatch(name) for name, _ in module.named_children())


def named(spec: RouterSpec) -> str:
    """The modules of a spec, for people."""
    if isinstance(spec.module, str):
        return repr(spec.module)
    return spec.module.__name__ if isinstance(spec.module, type) else type(spec.module).__name__
