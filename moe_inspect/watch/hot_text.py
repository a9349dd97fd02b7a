"""The text that made an expert busy: the last token that was sent to it, among its neighbours.

T tokens of a shard.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from moe_inspect.text import printable
from moe_inspect.trace.shard import Shard
from moe_inspect.trace.texts import as_text

BEFORE, AFTER = 40, 10  # tokens that are shown around it


@dataclass(frozen=True)
class HotText:
    """`words`: consecutive tokens of a sequence, and whether each was sent to the expert."""

    router: int
    expert: int
    words: list[tuple[str, bool]]


def hot_text(shard: Shard, router: int, expert: int, vocabulary: pa.Table) -> HotText | None:
    """None where the shard sends the expert nothing, or the trace has no vocabulary."""
    if shard.trace.counts_only or not len(vocabulary):
        return None
    hot_T = np.zeros(shard.files.tokens, bool)
    seen = shard.seen(router)
    chosen = np.logical_or.reduce([slot == expert for slot in shard.slots(router)])
    hot_T[slice(None) if seen is None else seen] = chosen
    if not hot_T.any():
        return None
    last = int(np.flatnonzero(hot_T)[-1])
    tokens = shard.tokens(["token_id", "sequence"])
    sequence_T = tokens["sequence"].to_numpy()
    # a decoded sequence has one token in each pass: its tokens lie apart
    of_sequence = np.flatnonzero(sequence_T == sequence_T[last])
    at = int(np.searchsorted(of_sequence, last))
    shown = of_sequence[max(0, at - BEFORE) : at + AFTER]
    ids = tokens["token_id"].to_numpy()[shown]
    if (ids < 0).any() or (ids >= len(vocabulary)).any():
        return None
    texts = as_text(vocabulary["token"].take(pa.array(ids)).to_pylist())
    words = [(printable(word), bool(hot)) for word, hot in zip(texts, hot_T[shown], strict=True)]
    return HotText(router, expert, words)
