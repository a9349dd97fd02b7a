"""What the index holds of a trace: a row of its table, and what is searched: of its domains and of
the most frequent token ids, which experts take more of them than of others.

R routers, E experts of a router, V token ids, T tokens of a shard, K slots, C candidates kept of a
token id.
"""

# pyarrow has no complete types
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from moe_inspect.analysis.counting.token_ids import MIN_COUNT
from moe_inspect.errors import MoeInspectError
from moe_inspect.progress import phase
from moe_inspect.reporting.render.documents import shards_to_read
from moe_inspect.reporting.render.payload import without_numpy
from moe_inspect.reporting.report import Report
from moe_inspect.reporting.tables.data import worst_router
from moe_inspect.reporting.verdict.findings import uneven
from moe_inspect.reporting.verdict.specialization import untrained_seed
from moe_inspect.text import cut, layer_label, readable
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.shard import Shard

CELLS = 20_000  # experts of a trace whose load is in the index
DOMAINS = 40  # of a trace, those with the most tokens
EXPERTS = 5  # of a domain, over all layers
LONGEST = 120  # characters of a name, a domain or a token

Entry = dict[str, Any]


def entry_of(made: Report) -> Entry:
    """row: the columns of the index's table. untrained: whether its weights are random. lacks: what
    is missing → why. layers: label and number of experts of each router. ratio: hundredths of the
    mean load of each expert, router after router. balance, bits: by router, for the chart. domains,
    words: what is searched. JSON can hold it."""
    trace, balance = made.trace, made.tables["balance"]
    spec: Any = made.tables["specialization"]
    domain_bits = spec["domain_mi_bits"] - spec["domain_mi_null_bits"]
    token_bits = spec["token_mi_bits"] - spec["token_mi_null_bits"]
    committee, words = made.tables["committee"], words_of(trace)
    worst, routers = worst_router(made), trace.routers
    row = {
        "model": _model(made),
        "architecture": _architecture(trace.manifest),
        "routers": len(routers),
        "experts": max(router.experts for router in routers),
        "top_k": max(router.top_k for router in routers),
        "tokens": made.counts.tokens,
        "domains": len(made.counts.domains),
        "max_over_mean": None if worst is None else worst["max_over_mean"],
        "uneven_routers": sum(uneven(made, one) for one in made.loaded),
        "dead_experts": sum(int(one["dead_experts"]) for one in made.loaded),
        "domain_bits": domain_bits.max(),
        "token_bits": token_bits.max(),
        "committee_experts": committee["committee_experts"].mean(),
        "committee_mass": committee["committee_mass"].mean(),
    }
    layers = [[layer_label(routers, r), one.experts] for r, one in enumerate(routers)]
    return {
        "row": {name: _plain(value) for name, value in row.items()},
        "untrained": untrained_seed(made) is not None,
        "lacks": _lacks(made, row, words),
        "layers": layers,
        "ratio": _ratios(made) if sum(E for _, E in layers) <= CELLS else None,
        "balance": _rounded(balance["max_over_mean"]),
        "bits": _rounded(domain_bits),
        "domains": _domains(made),
        "all_domains": len(made.counts.domains),
        "words": None if isinstance(words, str) else words,
    }


def _model(made: Report) -> str:
    model = made.trace.manifest.get("model", {})
    name = readable(cut(str(model.get("id") or model.get("class") or "unknown"), LONGEST))
    seed = untrained_seed(made)
    return name if seed is None else f"{name}, random weights (seed {seed})"


def _architecture(manifest: dict[str, Any]) -> str | None:
    model = manifest.get("model", {})
    config = model.get("config") or {}
    stated = config.get("architectures") or [model.get("class") or config.get("model_type")]
    return readable(cut(str(stated[0]), LONGEST)) if stated[0] else None


