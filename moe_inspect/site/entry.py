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
from moe_inspect.progress import tracked
from moe_inspect.reporting.render.payload import Json
from moe_inspect.reporting.render.texts import shards_to_read
from moe_inspect.reporting.report import Report
from moe_inspect.reporting.tables.data import worst_of
from moe_inspect.reporting.tables.summary import mapping
from moe_inspect.reporting.verdict.findings import uneven
from moe_inspect.reporting.verdict.specialization import untrained_seed
from moe_inspect.text import cut, layer_label, readable
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.shard import Shard

FORMAT = 1  # of what the index holds
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
    trace, counts, spec = made.trace, made.counts, made.tables["specialization"]
    routers, worst, words = trace.routers, worst_of(made.loaded), words_of(trace)
    bits = {of: spec[f"{of}_mi_bits"] - spec[f"{of}_mi_null_bits"] for of in ("domain", "token")}
    committee, load = made.tables["committee"], made.tables["load"]
    seed, model = untrained_seed(trace), mapping(trace.manifest.get("model"))
    config = mapping(model.get("config"))
    name = _readable(model.get("id") or model.get("class") or "unknown")
    classes = config.get("architectures") or [model.get("class") or config.get("model_type")]
    row = {
        "model": name if seed is None else f"{name}, random weights (seed {seed})",
        "architecture": _readable(classes[0]) if classes[0] else None,
        "routers": len(routers),
        "experts": max(router.experts for router in routers),
        "top_k": max(router.top_k for router in routers),
        "tokens": counts.tokens,
        "domains": len(counts.domains),
        "max_over_mean": None if worst is None else worst["max_over_mean"],
        "uneven_routers": sum(uneven(made, one) for one in made.loaded),
        "dead_experts": sum(int(one["dead_experts"]) for one in made.loaded),
        "domain_bits": bits["domain"].max(),
        "token_bits": bits["token"].max(),
        "committee_experts": committee["committee_experts"].mean(),
        "committee_mass": committee["committee_mass"].mean(),
    }
    lacks = {} if worst is not None else {"balance": "no router has load"}
    if len(counts.domains) < 2:
        lacks["specialization by domain, committee"] = "the text has one domain"
    elif counts.documents_unknown:
        lacks["specialization by domain"] = "counts do not tell documents apart"
    elif np.isnan(row["domain_bits"]):
        lacks["specialization by domain"] = f"too few documents ({counts.documents})"
    if isinstance(words, str):
        lacks["specialization by token, search by token"] = words
    ratio = load["load_ratio"].to_numpy(float, na_value=np.nan).tolist()
    hundredths = [None if value != value else round(100 * value) for value in ratio]
    return {
        "row": {name: None if value != value else value for name, value in row.items()},
        "untrained": seed is not None,
        "lacks": lacks,
        "layers": [[layer_label(routers, r), one.experts] for r, one in enumerate(routers)],
        "ratio": hundredths if len(hundredths) <= CELLS else None,
        "balance": _rounded(made.tables["balance"]["max_over_mean"]),
        "bits": _rounded(bits["domain"]),
        "domains": _domains(made),
        "all_domains": len(counts.domains),
        "words": None if isinstance(words, str) else words,
    }


def _readable(value: object) -> str:
    return readable(cut(str(value), LONGEST))


def _rounded(values: pd.Series) -> list[float | None]:
    return [None if value != value else round(float(value), 3) for value in values]


def _domains(made: Report) -> list[Json]:
    """name, tokens, and the experts that take more of them than of other domains', by activation ·
    log₂ lift: row, expert, activation in thousandths, lift in hundredths."""
    if len(made.counts.domains) < 2:
        return []
    table = made.tables["domains"]
    score = table["activation"] * np.log2(table["lift"].clip(lower=1))
    table = table.assign(score=score).sort_values("score", ascending=False, kind="stable")
    # of a domain at the router that saw most of it: encoders and decoders differ
    tokens = table.groupby("domain")["tokens"].max().sort_values(ascending=False, kind="stable")
    found = list[Json]()
    for name in tokens.index[:DOMAINS]:
        most = table[(table["domain"] == name) & (table["score"] > 0)].head(EXPERTS)
        scaled = most[["router", "expert", "activation", "lift"]] * (1, 1, 1000, 100)
        experts = scaled.round().astype(int).to_numpy().tolist()
        found.append({"name": _readable(name), "tokens": int(tokens[name]), "experts": experts})
    return found


