"""The section "Text" of a page and the contexts on the cards of experts (templates/text.js).

T tokens, R routers, K slots, E experts.
"""

# pyarrow has no complete types
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import base64
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd

from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.render import documents as docs
from moe_inspect.reporting.render.html import Section
from moe_inspect.reporting.render.payload import Json
from moe_inspect.reporting.tables.data import ReportData
from moe_inspect.reporting.tables.summary import ROUTES_TELL
from moe_inspect.text import layer_label, legible, plural, readable
from moe_inspect.trace.reader import Trace, address
from moe_inspect.trace.schema import Router
from moe_inspect.trace.texts import as_text, pieces_of

TEXT_BYTES = 1_000_000  # of the documents on the page, where no number of them was asked for
MOST_BYTES = 64_000_000  # beyond which a browser has trouble
LEVELS = 127  # of gate weights: √(weight ÷ largest)
POOL_TOKENS, POOL_LONGEST = 8192, 256  # that contexts are drawn from; of one document
SEED = 0
CONTEXTS = 60_000  # most, over all experts
TITLE = "Text"
READING = (
    "Each token in the colour of its route at one layer; point at a token for its route through "
    "all layers."
)
COLOURS = {
    "first expert": "the expert with the largest gate weight. Hue shows which eighth of the expert "
    "ids; the id stands below the first token of a run with the same first expert.",
    "gate weight": "of the first expert.",
    "margin": "how clearly the router chose its last expert: ln of the ratio of the two smallest "
    "gate weights, which is the difference of their router logits.",
    "reaches expert": "whether the token goes to a given expert, and with what gate weight.",
}


def text_section(data: ReportData, amount: docs.Amount = None) -> Section | str:
    """The section, or why there is none. `amount`: documents of each domain, "all", 0 for no text;
    by default as many as TEXT_BYTES hold."""
    trace = data.trace
    if amount == 0:
        return "text: left out as requested"
    if trace.counts_only:
        return "text: counts alone hold no tokens"
    if not len(trace.vocabulary_table):
        return Section(TITLE, without_text(trace), group="Specialization", name="text")
    routers, router = data.selection.routers, docs.telling_router(data)
    shards = docs.shards_to_read(trace, routers, amount)
    found = docs.find_documents(data, shards)
    if not len(found):
        return "text: no token is selected"
    listed = [trace.routers[r] for r in routers]
    budget, longest = sizes(listed, trace.has_weights, len(set(found["domain"])))
    shown = docs.choose(found, amount, budget, longest)
    tokens = int(shown["shown"].sum())
    if (size := TEXT_BYTES * tokens / budget) > MOST_BYTES:
        raise MoeInspectError(
            f"the text asked for, {tokens:,} tokens with all their routes, would take about "
            f"{size / 1e6:,.0f} MB of the page: ask for fewer documents or layers"
        )
    pooled = docs.choose(found.assign(bits=0.0), None, POOL_TOKENS, POOL_LONGEST)
    both = pd.concat([shown, pooled[~pooled["document"].isin(shown["document"])]])
    numbers, most = both["document"].to_numpy(), both["shown"].to_numpy()
    tokens = docs.tokens_of_documents(shards, data.selection, numbers, most)
    routes = docs.read_routes(trace, shards, routers, tokens)
    in_pool = both["document"].isin(pooled["document"]).to_numpy()[tokens.document_T]
    pool = np.flatnonzero(in_pool & (tokens.rank_T < POOL_LONGEST))
    T = int((tokens.document_T < len(shown)).sum())
    drawn = page_data(trace, routers, both, tokens, routes, T)
    documents = _documents(both)
    drawn["domainOf"] = [one["domain"] for one in documents]
    drawn["documents"] = documents[: len(shown)]
    drawn["row"] = 0 if router is None else routers.index(router)
    domain_P = pd.factorize(both["domain"])[0][tokens.document_T][pool]
    drawn |= {"contexts": _contexts(data, routes, pool, domain_P), "pool": len(pool)}
    return Section(
        TITLE,
        _how_chosen(data, shown, found),
        group="Specialization",
        name="text",
        definitions=COLOURS,
        widget="text",
        data=drawn,
        python=f"import moe_inspect\n\ntrace = moe_inspect.open_trace({address(trace)!r})\n"
        f"trace.document({int(shown['document'].iloc[0])})",
    )


def without_text(trace: Trace) -> str:
    reason = "its text" if trace.without_text else "a vocabulary"
    said = f"This trace was recorded without {reason}: it cannot show which words went where."
    return f"{said} {ROUTES_TELL}" if trace.without_text else said