def _lacks(made: Report, row: dict[str, Any], words: Any) -> dict[str, str]:
    counts, lacks = made.counts, dict[str, str]()
    if row["max_over_mean"] is None:
        lacks["balance"] = "no router has load"
    if len(counts.domains) < 2:
        lacks["specialization by domain, committee"] = "the text has one domain"
    elif counts.counts_only:
        lacks["specialization by domain"] = "counts do not tell documents apart"
    elif row["domain_bits"] != row["domain_bits"]:
        lacks["specialization by domain"] = f"too few documents ({counts.documents})"
    if isinstance(words, str):
        lacks["specialization by token, search by token"] = words
    return lacks


def _ratios(made: Report) -> list[int | None]:
    table: Any = made.tables["load"]
    ratio = table["load_ratio"].to_numpy(float, na_value=np.nan)
    return [None if value != value else round(100 * value) for value in ratio.tolist()]


def _domains(made: Report) -> list[dict[str, Any]]:
    """name, tokens, and the experts that take more of its tokens than of other domains', the most
    telling first, by activation · log₂ lift: row, expert, activation in thousandths, lift in
    hundredths."""
    if len(made.counts.domains) < 2:
        return []
    table: Any = made.tables["domains"]
    score = table["activation"] * np.log2(table["lift"].clip(lower=1))
    table = table.assign(score=score).sort_values("score", ascending=False, kind="stable")
    # of a domain at the router that saw most of it: encoders and decoders differ
    tokens = table.groupby("domain")["tokens"].max().sort_values(ascending=False, kind="stable")
    found = list[dict[str, Any]]()
    for name in tokens.index[:DOMAINS]:
        most = table[(table["domain"] == name) & (table["score"] > 0)].head(EXPERTS)
        columns = (
            most["router"],
            most["expert"],
            (1000 * most["activation"]).round().astype(int),
            (100 * most["lift"]).round().astype(int),
        )
        shown = readable(cut(str(name), LONGEST))
        experts = [list(map(int, one)) for one in zip(*columns, strict=True)]
        found.append({"name": shown, "tokens": int(tokens[name]), "experts": experts})
    return found


def _rounded(values: pd.Series) -> list[float | None]:
    return [None if value != value else round(float(value), 3) for value in values]


def _plain(value: Any) -> Any:
    plain = without_numpy(value) if hasattr(value, "tolist") else value
    return None if plain != plain else plain


def saturation(a: Any, b: Any) -> float | str:
    """The mean over routers of the share of experts that trace `a` has as `b` does, for the same
    tokens (0 to 1), or why it cannot be told."""
    from moe_inspect.comparison.compare import compare_checkpoints

    try:
        made = compare_checkpoints([a, b])
        if made.comparisons[0].misaligned:
            return made.comparisons[0].misaligned[0].text
        table: Any = made.tables["saturation"]
    except MoeInspectError as error:
        return str(error)
    return float(table["overlap"].mean())


TOKENS = 1_000  # token ids of a trace, the most frequent ones
EXPERTS_OF_TOKEN = 4  # of a token id, over all layers


def words_of(trace: Trace) -> dict[str, Any] | str:
    """texts, times: of each token id, the most frequent first. The columns row (of the routers),
    expert, share (thousandths of its occurrences) and lift (hundredths: share ÷ the expert's share
    of all tokens) are of its experts, those of token id i from start[i] to before start[i + 1]; the
    most telling first, by share · log₂ lift. read: tokens counted; few shards of a long trace are
    read. ids: token ids that occur often enough. Or a text: why there is none."""
    if trace.counts_only:
        return "counts hold no token ids"
    if not len(trace.vocabulary_table):
        return "the trace has no vocabulary"
    shards = shards_to_read(trace, tuple(range(len(trace.routers))), None)
    occurrences = _occurrences(shards)
    frequent = np.flatnonzero(occurrences >= MIN_COUNT)
    if not len(frequent):
        return f"no token id occurs {MIN_COUNT} times"
    ids_V = frequent[np.argsort(-occurrences[frequent], kind="stable")][:TOKENS]
    row_of = np.full(len(occurrences) + 1, -1)  # the last is for what is no token id
    row_of[ids_V] = np.arange(len(ids_V))
    found = _candidates(trace, shards, row_of, len(ids_V))
    kept_VC = found["score"] > 0
    text_of = dict(
        zip(
            trace.vocabulary_table["token_id"].to_pylist(),
            trace.vocabulary_table["token"].to_pylist(),
            strict=True,
        )
    )
    return {
        "texts": [_text(text_of.get(i), i) for i in ids_V.tolist()],
        "times": occurrences[ids_V].tolist(),
        "start": [0, *np.cumsum(kept_VC.sum(1)).tolist()],
        "row": found["row"][kept_VC].tolist(),
        "expert": found["expert"][kept_VC].tolist(),
        "share": np.rint(1000 * found["share"][kept_VC]).astype(int).tolist(),
        "lift": np.rint(100 * found["lift"][kept_VC]).astype(int).tolist(),
        "read": int(occurrences.sum()),
        "ids": len(frequent),
    }


