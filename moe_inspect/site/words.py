"""Which experts take a token id more than others: for the index, of the most frequent token ids.

V token ids, E experts of a router, T tokens of a shard, K slots, C candidates kept of a token id.
"""

# pyarrow has no types
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_inspect.analysis.counting.token_ids import MIN_COUNT
from moe_inspect.progress import phase
from moe_inspect.reporting.render.texts.documents import shards_to_read
from moe_inspect.text import readable
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.shard import Shard

TOKENS = 1_000  # token ids of a trace, the most frequent ones
EXPERTS = 4  # of a token id, over all layers


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
        order_VC = np.argsort(-score_VE, axis=1, kind="stable")[:, :EXPERTS]
        mine = {
            "score": np.take_along_axis(score_VE, order_VC, 1),
            "row": np.full(order_VC.shape, r),
            "expert": order_VC,
            "share": np.take_along_axis(share_VE, order_VC, 1),
            "lift": np.take_along_axis(lift_VE, order_VC, 1),
        }
        both = {name: np.hstack([best[name], mine[name]]) for name in names}
        order_VC = np.argsort(-both["score"], axis=1, kind="stable")[:, :EXPERTS]
        best = {name: np.take_along_axis(both[name], order_VC, 1) for name in names}
        advance(1)
    return best | {name: best[name].astype(int) for name in ("row", "expert")}