def sizes(routers: Sequence[Router], weights: bool, parts: int) -> tuple[int, int]:
    """Tokens that TEXT_BYTES hold, and the most of one document where there are so many parts."""
    of_weight = 0.85 if weights else 0  # bytes, compressed
    slots = sum(r.top_k * (np.log2(r.experts + 1) / 8 + of_weight) for r in routers)
    tokens = int(TEXT_BYTES / (4 / 3 * slots + 6))  # base64; 6 for the text itself
    return tokens, int(np.clip(tokens // parts, 128, 1024))


def _how_chosen(data: ReportData, shown: pd.DataFrame, found: pd.DataFrame) -> str:
    """How the documents were chosen, and how many are left out."""
    of, router = data.counts.documents, docs.telling_router(data)
    cut = shown.loc[shown["shown"] < shown["tokens"], "shown"]
    if len(shown) == of and not len(cut):
        return f"{READING} Shown in full: {plural(of, 'document')}."
    said = f"{READING} Shown: {len(shown):,} of {plural(of, 'document')}"
    if len(shown) < len(found):
        said += (
            ", spread over the trace"
            if router is None
            else ": those of each domain whose experts differ most from those of other domains (at "
            f"layer {layer_label(data.trace.routers, router)}, where domains differ most)"
        )
    if len(found) < of:
        said += f", chosen from {len(found):,} whose routes were read"
    if len(cut):
        said += f"; {plural(len(cut), 'document')} cut to {int(cut.max()):,} tokens or fewer"
    return f"{said}."


def page_data(
    trace: Trace,
    routers: Sequence[int],
    documents: pd.DataFrame,
    tokens: docs.DrawnTokens,
    routes: Sequence[docs.DrawnRoutes],
    shown: int,
    of_b: Sequence[docs.DrawnRoutes] = (),
) -> Json:
    """What text.js draws from, with the routes of the first `shown` tokens; `of_b`: those in
    another trace. words: of each token the index in `texts` (`packed_numbers`)."""
    drawn = list[Json]()
    for i, r in enumerate(routers):
        router = trace.routers[r]
        sides = dict(zip("ab", [routes[i], *of_b[i : i + 1]], strict=False))
        weights = [route.weights for route in sides.values() if route.weights is not None]
        most = max((float(of.max(initial=0)) for of in weights), default=0.0)
        drawn.append(
            {
                "label": layer_label(trace.routers, r),
                "experts": router.experts,
                "k": len(routes[i].ids),
                "first": router.first_choice_known,
                "most": most,
                **{at: _packed_routes(of, router.experts, shown, most) for at, of in sides.items()},
            }
        )
    start = np.searchsorted(tokens.document_T, np.arange(len(documents) + 1))
    texts, pieces = list[str](), pieces_of(trace, tokens.token_id_T)
    for first, last in pairwise(start):
        texts += as_text(pieces[first:last])
    codes, unique = pd.factorize(np.array([legible(text) for text in texts], object))
    return {
        "layers": drawn,
        "words": packed_numbers(codes),
        "texts": [str(text) for text in unique],
        "start": start.tolist(),
        "levels": LEVELS,
        "documents": _documents(documents),
    }


def _documents(documents: pd.DataFrame) -> list[Json]:
    columns = (documents[name] for name in ("document", "domain", "tokens"))
    return [
        {"number": int(n), "domain": readable(domain), "tokens": int(tokens)}
        for n, domain, tokens in zip(*columns, strict=True)
    ]


def _packed_routes(route: docs.DrawnRoutes, experts: int, shown: int, most: float) -> Json:
    """ids, weights: slot after slot, the first `shown` tokens; `experts` where there is no expert.
    Weights are levels up to `most`, each as the distance from that of the slot before."""
    ids, packed = np.where(route.ids == docs.NOWHERE, experts, route.ids)[:, :shown], ""
    if route.weights is not None and most:
        level_KT = _levels(route.weights[:, :shown], most)
        packed = packed_numbers(np.diff(level_KT, axis=0, prepend=0) % (LEVELS + 1))
    return {"ids": packed_numbers(ids), "weights": packed}


def _levels(weights: np.ndarray, most: float) -> np.ndarray:
    return np.rint(LEVELS * np.sqrt(np.maximum(weights, 0) / most)).astype(np.int64)


def packed_numbers(numbers: np.ndarray) -> str:
    """Numbers from 0 on for text.js: the bytes of each (1, 2 or 4), then all of them in base64."""
    kind = np.min_scalar_type(int(numbers.max(initial=0)))
    values = numbers.ravel().astype(kind.newbyteorder("<"))
    return f"{values.itemsize}{base64.b64encode(values.tobytes()).decode()}"


def _contexts(
    data: ReportData, routes: Sequence[docs.DrawnRoutes], pool: np.ndarray, domain_P: np.ndarray
) -> Json:
    """count: of each expert, router after router; token, level: of each context. They are drawn
    from the tokens of the pool in random order, all domains in turn."""
    shuffled = np.random.default_rng(SEED).permutation(len(pool))
    turn = pd.Series(domain_P[shuffled]).groupby(domain_P[shuffled]).cumcount().to_numpy()
    order = pool[shuffled[np.argsort(turn, kind="stable")]]
    sizes = [data.trace.routers[r].experts for r in data.selection.routers]
    most = int(np.clip(CONTEXTS // sum(sizes), 4, 12))
    n, token, level = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
    for route, E in zip(routes, sizes, strict=True):
        n_E, token_N, weight_N = docs.contexts(route, E, order, most)
        n.append(n_E)
        token.append(token_N)
        if weight_N is not None and route.weights is not None:
            level.append(_levels(weight_N, max(float(route.weights.max(initial=0)), 1e-30)))
    joined = {"count": n, "token": token, "level": level}
    return {name: packed_numbers(np.concatenate(of)) if of else "" for name, of in joined.items()}
