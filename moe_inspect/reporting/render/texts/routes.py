"""The tokens of documents with their routes, and the contexts of every expert.

T tokens of all documents, K slots, E experts, P tokens of the pool, N contexts.
"""

# pyarrow has no complete types
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from moe_inspect.analysis.counting.select import Selection
from moe_inspect.progress import phase
from moe_inspect.reporting.render.texts.documents import selected_rows
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.schema import Router
from moe_inspect.trace.shard import Shard, codes

NOWHERE = -1
SEED = 0


@dataclass(frozen=True)
class Tokens:
    """The tokens of documents, one document after the other, each in the order of its text.
    shard_T, row_T: where they are; token_id_T; document_T: which of the documents. rank_T: the
    place in the document."""

    shard_T: np.ndarray
    row_T: np.ndarray
    token_id_T: np.ndarray
    document_T: np.ndarray
    rank_T: np.ndarray


@dataclass(frozen=True)
class Routes:
    """Of one router: ids int32 [K, T], NOWHERE for a slot without an expert or a token that does
    not reach the router; weights float32 [K, T], None where the trace has none."""

    ids: np.ndarray
    weights: np.ndarray | None


def tokens_of_documents(
    shards: Sequence[Shard], selection: Selection, numbers: np.ndarray, most: np.ndarray
) -> Tokens:
    """The first `most` tokens of each of these documents, as far as they are in the shards."""
    order = np.argsort(numbers)
    parts = list[pd.DataFrame]()
    for s, shard in enumerate(shards):
        rows, document_T, _ = selected_rows(shard, selection)
        at_T = order[np.minimum(np.searchsorted(numbers, document_T, sorter=order), len(order) - 1)]
        mine = numbers[at_T] == document_T
        if not mine.any():
            continue
        table = shard.tokens(["token_id", "sequence", "position", "phase"])
        code_T, phases = codes(table["phase"])
        rows = rows[mine]
        decoder_N = np.array([phase != "encode" for phase in phases])
        taken = {
            name: table[name].to_numpy()[rows] for name in ("token_id", "sequence", "position")
        }
        place = {"document": at_T[mine], "shard": s, "row": rows, "later": decoder_N[code_T[rows]]}
        parts.append(pd.DataFrame({**place, **taken}))
    found = pd.concat(parts, ignore_index=True)
    found = found.sort_values(["document", "later", "sequence", "position"], kind="stable")
    rank = found.groupby("document").cumcount()
    keep = rank.to_numpy() < most[found["document"]]
    found, rank = found[keep], rank[keep]
    shard_T, row_T, token_id_T, document_T = (
        found[name].to_numpy() for name in ("shard", "row", "token_id", "document")
    )
    return Tokens(shard_T, row_T, token_id_T, document_T, rank.to_numpy())


def read_routes(
    trace: Trace, shards: Sequence[Shard], routers: Sequence[int], tokens: Tokens
) -> list[Routes]:
    """The routes of the tokens through each router. Memory: the routes, and one router of one
    shard."""
    T = len(tokens.row_T)
    found = [empty_routes(trace.routers[r], T, trace.has_weights) for r in routers]
    numbers = np.unique(tokens.shard_T).tolist()
    advance = phase("reading text", len(numbers), "shards")
    for s in numbers:
        at = np.flatnonzero(tokens.shard_T == s)
        for routes, r in zip(found, routers, strict=True):
            fill_routes(routes, shards[s], r, tokens.row_T[at], at)
        advance(1)
    return found


def empty_routes(router: Router, tokens: int, weights: bool) -> Routes:
    """The routes of so many tokens, all NOWHERE."""
    shape = router.top_k, tokens
    return Routes(
        np.full(shape, NOWHERE, np.int32), np.zeros(shape, np.float32) if weights else None
    )


def fill_routes(
    routes: Routes, shard: Shard, router: int, rows: np.ndarray, at: np.ndarray
) -> None:
    """Writes the decisions on these rows of a shard into columns `at`."""
    seen, E = shard.seen(router), shard.trace.routers[router].experts
    if seen is not None:
        at, rows = at[seen[rows]], (np.cumsum(seen) - 1)[rows[seen[rows]]]
    K = len(routes.ids)
    for ids_T, slot in zip(routes.ids, shard.slots(router)[:K], strict=True):
        chosen = slot[rows].astype(np.int32)
        ids_T[at] = np.where(chosen == E, NOWHERE, chosen)
    if routes.weights is not None:
        for weights_T, slot in zip(routes.weights, shard.slot_weights(router)[:K], strict=True):
            weights_T[at] = slot[rows]


def mixed_order(pool: np.ndarray, domain_P: np.ndarray) -> np.ndarray:
    """The tokens of the pool in random order, all domains in turn."""
    shuffled = np.random.default_rng(SEED).permutation(len(pool))
    turn = pd.Series(domain_P[shuffled]).groupby(domain_P[shuffled]).cumcount().to_numpy()
    return pool[shuffled[np.argsort(turn, kind="stable")]]


def contexts(
    routes: Routes, experts: int, order: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The first `most` tokens of `order` that each expert was given. n_E: int64 [E], how many these
    are; token_N, the tokens, expert after expert; weight_N, their gate weights."""
    K = len(routes.ids)
    expert_PK = routes.ids[:, order].T.reshape(-1)
    by_expert = np.argsort(expert_PK, kind="stable")
    start_E = np.searchsorted(expert_PK[by_expert], np.arange(experts + 1))
    n_E = np.minimum(np.diff(start_E), most)
    steps = np.arange(int(n_E.sum())) - np.repeat(np.cumsum(n_E) - n_E, n_E)
    chosen = by_expert[np.repeat(start_E[:-1], n_E) + steps]
    token_N, slot_N = order[chosen // K], chosen % K
    weights = routes.weights
    return n_E, token_N, None if weights is None else weights[slot_N, token_N]
