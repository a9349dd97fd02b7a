"""The text of the documents whose routes differ most between two traces, on their page.

T tokens, K slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from moe_inspect.comparison.aligning.rows import rows_of_shard
from moe_inspect.comparison.decisions.data import Decisions
from moe_inspect.reporting.render.documents import (
    NOWHERE,
    DrawnRoutes,
    DrawnTokens,
    empty_routes,
    read_routes,
    tokens_of_documents,
)
from moe_inspect.reporting.render.html import Section
from moe_inspect.reporting.render.texts import TITLE, page_data, sizes, without_text
from moe_inspect.text import plural

MOST_SHARDS = 4  # that the documents are in
AGREEMENT = (
    "Each token in the colour of how many of its experts differ in B, at one layer; point at a "
    "token for its route in both traces through all layers."
)


def text_section(made: Decisions) -> Section | str:
    """The section, or why there is none: "" where nothing differs."""
    trace, worst = made.a, _worst_documents(made)
    if not len(worst):
        return ""
    if not len(trace.vocabulary_table):
        return Section(TITLE, without_text(trace), group="Decisions", name="text")
    routers = [r for r, _ in made.pairs]
    shards = sorted(set(worst["shard"]))
    listed = [trace.routers[r] for r in routers]
    budget, longest = sizes(listed * 2, trace.has_weights, len(worst))
    shown = np.minimum(worst["tokens"].to_numpy(), longest)
    kept = (shown.cumsum() <= budget) | (np.arange(len(shown)) == 0)
    worst, shown = worst[kept], shown[kept]
    tokens = tokens_of_documents(
        [trace.shard(n) for n in shards], made.selection, worst["document"].to_numpy(), shown
    )
    of_a = read_routes(trace, [trace.shard(n) for n in shards], routers, tokens)
    documents = worst.assign(shown=shown)
    of_b, T = _routes_of_b(made, shards, tokens), len(tokens.row_T)
    drawn = page_data(trace, routers, documents, tokens, of_a, T, of_b)
    differ = int((made.counts.document_rows()[:, 4] > 0).sum())
    return Section(
        TITLE,
        f"{AGREEMENT} Shown: {len(worst):,} of {plural(differ, 'document')} that differ, those "
        f"with the largest share of different decisions, at most {longest:,} tokens each.",
        group="Decisions",
        name="text",
        widget="text",
        data=drawn | {"row": _most_different(made)},
    )


def _worst_documents(made: Decisions) -> pd.DataFrame:
    """document, domain, tokens, shard: the documents with the largest share of other decisions, in
    at most MOST_SHARDS shards of A."""
    names = pd.Index(["document", "domain", "tokens", "all", "other"])
    parts = [
        pd.DataFrame(rows, columns=names).assign(shard=number)
        for number, rows in made.counts.documents.items()
    ]
    found = pd.concat(parts, ignore_index=True)
    found = found[found["other"] > 0]
    if not len(found):
        return found
    found = found.assign(share=found["other"] / found["all"])
    found = found.sort_values(["share", "document"], ascending=[False, True])
    shards = list(dict.fromkeys(found["shard"]))[:MOST_SHARDS]
    found = found[found["shard"].isin(shards)].drop_duplicates("document")
    domains = [made.counts.domains[d] for d in found["domain"]]
    most = made.options.top or len(found)
    return found.assign(domain=domains).head(most).reset_index(drop=True)


def _most_different(made: Decisions) -> int:
    return int(np.argmax([made.of(r).mismatch_UX.sum() for r, _ in made.pairs]))


def _routes_of_b(made: Decisions, shards: Sequence[int], tokens: DrawnTokens) -> list[DrawnRoutes]:
    """B's routes of the tokens; none for those that are not compared."""
    has_weights = made.b.has_weights and made.a.has_weights
    found = [empty_routes(made.a.routers[r], len(tokens.row_T), has_weights) for r, _ in made.pairs]
    traces = made.a, made.b
    for s, number in enumerate(shards):
        mine = np.flatnonzero(tokens.shard_T == s)
        for stack in sorted({made.router(r).stack for r, _ in made.pairs}):
            rows = rows_of_shard(traces, made.alignment.of_shard(number), stack, made.selection)
            rows = rows.take(np.isin(rows.a.rows, tokens.row_T[mine]))
            if not len(rows):
                continue
            order = np.argsort(tokens.row_T[mine])
            at = mine[order[np.searchsorted(tokens.row_T[mine], rows.a.rows, sorter=order)]]
            for routes, (r, other) in zip(found, made.pairs, strict=True):
                if made.router(r).stack != stack:
                    continue
                E = made.router(r).experts
                slots = rows.of_b(lambda shard, r=other: shard.slots(r), other)
                for ids_T, slot in zip(routes.ids, slots, strict=False):
                    ids_T[at] = np.where(slot == E, NOWHERE, slot.astype(np.int32))
                if routes.weights is None:
                    continue
                weights = rows.of_b(lambda shard, r=other: shard.slot_weights(r), other)
                for weights_T, slot in zip(routes.weights, weights, strict=False):
                    weights_T[at] = slot
    return found
