"""How undecided a router was, and how far two routers' probabilities are apart.

T tokens, K slots, E experts, M margin deciles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_inspect.comparison.counting.kernels_numpy import Slots
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.shard import Shard

SAMPLE_SHARDS = 4  # at most, and one in four, from which the deciles of the margin are taken
ROWS = 8192  # of logits at a time


@dataclass(frozen=True)
class Margins:
    """The margin of a trace's decisions. source: "logits" (the k-th largest minus the next) or
    "weights" (the logarithm of the ratio of the two smallest gate weights: how far apart logits
    lie around there). edges: router → the nine limits between deciles; none where the margin
    cannot be known. medians: router → the median of all decisions."""

    source: str
    edges: dict[int, np.ndarray]
    medians: dict[int, float]


def margins(trace: Trace, routers: list[int]) -> Margins | None:
    """The deciles, from shards spread over the trace; None where neither logits nor weights are
    known."""
    source = "logits" if "logits" in trace.tables else "weights" if trace.has_weights else ""
    if not source:
        return None
    shards = [shard for shard in trace.shards if shard.files.tokens]
    step = max(SAMPLE_SHARDS, -(-len(shards) // SAMPLE_SHARDS))
    edges, medians = dict[int, np.ndarray](), dict[int, float]()
    for r in routers:
        parts = [margin_of(shard, r, source) for shard in shards[::step]]
        margin_T = np.concatenate([part for part in parts if part is not None] or [np.zeros(0)])
        margin_T = margin_T[np.isfinite(margin_T)]
        if len(margin_T):
            edges[r] = np.quantile(margin_T, np.arange(1, 10) / 10).astype(np.float32)
            medians[r] = float(np.median(margin_T))
    return Margins(source, edges, medians) if edges else None


def margin_of(shard: Shard, router: int, source: str) -> np.ndarray | None:
    """float32 [decisions], NaN where unknown; None where no decision has one (k = E, or k = 1
    and weights only)."""
    listed = shard.trace.routers[router]
    k = listed.top_k
    if source == "logits":
        return logit_margin(shard.logits(router), k) if k < listed.experts else None
    if k < 2 or not listed.first_choice_known:
        return None
    return weight_margin(shard.slot_weights(router)[:k])


def logit_margin(logits_TE: np.ndarray, k: int) -> np.ndarray:
    """float32 [T]: the k-th largest logit minus the next."""
    parts = [np.zeros(0, np.float32)]
    for t in range(0, len(logits_TE), ROWS):
        part_TE = -logits_TE[t : t + ROWS].astype(np.float32)
        part_TE.partition((k - 1, k), axis=1)
        parts.append(part_TE[:, k] - part_TE[:, k - 1])
    return np.concatenate(parts)


def weight_margin(weights: Slots) -> np.ndarray:
    """float32 [T]: the logarithm of the ratio of the two smallest gate weights."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(weights[-2] / weights[-1], dtype=np.float32)


def decile_of(margin_T: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """uint8 [T]: which tenth each margin is in."""
    decile_T = np.zeros(len(margin_T), np.uint8)
    for edge in edges:
        decile_T += margin_T > edge
    return decile_T


def log_probabilities(logits_TE: np.ndarray, scoring: str) -> np.ndarray:
    """float32 [T, E]: log softmax; of routers with sigmoids, the log of these made to sum to 1."""
    logits_TE = logits_TE.astype(np.float32)
    if scoring == "sigmoid":
        logits_TE = -np.logaddexp(0, -logits_TE)
    top_T1 = logits_TE.max(axis=1, keepdims=True)
    return logits_TE - top_T1 - np.log(np.exp(logits_TE - top_T1).sum(axis=1, keepdims=True))


def logit_shift(
    logits_a: np.ndarray, logits_b: np.ndarray, slots_a: Slots, scoring: str
) -> tuple[np.ndarray, np.ndarray]:
    """float32 [T], twice: mean over A's experts of |log r_B − log r_A|; and KL(A ‖ B), in nats."""
    E, shifts, divergences = logits_a.shape[1], list[np.ndarray](), list[np.ndarray]()
    for t in range(0, len(logits_a), ROWS):
        part = slice(t, t + ROWS)
        log_a, log_b = (log_probabilities(x[part], scoring) for x in (logits_a, logits_b))
        apart_TE = log_b - log_a
        chosen_TK = np.stack([slot[part] for slot in slots_a], axis=1).astype(np.int64)
        known_TK = chosen_TK < E
        of_chosen = np.take_along_axis(np.abs(apart_TE), np.where(known_TK, chosen_TK, 0), axis=1)
        shifts.append((of_chosen * known_TK).sum(1) / np.maximum(known_TK.sum(1), 1))
        divergences.append(-(np.exp(log_a) * apart_TE).sum(1))
    empty = np.zeros(0, np.float32)
    return np.concatenate([empty, *shifts]), np.concatenate([empty, *divergences])
