"""The loops over every assignment, compiled. Imported for traces that are worth the wait for numba (SMALL); each has its plain
twin in the simulation's own file, which smaller traces run and the tests compare.

T tokens, K slots, E experts, G groups, F capacity factors, D domains.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from moe_inspect.simulate import algorithms


@njit(nogil=True, cache=True)
def overflow(
    ids_KT: np.ndarray,
    start_G: np.ndarray,
    capacity_GF: np.ndarray,
    visit_N: np.ndarray,
    by_token: bool,
    E: int,
    domain_T: np.ndarray,
    decile_PT: np.ndarray,
    last_FD: np.ndarray,
    last_FPN: np.ndarray,
    load_GE: np.ndarray,
    worst_T: np.ndarray,
    best_T: np.ndarray,
) -> None:
    """`capacity.overflow_numpy`, in one sweep. The last five arrays are filled in place. `visit_N`, where not empty, is the order."""
    K, T = ids_KT.shape
    G = len(start_G) - 1
    for g in range(G):
        first, last = start_G[g], start_G[g + 1]
        count_E, least = load_GE[g], capacity_GF[g, 0]
        if len(visit_N):
            for i in range(first * K, last * K):
                k, t = visit_N[i] // T, visit_N[i] % T
                _queue(ids_KT[k, t], t, g, least, count_E, capacity_GF, domain_T, decile_PT, last_FD, last_FPN, worst_T, best_T)
        elif by_token:
            for t in range(first, last):
                for k in range(K):
                    _queue(ids_KT[k, t], t, g, least, count_E, capacity_GF, domain_T, decile_PT, last_FD, last_FPN, worst_T, best_T)
        else:
            for k in range(K):
                for t in range(first, last):
                    _queue(ids_KT[k, t], t, g, least, count_E, capacity_GF, domain_T, decile_PT, last_FD, last_FPN, worst_T, best_T)


@njit(nogil=True, cache=True)
def _queue(e, t, g, least, count_E, capacity_GF, domain_T, decile_PT, last_FD, last_FPN, worst_T, best_T):
    if e < 0:
        return
    place = count_E[e]
    count_E[e] = place + 1
    if place < least:  # fits under every factor: by far the most common
        best_T[t] = 0
        return
    level = 1
    while level < capacity_GF.shape[1] and capacity_GF[g, level] <= place:
        level += 1
    last_FD[level - 1, domain_T[t]] += 1
    last_FPN[level - 1, 0, decile_PT[0, t]] += 1
    last_FPN[level - 1, 1, decile_PT[1, t]] += 1
    worst_T[t] = max(worst_T[t], level)
    best_T[t] = min(best_T[t], level)


@njit(nogil=True, cache=True)
def lru(
    ids_KT: np.ndarray,
    phase_T: np.ndarray,
    rank_E: np.ndarray,
    touched_E: np.ndarray,
    load_E: np.ndarray,
    at_PE: np.ndarray,
    cold_P: np.ndarray,
) -> None:
    """Least recently used, for every number of slots at once: s slots hold the s experts used last, so an access hits where the
    expert's rank in the order of last use (0 is the latest) is below s. load_E counts accesses, at_PE[p, rank] those to known
    experts, cold_P those to new ones. rank_E (uint8 or uint16) and touched_E carry on from call to call."""
    K, T = ids_KT.shape
    zero, one = rank_E.dtype.type(0), rank_E.dtype.type(1)
    rank_8 = np.zeros(8, rank_E.dtype)
    for t in range(T):
        for k in range(K):  # the k experts of a decision are judged together, before any of them counts as used
            e = ids_KT[k, t]
            if e >= 0:
                load_E[e] += 1
                if touched_E[e]:
                    at_PE[phase_T[t], rank_E[e]] += 1
                else:
                    touched_E[e] = True
                    cold_P[phase_T[t]] += 1
        for first in range(0, K, 8):  # eight move to the front in one sweep of vector instructions over the ranks
            last, moved = min(first + 8, K), 0
            for k in range(first, first + 8):
                e = ids_KT[k, t] if k < last else -1
                rank_8[k - first] = rank_E[e] if e >= 0 else zero
                moved += e >= 0
            a, b, c, d, f, g, h, j = rank_8[0], rank_8[1], rank_8[2], rank_8[3], rank_8[4], rank_8[5], rank_8[6], rank_8[7]
            for i in range(len(rank_E)):
                here = rank_E[i]
                rank = here + (one if here < a else zero)  # one further back for each that was behind it
                rank += one if here < b else zero
                rank += one if here < c else zero
                rank += one if here < d else zero
                rank += one if here < f else zero
                rank += one if here < g else zero
                rank += one if here < h else zero
                rank += one if here < j else zero
                rank_E[i] = rank
            for k in range(first, last):
                e = ids_KT[k, t]
                if e >= 0:
                    moved -= 1
                    rank_E[e] = moved


@njit(nogil=True, cache=True)
def lfu(
    ids_KT: np.ndarray, phase_T: np.ndarray, slots: int, in_E: np.ndarray, count_E: np.ndarray, last_E: np.ndarray, hits_P: np.ndarray
) -> None:
    """Least frequently used, of equals the least recently. in_E: which experts are in; last_E[E] counts accesses; all carry on."""
    K, T = ids_KT.shape
    E = len(in_E)
    held = in_E.sum()
    for t in range(T):
        for k in range(K):
            e = ids_KT[k, t]
            if e >= 0:
                count_E[e] += 1
                last_E[E] += 1
                last_E[e] = last_E[E]
                hits_P[phase_T[t]] += in_E[e]
        for k in range(K):
            e = ids_KT[k, t]
            if e < 0 or in_E[e]:
                continue
            if held == slots:
                victim = -1
                for i in range(E):
                    if in_E[i] and (
                        victim < 0 or count_E[i] < count_E[victim] or (count_E[i] == count_E[victim] and last_E[i] < last_E[victim])
                    ):
                        wanted = False
                        for j in range(K):
                            wanted |= ids_KT[j, t] == i
                        if not wanted:
                            victim = i
                in_E[victim] = False
                held -= 1
            in_E[e] = True
            held += 1


@njit(nogil=True, cache=True)
def belady(
    ids_KT: np.ndarray, phase_T: np.ndarray, slots: int, known_E: np.ndarray, room_E: np.ndarray, known: np.ndarray, hits_P: np.ndarray
) -> None:
    """Belady's optimum without looking ahead, in memory for E experts: an access hits where its expert could have been kept since
    its last use beside all that has been kept so far (Jain and Lin 2016, OPTgen; as intervals by their ends: Carlisle and Lloyd 1995).

    known_E[:known[0]]: experts that could still be kept, latest use first. room_E[i]: the fewest slots free at any decision between
    the last use of expert i of that list and that of the one before it."""
    K, T = ids_KT.shape
    n = known[0]
    for t in range(T):
        wanted = 0
        for k in range(K):
            e = ids_KT[k, t]
            if e < 0:
                continue
            wanted += 1
            at = 0
            while at < n and known_E[at] != e:
                at += 1
            if at == n:
                continue
            hits_P[phase_T[t]] += 1
            full = n - 1
            for i in range(at, -1, -1):  # it has taken a slot at every decision since its last use
                room_E[i] -= 1
                if room_E[i] == 0:
                    full = i
            if at + 1 < n:
                room_E[at + 1] = min(room_E[at + 1], room_E[at])
            for i in range(at, n - 1):
                known_E[i], room_E[i] = known_E[i + 1], room_E[i + 1]
            n -= 1
            n = min(n, full)  # where all slots were taken, nothing older can have been kept
        if wanted == 0:
            continue
        for i in range(n - 1, -1, -1):
            known_E[i + wanted], room_E[i + wanted] = known_E[i], room_E[i]
        if n:
            room_E[wanted] = min(room_E[wanted], slots - wanted)
            n = 0 if room_E[wanted] == 0 else n
        n += wanted
        at = 0
        for k in range(K - 1, -1, -1):
            if ids_KT[k, t] >= 0:
                known_E[at], room_E[at] = ids_KT[k, t], slots + 1
                at += 1
    known[0] = n


serve_in_turn = njit(nogil=True, cache=True)(algorithms.serve_in_turn)
