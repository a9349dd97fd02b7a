"""Which documents a page shows: the most telling of each domain, found without reading more than a
few shards of a long trace.

T tokens of a shard, D domains, E experts.
"""

# pyarrow has no complete types
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from moe_inspect.analysis.counting.select import Selection
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.shard import Shard, codes

if TYPE_CHECKING:
    from moe_inspect.reporting.tables.data import ReportData

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
    router = telling_router(data)
    lift_DE = None if router is None else _log_lift(data, router)
    of_domain = {name: d for d, name in enumerate(data.counts.domains)}
    parts = list[pd.DataFrame]()
    for shard in shards:
        rows, document_T, domain_T = selected_rows(shard, data.selection)
        score_T = np.zeros(len(rows))
        if router is not None and lift_DE is not None:
            domain_N = np.array([of_domain.get(name, 0) for name in domain_T.categories])
            score_T = _scores(shard, router, lift_DE, rows, domain_N[domain_T.codes])
        number_N, first_N, at_T = np.unique(document_T, return_index=True, return_inverse=True)
        found = {
            "document": number_N,
            "domain": domain_T.take(first_N).astype(object),
            "tokens": np.bincount(at_T, minlength=len(number_N)),
            "bits": np.bincount(at_T, score_T, minlength=len(number_N)),
        }
        parts.append(pd.DataFrame(found))
    joined = pd.concat(parts).groupby("document", as_index=False)
    documents = joined.agg({"domain": "first", "tokens": "sum", "bits": "sum"})
    documents["bits"] /= np.maximum(documents["tokens"], SHORT)
    return documents


def choose(documents: pd.DataFrame, amount: Amount, tokens: int, longest: int) -> pd.DataFrame:
    """The documents to show, in order: of each domain in turn the most telling that is left.
    `amount`: so many of each domain. None: as many as `tokens` tokens hold, of each the first
    `longest`, at least one. The column `shown` is the number of tokens shown."""
    # among equals those that are spread over the trace, not its first
    spread = (documents["document"] * 0.61803398875) % 1
    ordered = documents.assign(spread=spread).sort_values(
        ["bits", "spread"], ascending=[False, True]
    )
    size = ordered.groupby("domain")["tokens"].transform("sum")
    ordered = ordered.assign(rank=ordered.groupby("domain").cumcount(), size=size)
    ordered = ordered.sort_values(["rank", "size"], ascending=[True, False], kind="stable")
    shown = ordered["tokens"]
    if amount is None:
        shown = shown.clip(upper=longest)
        ordered = ordered[(shown.cumsum() <= tokens) | (np.arange(len(shown)) == 0)]
    elif amount != "all":
        ordered = ordered[ordered["rank"] < amount]
    ordered = ordered.assign(shown=shown.loc[ordered.index])
    return ordered.drop(columns=["spread", "rank", "size"]).reset_index(drop=True)


def selected_rows(shard: Shard, selection: Selection) -> tuple[np.ndarray, np.ndarray, Any]:
    """The rows of a shard's tokens that are selected, with the document and the domain (a
    pandas.Categorical) of each."""
    table = shard.tokens(["document", "domain", "phase"])
    code_T, labels = codes(table["domain"])
    phase_T, phases = codes(table["phase"])
    keep_T = np.ones(len(code_T), bool)
    if selection.domains is not None:
        keep_T &= np.array([name in selection.domains for name in labels], bool)[code_T]
    if selection.phase is not None:
        keep_T &= np.array([name == selection.phase for name in phases], bool)[phase_T]
    rows = np.flatnonzero(keep_T)
    domain_T = pd.Categorical.from_codes(code_T[rows], pd.Index(labels))
    return rows, table["document"].to_numpy()[rows], domain_T


def telling_router(data: ReportData) -> int | None:
    """The router whose experts tell domains apart best; None where there is nothing to tell."""
    if len(data.counts.domains) < 2:
        return None
    bits = data.tables["specialization"]["domain_mi_bits"]
    return (
        data.selection.routers[int(bits.to_numpy(float).argmax())] if bits.notna().all() else None
    )


def _log_lift(data: ReportData, router: int) -> np.ndarray:
    """float64 [D, E + 1], the last for a slot that routed nowhere."""
    load_DE = data.counts.assignments_DE(router) + 0.5  # so that none is −∞
    share_DE = load_DE / load_DE.sum(1, keepdims=True)
    return np.pad(np.log2(share_DE / share_DE.mean(0)), ((0, 0), (0, 1)))


def _scores(
    shard: Shard, router: int, lift_DE: np.ndarray, rows: np.ndarray, domain_T: np.ndarray
) -> np.ndarray:
    seen = shard.seen(router)
    total_T = np.zeros(len(rows))
    at = np.arange(len(rows)) if seen is None else np.flatnonzero(seen[rows])
    decision = rows if seen is None else (np.cumsum(seen) - 1)[rows[at]]
    for slot in shard.slots(router):
        total_T[at] += lift_DE[domain_T[at], slot[decision]]
    return total_T
