"""Where the replicas of one router's experts can go, and what a placement of them comes to.

E experts, P slots, G GPUs, S = P / G slots of a GPU; slot p is on GPU p // S.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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
