"""The order of slots within a decision: descending gate weight, so that slot 0 holds the first
choice.

Many routers return their choices in another order (`topk(sorted=False)`, selection biases,
engines that sort by expert id). T decisions, K slots, E experts.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moe_inspect.trace.schema import Router

BY_WEIGHT, UNKNOWN = "weight", "unknown"


def descending(weights_KT: np.ndarray, nowhere_KT: np.ndarray | None = None) -> np.ndarray | None:
    """The slots of each decision from the largest weight to the smallest, int64 [K, T]; None where
    all decisions are in that order already. Equal weights keep their order; slots that routed
    nowhere (bool [K, T]) come last."""
    key_KT = (
        weights_KT if nowhere_KT is None else np.where(nowhere_KT, np.float32(-np.inf), weights_KT)
    )
    if (key_KT[:-1] >= key_KT[1:]).all():
        return None
    return np.argsort(-key_KT, axis=0, kind="stable")


def chosen_logits(
    logits_TE: np.ndarray, ids_KT: np.ndarray, nowhere_KT: np.ndarray | None = None
) -> np.ndarray:
    """The router logits of the experts chosen, float32 [K, T]: a larger logit is a larger
    weight."""
    expert_KT = ids_KT if nowhere_KT is None else np.where(nowhere_KT, 0, ids_KT)
    return np.take_along_axis(logits_TE, expert_KT.T.astype(np.int64), axis=1).T.astype(np.float32)


def stated(router: Router, known: bool) -> Router:
    """A copy of `router` with its slot order set. A single slot is always in order."""
    return replace(router, slot_order=BY_WEIGHT if known or router.top_k == 1 else UNKNOWN)
