"""The loops over every assignment, compiled by numba.

T tokens, K slots, E experts, G groups, F capacity factors, P phases or positions, B batch sizes, W
words of 64 experts. Of a placement: G GPUs (or nodes).
"""

from __future__ import annotations

import numpy as np
from numba import njit

NOWHERE = 255  # level of a slot that routed nowhere


@njit(nogil=True, cache=True)
def queue(ids_KT, start_G, of_G, level_SC, visit_N, by_token, load_GE, level_KT):  # type: ignore[no-untyped-def]
    """How many assignments are ahead of each in the queue of its expert and group. ids_KT:
    experts, −1 for none. start_G: the first token of each group, and the end. of_G: the row of
    level_SC for each group. visit_N: indices into the flat ids_KT in the order of service; where
    empty, token after token (`by_token`) or slot after slot. Adds to load_GE; level_KT becomes how
    many of the capacity factors drop each assignment, NOWHERE where there is none."""
    K, T = ids_KT.shape
    for g in range(len(start_G) - 1):
        first, last, load_E, level_C = start_G[g], start_G[g + 1], load_GE[g], level_SC[of_G[g]]
        if len(visit_N):
            for i in range(first * K, last * K):
                k, t = visit_N[i] // T, visit_N[i] % T
                _join(ids_KT[k], t, load_E, level_C, level_KT[k])
        elif by_token:
            for t in range(first, last):
                for k in range(K):
                    _join(ids_KT[k], t, load_E, level_C, level_KT[k])
        else:
            for k in range(K):
                for t in range(first, last):
                    _join(ids_KT[k], t, load_E, level_C, level_KT[k])


@njit(nogil=True, cache=True)
def _join(ids_T, t, load_E, level_C, level_T):  # type: ignore[no-untyped-def]
    e = ids_T[t]
    if e < 0:
        level_T[t] = NOWHERE
        return
    ahead = load_E[e]
    load_E[e] = ahead + 1
    # looked up, since a branch on whether there is room would be mispredicted
    level_T[t] = level_C[min(ahead, len(level_C) - 1)]


@njit(nogil=True, cache=True)
def lru(slots, phase_T, rank_E, known, load_E, at_PE, cold_P):  # type: ignore[no-untyped-def]
    """Least recently used, for every number of cache slots at once: s of them hold the s experts
    used last, so an access hits where the expert's rank in the order of last use (0 is the latest)
    is below s. slots: K arrays [T], −1 for none. load_E counts accesses, at_PE[p, rank] those to
    known experts, cold_P those to new ones, whose ranks are from known[0] on. rank_E and `known`
    carry on from call to call."""
    for t in range(len(phase_T)):
        at_E, new = at_PE[phase_T[t]], 0
        # the k experts of a decision are judged together, before any of them counts as used
        for k in range(len(slots)):
            e = slots[k][t]
            if e >= 0:
                load_E[e] += 1
                if rank_E[e] < known[0]:
                    at_E[rank_E[e]] += 1
                else:
                    new += 1
        for k in range(len(slots)):
            e = slots[k][t]
            if e >= 0:  # it moves to the front: those before it are one further back
                own = rank_E[e]
                for i in range(len(rank_E)):
                    rank_E[i] += rank_E[i] < own
                rank_E[e] = 0
        if new:
            cold_P[phase_T[t]] += new
            known[0] += new


