"""EPLB, the expert-parallel load balancer that DeepSeek published with V3
(github.com/deepseek-ai/EPLB): a placement of one router's experts, from their loads, written from
the description of the algorithm.

E experts, P slots, G GPUs, S = P / G slots of a GPU. Loads are of one router. Slot for slot what
the published code gives where no two loads that it compares are equal: here ties go to the lower
number, there to whichever its unstable sort puts first.
"""

from __future__ import annotations

import numpy as np


def pack(weight_I: np.ndarray, packs: int) -> tuple[np.ndarray, np.ndarray]:
    """Items into packs of equally many: the heaviest first, each to the lightest pack with room.

    Returns the pack of each item and its position within the pack, int64 [I]. One item a pack stays
    where it is."""
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
    """Each further slot to the expert whose replicas carry most, which makes the heaviest replica
    as light as can be.

    Returns the expert of each replica, the first E in order, int64 [slots], and the replicas of
    each expert, int64 [E].
    `most`: replicas that an expert may have at most."""
    expert_P, replicas_E = np.arange(slots), np.ones(len(load_E), np.int64)
    each_E = load_E.astype(np.float64)
    for p in range(len(load_E), slots):
        busiest = int(each_E.argmax())
        expert_P[p] = busiest
        replicas_E[busiest] += 1
        full = most is not None and replicas_E[busiest] >= most
        each_E[busiest] = -1 if full else load_E[busiest] / replicas_E[busiest]
    return expert_P, replicas_E


def eplb(load_E: np.ndarray, slots: int, groups: int, nodes: int, gpus: int) -> np.ndarray:
    """The expert of each slot, int64 [P]; slot p is on GPU p // S. Groups of experts are packed
    onto nodes, experts replicated within their node, replicas packed onto its GPUs. Where the
    groups do not divide among the nodes, all GPUs are one node."""
    if groups % nodes:
        groups, nodes = 1, 1
    E = len(load_E)
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
