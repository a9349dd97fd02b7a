"""The text of a trace: its documents, and the tokens that an expert was given, in their context.

T tokens, N of them that were asked for, K slots.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import pyarrow as pa
import regex

from moe_inspect.errors import MoeInspectError
from moe_inspect.later import pd
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.schema import Layers, layers_text, parse_ranges
from moe_inspect.trace.shard import Shard

# as its reader sees it: an extended grapheme cluster (Unicode, UAX 29)
CHARACTER = regex.compile(r"\X")
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
PLACE = ["token", "document", "domain", "sequence", "position", "phase", "token_id"]
CONTEXT = 8
SPREAD = 64  # tokens that a character may be spread over, at most


def as_text(pieces: Sequence[str | None]) -> list[str]:
    """What consecutive tokens write: ▁ is a space, and a character that is spread over several
    tokens, with the marks that change it or the emoji that it is joined to, stands at the first of
    them. Bytes that are no UTF-8 become "�"."""
    raw = [_bytes_of(piece or "") for piece in pieces]
    ends = list(accumulate(map(len, raw)))
    texts = [""] * len(raw)
    token = at = 0
    for character in CHARACTER.findall(b"".join(raw).decode("utf-8", "surrogateescape")):
        while ends[token] <= at:
            token += 1
        texts[token] += "�" if "\udc80" <= character <= "\udcff" else character
        at += len(character.encode("utf-8", "surrogateescape"))
    return texts


def _bytes_of(piece: str) -> bytes:
    """What a token writes, before it is known to be UTF-8."""
    parts = BYTE.split(piece.replace("▁", " "))
    return b"".join(
        bytes([int(part, 16)]) if n % 2 else part.encode("utf-8", "replace")
        for n, part in enumerate(parts)
    )


def pieces_of(trace: Trace, token_id: np.ndarray) -> list[str | None]:
    """The vocabulary's tokens of these ids, null where it has none. MoeInspectError where the trace
    has no vocabulary."""
    if not len(trace.vocabulary_table):
        raise MoeInspectError(f"{trace.path} was recorded without a vocabulary: it has no text")
    words = trace.vocabulary_table["token"]
    known = (token_id >= 0) & (token_id < len(words))
    return words.take(pa.array(np.where(known, token_id, -1), mask=~known)).to_pylist()


def text(trace: Trace, document: int) -> str:
    """The text of a document, its sequences one after the other."""
    tokens = _of_document(trace, document)
    return "".join(as_text(pieces_of(trace, tokens["token_id"].to_numpy())))


def document(trace: Trace, number: int, *, layers: Layers = None) -> pd.DataFrame:
    """A row per token and router, in the order of the text: token, sequence, position, phase,
    token_id, text ("" where the trace has no vocabulary), layer, router, expert_0 …, weight_0 ….
    `layers`: only their routers."""
    tokens, routers = _of_document(trace, number), trace.router_index(layers)
    has_text = len(trace.vocabulary_table) > 0
    ids = tokens["token_id"].to_numpy()
    tokens["text"] = as_text(pieces_of(trace, ids)) if has_text else ""
    shown = ["token", "sequence", "position", "phase", "token_id", "text"]
    parts = []
    for shard in trace.shards:
        if not (shard.tokens(["document"])["document"].to_numpy() == number).any():
            continue
        for router in routers:
            routing = shard.routing(router)
            of_it = np.isin(routing["token"].to_numpy(), tokens["token"].to_numpy())
            parts.append(routing.filter(pa.array(of_it)))
    found = pa.concat_tables(parts, promote_options="permissive").to_pandas()
    at_N = pd.Index(tokens["token"]).get_indexer(found.pop("token"))
    by_N = np.lexsort((found["router"], at_N))
    rows = tokens[shown].take(at_N[by_N]).reset_index(drop=True)
    return pd.concat([rows, found.take(by_N).reset_index(drop=True)], axis=1)


def requests(trace: Trace) -> pd.DataFrame:
    """A row per document: document, domain, source, prompt_tokens, generated_tokens."""
    _need_tokens(trace)
    decoded = pd.Series(dtype=int)
    for shard in trace.shards:
        tokens = shard.tokens(["document", "phase"]).to_pandas()
        new = tokens.loc[tokens["phase"] == "decode", "document"].value_counts()
        decoded = decoded.add(new, fill_value=0)
    documents = trace.documents()
    generated = documents["document"].map(decoded).fillna(0).astype(int)
    return documents[["document", "domain", "source"]].assign(
        prompt_tokens=documents["tokens"], generated_tokens=generated
    )


def tokens_of(
    trace: Trace, layers: Layers, experts: Layers, context: int = CONTEXT, *, top: int | None = None
) -> pd.DataFrame:
    """Return the tokens that were routed to these experts of these layers, in context. A row per
    assignment: layer, expert, token, document, domain, sequence, position, phase, router, slot,
    weight (NaN if the trace has none), left, text, right. The text of a token that is a part of a
    character is the whole character. `attrs["tokens"]`: number of tokens of each (layer, expert).

    layers   "0-3,7", 3 or [0, 7]; None: all
    experts  likewise
    context  number of tokens to the left and to the right
    top      at most this many tokens per expert; None: all. Each domain gives the same number of
             them, as far as it has so many: those with the largest gate weights. A trace without
             gate weights gives a random sample, the same at every call

    Raises MoeInspectError for a layer or an expert that the trace does not have."""
    routers_by_layer: dict[int, list[int]] = {}
    for router in trace.router_index(layers):
        routers_by_layer.setdefault(trace.routers[router].layer, []).append(router)
    _need_tokens(trace)
    parts, tokens = list[pd.DataFrame](), dict[tuple[int, int], int]()
    for layer, routers in routers_by_layer.items():
        E = max(trace.routers[router].experts for router in routers)
        chosen = range(E) if experts is None else parse_ranges(layers_text(experts), "experts")
        if chosen[-1] >= E:
            raise MoeInspectError(
                f"no expert {chosen[-1]} in layer {layer} of {trace.path}: it has {E}"
            )
        for expert in chosen:
            rows, tokens[layer, expert] = _tokens_of_expert(trace, routers, expert, context, top)
            rows.insert(0, "layer", layer)
            rows.insert(1, "expert", expert)
            parts.append(rows)
    frame = pd.concat(parts, ignore_index=True)
    frame.attrs["tokens"] = tokens
    return frame


def _tokens_of_expert(
    trace: Trace, routers: list[int], expert: int, context: int, top: int | None
) -> tuple[pd.DataFrame, int]:
    """Return the first `top` rows, and the number of tokens of the expert."""
    rng = np.random.default_rng(0)
    parts, tokens = list[pd.DataFrame](), 0
    for shard in trace.shards:  # in memory: a shard, and the first `top` of those before
        hits = pd.concat([_hits_of(shard, router, expert) for router in routers])
        tokens += len(hits)
        hits["order"] = -hits["weight"] if trace.has_weights else rng.random(len(hits))
        place = shard.tokens(PLACE[:-1]).take(pa.array(hits.pop("row").to_numpy())).to_pandas()
        parts.append(place.join(hits.reset_index(drop=True)))
        if top is not None:
            parts = [_first_of_domains(parts, top)]
    hits = _first_of_domains(parts, top)
    return hits.drop(columns="order").assign(**_context(trace, hits, routers, context)), tokens


def _first_of_domains(parts: list[pd.DataFrame], top: int | None) -> pd.DataFrame:
    """The rows by `order`: all, or `top` of them, of which each domain has the same number as far
    as it has so many."""
    rows = pd.concat(parts, ignore_index=True)
    rows = rows.sort_values("order", kind="stable", ignore_index=True)
    if top is None:
        return rows
    rank = rows.groupby("domain", observed=True).cumcount().to_numpy()
    chosen = np.sort(np.lexsort((rows.index, rank))[:top])
    return rows.iloc[chosen].reset_index(drop=True)


def _hits_of(shard: Shard, router: int, expert: int) -> pd.DataFrame:
    """Row of the token, router, slot and weight of each assignment to the expert in a shard."""
    slots, seen = shard.slots(router), shard.seen(router)
    at = [np.flatnonzero(ids_T == expert) for ids_T in slots]
    rows, slot = np.concatenate(at), np.repeat(np.arange(len(at)), [*map(len, at)])
    weight = np.full(len(rows), np.nan)
    if shard.trace.has_weights:
        weights = zip(shard.slot_weights(router), at, strict=True)
        weight = np.concatenate([weight_T[of] for weight_T, of in weights])
    row = rows if seen is None else np.flatnonzero(seen)[rows]
    return pd.DataFrame({"row": row, "router": router, "slot": slot, "weight": weight})


def _context(
    trace: Trace, hits: pd.DataFrame, routers: Sequence[int], context: int
) -> dict[str, list[str]]:
    """left, text and right of each row."""
    near = _sequences(trace, hits, routers)
    at_of: dict[int, tuple[list[str], int]] = {}  # token → the texts of its sequence, its place
    for _, rows in near.groupby("sequence"):
        token_T, id_T = rows["token"].to_numpy(), rows["token_id"].to_numpy()
        hit_T = np.flatnonzero(np.isin(token_T, hits["token"].to_numpy()))
        # the tokens around hits: those of long texts take much memory as pieces
        near_by = min(context, len(token_T)) + SPREAD
        for some in np.split(hit_T, np.flatnonzero(np.diff(hit_T) > 2 * near_by) + 1):
            begin = max(0, some[0] - near_by)
            texts = as_text(pieces_of(trace, id_T[begin : some[-1] + near_by + 1]))
            places = zip(token_T[some].tolist(), (some - begin).tolist(), strict=True)
            at_of.update({token: (texts, at) for token, at in places})
    left, words, right = [], [], []
    for token in hits["token"].tolist():
        texts, at = at_of[token]
        first = at
        while first > 0 and not texts[first]:
            first -= 1
        left.append("".join(texts[max(0, at - context) : first]))
        words.append(texts[first])
        right.append("".join(texts[at + 1 : at + 1 + context]))
    return {"left": left, "text": words, "right": right}


def _sequences(trace: Trace, hits: pd.DataFrame, routers: Sequence[int]) -> pd.DataFrame:
    """token, sequence, position, token_id of all tokens of the sequences of the hits, in order."""
    listed = trace.routers[routers[0]]
    columns = ["token", "sequence", "position", "phase", "token_id"]
    near = _tokens(trace, "sequence", hits["sequence"].to_numpy(), columns)
    if listed.stack:  # an encoder and a decoder number their positions each from 0
        near = near[[listed.sees(str(phase)) for phase in near["phase"]]]
    return near.sort_values(["sequence", "position"], kind="stable")


def _tokens(trace: Trace, name: str, wanted: np.ndarray, columns: list[str]) -> pd.DataFrame:
    """The tokens whose column `name` is one of these."""
    parts = []
    for shard in trace.shards:
        table = shard.tokens(columns)
        parts.append(table.filter(pa.array(np.isin(table[name].to_numpy(), wanted))).to_pandas())
    return pd.concat(parts, ignore_index=True)


def _of_document(trace: Trace, number: int) -> pd.DataFrame:
    """The tokens of a document in the order of its text."""
    _need_tokens(trace)
    tokens = _tokens(trace, "document", np.array([number]), PLACE)
    if not len(tokens):
        said = f"no document {number} in {trace.path}: it has {len(trace.documents()):,}, from 0 on"
        raise MoeInspectError(said)
    order = ["sequence", "position"]
    if tokens["phase"].eq("encode").any():
        tokens = tokens.assign(decoder=tokens["phase"] != "encode")
        order = ["decoder", *order]
    return tokens.sort_values(order, kind="stable", ignore_index=True)


def _need_tokens(trace: Trace) -> None:
    if trace.counts_only:
        raise MoeInspectError(f"{trace.path} holds counts only, no tokens")
    if not any(shard.files.tokens for shard in trace.shards):
        raise MoeInspectError(f"{trace.path} holds no tokens yet: nothing is committed")
