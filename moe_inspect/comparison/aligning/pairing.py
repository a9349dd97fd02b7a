"""Which router of one trace is compared with which of the other.

L routers of A, M routers of B, T tokens of a sample, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moe_inspect.comparison.aligning.models import (
    DifferentModelsError,
    layers_difference,
    shape_differences,
)
from moe_inspect.errors import MoeInspectError
from moe_inspect.text import ranges
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.schema import Router


def router_pairs(
    a: Trace, b: Trace, routers: Iterable[int], shift_layers: int = 0
) -> tuple[tuple[int, int], ...]:
    """`same_places`, checked: DifferentModelsError where two have other experts or another k,
    MoeInspectError where no layer is in both."""
    pairs = same_places(a, b, routers, shift_layers)
    if reasons := shape_differences(a, b, pairs):
        raise DifferentModelsError(a, b, reasons)
    if not pairs:
        raise MoeInspectError(
            f"no common layer: {a.path} has layers {_layers(a.routers)}, {b.path} has "
            f"{_layers(b.routers)}: use --shift-layers if they are numbered differently"
        )
    return pairs


def routers_of_one_model(
    a: Trace, b: Trace, routers: Iterable[int], shift_layers: int, layers: object
) -> tuple[tuple[int, int], ...]:
    """`router_pairs`; DifferentModelsError also where the models have another number of layers,
    unless the caller says which belong together: by `layers`, or by a shift."""
    pairs = router_pairs(a, b, routers, shift_layers)
    if layers is None and not shift_layers and (difference := layers_difference(a, b)):
        raise DifferentModelsError(a, b, [difference])
    return pairs


def same_places(
    a: Trace, b: Trace, routers: Iterable[int], shift_layers: int = 0
) -> tuple[tuple[int, int], ...]:
    """(router of A, router of B): the same layer, or layer n of B with n + shift_layers of A, the
    same stack, and the same place among the routers of the layer."""
    place_b = {key: r for r, key in enumerate(_places(b.routers))}
    place_a = _places(a.routers)
    pairs = list[tuple[int, int]]()
    for r in routers:
        layer, stack, nth = place_a[r]
        other = place_b.get((layer - shift_layers, stack, nth))
        if other is not None:
            pairs.append((r, other))
    return tuple(pairs)


def _places(routers: Sequence[Router]) -> list[tuple[int, str, int]]:
    """(layer, stack, place among the routers of both) of each."""
    seen, places = dict[tuple[int, str], int](), list[tuple[int, str, int]]()
    for router in routers:
        key = router.layer, router.stack
        places.append((*key, seen.get(key, 0)))
        seen[key] = seen.get(key, 0) + 1
    return places


def _layers(routers: Sequence[Router]) -> str:
    return ranges({router.layer for router in routers})