@njit(nogil=True, cache=True)
def lfu(ids_KT, phase_T, slots, order_E, at_E, count_E, held, hits_P):  # type: ignore[no-untyped-def]
    """Least frequently used, of equals the least recently. order_E[:held[0]]: the experts that are
    in, the next to go first; at_E: where each is there, −1 for out. Counts are far apart after a
    while, so an access moves its expert past few others. All carry on."""
    K, T = ids_KT.shape
    for t in range(T):
        for k in range(K):
            e = ids_KT[k, t]
            if e >= 0:
                hits_P[phase_T[t]] += at_E[e] >= 0
        for k in range(K):
            e = ids_KT[k, t]
            if e < 0:
                continue
            count_E[e] += 1
            at = at_E[e]
            if at < 0:
                if held[0] < slots:
                    free = held[0]
                    held[0] += 1
                else:
                    free = 0
                    while _is_wanted(ids_KT, t, order_E[free]):
                        free += 1
                    at_E[order_E[free]] = -1
                for i in range(free, 0, -1):
                    order_E[i] = order_E[i - 1]
                    at_E[order_E[i]] = i
                at = 0
            # past all that are used as often: it is the latest of them
            while at + 1 < held[0] and count_E[order_E[at + 1]] <= count_E[e]:
                order_E[at] = order_E[at + 1]
                at_E[order_E[at]] = at
                at += 1
            order_E[at], at_E[e] = e, at


@njit(nogil=True, cache=True)
def _is_wanted(ids_KT, t, e):  # type: ignore[no-untyped-def]
    wanted = False
    for k in range(len(ids_KT)):
        wanted |= ids_KT[k, t] == e
    return wanted


@njit(nogil=True, cache=True)
def belady(ids_KT, phase_T, slots, known_E, at_E, room_E, known, hits_P):  # type: ignore[no-untyped-def]
    """Belady's optimum without looking ahead, in memory for E experts: an access hits where its
    expert could have been kept since its last use beside all that has been kept so far (Jain and
    Lin 2016, OPTgen; as intervals by their ends: Carlisle and Lloyd 1995).

    known_E[:known[0]]: experts that could still be kept, latest use first; at_E: where each is
    there, if it is. room_E[i]: the fewest slots free at any decision between the last use of expert
    i of that list and that of the one before it."""
    K, T = ids_KT.shape
    n = known[0]
    for t in range(T):
        wanted = 0
        for k in range(K):
            e = ids_KT[k, t]
            if e < 0:
                continue
            wanted += 1
            at = at_E[e]
            if at >= n or known_E[at] != e:
                continue
            hits_P[phase_T[t]] += 1
            known_E[at] = -1
            least = room_E[at]
            for i in range(at + 1):  # it has taken a slot at every decision since its last use
                room_E[i] -= 1
                least = min(least, room_E[i])
            if least == 0:  # where all slots were taken, nothing older can have been kept
                n = 0
                while room_E[n] > 0:
                    n += 1
        if wanted == 0:
            continue
        kept = 0
        for i in range(n):
            kept += known_E[i] >= 0
        to = end = wanted + kept
        for i in range(n - 1, -1, -1):
            e = known_E[i]
            if e >= 0:
                to -= 1
                known_E[to], at_E[e], room_E[to] = e, to, room_E[i]
            elif to < end:  # what is between the uses of its neighbours now
                room_E[to] = min(room_E[to], room_E[i])
        if kept:
            room_E[wanted] = min(room_E[wanted], slots - wanted)
        n = wanted if kept and room_E[wanted] == 0 else end
        at = 0
        for k in range(K - 1, -1, -1):
            e = ids_KT[k, t]
            if e >= 0:
                known_E[at], at_E[e], room_E[at] = e, at, slots + 1
                at += 1
    known[0] = n


