"""Finds every router of a model: those that RouterSpecs describe, and those of transformers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from moe_inspect.errors import MoeInspectError
from moe_inspect.model.custom.find import candidates, sites_given, sites_registered
from moe_inspect.model.custom.frameworks import SPECS
from moe_inspect.model.custom.spec import RouterSpec, registered
from moe_inspect.model.routers import Site, called_experts, in_layers, is_of_transformers


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


def no_routers(model: Any, searched: bool = False) -> MoeInspectError:
    """Why nothing can be recorded, and what would help. `searched`: for calls of topk, in vain."""
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
    return MoeInspectError(
        f"no known router was found in {name}, but {like.described()}: {given}; "
        "moe_inspect.record(discover=True) looks for it"
    )