def _text(token: str | None, token_id: int) -> str:
    return f"id {token_id}" if token is None else readable(token.replace("▁", " "))


def _token_ids(shard: Shard) -> np.ndarray:
    return shard.tokens(["token_id"])["token_id"].to_numpy()


def _occurrences(shards: Sequence[Shard]) -> np.ndarray:
    """int64 by token id"""
    counts = np.zeros(0, np.int64)
    for shard in shards:
        token_id_T = _token_ids(shard)
        more = np.bincount(token_id_T[token_id_T >= 0])
        long, short = (more, counts) if len(more) > len(counts) else (counts, more)
        counts = long.astype(np.int64)
        counts[: len(short)] += short
    return counts


def _candidates(
    trace: Trace, shards: Sequence[Shard], row_of: np.ndarray, V: int
) -> dict[str, np.ndarray]:
    """score, row, expert, share, lift: [V, C], the highest scores first, 0 where there are fewer
    experts that take the token id more than they take others."""
    names = ("score", "row", "expert", "share", "lift")
    best = {name: np.zeros((V, 0)) for name in names}
    advance = phase("indexing tokens", len(trace.routers), "routers")
    for r, router in enumerate(trace.routers):
        E = router.experts
        assignments_VE, times_V = np.zeros(V * E, np.int64), np.zeros(V, np.int64)
        load_E, decisions = np.zeros(E, np.int64), 0
        for shard in shards:
            token_id_T, seen_T = _token_ids(shard), shard.seen(r)
            if seen_T is not None:
                token_id_T = token_id_T[seen_T]
            row_T, ids_TK = row_of[token_id_T], shard.ids(r)
            cell_TK = np.where(ids_TK >= 0, row_T[:, None] * E + ids_TK, -1)
            assignments_VE += np.bincount(cell_TK[cell_TK >= 0], minlength=V * E)
            times_V += np.bincount(row_T[row_T >= 0], minlength=V)
            load_E += np.bincount(ids_TK[ids_TK >= 0], minlength=E)
            decisions += len(ids_TK)
        share_VE = assignments_VE.reshape(V, E) / np.maximum(times_V, 1)[:, None]
        even_E = load_E / max(decisions, 1)
        lift_VE = np.divide(share_VE, even_E, out=np.zeros_like(share_VE), where=even_E > 0)
        score_VE = share_VE * np.log2(np.maximum(lift_VE, 1))
        order_VC = np.argsort(-score_VE, axis=1, kind="stable")[:, :EXPERTS_OF_TOKEN]
        mine = {
            "score": np.take_along_axis(score_VE, order_VC, 1),
            "row": np.full(order_VC.shape, r),
            "expert": order_VC,
            "share": np.take_along_axis(share_VE, order_VC, 1),
            "lift": np.take_along_axis(lift_VE, order_VC, 1),
        }
        both = {name: np.hstack([best[name], mine[name]]) for name in names}
        order_VC = np.argsort(-both["score"], axis=1, kind="stable")[:, :EXPERTS_OF_TOKEN]
        best = {name: np.take_along_axis(both[name], order_VC, 1) for name in names}
        advance(1)
    return best | {name: best[name].astype(int) for name in ("row", "expert")}
