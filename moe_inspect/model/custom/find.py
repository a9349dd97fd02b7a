"""The routers of a model that `RouterSpec`s describe.

T rows a router sees, K slots, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from moe_inspect.errors import MoeInspectError
from moe_inspect.model.custom.spec import RouterSpec
from moe_inspect.model.families import EXPERTS, TOP_K, TOWER, Adapter
from moe_inspect.model.routers import Site, layer_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

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


def sites_given(model: Any, specs: Sequence[RouterSpec]) -> list[Site]:
    """The sites of the specs that a caller gave. MoeInspectError where one matches no module, or
    two the same."""
    found: dict[str, Site] = {}
    for spec in specs:
        if not isinstance(spec, RouterSpec):
            raise MoeInspectError(f"routers takes RouterSpecs, not {type(spec).__name__}")
        matched = [(path, m) for path, m in model.named_modules() if _matches(spec, path, m)]
        if not matched:
            raise MoeInspectError(
                f"RouterSpec(module={named(spec)}) matches no module of {type(model).__name__}"
                f"{_similar(model, spec)}"
            )
        for path, module in matched:
            if path in found:
                raise MoeInspectError(f"two RouterSpecs match {path}")
            found[path] = site_of(spec, path, module, model)
    return sorted(found.values(), key=lambda site: site.layer)


def sites_registered(model: Any, specs: Sequence[RouterSpec]) -> list[Site]:
    """The sites of modules whose class is registered: the first spec that matches counts. The
    towers of a multimodal model see no text."""
    found = []
    for path, module in model.named_modules():
        if not TOWER.search(path):
            spec = next((s for s in specs if _matches(s, path, module)), None)
            found += [site_of(spec, path, module, model)] if spec is not None else []
    return sorted(found, key=lambda site: site.layer)


def site_of(spec: RouterSpec, path: str, module: Module, model: Any) -> Site:
    experts = spec.experts(module) if callable(spec.experts) else spec.experts
    experts = experts if experts is not None else _stated(module, EXPERTS_OF_MODULE)
    experts = experts if experts is not None else _features(module)
    if not experts:
        raise MoeInspectError(
            f"{path} ({type(module).__name__}) does not say how many experts it chooses from: "
            "give RouterSpec(experts=…)"
        )
    top_k = spec.top_k(module) if callable(spec.top_k) else spec.top_k
    top_k = top_k if top_k is not None else _stated(module, TOP_K_OF_MODULE)
    return Site(
        module,
        path,
        _layer(spec, path, module),
        int(experts),
        _of(spec.scoring, module),
        _shared_experts(spec, path, module, model),
        Adapter(
            _reads(spec, path, top_k),
            at_call=spec.before,
            experts=lambda module: int(experts),
            top_k=top_k,
            note=spec.note,
        ),
        logits_module=module if spec.logits is not None else None,
        told=True,
        logits_of=spec.logits,
        order=spec.order,
        rows=spec.rows,
    )


def in_map(chosen: Tensor, weights: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """A bool map of the experts chosen [..., E] and weights of its shape → ids [..., K] in order of
    their weights, −1 where fewer than K were chosen, and weights [..., K], 0 there."""
    nowhere = float("-inf")
    found, ids = weights.detach().float().masked_fill(~chosen, nowhere).topk(top_k, dim=-1)
    none = found == nowhere
    return ids.masked_fill(none, -1), weights.detach().gather(-1, ids).masked_fill(none, 0)


def _reads(spec: RouterSpec, path: str, top_k: int | None) -> Callable[..., Any]:
    """`spec.choice` with its result as ids and weights [T, K]."""

    def choice(
        module: Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> tuple[Tensor, Tensor] | None:
        found = spec.choice(module, args, kwargs, output)
        return None if found is None else as_choice(*found, path, top_k)

    return choice


def as_choice(
    ids: Tensor, weights: Tensor, path: str, top_k: int | None = None
) -> tuple[Tensor, Tensor]:
    """Ids int [..., K], or bool [..., E], and weights of the same shape → ids and weights [T, K].
    MoeInspectError, which names `path`, for anything else."""
    if ids.shape != weights.shape or not weights.dtype.is_floating_point or not ids.dim():
        raise MoeInspectError(
            f"the choice of {path} has ids {_shape(ids)} and weights {_shape(weights)}: both need "
            "the same shape [..., K], ids integer (or bool [..., E]) and weights floating-point"
        )
    if _dtype(ids) == "bool":
        if top_k is None:
            raise MoeInspectError(
                f"{path} gives a bool map and does not state its top-k: give RouterSpec(top_k=…)"
            )
        ids, weights = in_map(ids, weights, top_k)
    elif ids.dtype.is_floating_point:
        raise MoeInspectError(f"the choice of {path} has ids of dtype {_dtype(ids)}, not integers")
    return ids.reshape(-1, ids.shape[-1]), weights.reshape(-1, weights.shape[-1])


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
    if spec.shared_experts is not None:
        return int(_of(spec.shared_experts, module))
    while True:
        path = path.rpartition(".")[0]
        block = model.get_submodule(path)
        if not _wraps(block):
            return int(any("shared" in name for name, _ in block.named_children()))


def _of(value: Any, module: Module) -> Any:
    return value(module) if callable(value) else value


def _stated(module: Module, names: Sequence[str]) -> int | None:
    """The first of these sizes that the module or its config states."""
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _features(module: Module) -> int | None:
    """Of a linear layer that makes the logits."""
    return getattr(module, "out_features", None)


def named(spec: RouterSpec) -> str:
    """The modules of a spec, for people."""
    if isinstance(spec.module, str):
        return repr(spec.module)
    return spec.module.__name__ if isinstance(spec.module, type) else type(spec.module).__name__


def _similar(model: Any, spec: RouterSpec) -> str:
    """Paths that end like the pattern, for an error."""
    if not isinstance(spec.module, str):
        return ""
    last = spec.module.split(".")[-1]
    near = [path for path in _paths(model) if path.split(".")[-1] == last]
    return f"; modules called {last}: {', '.join(near[:3])}" if near else ""


def _paths(model: Any) -> Iterator[str]:
    return (path for path, _ in model.named_modules() if path)


def _shape(value: Any) -> str:
    return str(list(value.shape)) if hasattr(value, "shape") else type(value).__name__


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
