"""The loops of `simulate routing` over the tokens and experts of a batch, compiled by numba.

T tokens, E experts; N tokens drawn of them; R rounds of a fit.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def choose_largest(  # type: ignore[no-untyped-def]
    values_TE, drawn_N, times_N, k, add_E, room_E, guess_T, off_2, chosen_NE, bits_E
):
    """In turn, each of the tokens drawn takes the experts of its k largest values + add_E; ties go
    to the lowest id. times_N: how often it takes them. room_E: how many tokens each expert takes
    still; a full one's add_E is −inf. guess_T: about the k-th largest, less off_2[0], what guesses
    are off on average; off_2[1]: how far the values there are apart. Both become what was found.
    bits_E: integers as wide as the values, one more than there are experts."""
    # as integers in the order of the floats, whose least and most vector instructions find; in one
    # function, since numba counts references to the arrays of each call
    row_E, key_E, E = bits_E.view(add_E.dtype), np.empty_like(bits_E), len(add_E)
    kind, whole, zero = add_E.dtype.type, bits_E.dtype.type, np.int32(0)
    lowest, highest = np.iinfo(bits_E.dtype).min, np.iinfo(bits_E.dtype).max
    none, bottom, top, one = kind(-np.inf), whole(lowest), whole(highest), whole(1)
    row_E[E] = none
    nowhere = whole(lowest - bits_E[E])
    limited = room_E.min() <= times_N.sum()
    off = latest = off_2[0]
    for n in range(len(drawn_N)):
        t, times = drawn_N[n], np.int32(times_N[n])
        for e in range(E):
            row_E[e] = values_TE[t, e] + add_E[e]
        for e in range(E):
            bits = bits_E[e]
            key_E[e] = bits if bits >= 0 else whole(lowest - bits)
        # a number that k of them reach, between one that more reach and one that fewer do
        low, high, more, fewer, step = -np.inf, np.inf, 0, 0, off_2[1]
        first = guess = guess_T[t] + off
        x, least, most, over, searching = bottom, bottom, top, 0, True
        while searching:
            row_E[E] = guess
            bits = bits_E[E]
            x = bits if bits >= 0 else whole(lowest - bits)
            x = max(x, whole(least + one)) if over > 0 else min(x, most)
            found, least, most = zero, top, bottom
            for e in range(E):
                key = key_E[e]
                reached = key >= x
                found = np.int32(found + np.int32(reached))
                least = min(least, key if reached else top)
                most = max(most, bottom if reached else key)
            over = found - k
            if over == 0:
                searching = False
            elif over == 1:
                x, searching = whole(least + one), False
            elif over == -1 or (over < 0 and most <= nowhere):
                x, searching = most, False
            else:
                nearest = least if over > 0 else most
                bits_E[E] = nearest if nearest >= 0 else whole(lowest - nearest)
                if over > 0:
                    low, more = float(row_E[E]), over
                else:
                    high, fewer = float(row_E[E]), over
                if low == high:
                    x, searching = nearest, False
                elif np.isinf(low) or np.isinf(high):
                    guess = (low if over > 0 else high) + step * over
                    step = 2 * step + 1e-9
                else:
                    guess = low + (high - low) * more / (more - fewer)
        x, found = max(x, whole(nowhere + one)), zero
        for e in range(E):
            reached = key_E[e] >= x
            chosen_NE[n, e] = reached
            room_E[e] -= times if reached else zero
            found = np.int32(found + np.int32(reached))
        e = 0
        while found < k and x > nowhere + 1:  # of those equal to the next below, the first
            if key_E[e] == x - 1:
                chosen_NE[n, e] = True
                room_E[e] -= times
                found += 1
            e += 1
        e = E
        while found > k:
            e -= 1
            if key_E[e] == x:
                chosen_NE[n, e] = False
                room_E[e] += times
                found -= 1
        if limited:
            for e in range(E):
                add_E[e] = add_E[e] if room_E[e] > 0 else none
        off = latest  # not of the token before, which the processor may still be busy with
        if x > nowhere + 1:
            bits_E[E] = x if x >= 0 else whole(lowest - x)
            latest += (row_E[E] - first) / 8
            off_2[1] += (abs(row_E[E] - first) / 2 - off_2[1]) / 8
            guess_T[t] = row_E[E] - latest
    off_2[0] = latest


@njit(nogil=True, cache=True)
def fit_bias(scores_TE, k, start_R, drawn_N, times_N, rate_R, guess_T):  # type: ignore[no-untyped-def]
    """The bias after rounds, each of which chooses for the tokens drawn for it (their numbers from
    start_R on) and then takes a step."""
    N, E = np.diff(start_R).max(), scores_TE.shape[1]
    bias_E, room_E, off_2 = np.zeros(E, np.float32), np.empty(E, np.int32), np.zeros(2)
    chosen_NE, bits_E = np.empty((N, E), np.bool_), np.empty(E + 1, np.int32)
    for r in range(len(rate_R)):
        room_E[:] = 2**31 - 1
        of = slice(start_R[r], start_R[r + 1])
        drawn = scores_TE, drawn_N[of], times_N[of], k
        choose_largest(*drawn, bias_E, room_E, guess_T, off_2, chosen_NE, bits_E)
        step_bias(bias_E, -room_E, rate_R[r])
    return bias_E


@njit(nogil=True, cache=True)
def step_bias(bias_E, load_E, rate):  # type: ignore[no-untyped-def]
    """Moves each bias by the sign of mean − load."""
    mean = load_E.mean()
    for e in range(len(bias_E)):
        bias_E[e] += np.float32(rate * np.sign(mean - load_E[e]))


@njit(nogil=True, cache=True, fastmath={"reassoc"})
def plan_sums(plan_TE: np.ndarray, weight_E: np.ndarray) -> np.ndarray:
    """The sum of each column once each row, times the weights, is made to sum to 1; without the
    weights. float64 [E]"""
    sum_E = np.zeros(len(weight_E))
    for t in range(len(plan_TE)):
        total = 0.0
        for e in range(len(weight_E)):
            total += plan_TE[t, e] * weight_E[e]
        total = 1 / total
        for e in range(len(weight_E)):
            sum_E[e] += plan_TE[t, e] * total
    return sum_E


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
