"""What cannot be aligned is refused, with the reason: other texts, another tokenizer, positions
that are counted otherwise."""

from __future__ import annotations

import numpy as np

from moe_inspect.comparison.aligning.align import (
    Alignment,
    pairs_by_number,
    rows_of,
    segments_of,
)
from moe_inspect.comparison.aligning.models import DifferentModelsError, vocabularies_apart
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.reader import Trace

LEAST = 0.5  # of the tokens that could be compared
SHIFTS = (-2, -1, 1, 2)
SAMPLE = 64  # pairs of sequences


def check_tokens(a: Trace, b: Trace, alignment: Alignment) -> None:
    """MoeInspectError where most tokens of the shorter trace have no equal in the other,
    DifferentModelsError where that is since another tokenizer cut them."""
    possible = min(alignment.a.tokens, alignment.b.tokens)
    if alignment.matched >= LEAST * possible or (alignment.matched and not alignment.ids_known):
        return
    if alignment.ids_known:
        shift, share = _shift_of_positions(a, b, alignment)
        if share > LEAST:
            raise MoeInspectError(
                f"{share:.1%} of the tokens at position n of {a.path} are at n{shift:+d} of "
                f"{b.path}, as with a special token in front: add --shift-positions {shift}"
            )
        if other := vocabularies_apart(a, b):
            raise DifferentModelsError(a, b, [other])
    raise MoeInspectError(
        f"{a.path} and {b.path} have {alignment.matched:,} tokens in common (of "
        f"{alignment.a.tokens:,} and {alignment.b.tokens:,}), by document and position or by the "
        "content of sequences: trace the same text with both"
    )


def _shift_of_positions(a: Trace, b: Trace, alignment: Alignment) -> tuple[int, float]:
    """By how many positions B's token ids are further on, and the share of the tokens for which
    they are, in the first sequences with the same numbers."""
    best = (0.0, 0)
    pairs = pairs_by_number(alignment.a, alignment.b)[:SAMPLE]
    for shift in SHIFTS:
        s = segments_of(alignment.a, alignment.b, pairs, shift)
        same = total = 0
        for shard_a in np.unique(s.shard_a).tolist():
            for shard_b, part in s.in_shard(shard_a).by_shard_b():
                ids_a, ids_b = (
                    trace.shard(n).tokens(["token_id"])["token_id"].to_numpy()[rows]
                    for trace, n, rows in (
                        (a, shard_a, rows_of(part.row_a, part.length)),
                        (b, shard_b, rows_of(part.row_b, part.length)),
                    )
                )
                same, total = same + int((ids_a == ids_b).sum()), total + len(ids_a)
        best = max(best, (same / max(total, 1), shift))
    return best[1], best[0]
