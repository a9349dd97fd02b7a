"""FlashLB, the placement policy of vllm-ascend that looks at several windows: written from its
description, to compare with.

Experts count with their mean and a part of their standard deviation. Their replicas are counted out
in four groups, the busiest first: how many a group gets is tried, some fewer and some more than by
greed, by packing all experts and looking at the windows. W windows, E experts, G GPUs.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from moe_inspect.simulate.placement.policies import replicate

Z = NormalDist().inv_cdf(0.75)
GROUPS, AROUND = 4, 8


def flashlb(load_WE: np.ndarray, slots: int, gpus: int) -> np.ndarray:
    """The expert of each slot, int64 [slots]."""
    load_WE = load_WE.astype(np.float64)
    E, mean_E, covariance_EE = load_WE.shape[1], load_WE.mean(0), np.cov(load_WE.T)
    careful_E = mean_E + Z * np.sqrt(np.diag(covariance_EE))
    order_E, size = np.argsort(-careful_E, kind="stable"), -(-E // GROUPS)
    replicas_E, left = np.ones(E, np.int64), slots - E

    def counted(experts: np.ndarray, more: int) -> np.ndarray:
        return replicate(careful_E[experts], len(experts) + more)[1]

    def packed(group: np.ndarray, rest: np.ndarray, more: int) -> tuple[float, np.ndarray]:
        replicas_E[group], replicas_E[rest] = counted(group, more), counted(rest, left - more)
        expert_P = _pack(mean_E, covariance_EE, replicas_E, gpus)
        load_WG = (load_WE / replicas_E)[:, expert_P].reshape(len(load_WE), gpus, -1).sum(2)
        return float((load_WG.max(1) / load_WG.mean(1)).mean()), expert_P

    best_P = np.empty(0, np.int64)
    for number in range(GROUPS - 1):
        group, rest = np.split(order_E[number * size :], [size])
        greedy = int((counted(order_E[number * size :], left)[: len(group)] - 1).sum())
        tries = sorted(
            range(max(0, greedy - AROUND), min(left, greedy + AROUND) + 1),
            key=lambda more: abs(more - greedy),
        )
        found = {more: packed(group, rest, more) for more in tries}
        more = min(found, key=lambda more: found[more][0])
        best_P = found[more][1]
        replicas_E[group], left = counted(group, more), left - more
    return best_P


def _pack(
    mean_E: np.ndarray, covariance_EE: np.ndarray, replicas_E: np.ndarray, gpus: int
) -> np.ndarray:
    """The heaviest replica first, each to the GPU that lacks its expert, has room and comes to the
    least mean + Z standard deviations."""
    room = int(replicas_E.sum()) // gpus
    mean_G, variance_G, filled_G = np.zeros(gpus), np.zeros(gpus), np.zeros(gpus, np.int64)
    with_GE, placed_GS = np.zeros((gpus, len(mean_E))), np.full((gpus, room), -1)
    for e in np.argsort(-mean_E / replicas_E, kind="stable").tolist():
        n = replicas_E[e]
        for _ in range(n):
            after_G = variance_G + covariance_EE[e, e] / n**2 + 2 * with_GE[:, e] / n
            risk_G = mean_G + mean_E[e] / n + Z * np.sqrt(np.maximum(after_G, 0))
            risk_G[(filled_G == room) | (placed_GS == e).any(1)] = np.inf
            if np.isinf(risk_G).all():  # where none lacks it
                risk_G[filled_G < room] = 0
            g = int(risk_G.argmin())
            mean_G[g] += mean_E[e] / n
            variance_G[g] = after_G[g]
            with_GE[g] += covariance_EE[e] / n
            placed_GS[g, filled_G[g]] = e
            filled_G[g] += 1
    return placed_GS.reshape(-1)
