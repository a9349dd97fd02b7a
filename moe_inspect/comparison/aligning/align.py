"""Which rows of two traces are the same token: by document, position and token id, or by the
content of sequences where documents are numbered otherwise.

G sequences of a trace, P pairs of sequences, R runs, S segments, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from moe_inspect.comparison.aligning.pairing import DifferentModelsError, vocabularies_apart
from moe_inspect.comparison.aligning.runs import PREFIX, Runs, read_runs
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.runs import run_edges

LINE = 2**32  # positions of a pair of sequences, on one line with those of all others
MARGIN = 2**20  # so that shifted positions stay on their line


@dataclass(frozen=True)
class Segments:
    """Rows that are the same tokens in both traces: `length` rows from `row_a` of A's shard
    `shard_a` on, and from `row_b` of B's. Arrays [S], in the order of A's rows."""

    pair: np.ndarray
    position: np.ndarray
    length: np.ndarray
    shard_a: np.ndarray
    row_a: np.ndarray
    shard_b: np.ndarray
    row_b: np.ndarray

    def take(self, which: np.ndarray) -> Segments:
        return Segments(*(getattr(self, name)[which] for name in self.__dataclass_fields__))

    @property
    def tokens(self) -> int:
        return int(self.length.sum())

    @cached_property
    def broken(self) -> Segments:
        """Those after whose last token the sequence does not go on with one that both have."""
        start_S = self.pair * LINE + self.position + MARGIN
        return self.take(np.flatnonzero(~np.isin(start_S + self.length, start_S)))

    def in_shard(self, shard_a: int) -> Segments:
        first, last = np.searchsorted(self.shard_a, [shard_a, shard_a + 1])
        return self.take(np.arange(first, last))

    def by_shard_b(self) -> Iterator[tuple[int, Segments]]:
        for shard in np.unique(self.shard_b).tolist():
            yield shard, self.take(np.flatnonzero(self.shard_b == shard))


def rows_of(first: np.ndarray, length: np.ndarray) -> np.ndarray:
    """The rows of runs, one after the other. int64 [T]"""
    ends = np.cumsum(length)
    return np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(first - (ends - length), length)


@dataclass(frozen=True)
class Alignment:
    """a, b: the sequences of both. segments: the tokens that are compared. by: "document" (their
    numbers and positions) or "content". pairs: int64 [P, 2], sequences of A and of B. matched:
    tokens that both have. diverged: pairs of sequences that go on with other token
    ids; other_ids: tokens left out since then."""

    a: Runs
    b: Runs
    segments: Segments
    by: str
    pairs: np.ndarray
    matched: int
    diverged: int
    other_ids: int

    @property
    def ids_known(self) -> bool:
        """Whether it was checked that the tokens are the same."""
        return self.a.known and self.b.known

    @cached_property
    def last_P(self) -> np.ndarray:
        """int64 [P]: the last position of each pair that both traces have."""
        return np.minimum(self.a.last_G[self.pairs[:, 0]], self.b.last_G[self.pairs[:, 1]])

    @cached_property
    def shards(self) -> list[int]:
        """The shards of A that have a token in common with B."""
        return np.unique(self.segments.shard_a).tolist()

    def of_shard(self, number: int) -> AlignedShard:
        s = self.segments.in_shard(number)
        tokens_S = self.a.tokens_G[self.pairs[s.pair, 0]]
        return AlignedShard(number, s, tokens_S, self.last_P[s.pair], self.a.domains)


@dataclass(frozen=True)
class AlignedShard:
    """The tokens of a shard of A that are compared. tokens_S, last_S: of the sequence that each
    segment is of, its tokens in A and the last position that both traces have. `domains`: of
    A."""

    number: int
    segments: Segments
    tokens_S: np.ndarray
    last_S: np.ndarray
    domains: tuple[str, ...]


def align(
    trace_a: Trace,
    trace_b: Trace,
    *,
    shift_positions: int = 0,
    shift_routes: int = 0,
    drop_last: bool = False,
) -> Alignment:
    """The tokens that both traces have. shift_positions: B's position n + shift is A's n.
    shift_routes: the same of B's routes alone, whose token ids are where they belong. drop_last:
    without the last token of each sequence."""
    if (shift := max(abs(shift_positions), abs(shift_routes))) >= MARGIN:
        raise MoeInspectError(f"a shift by {shift:,} tokens: at most {MARGIN - 1:,} are possible")
    a, b = read_runs(trace_a), read_runs(trace_b)
    by, pairs = "document", pairs_by_number(a, b)
    if a.known and b.known and not shift_positions:
        by_content = _pairs_by_content(a, b)
        if _alike(a, b, pairs) < 0.999 * _alike(a, b, by_content):
            by, pairs = "content", by_content
    found = segments_of(a, b, pairs, shift_positions)
    first_P = np.full(len(pairs), LINE)
    if a.known and b.known:
        at = np.flatnonzero(~_same_content(a, b, pairs) | bool(shift_positions))
        first_P = _first_difference(trace_a, trace_b, found, at, len(pairs))
    diverged, other = int((first_P < LINE).sum()), found.tokens - _cut(found, first_P).tokens
    if shift_routes:
        found = segments_of(a, b, pairs, shift_routes)
    found = _cut(found, first_P)
    alignment = Alignment(a, b, found, by, pairs, found.tokens, diverged, other)
    if drop_last:
        alignment = replace(alignment, segments=_cut(alignment.segments, alignment.last_P))
    return alignment


def segments_of(a: Runs, b: Runs, pairs: np.ndarray, shift: int = 0) -> Segments:
    """The rows of paired sequences at the same positions; B's are `shift` further on."""
    at_a, start_a = _on_lines(a, pairs[:, 0], 0)
    at_b, start_b = _on_lines(b, pairs[:, 1], -shift)
    end_a, end_b = start_a + a.length[at_a], start_b + b.length[at_b]
    bounds = np.unique(np.concatenate([start_a, end_a, start_b, end_b]))
    start, length = bounds[:-1], np.diff(bounds)
    of_a = np.searchsorted(start_a, start, "right") - 1
    of_b = np.searchsorted(start_b, start, "right") - 1
    both = (of_a >= 0) & (of_b >= 0)
    both[both] = (start[both] < end_a[of_a[both]]) & (start[both] < end_b[of_b[both]])
    start, length, of_a, of_b = start[both], length[both], of_a[both], of_b[both]
    run_a, run_b = at_a[of_a], at_b[of_b]
    found = Segments(
        start // LINE,
        start % LINE - MARGIN,
        length,
        a.shard[run_a],
        a.row[run_a] + start - start_a[of_a],
        b.shard[run_b],
        b.row[run_b] + start - start_b[of_b],
    )
    return _joined(found.take(np.lexsort([found.row_a, found.shard_a])))


