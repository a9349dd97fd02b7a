"""What is to be changed in which layer, checked against the routers of a model.

E experts, K slots.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from moe_inspect.errors import MoeInspectError
from moe_inspect.model.routers import Site, top_k_of
from moe_inspect.text import comma_list

# layer, or path of a router's module → experts
Layers = Mapping["int | str", "int | Iterable[int]"]


@dataclass(frozen=True)
class Plan:
    """By site: the experts dropped and the experts forced. `shuffle`: the seed, None where nothing
    is shuffled."""

    drop: Mapping[int, tuple[int, ...]]
    force: Mapping[int, tuple[int, ...]]
    shuffle: int | None = None
    replay: bool = False

    @property
    def needs_rows(self) -> bool:
        return self.replay or self.shuffle is not None

    def changes(self, r: int) -> bool:
        """Whether anything is changed at site r."""
        return self.needs_rows or r in self.drop or r in self.force

    def described(self, sites: Sequence[Site]) -> str:
        """For the manifest of a trace recorded meanwhile."""
        parts = [
            f"{verb} in {sites[r].path}: {comma_list(list(experts))}"
            for verb, of in (("dropped", self.drop), ("forced", self.force))
            for r, experts in of.items()
        ]
        parts += ["routing replayed from another trace"] if self.replay else []
        parts += [f"choices shuffled (seed {self.shuffle})"] if self.shuffle is not None else []
        return "intervention: " + "; ".join(parts)


def planned(
    model: object,
    sites: Sequence[Site],
    drop: Layers | None,
    force: Layers | None,
    shuffle: int | None,
    replay: bool,
) -> Plan:
    """MoeInspectError for a layer without a router or whose router's choice is fixed, an expert
    that it does not have, a layer with nothing left to choose, and for interventions that
    contradict each other."""
    asked = {"drop": drop, "force": force, "replay": replay or None, "shuffle": shuffle}
    given = [name for name, value in asked.items() if value is not None]
    if not given:
        raise MoeInspectError("intervene does nothing: give it drop, force, replay or shuffle")
    if len(given) > 1 and set(given) != {"drop", "force"}:
        raise MoeInspectError(f"{given[0]} and {given[1]} contradict each other: give one of them")
    dropped = _by_site(sites, drop or {}, "drop")
    made = Plan(dropped, _by_site(sites, force or {}, "force"), shuffle, replay)
    for r, site in enumerate(sites):
        if made.changes(r) and site.adapter is not None and site.adapter.fixed:
            raise MoeInspectError(f"{site.path}: {site.adapter.fixed}")
    for r, experts in made.drop.items():
        if len(experts) >= sites[r].experts:
            raise MoeInspectError(
                f"drop leaves no expert in layer {sites[r].layer}, which has {sites[r].experts}"
            )
    for r, experts in made.force.items():
        if r in dropped:
            raise MoeInspectError(f"layer {sites[r].layer} is in both drop and force: give one")
        if len(experts) > (K := top_k_of(sites[r], model)):
            raise MoeInspectError(
                f"force has {len(experts)} experts for layer {sites[r].layer}, whose tokens "
                f"choose {K}"
            )
    return made


def _by_site(sites: Sequence[Site], layers: Layers, name: str) -> dict[int, tuple[int, ...]]:
    found: dict[int, tuple[int, ...]] = {}
    for layer, of_layer in layers.items():
        experts = sorted({of_layer} if isinstance(of_layer, int) else set(of_layer))
        in_layer = [r for r, site in enumerate(sites) if layer in (site.layer, site.path)]
        if not in_layer:
            known = comma_list(sorted({site.layer for site in sites}))
            raise MoeInspectError(f"{name}: no router in layer {layer}: the MoE layers are {known}")
        if len(in_layer) > 1:
            raise MoeInspectError(
                f"{name}: layer {layer} has {len(in_layer)} routers, "
                f"{' and '.join(sites[r].path for r in in_layer)}: give one of these paths in "
                "place of the layer"
            )
        E = sites[in_layer[0]].experts
        if wrong := [e for e in experts if not 0 <= e < E]:
            raise MoeInspectError(
                f"{name}: no expert {wrong[0]} in layer {layer}, which has {E} (0 to {E - 1})"
            )
        if experts:
            found[in_layer[0]] = tuple(experts)
    return found
