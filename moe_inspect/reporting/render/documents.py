"""Which documents a page shows, the most telling of each domain, found without reading more than a
few shards of a long trace; their tokens with their routes, and the contexts of every expert.

T tokens, D domains, E experts, K slots, P tokens of the pool, N contexts.
"""

# pyarrow has no complete types
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from moe_inspect.analysis.counting.select import Selection, selected_tokens
from moe_inspect.progress import tracked
from moe_inspect.reporting.tables.data import ReportData
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.schema import Router
from moe_inspect.trace.shard import Shard, codes

READ = 40_000_000  # assignments of all shards that are read, at least one shard
MOST_SHARDS = 16
SHORT = 64  # tokens: a shorter document is judged as if it had so many
Amount = int | Literal["all"] | None


def shards_to_read(trace: Trace, routers: tuple[int, ...], amount: Amount) -> list[Shard]:
    """A few shards, spread over the trace, where no number of documents was asked for; else all."""
    shards = [shard for shard in trace.shards if shard.files.tokens]
    if amount or not shards:
        return shards
    each = sum(trace.routers[r].top_k for r in routers) * trace.n_tokens / len(shards)
    n = min(len(shards), MOST_SHARDS, max(1, int(READ / each)))
    return [shards[int((i + 0.5) * len(shards) / n)] for i in range(n)]


def find_documents(data: ReportData, shards: list[Shard]) -> pd.DataFrame:
    """document, domain, tokens, bits: a row per document with selected tokens in these shards.

    bits: what the experts of one router say for the document's domain, in bits per token: the mean
    over its tokens of Σ log₂ (share of the expert in the domain ÷ its mean over the domains). 0
    where there is one domain only."""
    router, parts = telling_router(data), list[pd.DataFrame]()
    lift_DE = None if router is None else _log_lift(data, router)
    of_domain = {name: d for d, name in enumerate(data.counts.domains)}
    for shard in shards:
        seen = selected_tokens(shard, data.selection)
        score_T = np.zeros(len(seen.number_T))
        if router is not None and lift_DE is not None:
            domain_T = np.array([of_domain.get(name, 0) for name in seen.domains])[seen.domain_T]
            at_T, decision = _decisions(shard, router, seen.number_T)
            for slot in shard.slots(router):
                score_T[at_T] += lift_DE[domain_T[at_T], slot[decision]]
        number_N, first_N, at_T = np.unique(seen.document_T, return_index=True, return_inverse=True)
        found = {
            "document": number_N,
            "domain": np.array(seen.domains, object)[seen.domain_T[first_N]],
            "tokens": np.bincount(at_T, minlength=len(number_N)),
            "bits": np.bincount(at_T, score_T, minlength=len(number_N)),
        }
        parts.append(pd.DataFrame(found))
    joined = pd.concat(parts).groupby("document", as_index=False)
    documents = joined.agg({"domain": "first", "tokens": "sum", "bits": "sum"})
    documents["bits"] /= np.maximum(documents["tokens"], SHORT)
    return documents


def _log_lift(data: ReportData, router: int) -> np.ndarray:
    """float64 [D, E + 1], the last for a slot that routed nowhere."""
    load_DE = data.counts.assignments_DE(router) + 0.5  # so that none is −∞
    share_DE = load_DE / load_DE.sum(1, keepdims=True)
    return np.pad(np.log2(share_DE / share_DE.mean(0)), ((0, 0), (0, 1)))


