"""Which tensors of a checkpoint are the rows of a router, and which those of its experts, by their
names and shapes: the config is not needed, and what transformers renames when it loads does not
matter.

E experts, H hidden width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from moe_inspect.analysis.weights.stored import Stored

LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks?|h)\.(\d+)\.")
TOWER = re.compile(r"(?:^|\.)(?:vision|visual|audio)")
ROUTER = re.compile(r"^(?P<place>.*?)\.?(?<![\w])(?:gate|router)\.(?:\w+\.)*weight$")
NUMBERED = re.compile(r"^(?P<place>.*?)\.?(?<![\w])experts?\.(?:expert_)?(?P<e>\d+)\.")
FUSED = re.compile(r"^(?P<place>.*?)\.?(?<![\w])experts\.(?!\d|expert_|router|gate\.)")
# blocks that predict further tokens: they have experts of their own, which no trace shows
MTP = re.compile(r"(?:^|[._])mtp(?:[._]|$)")
ATTENTION = re.compile(r"att(?:n|ention)")


@dataclass
class RoutedPlace:
    """One router of a checkpoint and its experts. `place`: what their names begin with. `rows`: of
    the router, [E, H]; None where there is no such matrix. of_expert[e]: the matrices of an expert,
    each (tensor, first value, how many)."""

    place: str
    layer: int
    rows: Stored | None
    of_expert: list[list[tuple[Stored, int, int]]] = field(
        default_factory=list[list[tuple[Stored, int, int]]]
    )

    @property
    def experts(self) -> int:
        return len(self.of_expert)

    @property
    def blocks(self) -> str:
        """The path of the blocks that it is in one of."""
        found = LAYER.search(f"{self.place}.")
        return self.place[: found.start(1) - 1] if found else ""

    @property
    def stack(self) -> str:
        """ "encoder" or "decoder" where its name says so."""
        parts = self.place.split(".")
        return next((stack for stack in ("encoder", "decoder") if stack in parts), "")


def routed_places(tensors: Mapping[str, Stored]) -> list[RoutedPlace]:
    """In the order of a forward pass: the encoder first, layer by layer, attention before the
    rest; blocks that predict further tokens last."""
    rows, numbered, fused = _sorted_out(tensors)
    found = list[RoutedPlace]()
    # experts beside their router may be called so themselves
    for place in {*rows, *numbered, *(p for p in fused if f"{p}.experts" not in rows)}:
        layer, routers = LAYER.search(f"{place}."), rows.get(place, [])
        router = routers[0] if len(routers) == 1 else None  # of several matrices none is its rows
        if place in numbered:
            parts = _of_numbers(numbered[place])
        else:
            E = router.shape[0] if router else 0
            parts = _of_fused(fused.get(place) or _beside(tensors, place, E), E)
        if layer and len(parts) > 1:
            rowed = router if router and router.shape[0] >= len(parts) else None
            found.append(RoutedPlace(place, int(layer[1]), rowed, parts))
    return sorted(
        found,
        key=lambda p: (
            bool(MTP.search(p.place)),
            p.stack == "decoder",
            p.layer,
            not ATTENTION.search(p.place),
            p.place,
        ),
    )


def _sorted_out(
    tensors: Mapping[str, Stored],
) -> tuple[dict[str, list[Stored]], dict[str, dict[int, list[Stored]]], dict[str, list[Stored]]]:
    """By place: matrices of routers, matrices of single experts by number, and of all at once."""
    rows = dict[str, list[Stored]]()
    numbered, fused = dict[str, dict[int, list[Stored]]](), dict[str, list[Stored]]()
    for name, tensor in sorted(tensors.items()):
        if TOWER.search(name) or len(tensor.shape) < 2:
            continue
        if of_one := NUMBERED.match(name):
            experts = numbered.setdefault(of_one["place"], {})
            experts.setdefault(int(of_one["e"]), []).append(tensor)
        elif (of_router := ROUTER.match(name)) and len(tensor.shape) == 2:
            rows.setdefault(of_router["place"], []).append(tensor)
        elif (of_all := FUSED.match(name)) and not name.endswith("bias"):
            fused.setdefault(of_all["place"], []).append(tensor)
    return rows, numbered, fused


def _of_numbers(experts: Mapping[int, list[Stored]]) -> list[list[tuple[Stored, int, int]]]:
    """None where a number is missing."""
    if sorted(experts) != list(range(len(experts))):
        return []
    return [[(t, 0, t.size) for t in experts[e]] for e in range(len(experts))]


def _of_fused(tensors: list[Stored], rows: int) -> list[list[tuple[Stored, int, int]]]:
    """Each tensor holds the experts one after the other: [E, …], or [E · width, H] where the router
    tells E. `rows`: of the router, 0 where that is not known."""
    mine = [t for t in tensors if len(t.shape) >= 3]
    E = mine[0].shape[0] if mine else rows
    mine = mine or [t for t in tensors if E and t.shape[0] > E and t.shape[0] % E == 0]
    if not mine or any(t.shape[0] % E for t in mine):
        return []
    return [[(t, e * (t.size // E), t.size // E) for t in mine] for e in range(E)]


def _beside(tensors: Mapping[str, Stored], place: str, E: int) -> list[Stored]:
    """Tensors of E right beside the router: experts that no name tells."""
    inside = re.compile(rf"{re.escape(place)}\.\w+(?:\.weight)?")
    return [
        t
        for name, t in tensors.items()
        if len(t.shape) == 3 and t.shape[0] == E and inside.fullmatch(name)
    ]