def _joined(segments: Segments) -> Segments:
    """Segments of a pair that follow each other in both traces, as one."""
    s = segments
    start = np.cumsum(s.length) - s.length
    steps = s.row_a - start, s.row_b - start, s.position - start
    edges = run_edges(s.pair, s.shard_a, s.shard_b, *steps)
    if len(edges) < 2:
        return s
    return replace(s.take(edges[:-1]), length=np.add.reduceat(s.length, edges[:-1]))


def _on_lines(runs: Runs, group_P: np.ndarray, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """The runs of paired sequences and where they begin, ascending; each pair on a line of its
    own."""
    line_G = np.full(len(runs.key_G), -1)
    line_G[group_P] = np.arange(len(group_P))
    line = line_G[runs.group]
    at = np.flatnonzero(line >= 0)
    start = line[at] * LINE + runs.position[at] + MARGIN + offset
    order = np.argsort(start, kind="stable")
    return at[order], start[order]


def pairs_by_number(a: Runs, b: Runs) -> np.ndarray:
    """int64 [P, 2]: sequences with the same document, number within it and repetition."""
    both = np.concatenate([a.key_G, b.key_G])
    order = np.lexsort(both.T[::-1])
    same = np.flatnonzero((both[order[1:]] == both[order[:-1]]).all(axis=1))
    first, second = order[same], order[same + 1]
    return np.column_stack([first, second - len(a.key_G)])


def _pairs_by_content(a: Runs, b: Runs) -> np.ndarray:
    """int64 [P, 2]: sequences of the same token ids; of the others those whose first PREFIX are
    the same, where no other begins so."""
    pairs = _pairs_by_key(a.content_G, b.content_G, repeated=True)
    left_a = np.setdiff1d(np.arange(len(a.key_G)), pairs[:, 0])
    left_b = np.setdiff1d(np.arange(len(b.key_G)), pairs[:, 1])
    left_a, left_b = left_a[a.tokens_G[left_a] >= PREFIX], left_b[b.tokens_G[left_b] >= PREFIX]
    more = _pairs_by_key(a.prefix_G[left_a], b.prefix_G[left_b], repeated=False)
    return np.concatenate([pairs, np.column_stack([left_a[more[:, 0]], left_b[more[:, 1]]])])


def _pairs_by_key(key_a: np.ndarray, key_b: np.ndarray, repeated: bool) -> np.ndarray:
    """int64 [P, 2]: those with the same key, the n-th of A with the n-th of B; or only the keys
    that one of each has."""
    keys = np.unique(np.concatenate([key_a, key_b]))
    sides = []
    for key in (key_a, key_b):
        order = np.argsort(key, kind="stable")
        edges = run_edges(key[order])
        size = np.diff(edges)
        which = np.searchsorted(keys, key[order])
        nth = np.arange(len(key)) - np.repeat(edges[:-1], size)
        kept = np.ones(len(key), bool) if repeated else np.repeat(size == 1, size)
        sides.append((order[kept], (which * max(len(key_a), len(key_b), 1) + nth)[kept]))
    (order_a, name_a), (order_b, name_b) = sides
    _, at_a, at_b = np.intersect1d(name_a, name_b, assume_unique=True, return_indices=True)
    return np.column_stack([order_a[at_a], order_b[at_b]])


def _same_content(a: Runs, b: Runs, pairs: np.ndarray) -> np.ndarray:
    """bool [P]: whether all token ids are the same."""
    of_a, of_b = pairs.T
    return (a.content_G[of_a] == b.content_G[of_b]) & (a.tokens_G[of_a] == b.tokens_G[of_b])


def _alike(a: Runs, b: Runs, pairs: np.ndarray) -> int:
    """Tokens of the pairs that have, or begin with, the same token ids."""
    of_a, of_b = pairs.T
    same = _same_content(a, b, pairs) | (a.prefix_G[of_a] == b.prefix_G[of_b])
    return int(np.minimum(a.tokens_G[of_a], b.tokens_G[of_b])[same].sum())


def _first_difference(
    trace_a: Trace, trace_b: Trace, segments: Segments, at: np.ndarray, P: int
) -> np.ndarray:
    """int64 [P]: the first position at which the token ids of a pair differ; LINE where none
    does. `at`: the pairs to look at."""
    first_P = np.full(P, LINE)
    suspects = segments.take(np.flatnonzero(np.isin(segments.pair, at)))

    @lru_cache(maxsize=4)
    def ids(in_b: bool, number: int) -> np.ndarray:
        shard = (trace_b if in_b else trace_a).shard(number)
        return shard.tokens(["token_id"])["token_id"].to_numpy()

    for shard_a in np.unique(suspects.shard_a).tolist():
        for shard_b, s in suspects.in_shard(shard_a).by_shard_b():
            ids_a = ids(False, shard_a)[rows_of(s.row_a, s.length)]
            ids_b = ids(True, shard_b)[rows_of(s.row_b, s.length)]
            differs = np.flatnonzero(ids_a != ids_b)
            of_segment = np.repeat(np.arange(len(s.length)), s.length)[differs]
            begins = np.cumsum(s.length) - s.length
            position = s.position[of_segment] + differs - begins[of_segment]
            np.minimum.at(first_P, s.pair[of_segment], position)
    return first_P


def _cut(segments: Segments, first_P: np.ndarray) -> Segments:
    """What lies before the first difference of each pair."""
    length = np.clip(first_P[segments.pair] - segments.position, 0, segments.length)
    return replace(segments, length=length).take(np.flatnonzero(length))


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
