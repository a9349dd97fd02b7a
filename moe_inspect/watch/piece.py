"""The load of a piece of a trace: a shard, or the part of it that was not counted before; and the
text that made an expert busy.

L routers, E experts of the widest, N assignments of a router, T tokens of a shard.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from moe_inspect.errors import Damaged
from moe_inspect.text import printable
from moe_inspect.trace.schema import Router
from moe_inspect.trace.shard import Shard
from moe_inspect.trace.texts import as_text


@dataclass(frozen=True)
class Piece:
    """load_LE: int64, 0 beyond the experts of a router; tokens_L: int64, the tokens each router
    saw. `first`, `last`: forward passes (steps of a training)."""

    first: int
    last: int
    tokens: int
    decisions: int
    load_LE: np.ndarray
    tokens_L: np.ndarray

    def minus(self, others: list[Piece]) -> Piece:
        """Without what others have counted of it."""
        return Piece(
            max([self.first, *(other.last + 1 for other in others)]),
            self.last,
            self.tokens - sum(other.tokens for other in others),
            self.decisions - sum(other.decisions for other in others),
            self.load_LE - sum((other.load_LE for other in others), np.zeros_like(self.load_LE)),
            self.tokens_L - sum((other.tokens_L for other in others), np.zeros_like(self.tokens_L)),
        )


def joined(pieces: list[Piece]) -> Piece:
    """The sum of consecutive pieces."""
    return Piece(
        pieces[0].first,
        pieces[-1].last,
        sum(piece.tokens for piece in pieces),
        sum(piece.decisions for piece in pieces),
        np.sum([piece.load_LE for piece in pieces], axis=0),
        np.sum([piece.tokens_L for piece in pieces], axis=0),
    )


def piece_of(shard: Shard) -> Piece:
    """What a shard holds. Damaged where it names an expert that its router does not have."""
    routers, files = shard.trace.routers, shard.files
    load_LE = np.zeros((len(routers), max(r.experts for r in routers)), np.int64)
    tokens_L = np.zeros(len(routers), np.int64)
    if shard.trace.counts_only:
        table = shard.counts()
        at = table["router"].to_numpy(), table["expert"].to_numpy()
        np.add.at(load_LE, at, table["assignments"].to_numpy())
        tokens_L[:] = _tokens_counted(load_LE, routers, files.tokens)
    else:
        for r, router in enumerate(routers):
            tokens_L[r], load_LE[r] = _load(shard, r, router, load_LE.shape[1])
        if tokens_L.sum() != (rows := shard.file("routing").metadata.num_rows):
            name = files.paths["routing"]
            said = f"{tokens_L.sum():,} of its {rows:,} rows are of a router of the manifest"
            raise Damaged(name, said, name)
    first = files.last_batch if files.first_batch is None else files.first_batch
    return Piece(first, files.last_batch, files.tokens, files.decisions, load_LE, tokens_L)


def _tokens_counted(load_LE: np.ndarray, routers: list[Router], tokens: int) -> np.ndarray:
    """Of a model with two stacks counts do not say which tokens reach a router: as many as its
    assignments take."""
    top_k_L = np.array([router.top_k for router in routers])
    by_load_L = -(-load_LE.sum(1) // top_k_L)
    has_stacks_L = np.array([bool(router.stack) for router in routers])
    return np.where(has_stacks_L, by_load_L, tokens)


def _load(shard: Shard, r: int, router: Router, width: int) -> tuple[int, np.ndarray]:
    """The number of decisions of a router, and its load_E; null slots are not counted. A router and
    a slot at a time: what is read then stays in the processor's caches."""
    table = shard.rows_of_router("routing", r, [f"expert_{j}" for j in range(router.top_k)])
    load_E = np.zeros(width, np.int64)
    for column in table.columns:
        for chunk in column.chunks:
            ids_N = (chunk.drop_null() if chunk.null_count else chunk).to_numpy()
            found_E = np.bincount(ids_N, minlength=width)
            if found_E[router.experts :].any():
                name, highest = shard.files.paths["routing"], found_E.nonzero()[0][-1]
                said = f"it has an assignment to expert {highest} of layer {router.layer}, which"
                raise Damaged(name, f"{said} has {router.experts} experts", name)
            load_E += found_E
    return len(table), load_E


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
