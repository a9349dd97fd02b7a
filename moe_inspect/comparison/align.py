"""Find the rows of two traces that are the same token, by document and position or by content; and
read the aligned rows of a shard.

T tokens of a shard, R runs and G sequences of a trace, P pairs of sequences, S segments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np
import pandas as pd

from moe_inspect.analysis.counting.counts import CLUSTERS
from moe_inspect.analysis.counting.select import Selection
from moe_inspect.analysis.tasks import by_shard
from moe_inspect.comparison.pairing import DifferentModelsError, vocabularies_apart
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.schema import PHASES, sees
from moe_inspect.trace.shard import Shard, codes, run_edges

PREFIX = 16  # first tokens, by which a sequence is found if its length differs in the other trace
LINE = 2**32  # length of the line on which the positions of a pair of sequences lie
MARGIN = 2**20  # before the first position, so that shifted positions stay on their line


@dataclass(frozen=True)
class Runs:
    """R runs: consecutive positions of one sequence in consecutive rows of a shard."""

    position: np.ndarray  # [R]: the first
    length: np.ndarray  # [R]
    shard: np.ndarray  # [R]
    row: np.ndarray  # [R]: the first
    group: np.ndarray  # [R]: its sequence, an index into the arrays [G]
    key_G: np.ndarray  # [G, 4]: document, sequence within it, encoder or not, repetition
    content_G: np.ndarray  # hashes of all token ids and positions
    prefix_G: np.ndarray  # hashes of the first PREFIX tokens
    known: bool  # whether the trace knows token ids
    domains: tuple[str, ...]

    @cached_property
    def tokens_G(self) -> np.ndarray:
        return _sums(self.group, self.length, len(self.key_G))

    @cached_property
    def last_G(self) -> np.ndarray:
        """Last position of each sequence. int64 [G]"""
        last_G = np.zeros(len(self.key_G), np.int64)
        np.maximum.at(last_G, self.group, self.position + self.length - 1)
        return last_G

    @property
    def tokens(self) -> int:
        return int(self.length.sum())


def read_runs(trace: Trace) -> Runs:
    """Read where the sequences of a trace are. Memory grows with the number of sequences, or with
    that of tokens if sequences take turns."""
    if trace.counts_only:
        raise MoeInspectError(
            f"{trace.path} holds counts only, which cannot be compared token by token: "
            f"{trace.more_than_counts}"
        )
    shards = list(by_shard(trace, None, _runs_of))
    sizes = [part.shape[1] for part, _, _ in shards]
    if not sum(sizes):
        raise MoeInspectError(f"{trace.path} holds no tokens: nothing to compare")
    columns = np.concatenate([part for part, _, _ in shards], axis=1)
    key_G, group = _sequences(columns[:5])
    position, length, row, content, prefix = columns[3:]
    return Runs(
        position,
        length,
        np.repeat(np.arange(len(sizes)), sizes),
        row,
        group,
        key_G,
        *(_sums(group, hashes, len(key_G)) for hashes in (content, prefix)),
        known=any(known for _, _, known in shards),
        domains=tuple(sorted({label for _, labels, _ in shards for label in labels})),
    )


def _runs_of(shard: Shard) -> tuple[np.ndarray, list[str], bool]:
    """Columns of `read_runs`, int64 [8, R]; the domains; and whether token ids are known."""
    names = ["document", "sequence", "position", "token_id"]
    table = shard.tokens([*names, "domain", "phase"])
    code_T, labels = codes(table["domain"])
    phase_T, phases = codes(table["phase"])
    document_T, sequence_T, position_T, id_T = (
        table[name].to_numpy().astype(np.int64) for name in names
    )
    encoder_T = np.array([phase == PHASES[2] for phase in phases], bool)[phase_T]
    edges = run_edges(document_T, sequence_T, encoder_T, position_T - np.arange(len(position_T)))
    first = edges[:-1]
    hash_T = mixed((id_T << 32) ^ position_T).view(np.int64)  # summed over a sequence
    early_T = np.where(position_T < PREFIX, hash_T, 0)
    keys = (column_T[first] for column_T in (document_T, sequence_T, encoder_T, position_T))
    hashes = (np.add.reduceat(x, first) if len(first) else first for x in (hash_T, early_T))
    part = np.stack([*keys, np.diff(edges), first, *hashes])
    return part, [labels[d] for d in np.unique(code_T)], bool((id_T >= 0).any())


def mixed(values: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each integer: the finalizer of SplitMix64
    (doi:10.1145/2660193.2660195). uint64"""
    h = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