def saturation(a: Trace, b: Trace) -> tuple[float | None, str]:
    """The mean over routers of the share of experts that trace `a` has as `b` does, for the same
    tokens (0 to 1); and why it cannot be told, where it is None."""
    from moe_inspect.comparison.compare import compare_checkpoints

    try:
        made = compare_checkpoints([a, b])
        if misaligned := made.comparisons[0].misaligned:
            return None, misaligned[0].text
        return float(made.tables["saturation"]["overlap"].mean()), ""
    except MoeInspectError as error:
        return None, str(error)


TOKENS = 1_000  # token ids of a trace, the most frequent ones
EXPERTS_OF_TOKEN = 4  # of a token id, over all layers


def words_of(trace: Trace) -> Json | str:
    """texts, times: of each token id, the most frequent first. The columns row (of the routers),
    expert, share (thousandths of its occurrences) and lift (hundredths: share ÷ the expert's share
    of all tokens) are of its experts, those of token id i from start[i] to before start[i + 1]; the
    most telling first, by share · log₂ lift. read: tokens counted; few shards of a long trace are
    read. ids: token ids that occur often enough. Or a text: why there is none."""
    if trace.counts_only:
        return "counts hold no token ids"
    vocabulary = trace.vocabulary_table
    if not len(vocabulary):
        return "the trace has no vocabulary"
    shards = shards_to_read(trace, tuple(range(len(trace.routers))), None)
    occurrences = np.zeros(0, np.int64)
    for shard in shards:
        token_id_T = _token_ids(shard)
        more = np.bincount(token_id_T[token_id_T >= 0], minlength=len(occurrences))
        more[: len(occurrences)] += occurrences
        occurrences = more
    frequent = np.flatnonzero(occurrences >= MIN_COUNT)
    if not len(frequent):
        return f"no token id occurs {MIN_COUNT} times"
    ids_V = frequent[np.argsort(-occurrences[frequent], kind="stable")][:TOKENS]
    row_of = np.full(len(occurrences) + 1, -1)  # the last is for what is no token id
    row_of[ids_V] = np.arange(len(ids_V))
    found = _candidates(trace, shards, row_of, len(ids_V))
    kept_VC = found["score"] > 0
    columns = (vocabulary[name].to_pylist() for name in ("token_id", "token"))
    text_of: dict[int, str | None] = dict(zip(*columns, strict=True))
    return {
        "texts": [
            f"id {i}" if (text := text_of.get(i)) is None else readable(text.replace("▁", " "))
            for i in ids_V.tolist()
        ],
        "times": occurrences[ids_V].tolist(),
        "start": [0, *np.cumsum(kept_VC.sum(1)).tolist()],
        "row": found["row"][kept_VC].astype(int).tolist(),
        "expert": found["expert"][kept_VC].astype(int).tolist(),
        "share": np.rint(1000 * found["share"][kept_VC]).astype(int).tolist(),
        "lift": np.rint(100 * found["lift"][kept_VC]).astype(int).tolist(),
        "read": int(occurrences.sum()),
        "ids": len(frequent),
    }


def _token_ids(shard: Shard) -> np.ndarray:
    return shard.tokens(["token_id"])["token_id"].to_numpy()


def _candidates(
    trace: Trace, shards: Sequence[Shard], row_of: np.ndarray, V: int
) -> dict[str, np.ndarray]:
    """score, row, expert, share, lift: [V, C], the highest scores first, 0 where there are fewer
    experts that take the token id more than they take others."""
    best = {name: np.zeros((V, 0)) for name in ("score", "row", "expert", "share", "lift")}
    for r in tracked(range(len(trace.routers)), "indexing tokens", "routers"):
        E = trace.routers[r].experts
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
        found = {
            "score": share_VE * np.log2(np.maximum(lift_VE, 1)),
            "row": np.full((V, E), r),
            "expert": np.broadcast_to(np.arange(E), (V, E)),
            "share": share_VE,
            "lift": lift_VE,
        }
        both = {name: np.hstack([best[name], values_VE]) for name, values_VE in found.items()}
        order_VC = np.argsort(-both["score"], axis=1, kind="stable")[:, :EXPERTS_OF_TOKEN]
        best = {name: np.take_along_axis(values, order_VC, 1) for name, values in both.items()}
    return best
