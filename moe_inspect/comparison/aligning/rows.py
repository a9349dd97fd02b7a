"""The tokens of one shard of A that are compared: where they are in both traces, and what is known
of them. T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moe_inspect.analysis.counting.counts import CLUSTERS
from moe_inspect.analysis.counting.select import Selection
from moe_inspect.comparison.aligning.align import Alignment, Segments, rows_of
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.schema import PHASES, sees
from moe_inspect.trace.shard import Shard, codes

Columns = tuple[np.ndarray, ...]
OF_TOKENS = -1
DECILES = 10
CELLS = len(PHASES) * DECILES  # a phase and a position decile


@dataclass(frozen=True)
class RowsInShard:
    shard: Shard
    rows: np.ndarray
    at: np.ndarray | None = None  # int64, which of the tokens; None for all, in order

    @cached_property
    def index(self) -> slice | np.ndarray:
        """The rows, as a slice where they follow each other: then nothing is copied."""
        rows = self.rows
        if len(rows) and (np.diff(rows) == 1).all():
            return slice(int(rows[0]), int(rows[-1]) + 1)
        return rows

    @cached_property
    def highest(self) -> int:
        return int(self.rows.max(initial=-1))

    def take(self, keep_T: np.ndarray) -> RowsInShard:
        if self.at is None:
            return RowsInShard(self.shard, self.rows[keep_T])
        kept = keep_T[self.at]
        return RowsInShard(self.shard, self.rows[kept], (np.cumsum(keep_T) - 1)[self.at[kept]])

    def read(self, columns_of: Callable[[Shard, int], Columns], router: int) -> Columns:
        columns, part = columns_of(self.shard, router), self
        seen = None if router == OF_TOKENS else self.shard.seen(router)
        if seen is not None:
            part = RowsInShard(self.shard, (np.cumsum(seen) - 1)[self.rows])
        if part.highest >= len(columns[0]):
            raise MoeInspectError(
                f"damaged trace: {self.shard.trace.path}: router {router} has {len(columns[0])} "
                f"decisions in a shard with a token in row {part.highest}"
            )
        return tuple(column[part.index] for column in columns)


@dataclass(frozen=True)
class AlignedRows:
    """The tokens that reach the routers of a stack."""

    sides: tuple[list[RowsInShard], list[RowsInShard]]  # where they are in A and in B
    unit_T: np.ndarray  # what they are counted by
    cell_T: np.ndarray
    document_T: np.ndarray
    last_T: np.ndarray  # whether they are the last of their sequence

    def __len__(self) -> int:
        return len(self.unit_T)

    @property
    def row_T(self) -> np.ndarray:
        """int64 [T]: where they are in the shard of A."""
        return self.sides[0][0].rows

    @cached_property
    def alike(self) -> bool:
        """Whether they are the same rows of the same file in both traces."""
        (a,), of_b = self.sides
        if len(of_b) != 1 or not same_files(a.shard, of_b[0].shard):
            return False
        return np.array_equal(a.rows, of_b[0].rows)

    def take(self, keep_T: np.ndarray) -> AlignedRows:
        """Of these tokens only."""
        of_a, of_b = ([part.take(keep_T) for part in side] for side in self.sides)
        of_b = [part for part in of_b if part.at is None or len(part.at)]
        tokens = self.unit_T, self.cell_T, self.document_T, self.last_T
        return AlignedRows((of_a, of_b), *(values[keep_T] for values in tokens))

    def read(self, side: int, columns_of: Callable[[Shard, int], Columns], router: int) -> Columns:
        """What `columns_of` reads of a router of A (side 0) or of B (side 1), of these tokens;
        OF_TOKENS for columns of the tokens themselves."""
        parts = self.sides[side]
        found = [part.read(columns_of, router) for part in parts]
        if parts[0].at is None:
            return found[0]
        columns = [
            np.empty((len(self), *of_part[0].shape[1:]), np.result_type(*of_part))
            for of_part in zip(*found, strict=True)
        ]
        for part, of_part in zip(parts, found, strict=True):
            for column, values in zip(columns, of_part, strict=True):
                column[part.at] = values
        return tuple(columns)

    def both(
        self, columns_of: Callable[[Shard, int], Columns], pair: tuple[int, int]
    ) -> tuple[Columns, Columns]:
        """The same of a router of A and one of B."""
        return self.read(0, columns_of, pair[0]), self.read(1, columns_of, pair[1])


def rows_of_shard(
    traces: tuple[Trace, Trace],
    s: Segments,
    domains: tuple[str, ...],
    stack: str,
    selection: Selection,
) -> AlignedRows:
    """The tokens in one shard of A that reach the routers of a stack. domains: the labels of A."""
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
    others = np.unique(shard_b).tolist()
    places = [np.flatnonzero(shard_b == n) for n in others]
    of_b = [
        RowsInShard(traces[1].shard(n), rows_b[at], at if len(others) > 1 else None)
        for n, at in zip(others, places, strict=True)
    ]
    rows = AlignedRows(
        ([RowsInShard(shard, rows_a)], of_b),
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
    """Whether two shards have the same bytes, as the traces state them: nothing is read."""
    tables = set(a.files.stated) & set(b.files.stated) & {"tokens", "routing", "logits"}
    hashes = [(a.files.stated[t].sha256, b.files.stated[t].sha256) for t in sorted(tables)]
    same = all(x is not None and x == y for x, y in hashes)
    return same and set(a.files.stated) == set(b.files.stated)


def all_alike(alignment: Alignment) -> bool:
    """Whether every shard that is compared is the same file in both traces, in whole."""
    s = alignment.segments
    if not np.array_equal(s.row_a, s.row_b) or not np.array_equal(s.shard_a, s.shard_b):
        return False
    shards = zip(*(trace.shards for trace in alignment.traces), strict=False)
    return all(same_files(a, b) for n, (a, b) in enumerate(shards) if n in s.shards)