def _decisions(shard: Shard, router: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of these rows of a shard reach the router, and which decisions of it are theirs."""
    seen = shard.seen(router)
    if seen is None:
        return np.arange(len(rows)), rows
    at = np.flatnonzero(seen[rows])
    return at, (np.cumsum(seen) - 1)[rows[at]]


def choose(documents: pd.DataFrame, amount: Amount, tokens: int, longest: int) -> pd.DataFrame:
    """The documents to show, in order: of each domain in turn the most telling that is left.
    `amount`: so many of each domain. None: as many as `tokens` tokens hold, of each the first
    `longest`, at least one. The column `shown` is the number of tokens shown."""
    # among equals those that are spread over the trace, not its first
    spread = (documents["document"] * 0.61803398875) % 1
    ordered = documents.assign(spread=spread)
    ordered = ordered.sort_values(["bits", "spread"], ascending=[False, True])
    by_domain = ordered.groupby("domain")
    ordered = ordered.assign(rank=by_domain.cumcount(), size=by_domain["tokens"].transform("sum"))
    ordered = ordered.sort_values(["rank", "size"], ascending=[True, False], kind="stable")
    shown = ordered["tokens"]
    if amount is None:
        shown = shown.clip(upper=longest)
        ordered = ordered[(shown.cumsum() <= tokens) | (np.arange(len(shown)) == 0)]
    elif amount != "all":
        ordered = ordered[ordered["rank"] < amount]
    ordered = ordered.assign(shown=shown.loc[ordered.index])
    return ordered.drop(columns=["spread", "rank", "size"]).reset_index(drop=True)


def telling_router(data: ReportData) -> int | None:
    """The router whose experts tell domains apart best; None where there is nothing to tell."""
    if len(data.counts.domains) < 2:
        return None
    bits = data.tables["specialization"]["domain_mi_bits"].to_numpy(float)
    return None if np.isnan(bits).any() else data.selection.routers[int(bits.argmax())]


NOWHERE = -1


@dataclass(frozen=True)
class DrawnTokens:
    """The tokens of documents, one document after the other, each in the order of its text.
    shard_T, row_T: where they are; token_id_T; document_T: which of the documents. rank_T: the
    place in the document."""

    shard_T: np.ndarray
    row_T: np.ndarray
    token_id_T: np.ndarray
    document_T: np.ndarray
    rank_T: np.ndarray


@dataclass(frozen=True)
class DrawnRoutes:
    """Of one router: ids int32 [K, T], NOWHERE for a slot without an expert or a token that does
    not reach the router; weights float32 [K, T], None where the trace has none."""

    ids: np.ndarray
    weights: np.ndarray | None


def tokens_of_documents(
    shards: Sequence[Shard], selection: Selection, numbers: np.ndarray, most: np.ndarray
) -> DrawnTokens:
    """The first `most` tokens of each of these documents, as far as they are in the shards."""
    order, columns = np.argsort(numbers), ["token_id", "sequence", "position"]
    parts = list[pd.DataFrame]()
    for s, shard in enumerate(shards):
        seen = selected_tokens(shard, selection)
        place_T = np.searchsorted(numbers, seen.document_T, sorter=order)
        at_T = order[np.minimum(place_T, len(order) - 1)]
        mine = numbers[at_T] == seen.document_T
        if not mine.any():
            continue
        rows, table = seen.number_T[mine], shard.tokens([*columns, "phase"])
        code_T, phases = codes(table["phase"])
        later_N = np.array([phase != "encode" for phase in phases])
        place = {"document": at_T[mine], "shard": s, "row": rows, "later": later_N[code_T[rows]]}
        taken = {name: table[name].to_numpy()[rows] for name in columns}
        parts.append(pd.DataFrame(place | taken))
    found = pd.concat(parts, ignore_index=True)
    found = found.sort_values(["document", "later", "sequence", "position"], kind="stable")
    found = found.assign(rank=found.groupby("document").cumcount())
    found = found[found["rank"].to_numpy() < most[found["document"]]]
    names = ("shard", "row", "token_id", "document", "rank")
    return DrawnTokens(*(found[name].to_numpy() for name in names))


def read_routes(
    trace: Trace, shards: Sequence[Shard], routers: Sequence[int], tokens: DrawnTokens
) -> list[DrawnRoutes]:
    """The routes of the tokens through each router. Memory: these, and a router of a shard."""
    T = len(tokens.row_T)
    found = [empty_routes(trace.routers[r], T, trace.has_weights) for r in routers]
    for s in tracked(np.unique(tokens.shard_T).tolist(), "reading text", "shards"):
        shard, drawn = shards[s], np.flatnonzero(tokens.shard_T == s)
        for routes, r in zip(found, routers, strict=True):
            reach, rows = _decisions(shard, r, tokens.row_T[drawn])
            at, E, K = drawn[reach], trace.routers[r].experts, len(routes.ids)
            for ids_T, slot in zip(routes.ids, shard.slots(r)[:K], strict=True):
                chosen = slot[rows].astype(np.int32)
                ids_T[at] = np.where(chosen == E, NOWHERE, chosen)
            if routes.weights is not None:
                for weights_T, slot in zip(routes.weights, shard.slot_weights(r)[:K], strict=True):
                    weights_T[at] = slot[rows]
    return found


def empty_routes(router: Router, tokens: int, weights: bool) -> DrawnRoutes:
    """The routes of so many tokens, all NOWHERE."""
    ids = np.full((router.top_k, tokens), NOWHERE, np.int32)
    return DrawnRoutes(ids, np.zeros(ids.shape, np.float32) if weights else None)


def contexts(
    routes: DrawnRoutes, experts: int, order: np.ndarray, most: int
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
