"""The loops over every assignment, compiled. Imported for traces that are worth the wait for numba (SMALL); each has its plain
twin in the simulation's own file, which smaller traces run and the tests compare.

T tokens, K slots, E experts, G groups, F capacity factors, D domains.
"""

from __future__ import annotations

import numpy as np
from numba import njit


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
