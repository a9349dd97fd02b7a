"""The section "Text" of a page and the contexts on the cards of experts (templates/text.js): which
documents a page shows, the most telling of each domain, found without reading more than a few
shards of a long trace; their tokens with their routes, and the contexts of every expert.

T tokens, D domains, R routers, K slots, E experts, P tokens of the pool, N contexts.
"""

# pyarrow has no complete types
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd

from moe_inspect.analysis.counting.select import Selection, selected_tokens
from moe_inspect.progress import tracked
from moe_inspect.reporting.render.html import Section
from moe_inspect.reporting.render.payload import Json
from moe_inspect.reporting.tables.data import ReportData
from moe_inspect.reporting.tables.summary import ROUTES_TELL
from moe_inspect.text import layer_label, legible, plural, readable
from moe_inspect.trace.reader import Trace, address
from moe_inspect.trace.schema import Router
from moe_inspect.trace.shard import Shard, codes
from moe_inspect.trace.texts import as_text, pieces_of

TEXT_BYTES = 1_000_000  # of the documents on the page, where no number of them was asked for
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
READ = 40_000_000  # assignments of all shards that are read, at least one shard
MOST_SHARDS = 16
SHORT = 64  # tokens: a shorter document is judged as if it had so many
NOWHERE = -1


def text_section(data: ReportData, text: bool = True) -> Section | str:
    """Return the section, or why there is none. It has as many documents as TEXT_BYTES hold."""
    trace = data.trace
    if not text:
        return "text: left out as requested"
    if trace.counts_only:
        return "text: counts alone hold no tokens"
    if not len(trace.vocabulary_table):
        return Section(TITLE, without_text(trace), group="Specialization", name="text")
    routers, router = data.selection.routers, telling_router(data)
    shards = _shards_to_read(trace, routers)
    found = find_documents(data, shards)
    if not len(found):
        return "text: no token is selected"
    listed = [trace.routers[r] for r in routers]
    budget, longest = sizes(listed, trace.has_weights, len(set(found["domain"])))
    shown = choose(found, budget, longest)
    pooled = choose(found.assign(bits=0.0), POOL_TOKENS, POOL_LONGEST)
    both = pd.concat([shown, pooled[~pooled["document"].isin(shown["document"])]])
    numbers, most = both["document"].to_numpy(), both["shown"].to_numpy()
    tokens = tokens_of_documents(shards, data.selection, numbers, most)
    routes = read_routes(trace, shards, routers, tokens)
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
    of, router = data.counts.documents, telling_router(data)
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
    tokens: DrawnTokens,
    routes: Sequence[DrawnRoutes],
    shown: int,
    of_b: Sequence[DrawnRoutes] = (),
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


def _packed_routes(route: DrawnRoutes, experts: int, shown: int, most: float) -> Json:
    """ids, weights: slot after slot, the first `shown` tokens; `experts` where there is no expert.
    Weights are levels up to `most`, each as the distance from that of the slot before."""
    ids, packed = np.where(route.ids == NOWHERE, experts, route.ids)[:, :shown], ""
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
    data: ReportData, routes: Sequence[DrawnRoutes], pool: np.ndarray, domain_P: np.ndarray
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
        # the first `most` tokens that each expert was given, expert after expert
        K, expert_PK = len(route.ids), route.ids[:, order].T.reshape(-1)
        expert_PK = expert_PK.astype(np.uint16)  # NOWHERE is the last; numpy sorts 16 bits by radix
        by_expert = np.argsort(expert_PK, kind="stable")
        start_E = np.searchsorted(expert_PK[by_expert], np.arange(E + 1))
        n_E = np.minimum(np.diff(start_E), most)
        steps = np.arange(int(n_E.sum())) - np.repeat(np.cumsum(n_E) - n_E, n_E)
        chosen = by_expert[np.repeat(start_E[:-1], n_E) + steps]
        n.append(n_E)
        token.append(order[chosen // K])
        if route.weights is not None:
            weight_N = route.weights[chosen % K, token[-1]]
            level.append(_levels(weight_N, max(float(route.weights.max(initial=0)), 1e-30)))
    joined = {"count": n, "token": token, "level": level}
    return {name: packed_numbers(np.concatenate(of)) if of else "" for name, of in joined.items()}


# --- the documents, and the routes of their tokens


def _shards_to_read(trace: Trace, routers: tuple[int, ...]) -> list[Shard]:
    """Return a few shards, spread over the trace; all of a short trace."""
    shards = [shard for shard in trace.shards if shard.files.tokens]
    if not shards:
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


def choose(documents: pd.DataFrame, tokens: int, longest: int) -> pd.DataFrame:
    """Return the documents to show, in order: of each domain in turn the most telling that is left.
    There are as many as `tokens` tokens hold, but at least one; only the first `longest` tokens of
    each are shown. The column `shown` is their number."""
    # among equals those that are spread over the trace, not its first
    spread = (documents["document"] * 0.61803398875) % 1
    ordered = documents.assign(spread=spread)
    ordered = ordered.sort_values(["bits", "spread"], ascending=[False, True])
    by_domain = ordered.groupby("domain")
    ordered = ordered.assign(rank=by_domain.cumcount(), size=by_domain["tokens"].transform("sum"))
    ordered = ordered.sort_values(["rank", "size"], ascending=[True, False], kind="stable")
    shown = ordered["tokens"].clip(upper=longest)
    ordered = ordered[(shown.cumsum() <= tokens) | (np.arange(len(shown)) == 0)]
    ordered = ordered.assign(shown=shown.loc[ordered.index])
    return ordered.drop(columns=["spread", "rank", "size"]).reset_index(drop=True)


def telling_router(data: ReportData) -> int | None:
    """The router whose experts tell domains apart best; None where there is nothing to tell."""
    if len(data.counts.domains) < 2:
        return None
    bits = data.tables["specialization"]["domain_mi_bits"].to_numpy(float)
    return None if np.isnan(bits).any() else data.selection.routers[int(bits.argmax())]


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
