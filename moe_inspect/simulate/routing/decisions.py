"""What `simulate routing` reads of a trace: the decisions of a router and their logits, batch by
batch.

T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.simulate.routing.algorithms import SEED, RouterScores, scores_of
from moe_inspect.simulate.shards import check_length, slots
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.runs import run_edges
from moe_inspect.trace.shard import Shard

if TYPE_CHECKING:
    import pandas as pd

SAMPLE = 16_384  # tokens, at most, that an algorithm that learns is prepared on


def halves(trace: Trace) -> pd.Series:
    """Splits the documents into two halves with the same mix of domains. By document: 0 or 1,
    alternating within each domain."""
    listed: Any = (
        trace.documents().drop_duplicates("document").sort_values("document").set_index("document")
    )
    return listed.groupby("domain", observed=True).cumcount() % 2


class Decisions:
    """The decisions of one router in one shard, and the logits that they were made from."""

    def __init__(self, shard: Shard, r: int, half_of: pd.Series) -> None:
        self.router, seen = shard.trace.routers[r], shard.seen(r)
        table = shard.tokens(["batch", "token_id", "document"])
        kept = slice(None) if seen is None else seen
        self.batch_T, self.token_id_T = (
            table["batch"].to_numpy()[kept],
            table["token_id"].to_numpy()[kept],
        )
        self.half_T = half_of.reindex(table["document"].to_numpy()[kept]).to_numpy()
        ids_KT, self.logits_TE = slots(shard, r), shard.logits(r)
        check_length(ids_KT.T, len(self.batch_T), r)
        check_length(self.logits_TE, len(self.batch_T), r)
        if np.isnan(self.logits_TE).any() or not np.isfinite(self.logits_TE).any(1).all():
            raise MoeInspectError(
                f"{shard.trace.path}: router {r} has NaN logits, or tokens without any finite logit"
            )
        model_TE = np.zeros((len(self.batch_T), self.router.experts + 1), bool)
        model_TE[np.arange(len(self.batch_T)), ids_KT] = True  # an unused slot, −1: the last column
        self.model_TE = model_TE[:, :-1]

    def batch(self, part: Any, number: int) -> RouterScores:
        k, scoring = self.router.top_k, self.router.scoring
        return scores_of(
            self.logits_TE[part], self.model_TE[part], self.token_id_T[part], k, scoring, number
        )

    def tokens(self, half: int | None) -> np.ndarray:
        """The tokens of one half of the documents, or of all. int64 [T]"""
        return np.arange(len(self.half_T)) if half is None else np.flatnonzero(self.half_T == half)

    def batches(self, half: int | None) -> Iterator[RouterScores]:
        tokens = self.tokens(half)
        start_G = run_edges(self.batch_T[tokens])
        for first, last in pairwise(start_G):
            yield self.batch(
                tokens[first:last] if half is not None else slice(first, last),
                int(self.batch_T[tokens[first]]),
            )

    def sample(self, tokens: np.ndarray) -> RouterScores:
        """At most SAMPLE of the tokens, drawn uniformly at random."""
        drawn = np.random.default_rng(SEED).permutation(tokens)[:SAMPLE]
        return self.batch(np.sort(drawn), -1)
