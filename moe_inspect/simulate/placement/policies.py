"""Layouts of a router's slots on GPUs, and the policies that fill them at once; local-search is a
file of its own.

EPLB is the expert-parallel load balancer that DeepSeek published with V3
(github.com/deepseek-ai/EPLB), written from the description of the algorithm. It gives the same
slots as the published code unless two loads that it compares are equal: here ties go to the lower
number, there to whichever its unstable sort puts first.

E experts, P slots, G GPUs, S = P / G slots of a GPU; slot p is on GPU p // S. A policy goes from
the load of each of one router's experts, int64 [E], to the expert of each slot, int64 [P].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from moe_inspect.analysis.counting.select import Selection
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.config import text_config
from moe_inspect.trace.reader import Trace

MOST_SLOTS = 2**20  # per layer
MOST_GPUS = 8  # by default
CURRENT = "current"  # the policy that a plan file gives: the placement in use
# name → from the load of each expert, [E], or of each window and expert, [W, E], to the expert of
# each slot; the simplest policies come first. With True, windows are workloads.
POLICIES: dict[str, Callable[..., np.ndarray]] = {}
UNFITTED = {CURRENT}  # policies that do not look at the load
Place = TypeVar("Place", bound=Callable[..., np.ndarray])


@dataclass(frozen=True)
class Layout:
    """`slots`: over all GPUs, the same number on each; each node has the same number of GPUs.
    `groups`: groups of experts that group-limited routing chooses among (DeepSeek-V3)."""

    slots: int
    gpus: int
    nodes: int = 1
    groups: int = 1


def policy(*, fitted: bool = True, by_window: bool = False) -> Callable[[Place], Place]:
    """Register a policy under the function's name. `fitted`: whether it looks at the load;
    `by_window`: it takes the load of each window and expert, the layout, and whether windows are
    workloads."""

    def register(place: Place) -> Place:
        def run(load: np.ndarray, layout: Layout, workloads: bool = False) -> np.ndarray:
            load_WE = np.atleast_2d(load)
            if by_window:
                return place(load_WE, layout, workloads)
            return place(load_WE.sum(0), layout)

        name = place.__name__.replace("_", "-")
        POLICIES[name] = run
        if not fitted:
            UNFITTED.add(name)
        return place

    return register


def layouts_of(
    trace: Trace,
    selection: Selection,
    gpus: int | None,
    nodes: int,
    groups: int | None,
    physical: int | None,
) -> dict[int, Layout]:
    """The layout of each router. `physical`: slots per layer, replicas included; None: one per
    expert. MoeInspectError if the numbers do not divide."""
    experts = {trace.routers[r].experts for r in selection.routers}
    if physical is not None and physical < (E := max(experts)):
        raise MoeInspectError(
            f"{physical} physical experts for {E} experts: each needs a slot, use at least {E}"
        )
    if physical is not None and physical > MOST_SLOTS:
        raise MoeInspectError(f"{physical:,} physical experts: use at most {MOST_SLOTS:,}")
    slots = experts if physical is None else {physical}
    if gpus is None:  # with one slot per GPU there is nothing to choose
        most = max(1, min(MOST_GPUS, min(slots) // 2))
        fit = (g for g in range(most, 0, -1) if not (any(n % g for n in slots) or g % nodes))
        if (gpus := next(fit, None)) is None:
            raise MoeInspectError(
                f"no number of GPUs up to {most} divides {_listed(slots)} slots and is a multiple "
                f"of {nodes} nodes: give --gpus"
            )
    if gpus < 1 or nodes < 1 or gpus % nodes:
        raise MoeInspectError(
            f"{gpus} GPUs on {nodes} nodes: the number of GPUs must be a multiple of the "
            "number of nodes"
        )
    if uneven := sorted(n for n in slots if n % gpus):
        kind = "experts" if physical is None else "physical experts"
        raise MoeInspectError(
            f"cannot split {uneven[0]} {kind} over {gpus} GPUs: use a divisor, or a plan of "
            f"--physical-experts {-(-max(slots) // gpus) * gpus}"
        )
    if groups is None:
        known = text_config(trace).get("n_group")
        groups = known if isinstance(known, int) and known > 0 else 1
        groups = 1 if any(E % groups for E in experts) else groups
    if groups < 1 or any(E % groups for E in experts):
        raise MoeInspectError(
            f"cannot split {_listed(experts)} experts into {groups} equal groups: use a divisor"
        )
    return {
        r: Layout(physical or trace.routers[r].experts, gpus, nodes, groups)
        for r in selection.routers
    }


def _listed(values: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(values)))


def shares(expert_P: np.ndarray, E: int, parts: int) -> np.ndarray:
    """The share of each expert's load that each of `parts` equal runs of slots (GPUs, or nodes)
    gets. float64 [E, parts]"""
    share_EG = np.zeros((E, parts))
    np.add.at(share_EG, (expert_P, np.arange(len(expert_P)) * parts // len(expert_P)), 1)
    return share_EG / share_EG.sum(1, keepdims=True)


def colocated(expert_P: np.ndarray, gpus: int) -> int:
    """Replicas on a GPU with another of the same expert, of experts with at most one per GPU."""
    slots_GS = np.sort(expert_P.reshape(gpus, -1), axis=1)
    few_E = np.bincount(expert_P) <= gpus
    return int(((slots_GS[:, 1:] == slots_GS[:, :-1]) & few_E[slots_GS[:, 1:]]).sum())


@policy(fitted=False)
def contiguous(load_E: np.ndarray, layout: Layout) -> np.ndarray:
    """Experts in order, then from the first again: what SGLang does without a plan."""
    return np.arange(layout.slots) % len(load_E)


@policy(fitted=False)
def round_robin(load_E: np.ndarray, layout: Layout) -> np.ndarray:
    """Expert e on GPU e mod G, then from the first again (vLLM's round_robin)."""
    gpu_P, position_P = np.divmod(np.arange(layout.slots), layout.slots // layout.gpus)
    return (position_P * layout.gpus + gpu_P) % len(load_E)


@policy()
def greedy(load_E: np.ndarray, layout: Layout) -> np.ndarray:
    """One more replica for each of the busiest experts, as far as the slots go; then the heaviest
    first, each to the lightest GPU."""
    E = len(load_E)
    expert_P = np.concatenate(
        [np.arange(E), np.resize(np.argsort(-load_E, kind="stable"), layout.slots - E)]
    )
    each_P = (load_E / np.bincount(expert_P, minlength=E))[expert_P]
    gpu_P, position_P = pack(each_P, layout.gpus)
    placed_P = np.empty(layout.slots, np.int64)
    placed_P[gpu_P * (layout.slots // layout.gpus) + position_P] = expert_P
    return placed_P


@policy()
def eplb(load_E: np.ndarray, layout: Layout) -> np.ndarray:
    """EPLB as DeepSeek published it, ties aside: groups of experts are packed onto nodes, experts
    replicated within their node, replicas packed onto its GPUs. If the groups do not divide among
    the nodes, all GPUs are one node."""
    E, slots, gpus = len(load_E), layout.slots, layout.gpus
    groups, nodes = layout.groups, layout.nodes
    if groups % nodes:
        groups, nodes = 1, 1
    size, of_node, room = E // groups, E // nodes, slots // nodes
    node_of_group, position = pack(load_E.reshape(groups, size).sum(1).astype(np.float64), nodes)
    # experts in the order of their nodes
    start_of_group = (node_of_group * (groups // nodes) + position) * size
    expert_of = np.empty(E, np.int64)
    expert_of[(start_of_group[:, None] + np.arange(size)).ravel()] = np.arange(E)
    expert_P = np.empty(slots, np.int64)
    for node in range(nodes):
        experts = expert_of[node * of_node : (node + 1) * of_node]
        replica_of, replicas = replicate(load_E[experts], room)
        gpu, position = pack((load_E[experts] / replicas)[replica_of], gpus // nodes)
        expert_P[node * room + gpu * (slots // gpus) + position] = experts[replica_of]
    return expert_P


@policy()
def eplb_global(load_E: np.ndarray, layout: Layout) -> np.ndarray:
    """EPLB without regard to groups and nodes."""
    return eplb(load_E, Layout(layout.slots, layout.gpus))


def pack(weight_I: np.ndarray, packs: int) -> tuple[np.ndarray, np.ndarray]:
    """Put items into packs of equal size: the heaviest first, each to the lightest pack with room.

    Return the pack of each item and its position within the pack, int64 [I]. Packs of one item
    keep the order."""
    items = len(weight_I)
    room = items // packs
    if room == 1:
        return np.arange(items), np.zeros(items, np.int64)
    pack_I, position_I = np.zeros(items, np.int64), np.zeros(items, np.int64)
    weight, filled = [0.0] * packs, [0] * packs
    weights = weight_I.tolist()
    for item in np.argsort(-weight_I, kind="stable").tolist():
        lightest = min((p for p in range(packs) if filled[p] < room), key=weight.__getitem__)
        pack_I[item], position_I[item] = lightest, filled[lightest]
        weight[lightest] += weights[item]
        filled[lightest] += 1
    return pack_I, position_I


def replicate(
    load_E: np.ndarray, slots: int, most: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Give each further slot to the expert whose replicas carry most, which makes the heaviest
    replica as light as possible.

    Return the expert of each replica, the first E in order, int64 [slots], and the replicas of
    each expert, int64 [E]. `most`: replicas that an expert may have at most."""
    expert_P, replicas_E = np.arange(slots), np.ones(len(load_E), np.int64)
    each_E = load_E.astype(np.float64)
    for p in range(len(load_E), slots):
        busiest = int(each_E.argmax())
        expert_P[p] = busiest
        replicas_E[busiest] += 1
        full = most is not None and replicas_E[busiest] >= most
        each_E[busiest] = -1 if full else load_E[busiest] / replicas_E[busiest]
    return expert_P, replicas_E
