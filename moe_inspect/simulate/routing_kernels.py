"""The loops of `simulate routing` over the tokens and experts of a batch, compiled by numba.

T tokens, E experts.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def choose_largest(values_TE, k, room, guess_T, chosen_TE):  # type: ignore[no-untyped-def]
    """In turn, each of the tokens takes the experts of its k largest values, none of −inf, that
    have fewer than `room` tokens; ties go to the lowest id. guess_T: about the k-th largest, which
    it becomes. Values are finite or −inf."""
    kind, zero, (T, E) = values_TE.dtype.type, np.int32(0), values_TE.shape
    none, row_E, load_E, apart = kind(-np.inf), np.empty(E, kind), np.zeros(E, np.int32), kind(0)
    for t in range(T):
        there = zero
        for e in range(E):
            row_E[e] = values_TE[t, e] if load_E[e] < room else none
            there = np.int32(there + np.int32(row_E[e] > none))
        # a bound that k values are above, between a low one that more are above and a high one
        guess = guess_T[t] if np.isfinite(guess_T[t]) else kind(0)
        low, high, bound, step = none, kind(np.inf), guess, apart
        if there <= k:
            low = high = bound = none
        while low < high:
            found = zero
            for e in range(E):
                found = np.int32(found + np.int32(row_E[e] > bound))
            if found == k:
                break
            if found > k:
                low = bound
            else:
                high = bound
            if np.isinf(low) or np.isinf(high):
                step = kind(2) * step + kind(1e-9)
                bound += step if found > k else -step
            else:
                bound = low + (high - low) / kind(2)
                if bound in (low, high):  # neighbours: values of `high` are tied
                    bound = low = high
        found = zero
        for e in range(E):
            above = row_E[e] > bound
            chosen_TE[t, e] = above
            load_E[e] += np.int32(above)
            found = np.int32(found + np.int32(above))
        e = 0
        while found < k and bound > none:
            if row_E[e] == bound:
                chosen_TE[t, e] = True
                load_E[e] += 1
                found += 1
            e += 1
        if bound > none:
            apart += (abs(bound - guess) / kind(2) - apart) / kind(8)
            guess_T[t] = bound


@njit(nogil=True, cache=True)
def choose_reaching(values_TE, k_T, kth_T, chosen_TE):  # type: ignore[no-untyped-def]
    """Each token takes the experts of its k largest values, of which kth_T is the least; ties go to
    the lowest id."""
    E = values_TE.shape[1]
    for t in range(len(values_TE)):
        x, found = kth_T[t], np.int32(0)
        for e in range(E):
            reached = values_TE[t, e] >= x
            chosen_TE[t, e] = reached
            found = np.int32(found + np.int32(reached))
        e = E
        while found > k_T[t]:
            e -= 1
            if values_TE[t, e] == x:
                chosen_TE[t, e] = False
                found -= 1


@njit(nogil=True, cache=True)
def transpose(values_TE, values_ET):  # type: ignore[no-untyped-def]
    """In blocks that the first cache holds."""
    T, E = values_TE.shape
    for first in range(0, T, 16):
        for e in range(E):
            for t in range(first, min(first + 16, T)):
                values_ET[e, t] = values_TE[t, e]


@njit(nogil=True, cache=True)
def choose_of_columns(values_TE, kth_E, room_E, chosen_TE):  # type: ignore[no-untyped-def]
    """Each expert takes the tokens with values above kth_E and, of those with kth_E, the first for
    which it has room."""
    T, E = values_TE.shape
    for t in range(T):
        for e in range(E):
            equal = (values_TE[t, e] == kth_E[e]) & (room_E[e] > 0)
            chosen_TE[t, e] = (values_TE[t, e] > kth_E[e]) | equal
            room_E[e] -= equal


@njit(nogil=True, cache=True)
def subtract_highest(values_TE):  # type: ignore[no-untyped-def]
    """Makes each value how far it is below its row's highest."""
    E = values_TE.shape[1]
    for t in range(len(values_TE)):
        highest = values_TE[t, 0]
        for e in range(E):
            highest = values_TE[t, e] if values_TE[t, e] > highest else highest
        for e in range(E):
            values_TE[t, e] -= highest


@njit(nogil=True, cache=True)
def fewest(sorted_TE, total_T, enough):  # type: ignore[no-untyped-def]
    """How many of each row's values, from the last on, it takes to be `enough` of its total, or
    all; and the share that the least of them is."""
    T, E = sorted_TE.shape
    k_T, kth_T = np.empty(T, np.int64), np.empty(T, sorted_TE.dtype)
    for t in range(T):
        k, share = 1, np.float32(sorted_TE[t, E - 1] / total_T[t])
        found = np.float64(share)
        while k < E and found < enough:
            k += 1
            share = np.float32(sorted_TE[t, E - k] / total_T[t])
            found += share
        k_T[t], kth_T[t] = k, share
    return k_T, kth_T


@njit(nogil=True, cache=True)
def tally(chosen_TE, share_TE, model_TE, load_E, mass_E):  # type: ignore[no-untyped-def]
    """Adds the choices of each expert, and their shares. Returns how many are the model's, and the
    tokens without any."""
    agreed = unrouted = 0
    for t in range(len(chosen_TE)):
        found = same = np.int32(0)
        for e in range(len(load_E)):
            chosen = np.int32(chosen_TE[t, e])
            load_E[e] += chosen
            mass_E[e] += share_TE[t, e] if chosen else np.float32(0)
            same = np.int32(same + (chosen & np.int32(model_TE[t, e])))
            found = np.int32(found + chosen)
        agreed += same
        unrouted += found == 0
    return agreed, unrouted
