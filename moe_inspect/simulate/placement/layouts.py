"""From the GPUs that were asked for to the layout of each router: where the replicas of its experts
can go, and what a placement of them comes to; and plans: the expert of every slot of a layout.

E experts, W windows, P slots, G GPUs, S = P / G slots of a GPU; slot p is on GPU p // S.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from moe_inspect.analysis.counting.select import Selection
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.config import text_config
from moe_inspect.simulate.placement.windows import FitWindows
from moe_inspect.trace.reader import Trace


@dataclass(frozen=True)
class Layout:
    """`slots` in all, the same number on each GPU; the same number of GPUs on each node. `groups`:
    of experts, which a router with group-limited routing chooses among (DeepSeek-V3)."""

    slots: int
    gpus: int
    nodes: int = 1
    groups: int = 1


def shares(expert_P: np.ndarray, E: int, parts: int) -> np.ndarray:
    """The share of each expert's load that each of `parts` equal runs of slots (GPUs, or nodes)
    gets. float64 [E, parts]"""
    share_EG = np.zeros((E, parts))
    np.add.at(share_EG, (expert_P, np.arange(len(expert_P)) * parts // len(expert_P)), 1)
    return share_EG / share_EG.sum(1, keepdims=True)


def colocated(expert_P: np.ndarray, gpus: int) -> int:
    """Replicas that share a GPU with another of the same expert, of experts with no more replicas
    than there are GPUs."""
    slots_GS = np.sort(expert_P.reshape(gpus, -1), axis=1)
    few_E = np.bincount(expert_P) <= gpus
    return int(((slots_GS[:, 1:] == slots_GS[:, :-1]) & few_E[slots_GS[:, 1:]]).sum())


MOST_SLOTS = 2**20  # of a layer
MOST_GPUS = 8  # where no number is asked for


@dataclass(frozen=True)
class Plans:
    """The expert of every slot, int64 [P], by (router, policy), with what the plans were made from.
    `loads`: assignments of each router's experts by window, int64 [W, E]."""

    trace: Trace
    selection: Selection
    windows: FitWindows
    layouts: dict[int, Layout]
    loads: dict[int, np.ndarray]
    of: dict[tuple[int, str], np.ndarray]


def layouts_of(
    trace: Trace,
    selection: Selection,
    gpus: int | None,
    nodes: int,
    physical: int | None,
    groups: int | None,
) -> dict[int, Layout]:
    """The layout of each router. `physical`: experts of a layer, replicas included; None: as many
    as there are. MoeInspectError where the numbers do not divide."""
    experts = {trace.routers[r].experts for r in selection.routers}
    if physical is not None and physical < (E := max(experts)):
        raise MoeInspectError(
            f"{physical} physical experts for {E} experts: each needs a slot, use at least {E}"
        )
    if physical is not None and physical > MOST_SLOTS:
        raise MoeInspectError(f"{physical:,} physical experts: use at most {MOST_SLOTS:,}")
    slots = experts if physical is None else {physical}
    gpus = _default_gpus(slots, nodes) if gpus is None else gpus
    if gpus < 1 or nodes < 1 or gpus % nodes:
        raise MoeInspectError(
            f"{gpus} GPUs on {nodes} nodes: the number of GPUs must be a multiple of the "
            "number of nodes"
        )
    if uneven := sorted(n for n in slots if n % gpus):
        kind = "experts" if physical is None else "physical experts"
        raise MoeInspectError(
            f"cannot split {uneven[0]} {kind} over {gpus} GPUs: use --physical-experts "
            f"{-(-max(slots) // gpus) * gpus}"
        )
    groups = _default_groups(trace, experts) if groups is None else groups
    if groups < 1 or any(E % groups for E in experts):
        raise MoeInspectError(
            f"cannot split {_listed(experts)} experts into {groups} equal groups: use a divisor"
        )
    return {
        r: Layout(physical or trace.routers[r].experts, gpus, nodes, groups)
        for r in selection.routers
    }


def _default_gpus(slots: set[int], nodes: int) -> int:
    """The largest number up to MOST_GPUS that divides the slots. At least two slots per GPU: with
    one there is nothing to choose."""
    most = max(1, min(MOST_GPUS, min(slots) // 2))
    for gpus in range(most, 0, -1):
        if not any(n % gpus for n in slots) and gpus % nodes == 0:
            return gpus
    raise MoeInspectError(
        f"no number of GPUs up to {most} divides {_listed(slots)} slots and is a multiple of "
        f"{nodes} nodes: give --gpus"
    )


def _default_groups(trace: Trace, experts: set[int]) -> int:
    known = text_config(trace).get("n_group")
    if isinstance(known, int) and known > 0 and not any(E % known for E in experts):
        return known
    return 1


def _listed(values: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(values)))
