"""Which experts may go together.

E experts, K slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from moe_inspect.analysis.scores import experts_kept, refuse_too_few
from moe_inspect.errors import MoeInspectError
from moe_inspect.interventions.among import SHARED_OUT, how_dropped
from moe_inspect.model.config import groups_of
from moe_inspect.model.load import config_record
from moe_inspect.model.routers import Site, block_of


def check(network: Any, sites: Sequence[Site], keep: float, K: int) -> None:
    """MoeInspectError where that many experts cannot go alike in all layers, or where routers do
    not choose by logits that can be seen. K: to how many experts a token goes, at most."""
    sizes = sorted({site.experts for site in sites})
    if len(sizes) > 1:
        raise MoeInspectError(
            f"the layers have different numbers of experts ({', '.join(map(str, sizes))}), and a "
            "config states one: not pruned"
        )
    if (layers := [s.layer for s in sites]) and len(set(layers)) < len(layers):
        raise MoeInspectError("a layer has two routers: models like that are not pruned")
    for site in sites:
        if site.adapter is not None and site.adapter.among is not None:
            raise MoeInspectError(
                f"experts of layer {site.layer} share their keys (product keys): none can be "
                "dropped alone, so the model is not pruned"
            )
        if other := _alike_beside(network, site):
            raise MoeInspectError(
                f"layer {site.layer} has other experts beside those that were traced ({other}), "
                "and the config states one number for both: not pruned"
            )
        hashed = any(name.endswith("tid2eid") for name, _ in _tensors_beside(network, site))
        if hashed or how_dropped(site) == SHARED_OUT:
            why = "goes by a table of token ids" if hashed else "does not show its logits"
            raise MoeInspectError(
                f"the router of layer {site.layer} {why}: it cannot choose among fewer experts, "
                "so the model is not pruned"
            )
    E = sizes[0]
    groups, _, _ = of_groups = groups_of(config_of(network))
    if experts_kept(E, keep, groups) == E:
        within = f" in each of {groups} groups" if groups > 1 else ""
        raise MoeInspectError(
            f"--keep {keep:g} drops none of {E // groups} experts{within}: lower it"
        )
    refuse_too_few(E, K, keep, of_groups)


def config_of(network: Any) -> dict[str, Any]:
    """The config of a model as config.json has it; empty where it has none."""
    return config_record(getattr(network, "config", None))


def _alike_beside(network: Any, site: Site) -> str:
    """The path of another block like that of these experts, beside it; "" for none."""
    path = block_of(site.path)
    owner, _, own = path.rpartition(".")
    kind = type(network.get_submodule(path))
    return next(
        (
            f"{owner}.{name}"
            for name, module in network.get_submodule(owner).named_children()
            if name != own and type(module) is kind and not name.isdigit()
        ),
        "",
    )


def _tensors_beside(network: Any, site: Site) -> Iterator[tuple[str, Any]]:
    block = network.get_submodule(site.path.rpartition(".")[0])
    yield from block.named_parameters()
    yield from block.named_buffers()
