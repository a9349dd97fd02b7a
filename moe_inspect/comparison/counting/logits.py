"""How undecided a router was, and how far two routers' probabilities are apart.

T tokens, K slots, E experts, M margin deciles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_inspect.comparison.counting.kernels import Slots
from moe_inspect.trace.reader import Trace

SAMPLE_SHARDS = 4  # at most, and one in four, from which the deciles of the margin are taken
ROWS = 8192  # of logits at a time
EMPTY = np.zeros(0, np.float32)
LOGITS_DECIDE = 0.9  # share of decisions that take the largest logits, from which logits decide


@dataclass(frozen=True)
class Margins:
    edges: dict[int, np.ndarray]  # router → the nine limits between deciles; none if unknown
    medians: dict[int, float]  # router → the median of all decisions


def margins(trace: Trace, routers: list[int]) -> Margins | None:
    """The deciles, from shards spread over the trace; None where they are of no router. The k gate
    weights do not tell the margin: it is to the best expert that was not chosen."""
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
    """float32 [T]: the k-th largest logit minus the next; NaN where an expert was chosen whose
    logit is below that."""
    k, parts = len(slots), [EMPTY]
    for t in range(0, len(logits_TE), ROWS):
        part_TE = logits_TE[t : t + ROWS].astype(np.float32)
        E, lowest_T = part_TE.shape[1], np.full(len(part_TE), np.inf, np.float32)
        for slot_T in slots:
            at_T = slot_T[t : t + ROWS].astype(np.int64)
            of_T = part_TE[np.arange(len(at_T)), np.minimum(at_T, E - 1)]
            lowest_T = np.minimum(lowest_T, np.where(at_T < E, of_T, np.inf))
        part_TE.partition((E - k - 1, E - k), axis=1)
        next_T = part_TE[:, E - k - 1]
        parts.append(np.where(lowest_T < next_T, np.nan, part_TE[:, E - k] - next_T))
    return np.concatenate(parts)


def decile_of(margin_T: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """uint8 [T]: which tenth each margin is in."""
    decile_T = np.zeros(len(margin_T), np.uint8)
    for edge in edges:
        decile_T += margin_T > edge
    return decile_T


def _log_probabilities(logits_TE: np.ndarray, scoring: str) -> np.ndarray:
    """float32 [T, E]: log softmax; of routers with sigmoids, the log of these made to sum to 1."""
    logits_TE = logits_TE.astype(np.float32)
    if scoring == "sigmoid":
        logits_TE = -np.logaddexp(0, -logits_TE)
    logits_TE = logits_TE - logits_TE.max(axis=1, keepdims=True)
    return logits_TE - np.log(np.exp(logits_TE).sum(axis=1, keepdims=True))


def logit_shift(
    logits_a: np.ndarray, logits_b: np.ndarray, slots_a: Slots, scoring: str
) -> tuple[np.ndarray, np.ndarray]:
    """float32 [T], twice: mean over A's experts of |log r_B − log r_A|; and KL(A ‖ B), in nats."""
    E, shifts, divergences = logits_a.shape[1], [EMPTY], [EMPTY]
    for t in range(0, len(logits_a), ROWS):
        part = slice(t, t + ROWS)
        log_a, log_b = (_log_probabilities(x[part], scoring) for x in (logits_a, logits_b))
        apart_TE = log_b - log_a
        chosen_TK = np.stack([slot[part] for slot in slots_a], axis=1).astype(np.int64)
        known_TK = chosen_TK < E
        of_chosen = np.take_along_axis(np.abs(apart_TE), np.where(known_TK, chosen_TK, 0), axis=1)
        shifts.append((of_chosen * known_TK).sum(1) / np.maximum(known_TK.sum(1), 1))
        divergences.append(-(np.exp(log_a) * apart_TE).sum(1))
    return np.concatenate(shifts), np.concatenate(divergences)
