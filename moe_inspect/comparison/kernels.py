"""Loops over the decisions of a router: how they differ, how undecided the router was, and the
distance between the probabilities of two routers.

T tokens of a shard that are compared, N of them whose slots are not equal one by one, K slots,
E experts, V units (clusters of documents), X cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_inspect.trace.reader import Trace

Slots = tuple[np.ndarray, ...]  # K arrays [T], the number of experts where a slot routed nowhere
BLOCK = 8192  # decisions at a time
SAMPLE_SHARDS = 4  # at most, and one in four, from which the deciles of the margin are taken
EMPTY = np.zeros(0, np.float32)
LOGITS_DECIDE = 0.9  # share of decisions that take the largest logits, from which logits decide


def unequal(a: Slots, b: Slots) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decisions in which any slot differs, int64 [N]; and their experts in A and in B, [K, N]."""
    at = np.flatnonzero(np.any([x_T != y_T for x_T, y_T in zip(a, b, strict=True)], axis=0))
    a_KN, b_KN = (np.stack([slot_T[at] for slot_T in side]) for side in (a, b))
    return at, a_KN, b_KN


def nowhere_in_both(a: Slots, b: Slots, E: int) -> np.ndarray:
    """Number of slots that route nowhere in A and in B. int64 [T]"""
    nowhere_a, nowhere_b = (
        np.sum([slot_T == E for slot_T in side], axis=0, dtype=np.int64) for side in (a, b)
    )
    return np.minimum(nowhere_a, nowhere_b)