def _sequences(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Key of each sequence, int64 [G, 4], and the sequence of each run, int64 [R]. A run that
    begins before the last one ended belongs to another repetition of the sequence. columns:
    document, sequence, encoder or not, position and length of each run."""
    names = ["document", "sequence", "encoder"]
    runs = pd.DataFrame(columns.T, columns=pd.Index([*names, "position", "length"]))
    # within the document, since programs number sequences differently
    runs["sequence"] = runs.groupby("document")["sequence"].rank("dense").astype(np.int64) - 1
    group = runs.groupby(names).ngroup()
    end = (runs["position"] + runs["length"]).groupby(group)
    again = runs["position"] < end.shift(fill_value=runs["position"].min())
    runs["repetition"] = again.astype(np.int64).groupby(group).cumsum()
    group = runs.groupby([group, "repetition"]).ngroup().to_numpy()
    _, first_G = np.unique(group, return_index=True)
    return runs[[*names, "repetition"]].to_numpy()[first_G], group


def _sums(group: np.ndarray, values: np.ndarray, G: int) -> np.ndarray:
    """Sums by sequence, modulo 2⁶⁴. int64 [G]"""
    total_G = np.zeros(G, np.int64)
    np.add.at(total_G, group, values)
    return total_G


@dataclass(frozen=True)
class Segments:
    """Rows that are the same tokens in both traces. Arrays [S], in the order of A's rows."""

    pair: np.ndarray  # the pair of sequences
    position: np.ndarray  # the first position
    length: np.ndarray
    shard_a: np.ndarray
    row_a: np.ndarray  # the first row
    shard_b: np.ndarray
    row_b: np.ndarray
    size: np.ndarray  # tokens of the sequence in A
    last: np.ndarray  # the last position that both traces have

    def take(self, which: np.ndarray) -> Segments:
        return Segments(*(getattr(self, field.name)[which] for field in fields(self)))

    @property
    def tokens(self) -> int:
        return int(self.length.sum())

    @cached_property
    def shards(self) -> list[int]:
        """The shards of A that have a token in common with B."""
        return np.unique(self.shard_a).tolist()

    def in_shard(self, shard_a: int) -> Segments:
        first, last = np.searchsorted(self.shard_a, [shard_a, shard_a + 1])
        return self.take(np.arange(first, last))


def rows_of(first: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Row numbers of runs, concatenated. int64 [T]"""
    ends = np.cumsum(length)
    return np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(first - (ends - length), length)


@dataclass(frozen=True)
class Alignment:
    """The tokens that two traces have in common."""

    traces: tuple[Trace, Trace]
    a: Runs
    b: Runs
    segments: Segments  # the tokens that are compared
    by: str  # "document" (their numbers and positions) or "content"
    matched: int  # tokens that both have
    diverged: int  # pairs of sequences that continue with other token ids
    other_ids: int  # tokens left out for that

    @property
    def ids_known(self) -> bool:
        """Whether token ids confirm that the tokens are the same."""
        return self.a.known and self.b.known


def align(
    trace_a: Trace,
    trace_b: Trace,
    *,
    shift_positions: int = 0,
    shift_routes: int = 0,
    drop_last: bool = False,
) -> Alignment:
    """Find the tokens that both traces have. shift_positions: B's position n + shift is A's n.
    shift_routes: B's routes are shifted, but not its token ids. drop_last: leave out the last token
    of each sequence."""
    if (shift := max(abs(shift_positions), abs(shift_routes))) >= MARGIN:
        raise MoeInspectError(f"a shift by {shift:,} tokens: at most {MARGIN - 1:,} are possible")
    a, b = read_runs(trace_a), read_runs(trace_b)
    by, pairs = "document", _paired(a.key_G, b.key_G)
    if a.known and b.known and not shift_positions:
        by_content = _pairs_by_content(a, b)
        if _alike(a, b, pairs) < 0.999 * _alike(a, b, by_content):
            by, pairs = "content", by_content
    found = segments_of(a, b, pairs, shift_positions)
    first_P = np.full(len(pairs), LINE)  # the first position at which token ids differ
    if a.known and b.known:
        suspect_P = ~_same_content(a, b, pairs) | bool(shift_positions)
        suspects = found.take(np.flatnonzero(suspect_P[found.pair]))
        for s, ids_a, ids_b in _token_ids((trace_a, trace_b), suspects):
            differs = np.flatnonzero(ids_a != ids_b)
            pair_T, position_T = np.repeat(s.pair, s.length), rows_of(s.position, s.length)
            np.minimum.at(first_P, pair_T[differs], position_T[differs])
    diverged = int((first_P < LINE).sum())
    other = found.tokens - _cut(found, first_P[found.pair]).tokens
    if shift_routes:
        found = segments_of(a, b, pairs, shift_routes)
    found = _cut(found, first_P[found.pair])
    kept = _cut(found, found.last) if drop_last else found
    return Alignment((trace_a, trace_b), a, b, kept, by, found.tokens, diverged, other)


def segments_of(a: Runs, b: Runs, pairs: np.ndarray, shift: int = 0) -> Segments:
    """Rows of paired sequences at the same positions; B's are `shift` further on."""
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
    run_a, run_b, pair = at_a[of_a], at_b[of_b], start // LINE
    group_a, group_b = pairs[pair].T
    found = Segments(
        pair,
        start % LINE - MARGIN,
        length,
        a.shard[run_a],
        a.row[run_a] + start - start_a[of_a],
        b.shard[run_b],
        b.row[run_b] + start - start_b[of_b],
        a.tokens_G[group_a],
        np.minimum(a.last_G[group_a], b.last_G[group_b]),
    )
    s = found.take(np.lexsort([found.row_a, found.shard_a]))
    # join segments of a pair that follow each other in both traces
    start = np.cumsum(s.length) - s.length
    steps = s.row_a - start, s.row_b - start, s.position - start
    first = run_edges(s.pair, s.shard_a, s.shard_b, *steps)[:-1]
    return replace(s.take(first), length=np.add.reduceat(s.length, first)) if len(first) else s


def _on_lines(runs: Runs, group_P: np.ndarray, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """Runs of paired sequences and their beginnings, ascending; each pair on its own line."""
    line_G = np.full(len(runs.key_G), -1)
    line_G[group_P] = np.arange(len(group_P))
    line = line_G[runs.group]
    at = np.flatnonzero(line >= 0)
    start = line[at] * LINE + runs.position[at] + MARGIN + offset
    order = np.argsort(start, kind="stable")
    return at[order], start[order]


def _cut(segments: Segments, end_S: np.ndarray) -> Segments:
    """The part of each segment before a position."""
    length = np.clip(end_S - segments.position, 0, segments.length)
    return replace(segments, length=length).take(np.flatnonzero(length))


def _paired(key_a: np.ndarray, key_b: np.ndarray) -> np.ndarray:
    """Equal rows of A and B, both without repeats, in ascending order. int64 [P, 2]"""
    both = np.concatenate([key_a, key_b])
    order = np.lexsort(both.T[::-1])
    same = np.flatnonzero((both[order[1:]] == both[order[:-1]]).all(axis=1))
    return np.column_stack([order[same], order[same + 1] - len(key_a)])


def _pairs_by_content(a: Runs, b: Runs) -> np.ndarray:
    """Pairs of sequences with the same token ids, the n-th of A with the n-th of B; then of
    sequences that alone begin with the same PREFIX tokens. int64 [P, 2]"""
    pairs = _paired(_numbered(a.content_G), _numbered(b.content_G))
    places, keys = list[np.ndarray](), list[np.ndarray]()
    for runs, paired in zip((a, b), pairs.T, strict=True):
        left = np.setdiff1d(np.flatnonzero(runs.tokens_G >= PREFIX), paired)
        key, first, times = np.unique(runs.prefix_G[left], return_index=True, return_counts=True)
        places.append(left[first[times == 1]])
        keys.append(key[times == 1, None])
    more = _paired(*keys)
    return np.concatenate([pairs, np.column_stack([places[i][more[:, i]] for i in (0, 1)])])


def _numbered(key_G: np.ndarray) -> np.ndarray:
    """Each key, and its number among equal keys. [G, 2]"""
    return np.column_stack([key_G, pd.Series(key_G).groupby(key_G).cumcount()])


def _same_content(a: Runs, b: Runs, pairs: np.ndarray) -> np.ndarray:
    of_a, of_b = pairs.T
    return (a.content_G[of_a] == b.content_G[of_b]) & (a.tokens_G[of_a] == b.tokens_G[of_b])


def _alike(a: Runs, b: Runs, pairs: np.ndarray) -> int:
    """Number of tokens of pairs that have, or begin with, the same token ids."""
    of_a, of_b = pairs.T
    same = _same_content(a, b, pairs) | (a.prefix_G[of_a] == b.prefix_G[of_b])
    return int(np.minimum(a.tokens_G[of_a], b.tokens_G[of_b])[same].sum())


def _token_ids(
    traces: tuple[Trace, Trace], segments: Segments
) -> Iterator[tuple[Segments, np.ndarray, np.ndarray]]:
    """Segments of one shard of A and one of B, and the token ids of both, [T]."""

    @lru_cache(maxsize=4)
    def ids(side: int, number: int) -> np.ndarray:
        return traces[side].shard(number).tokens(["token_id"])["token_id"].to_numpy()

    s = segments.take(np.lexsort([segments.shard_b, segments.shard_a]))
    for first, end in pairwise(run_edges(s.shard_a, s.shard_b).tolist()):
        part = s.take(np.arange(first, end))
        ids_a = ids(0, int(part.shard_a[0]))[rows_of(part.row_a, part.length)]
        yield part, ids_a, ids(1, int(part.shard_b[0]))[rows_of(part.row_b, part.length)]


LEAST = 0.5  # of the tokens that could be compared
SHIFTS = (-2, -1, 1, 2)
SAMPLE = 64  # pairs of sequences


def check_tokens(alignment: Alignment) -> None:
    """Raise MoeInspectError if most tokens of the shorter trace have no partner in the other, and
    DifferentModelsError if the tokenizers differ."""
    a, b = alignment.traces

    def shifted(shift: int) -> float:
        """Share of the sampled tokens whose ids are `shift` positions further on in B."""
        runs = alignment.a, alignment.b
        segments = segments_of(*runs, _paired(*(x.key_G for x in runs))[:SAMPLE], shift)
        same = sum(int((ids_a == ids_b).sum()) for _, ids_a, ids_b in _token_ids((a, b), segments))
        return same / max(segments.tokens, 1)

    possible = min(alignment.a.tokens, alignment.b.tokens)
    if alignment.matched >= LEAST * possible or (alignment.matched and not alignment.ids_known):
        return
    if alignment.ids_known:
        share, shift = max((shifted(shift), shift) for shift in SHIFTS)
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


Columns = tuple[np.ndarray, ...]
DECILES = 10
CELLS = len(PHASES) * DECILES  # a phase and a position decile


@dataclass(frozen=True)
class RowsInShard:
    """Rows of one shard that hold some of the aligned tokens."""

    shard: Shard
    rows: np.ndarray
    at: np.ndarray  # int64, indices of the aligned tokens

    @cached_property
    def index(self) -> slice | np.ndarray:
        """The rows; a slice if they follow each other, so that nothing is copied."""
        rows = self.rows
        if len(rows) and (np.diff(rows) == 1).all():
            return slice(int(rows[0]), int(rows[-1]) + 1)
        return rows

    def take(self, keep_T: np.ndarray) -> RowsInShard:
        kept = keep_T[self.at]
        return RowsInShard(self.shard, self.rows[kept], (np.cumsum(keep_T) - 1)[self.at[kept]])

    def read(self, columns_of: Callable[[Shard, int], Columns], router: int) -> Columns:
        columns, part = columns_of(self.shard, router), self
        seen = self.shard.seen(router)
        if seen is not None:
            part = RowsInShard(self.shard, (np.cumsum(seen) - 1)[self.rows], self.at)
        if (highest := int(part.rows.max(initial=-1))) >= len(columns[0]):
            raise MoeInspectError(
                f"damaged trace: {self.shard.trace.path}: router {router} has {len(columns[0])} "
                f"decisions in a shard with a token in row {highest}"
            )
        return tuple(column[part.index] for column in columns)


@dataclass(frozen=True)
class AlignedRows:
    """Aligned tokens of a shard of A that reach the routers of a stack."""

    sides: tuple[list[RowsInShard], list[RowsInShard]]  # where they are in A and in B
    unit_T: np.ndarray  # cluster of documents
    cell_T: np.ndarray  # phase and position decile
    document_T: np.ndarray
    last_T: np.ndarray  # whether they are the last of their sequence

    def __len__(self) -> int:
        return len(self.unit_T)

    @property
    def row_T(self) -> np.ndarray:
        """Rows in the shard of A. int64 [T]"""
        return self.sides[0][0].rows

    @cached_property
    def alike(self) -> bool:
        """Whether both traces have the same rows of the same file."""
        (a,), of_b = self.sides
        if len(of_b) != 1 or not same_files(a.shard, of_b[0].shard):
            return False
        return np.array_equal(a.rows, of_b[0].rows)

    def take(self, keep_T: np.ndarray) -> AlignedRows:
        of_a, of_b = ([part.take(keep_T) for part in side] for side in self.sides)
        of_b = [part for part in of_b if len(part.at)]
        tokens = self.unit_T, self.cell_T, self.document_T, self.last_T
        return AlignedRows((of_a, of_b), *(values[keep_T] for values in tokens))

    def read(self, side: int, columns_of: Callable[[Shard, int], Columns], router: int) -> Columns:
        """Columns of a router of A (side 0) or of B (side 1), at these tokens."""
        parts = self.sides[side]
        of_parts = [part.read(columns_of, router) for part in parts]
        if len(parts) == 1:
            return of_parts[0]
        columns = [
            np.empty((len(self), *of_part[0].shape[1:]), np.result_type(*of_part))
            for of_part in zip(*of_parts, strict=True)
        ]
        for part, of_part in zip(parts, of_parts, strict=True):
            for column, values in zip(columns, of_part, strict=True):
                column[part.at] = values
        return tuple(columns)

    def both(
        self, columns_of: Callable[[Shard, int], Columns], pair: tuple[int, int]
    ) -> tuple[Columns, Columns]:
        """Columns of a router of A and of one of B, at these tokens."""
        return self.read(0, columns_of, pair[0]), self.read(1, columns_of, pair[1])


def rows_of_shard(
    traces: tuple[Trace, Trace],
    s: Segments,
    domains: tuple[str, ...],
    stack: str,
    selection: Selection,
) -> AlignedRows:
    """Aligned tokens of one shard of A that reach the routers of a stack. domains: A's labels."""
    rows_a, rows_b = rows_of(s.row_a, s.length), rows_of(s.row_b, s.length)
    shard_b, size_T, last_T = (np.repeat(of_S, s.length) for of_S in (s.shard_b, s.size, s.last))
    position_T, shard = rows_of(s.position, s.length), traces[0].shard(int(s.shard_a[0]))
    table = shard.tokens(["document", "domain", "phase"])
    code_T, labels = codes(table["domain"])
    phase_T, phases = codes(table["phase"])
    code_T, phase_T = code_T[rows_a], phase_T[rows_a]
    document_T = table["document"].to_numpy()[rows_a].astype(np.int64)
    domain_of = np.array([domains.index(x) if x in domains else 0 for x in labels], np.int64)
    number_of = np.array([PHASES.index(x) if x in PHASES else 0 for x in phases], np.int64)
    decile_T = np.clip(DECILES * position_T // np.maximum(size_T, 1), 0, DECILES - 1)
    others = [(n, np.flatnonzero(shard_b == n)) for n in np.unique(shard_b).tolist()]
    of_b = [RowsInShard(traces[1].shard(n), rows_b[at], at) for n, at in others]
    rows = AlignedRows(
        ([RowsInShard(shard, rows_a, np.arange(len(rows_a)))], of_b),
        domain_of[code_T] * CLUSTERS + document_T % CLUSTERS,
        number_of[phase_T] * DECILES + decile_T,
        document_T,
        position_T == last_T,
    )
    of_domain = [selection.domains is None or x in selection.domains for x in labels]
    of_phase = [sees(stack, x) and selection.phase in (None, x) for x in phases]
    keep_T = np.array(of_domain, bool)[code_T] & np.array(of_phase, bool)[phase_T]
    return rows if keep_T.all() else rows.take(keep_T)


def same_files(a: Shard, b: Shard) -> bool:
    """Whether two shards have the same bytes, by the stated hashes; no file is read."""
    tables = set(a.files.stated) & set(b.files.stated) & {"tokens", "routing", "logits"}
    hashes = [(a.files.stated[t].sha256, b.files.stated[t].sha256) for t in sorted(tables)]
    same = all(x is not None and x == y for x, y in hashes)
    return same and set(a.files.stated) == set(b.files.stated)


def all_alike(alignment: Alignment) -> bool:
    """Whether every compared shard is the same complete file in both traces."""
    s = alignment.segments
    if not np.array_equal(s.row_a, s.row_b) or not np.array_equal(s.shard_a, s.shard_b):
        return False
    shards = zip(*(trace.shards for trace in alignment.traces), strict=False)
    return all(same_files(a, b) for n, (a, b) in enumerate(shards) if n in s.shards)