@njit(nogil=True, cache=True)
def fill_steps(  # type: ignore[no-untyped-def]
    slots,
    position_T,
    before_T,
    draft_N,
    batch_B,
    there_NBPW,
    filled_NBP,
    full_NBP,
    steps_2NBG,
    distinct_2NBG,
    load_E,
):
    """Adds tokens, each with the d before it in its sequence, to the decode steps of their
    positions. A step of B such windows is full: it is counted and the next begins. slots: K arrays
    [T], −1 for none; before_T: the token before, −1 for none; draft_N: the numbers d, rising, the
    first 0; batch_B: the batch sizes B. The last six arrays change in place: there_NBPW, the
    experts of the steps that are filling up, as bits; filled_NBP, their windows; full_NBP, the full
    steps; steps_2NBG and distinct_2NBG, full steps and the sum of their distinct experts, the n-th
    step of every position in group n mod G, a power of 2: first, for d > 0, of tokens alone at the
    positions that have d before them, then of the windows; load_E."""
    W, G = there_NBPW.shape[3], steps_2NBG.shape[3]
    # two sets that slots take in turn: with one, each slot would wait for the one before
    even_W, odd_W = np.zeros(W, np.uint64), np.zeros(W, np.uint64)
    for t in range(len(position_T)):
        p = position_T[t]
        even_W[:] = np.uint64(0)
        odd_W[:] = np.uint64(0)
        for k in range(len(slots)):
            e = slots[k][t]
            if e >= 0:
                load_E[e] += 1
                mine_W = odd_W if k % 2 else even_W
                mine_W[e >> 6] |= np.uint64(1) << np.uint64(e & 63)
        earlier, length = t, 1
        for n in range(len(draft_N)):
            while length <= draft_N[n] and before_T[earlier] >= 0:
                earlier = before_T[earlier]
                length += 1
                for k in range(len(slots)):
                    e = slots[k][earlier]
                    if e >= 0:
                        mine_W = odd_W if k % 2 else even_W
                        mine_W[e >> 6] |= np.uint64(1) << np.uint64(e & 63)
            if length <= draft_N[n]:
                break
            there_BPW, filled_BP = there_NBPW[n], filled_NBP[n]
            for b in range(len(batch_B)):
                there_W = there_BPW[b, p]
                filled_BP[b, p] += 1
                full = filled_BP[b, p] == batch_B[b]
                distinct = np.int64(0)
                for w in range(W):
                    word = there_W[w] | even_W[w] | odd_W[w]
                    if full:
                        distinct += _bits(word)
                    there_W[w] = np.uint64(0) if full else word
                if full:
                    g = full_NBP[n, b, p] & (G - 1)
                    filled_BP[b, p] = 0
                    full_NBP[n, b, p] += 1
                    steps_2NBG[1, n, b, g] += 1
                    distinct_2NBG[1, n, b, g] += distinct
                    if n == 0:
                        for m in range(1, len(draft_N)):
                            if draft_N[m] <= p:
                                steps_2NBG[0, m, b, g] += 1
                                distinct_2NBG[0, m, b, g] += distinct


@njit(nogil=True, cache=True)
def _bits(word):
    """How many bits are set: by twos, by fours, by bytes, and the bytes added up by a product
    (Warren, Hacker's Delight, 5-1)."""
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + (
        (word >> np.uint64(2)) & np.uint64(0x3333333333333333)
    )
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@njit(nogil=True, cache=True)
def reached(ids_KT: np.ndarray, miss_EG: np.ndarray, gpus: int) -> np.ndarray:
    """Sum over decisions of the GPUs that each is expected to reach, Σ_t Σ_g 1 − Π_k (1 − share),
    of each plan. ids_KT: experts, −1 for none; miss_EG: 1 − the share of each expert's load, by
    GPU, float32, `gpus` columns per plan, and a last row of ones for slots that routed nowhere."""
    K, T = ids_KT.shape
    nowhere, columns = len(miss_EG) - 1, miss_EG.shape[1]
    miss_G, missed_G = np.empty(columns, np.float32), np.zeros(columns)
    for t in range(T):
        miss_G[:] = 1
        for k in range(K):
            row_G = miss_EG[ids_KT[k, t] if ids_KT[k, t] >= 0 else nowhere]
            for g in range(columns):
                miss_G[g] *= row_G[g]
        for g in range(columns):
            missed_G[g] += miss_G[g]
    missed_N = np.zeros(columns // gpus)
    for g in range(columns):
        missed_N[g // gpus] += missed_G[g]
    return T * gpus - missed_N


# --- routing algorithms, on the tokens and experts of a batch


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