def sets(a_KN: np.ndarray, b_KN: np.ndarray, E: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A's assignments whose expert B did not choose, and the reverse, bool [K, N]; and the number
    of experts of the larger set that the other set lacks, int64 [N], 0 if the sets are equal. An
    expert that a decision names twice counts once; nowhere is no expert."""
    some_a_KN, some_b_KN = a_KN != E, b_KN != E
    equal_KKN = a_KN[:, None] == b_KN[None]
    lost_KN, gained_KN = some_a_KN & ~equal_KKN.any(1), some_b_KN & ~equal_KKN.any(0)
    size_a, size_b = some_a_KN.sum(0), some_b_KN.sum(0)
    common = np.minimum(size_a - lost_KN.sum(0), size_b - gained_KN.sum(0))
    return lost_KN, gained_KN, np.maximum(size_a, size_b) - common


def weight_difference(
    a_KN: np.ndarray, b_KN: np.ndarray, E: int, at: np.ndarray, a: Slots, b: Slots
) -> np.ndarray:
    """Σ |weight in A − weight in B| over the experts that both chose. float32 [T]. at: the N
    decisions whose slots differ; a_KN and b_KN: their experts. a, b: the weights."""
    total_T, total_N = np.zeros(len(a[0]), np.float32), np.zeros(len(at), np.float32)
    for of_a_T, of_b_T in zip(a, b, strict=True):
        total_T += np.abs(of_a_T - of_b_T)
    weights_b = [slot_T[at] for slot_T in b]
    for a_N, of_a_T in zip(a_KN, a, strict=True):
        weight_N, some_N = of_a_T[at], a_N != E
        for b_N, of_b_N in zip(b_KN, weights_b, strict=True):
            both_N = (a_N == b_N) & some_N
            total_N += np.where(both_N, np.abs(weight_N - of_b_N), np.float32(0))
    total_T[at] = total_N
    return total_T


def add_cells(
    total_VX: np.ndarray, unit_N: np.ndarray, cell_N: np.ndarray, by_N: np.ndarray | None = None
) -> None:
    """Add `by_N`, integers far below 2^53, or 1 to each (unit, cell), in place."""
    sums = np.bincount(unit_N * total_VX.shape[1] + cell_N, by_N, total_VX.size)
    total_VX += sums.reshape(total_VX.shape).astype(total_VX.dtype)


def add_moves(
    a_KN: np.ndarray,
    b_KN: np.ndarray,
    lost_KN: np.ndarray,
    gained_KN: np.ndarray,
    unit_N: np.ndarray,
    moved_UE: np.ndarray,
    flips_EE: np.ndarray,
) -> None:
    """Add assignments that only B has, subtract those that only A has, and count each pair of a
    lost and a gained expert. In place."""
    for experts_KN, which_KN, sign in ((a_KN, lost_KN, -1), (b_KN, gained_KN, 1)):
        slot, at = np.nonzero(which_KN)
        add_cells(moved_UE, unit_N[at], experts_KN[slot, at], np.full(len(at), sign))
    E = len(flips_EE)
    for n in range(0, len(unit_N), BLOCK):
        part = slice(n, n + BLOCK)
        flip_KKN = a_KN[:, None, part].astype(np.intp) * E + b_KN[None, :, part]
        flips = flip_KKN[lost_KN[:, None, part] & gained_KN[None, :, part]]
        flips_EE += np.bincount(flips, minlength=E * E).reshape(E, E)


@dataclass(frozen=True)
class Margins:
    """Deciles of the margins of A's routers."""

    edges: dict[int, np.ndarray]  # router → the nine limits between deciles
    medians: dict[int, float]  # router → the median of all decisions


def margins(trace: Trace, routers: list[int]) -> Margins | None:
    """Deciles of the margins, from shards spread over the trace; None if no router's are known. The
    k gate weights do not show the margin, which is to the best expert that was not chosen."""
    if "logits" not in trace.tables:
        return None
    shards = [shard for shard in trace.shards if shard.files.tokens]
    step = max(SAMPLE_SHARDS, -(-len(shards) // SAMPLE_SHARDS))
    edges, medians = dict[int, np.ndarray](), dict[int, float]()
    for r in routers:
        k, E = trace.routers[r].top_k, trace.routers[r].experts
        if k == E:
            continue
        parts = [logit_margin(s.logits(r), s.slots(r)[:k]) for s in shards[::step]]
        margin_T = np.concatenate([EMPTY, *parts])
        known_T = np.isfinite(margin_T)
        # else biases or groups of experts decide too
        if known_T.sum() > LOGITS_DECIDE * len(margin_T):
            margin_T = margin_T[known_T]
            edges[r] = np.quantile(margin_T, np.arange(1, 10) / 10).astype(np.float32)
            medians[r] = float(np.median(margin_T))
    return Margins(edges, medians) if edges else None


def logit_margin(logits_TE: np.ndarray, slots: Slots) -> np.ndarray:
    """The k-th largest logit minus the next; NaN if a lower expert was chosen. float32 [T]"""
    k, parts = len(slots), [EMPTY]
    for t in range(0, len(logits_TE), BLOCK):
        part_TE = logits_TE[t : t + BLOCK].astype(np.float32)
        E, lowest_T = part_TE.shape[1], np.full(len(part_TE), np.inf, np.float32)
        for slot_T in slots:
            at_T = slot_T[t : t + BLOCK].astype(np.int64)
            of_T = part_TE[np.arange(len(at_T)), np.minimum(at_T, E - 1)]
            lowest_T = np.minimum(lowest_T, np.where(at_T < E, of_T, np.inf))
        part_TE.partition((E - k - 1, E - k), axis=1)
        next_T = part_TE[:, E - k - 1]
        parts.append(np.where(lowest_T < next_T, np.nan, part_TE[:, E - k] - next_T))
    return np.concatenate(parts)


def _log_probabilities(logits_TE: np.ndarray, scoring: str) -> np.ndarray:
    """Log softmax; for sigmoid routers, the log of the normalised sigmoids. float32 [T, E]"""
    logits_TE = logits_TE.astype(np.float32)
    if scoring == "sigmoid":
        logits_TE = -np.logaddexp(0, -logits_TE)
    logits_TE = logits_TE - logits_TE.max(axis=1, keepdims=True)
    return logits_TE - np.log(np.exp(logits_TE).sum(axis=1, keepdims=True))


def logit_shift(
    logits_a: np.ndarray, logits_b: np.ndarray, slots_a: Slots, scoring: str
) -> tuple[np.ndarray, np.ndarray]:
    """Mean over A's experts of |log r_B − log r_A|, and KL(A ‖ B) in nats. float32 [T] each"""
    E, shifts, divergences = logits_a.shape[1], [EMPTY], [EMPTY]
    for t in range(0, len(logits_a), BLOCK):
        part = slice(t, t + BLOCK)
        log_a, log_b = (_log_probabilities(x[part], scoring) for x in (logits_a, logits_b))
        apart_TE = log_b - log_a
        chosen_TK = np.stack([slot[part] for slot in slots_a], axis=1).astype(np.int64)
        known_TK = chosen_TK < E
        of_chosen = np.take_along_axis(np.abs(apart_TE), np.where(known_TK, chosen_TK, 0), axis=1)
        shifts.append((of_chosen * known_TK).sum(1) / np.maximum(known_TK.sum(1), 1))
        divergences.append(-(np.exp(log_a) * apart_TE).sum(1))
    return np.concatenate(shifts), np.concatenate(divergences)
