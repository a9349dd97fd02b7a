"""What the weights of a model say of its routers and experts, without running it: tables `routers`
(the geometry of each router's rows) and `experts`. Which tensors of a checkpoint are the rows of a
router, and which those of its experts, is told by their names and shapes: the config is not needed,
and what transformers renames when it loads does not matter.

L routers, E experts, H hidden width.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from moe_inspect.analysis.metrics.balance import entropy_nats, nan_for_zero
from moe_inspect.analysis.metrics.uncertainty import SEED
from moe_inspect.analysis.weights.stored import Stored, tensors_in, with_scales
from moe_inspect.errors import MoeInspectError
from moe_inspect.later import pd
from moe_inspect.progress import tracked
from moe_inspect.trace.schema import Router

LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks?|h)\.(\d+)\.")
TOWER = re.compile(r"(?:^|\.)(?:vision|visual|audio)")
ROUTER = re.compile(r"^(?P<place>.*?)\.?(?<![\w])(?:gate|router)\.(?:\w+\.)*weight$")
NUMBERED = re.compile(r"^(?P<place>.*?)\.?(?<![\w])experts?\.(?:expert_)?(?P<e>\d+)\.")
FUSED = re.compile(r"^(?P<place>.*?)\.?(?<![\w])experts\.(?!\d|expert_|router|gate\.)")
# blocks that predict further tokens: they have experts of their own, which no trace shows
MTP = re.compile(r"(?:^|[._])mtp(?:[._]|$)")
ATTENTION = re.compile(r"att(?:n|ention)")
DRAWS = 5  # of random rows
Columns = dict[str, object]
GEOMETRY = [
    *("cosine_mean", "cosine_max", "cosine_max_random", "effective_rank", "effective_rank_random"),
    *("row_norm_mean", "row_norm_min", "row_norm_max"),
]


@dataclass
class RoutedPlace:
    """One router of a checkpoint and its experts. `place`: what their names begin with. `rows`: of
    the router, [E, H]; None where there is no such matrix. of_expert[e]: the matrices of an expert,
    each (tensor, first value, how many)."""

    place: str
    layer: int
    rows: Stored | None
    of_expert: list[list[tuple[Stored, int, int]]]

    @property
    def experts(self) -> int:
        return len(self.of_expert)

    @property
    def weights_E(self) -> np.ndarray:
        """The number of weights of each expert. int64 [E]"""
        return np.array([sum(n for _, _, n in of) for of in self.of_expert], np.int64)

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
    # by place: matrices of routers, matrices of single experts by number, and of all at once
    rows, fused = defaultdict[str, list[Stored]](list), defaultdict[str, list[Stored]](list)
    numbered = defaultdict[str, dict[int, list[Stored]]](dict)
    for name, tensor in sorted(tensors.items()):
        if TOWER.search(name) or len(tensor.shape) < 2:
            continue
        if of_one := NUMBERED.match(name):
            numbered[of_one["place"]].setdefault(int(of_one["e"]), []).append(tensor)
        elif (of_router := ROUTER.match(name)) and len(tensor.shape) == 2:
            rows[of_router["place"]].append(tensor)
        elif (of_all := FUSED.match(name)) and not name.endswith("bias"):
            fused[of_all["place"]].append(tensor)
    found = list[RoutedPlace]()
    # experts beside their router may be called so themselves
    for place in {*rows, *numbered, *(p for p in fused if f"{p}.experts" not in rows)}:
        layer, routers = LAYER.search(f"{place}."), rows.get(place, [])
        router = routers[0] if len(routers) == 1 else None  # of several matrices none is its rows
        if (experts := numbered.get(place)) is not None:
            whole = sorted(experts) == list(range(len(experts)))  # no number is missing
            parts = [[(t, 0, t.size) for t in experts[e]] for e in sorted(experts) if whole]
        else:
            E = router.shape[0] if router else 0
            parts = _of_fused(fused.get(place) or _beside(tensors, place, E), E)
        if layer and len(parts) > 1:
            rowed = router if router and router.shape[0] >= len(parts) else None
            found.append(RoutedPlace(place, int(layer[1]), rowed, parts))

    def turn(p: RoutedPlace) -> tuple[bool, bool, int, bool, str]:
        of_mtp, attends = bool(MTP.search(p.place)), bool(ATTENTION.search(p.place))
        return of_mtp, p.stack == "decoder", p.layer, not attends, p.place

    return sorted(found, key=turn)


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
    of_E = {name: t for name, t in tensors.items() if len(t.shape) == 3 and t.shape[0] == E}
    return [t for name, t in of_E.items() if inside.fullmatch(name)]


def places_in(directory: str | Path) -> list[RoutedPlace]:
    """Every router of a checkpoint with its experts. MoeInspectError where none is found."""
    found = routed_places(with_scales(tensors_in(directory)))
    if not found:
        raise MoeInspectError(
            f"no experts among the tensors in {directory}: it is a dense model, or its names are "
            "not known here"
        )
    return found


def weight_tables(directory: str | Path) -> dict[str, pd.DataFrame]:
    """The tables `routers` and `experts` of the safetensors checkpoint in a directory. `blocks`:
    the path of the blocks that a router is in, which may number layers anew: "mtp.layers".

    routers: a row per router: the cosines of pairs of its rows (mean and largest), their effective
    rank and norms; beside random rows of the same shape. experts: a row per expert: the number of
    its weights, AIMER, the norm of its weights, the norm of its row of the router, and the expert
    whose row is nearest. NaN where weights are quantised, or a router has no row per expert."""
    places = places_in(directory)
    routers, experts = list[Columns](), list[pd.DataFrame]()
    for r, place in enumerate(tracked(places, "reading weights", "routers")):
        shape: Columns = {"layer": place.layer, "router": r, "blocks": place.blocks}
        rows_EH = rows_of(place)
        routers.append({**shape, "experts": place.experts, **geometry_of(rows_EH)})
        aimer_E, norm_E = aimer_and_norm(place)
        of_experts = {
            "expert": np.arange(place.experts),
            "weights": np.where(np.isnan(aimer_E), np.nan, place.weights_E),
            "aimer": aimer_E,
            "weight_norm": norm_E,
            **_rows_by_expert(rows_EH, place.experts),
        }
        experts.append(pd.DataFrame({**shape, **of_experts}))
    of_all = pd.concat(experts, ignore_index=True)
    return {
        "routers": pd.DataFrame(routers).astype({"hidden": "Int64"}),
        "experts": of_all.astype({"weights": "Int64", "nearest": "Int64"}),
    }


def aimer_of(
    directory: str | Path, routers: Sequence[Router], indices: Iterable[int]
) -> dict[int, np.ndarray]:
    """AIMER of the experts of these routers of a trace, float64 [E] each, by the checkpoint of its
    model; NaN where that has no such experts, or they are quantised. Routers are those of the same
    layer, in its order. MoeInspectError where none is the same."""
    stacks = any(router.stack for router in routers)
    layers = set[int]() if stacks else {router.layer for router in routers}
    places = defaultdict[tuple[str, int], list[RoutedPlace]](list)
    for place in _of_the_model(places_in(directory), layers):
        places[place.stack if stacks else "", place.layer].append(place)
    chosen, same = list(indices), dict[int, RoutedPlace]()
    for r in chosen:
        at = routers[r].stack, routers[r].layer
        there = [i for i, other in enumerate(routers) if (other.stack, other.layer) == at]
        mine = places[at][there.index(r)] if len(places[at]) == len(there) else None
        if mine and mine.experts == routers[r].experts:
            same[r] = mine
    if not same:
        raise MoeInspectError(
            f"the weights in {directory} are not of this trace's model: no router of the same "
            "layer has as many experts"
        )
    found = {r: np.full(routers[r].experts, np.nan) for r in chosen}
    for r in tracked(same, "reading weights", "routers"):
        found[r], _ = aimer_and_norm(same[r])
    return found


def _of_the_model(places: Sequence[RoutedPlace], layers: set[int]) -> list[RoutedPlace]:
    """Without those of blocks beside the model, which have numbers of their own: they predict
    further tokens, or do not have all of these layers where others do."""
    held = dict[str, set[int]]()
    for place in places:
        if not MTP.search(place.place):
            held.setdefault(place.blocks, set()).add(place.layer)
    whole = {blocks for blocks, of in held.items() if of >= layers} or held.keys()
    return [place for place in places if place.blocks in whole]


def aimer_and_norm(place: RoutedPlace) -> tuple[np.ndarray, np.ndarray]:
    """AIMER = mean |w| ÷ root mean square of w over all the weights of an expert (biases left
    out), and √Σw². float64 [E], twice; NaN where they are all 0, or quantised in a way that is not
    known here. AIMER is in (0, 1]: 1 where all are equally large, √(2/π) = 0.798 where they are
    Gaussian, less where few stand out. arXiv:2603.18492."""
    sums_E2 = np.full((place.experts, 2), np.nan)
    for e, parts in enumerate(place.of_expert):
        if all(tensor.readable for tensor, _, _ in parts):
            sums_E2[e] = np.sum([_sums(*part) for part in parts], axis=0)
    absolute_E, square_E = sums_E2.T
    square_E = nan_for_zero(square_E)
    return absolute_E / np.sqrt(place.weights_E * square_E), np.sqrt(square_E)


def _sums(tensor: Stored, first: int, count: int) -> tuple[float, float]:
    """Σ|w| and Σw²."""
    absolute = square = 0.0
    for piece in tensor.pieces(first, count):
        absolute += float(np.abs(piece).sum(dtype=np.float64))
        square += float(np.square(piece, dtype=np.float64).sum())
    return absolute, square


def rows_of(place: RoutedPlace) -> np.ndarray | None:
    """The router's rows, float64 [E, H]; rows beyond its experts (of experts that do nothing) are
    left out. None where it has none, or they are quantised."""
    if place.rows is None or not place.rows.readable:
        return None
    return place.rows.whole()[: place.experts]


def geometry_of(rows_EH: np.ndarray | None) -> Columns:
    """The width of a router's rows, and their geometry, NaN where they are not known. After
    arXiv:2605.12476."""
    if rows_EH is None:
        return {"hidden": None, **dict.fromkeys(GEOMETRY, float("nan"))}
    cosine_max, rank = random_geometry(*rows_EH.shape)
    norm_E = np.sqrt((rows_EH**2).sum(1))
    cosine_P = cosines(rows_EH)[np.triu_indices(len(rows_EH), 1)]
    known = np.isfinite(cosine_P).any()
    mean, most = (np.nanmean(cosine_P), np.nanmax(cosine_P)) if known else (np.nan, np.nan)
    found = [mean, most, cosine_max, effective_rank(rows_EH), rank]
    found += [norm_E.mean(), norm_E.min(), norm_E.max()]
    return {"hidden": rows_EH.shape[1], **dict(zip(GEOMETRY, map(float, found), strict=True))}


def cosines(rows_EH: np.ndarray) -> np.ndarray:
    """Of each pair of rows, [E, E]; NaN with a row of zeros."""
    unit_EH = rows_EH / nan_for_zero(np.sqrt((rows_EH**2).sum(1, keepdims=True)))
    return unit_EH @ unit_EH.T


def effective_rank(rows_EH: np.ndarray) -> float:
    """exp of the entropy of the singular values' shares: in [1, min(E, H)], how many directions the
    rows make use of (Roy and Vetterli 2007). NaN where all are 0."""
    value_N = np.linalg.svd(rows_EH, compute_uv=False)
    return float(np.exp(entropy_nats(value_N / nan_for_zero(value_N.sum()))))


@lru_cache(maxsize=32)
def random_geometry(E: int, H: int) -> tuple[float, float]:
    """cosine_max and effective_rank of independent Gaussian rows, their means over DRAWS."""
    rng = np.random.default_rng([SEED, E, H])
    draws = [rng.standard_normal((E, H)) for _ in range(DRAWS)]
    upper = np.triu_indices(E, 1)
    most = np.mean([cosines(rows_EH)[upper].max() for rows_EH in draws])
    return float(most), float(np.mean([effective_rank(rows_EH) for rows_EH in draws]))


def _rows_by_expert(rows_EH: np.ndarray | None, E: int) -> Columns:
    if rows_EH is None:
        return {"row_norm": np.full(E, np.nan), "nearest": pd.NA, "nearest_cosine": np.nan}
    cosine_EE = np.nan_to_num(cosines(rows_EH), nan=-2)
    np.fill_diagonal(cosine_EE, -3)
    most_E = cosine_EE.max(1)
    return {
        "row_norm": np.sqrt((rows_EH**2).sum(1)),
        "nearest": pd.array(cosine_EE.argmax(1), "Int64"),
        "nearest_cosine": np.where(most_E >= -1.5, most_E, np.nan),
    }
