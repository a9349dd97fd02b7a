"""Pair the routers of two traces, or name how their models differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from moe_inspect.errors import MoeInspectError
from moe_inspect.text import layer_label, plural, ranges
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.schema import Router


def routers_of_one_model(
    a: Trace, b: Trace, routers: Iterable[int], shift_layers: int, layers: object
) -> tuple[tuple[int, int], ...]:
    """`same_places`, checked. Raises DifferentModelsError if the shapes of routers differ, or the
    number of layers and the caller selects none; MoeInspectError if no layer is in both."""
    pairs = same_places(a, b, routers, shift_layers)
    if reasons := _shape_differences(a, b, pairs):
        raise DifferentModelsError(a, b, reasons)
    if not pairs:
        of_a, of_b = (ranges({router.layer for router in trace.routers}) for trace in (a, b))
        raise MoeInspectError(
            f"no common layer: {a.path} has layers {of_a}, {b.path} has {of_b}: use --shift-layers "
            "if they are numbered differently"
        )
    if layers is None and not shift_layers and (difference := _layers_difference(a, b)):
        raise DifferentModelsError(a, b, [difference])
    return pairs


def same_places(
    a: Trace, b: Trace, routers: Iterable[int], shift_layers: int = 0
) -> tuple[tuple[int, int], ...]:
    """(router of A, router of B): the same layer, or layer n of B with n + shift_layers of A, the
    same stack, and the same place among the routers of the layer."""
    place_a, place_b = _places(a.routers, 0), _places(b.routers, shift_layers)
    router_b = {place: m for m, place in enumerate(place_b)}
    return tuple((r, router_b[place_a[r]]) for r in routers if place_a[r] in router_b)


def _places(routers: Sequence[Router], shift: int) -> list[tuple[int, str, int]]:
    """Each router's layer, stack, and place among the routers of both."""
    keys = [(router.layer + shift, router.stack) for router in routers]
    return [(*key, keys[:r].count(key)) for r, key in enumerate(keys)]


def layers_named(labels: Sequence[str], most: int = 6) -> str:
    """ "layers 0, 1, 2"; of more than `most`, "layers 1-6, 8-14 (13 layers)"."""
    if len(labels) <= most:
        return f"{'layer' if len(labels) == 1 else 'layers'} {', '.join(labels)}"
    numbers = all(label.isdecimal() for label in labels)
    runs = ranges(map(int, labels)).split(",") if numbers else labels
    more = ", …" if len(runs) > most else ""
    return f"layers {', '.join(runs[:most])}{more} ({plural(len(labels), 'layer')})"


PHYSICAL = ". Physical ids of replicated experts must be mapped to logical ids first"


class DifferentModelsError(MoeInspectError):
    """The traces come from different models: decisions cannot be compared one by one. reasons:
    a phrase each, "A has 64 experts per layer, B 128"."""

    def __init__(self, a: Trace, b: Trace, reasons: Sequence[str]):
        self.reasons = tuple(reasons)
        # replicas make the number of experts alone differ
        alone = len(reasons) == 1 and "experts" in reasons[0] and SIZE_OF_K not in reasons[0]
        super().__init__(
            f"{a.path} (A) and {b.path} (B) are traces of different models: "
            f"{'; '.join(reasons)}; their decisions cannot be compared one by one"
            f"{PHYSICAL if alone else ''}"
        )


SIZE_OF_K = "experts per token"
SIZES: dict[str, Callable[[Router], int]] = {
    "experts per layer": lambda router: router.experts,
    SIZE_OF_K: lambda router: router.top_k,
}


def _shape_differences(a: Trace, b: Trace, pairs: Sequence[tuple[int, int]]) -> list[str]:
    """Differences of paired routers in experts and in experts per token; a phrase each."""
    of_a, of_b = a.routers, b.routers
    found = list[str]()
    for what, size in SIZES.items():
        sizes_a, sizes_b = (sorted({size(r) for r in side}) for side in (of_a, of_b))
        apart = [(r, m) for r, m in pairs if size(of_a[r]) != size(of_b[m])]
        if sizes_a != sizes_b and (len(sizes_a) == len(sizes_b) == 1 or not pairs):
            a_has, b_has = (" or ".join(map(str, sizes)) for sizes in (sizes_a, sizes_b))
            found.append(f"A has {a_has} {what}, B {b_has}")
        elif apart:
            r, m = apart[0]
            has = f"has {size(of_a[r])} {what} in A, {size(of_b[m])} in B"
            found.append(f"layer {layer_label(of_a, r)} {has}")
    return found


def _layers_difference(a: Trace, b: Trace) -> str:
    """Difference of the numbers of layers in the configs, dense layers included; "" if unknown."""
    blocks = [trace.stated_blocks for trace in (a, b)]
    if None in blocks or blocks[0] == blocks[1]:
        return ""
    return f"A has {blocks[0]} layers, B {blocks[1]}"


def vocabularies_apart(a: Trace, b: Trace) -> str:
    """A difference of the vocabularies; "" if there is none, or one is unknown."""
    of_a, of_b = (trace.vocabulary_table for trace in (a, b))
    if not len(of_a) or not len(of_b) or of_a.equals(of_b):
        return ""
    if len(of_a) != len(of_b):
        return f"the tokenizers have {len(of_a):,} tokens in A, {len(of_b):,} in B"
    return "the tokenizers map the same token ids to different texts"
