"""The tokens of one shard of A that are compared: where they are in both traces, and what is known
of them.

T tokens, K slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moe_inspect.analysis.counting.counts import CLUSTERS
from moe_inspect.analysis.counting.select import Selection
from moe_inspect.comparison.aligning.align import AlignedShard, Alignment, rows_of
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.schema import PHASES
from moe_inspect.trace.shard import Shard, codes

Columns = tuple[np.ndarray, ...]
DECILES = 10
CELLS = len(PHASES) * DECILES  # a phase and a position decile


@dataclass(frozen=True)
class Part:
    """Rows of one shard. at: int64, which of the tokens; None for all, in order."""

    shard: Shard
    rows: np.ndarray
    at: np.ndarray | None = None

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


@dataclass(frozen=True)
class Rows:
    """The tokens that reach the routers of a stack. a, b: where they are. unit_T, cell_T: what they
    are counted by (`counts.PairCounts`). last_T: whether they are the last of their sequence.
    alike: the shard is the same file in both traces."""

    a: Part
    b: list[Part]
    unit_T: np.ndarray
    cell_T: np.ndarray
    document_T: np.ndarray
    last_T: np.ndarray
    alike: bool

    def __len__(self) -> int:
        return len(self.a.rows)

    @cached_property
    def units(self) -> tuple[np.ndarray, np.ndarray]:
        """The units there are, and which of these each token is in."""
        unit_X, at_T = np.unique(self.unit_T, return_inverse=True)
        return unit_X, at_T.astype(np.int64)

    def take(self, keep_T: np.ndarray) -> Rows:
        """Of these tokens only."""
        renumbered_T = np.cumsum(keep_T) - 1
        parts = list[Part]()
        for part in self.b:
            at = np.arange(len(self)) if part.at is None else part.at
            kept = keep_T[at]
            if kept.any():
                at_kept = None if part.at is None else renumbered_T[at[kept]]
                parts.append(Part(part.shard, part.rows[kept], at_kept))
        part_a = Part(self.a.shard, self.a.rows[keep_T])
        tokens = self.unit_T, self.cell_T, self.document_T, self.last_T
        return Rows(part_a, parts, *(values[keep_T] for values in tokens), alike=self.alike)

    def of_a(self, read: Callable[[Shard], Columns], router: int | None) -> Columns:
        """What `read` returns of a shard, of these tokens. router: whose decisions they are; None
        for a column of the tokens."""
        return _taken(self.a, read, router)

    def of_b(self, read: Callable[[Shard], Columns], router: int | None) -> Columns:
        if len(self.b) == 1 and self.b[0].at is None:
            return _taken(self.b[0], read, router)
        parts = [_taken(part, read, router) for part in self.b]
        columns = [
            np.empty((len(self), *column.shape[1:]), np.result_type(*(p[j] for p in parts)))
            for j, column in enumerate(parts[0])
        ]
        for part, found in zip(self.b, parts, strict=True):
            for column, values in zip(columns, found, strict=True):
                column[part.at] = values
        return tuple(columns)


def _taken(part: Part, read: Callable[[Shard], Columns], router: int | None) -> Columns:
    columns, seen = read(part.shard), None if router is None else part.shard.seen(router)
    if seen is not None:
        part = Part(part.shard, (np.cumsum(seen) - 1)[part.rows])
    if part.highest >= len(columns[0]):
        raise MoeInspectError(
            f"damaged trace: {part.shard.trace.path}: router {router} has {len(columns[0])} "
            f"decisions in a shard with a token in row {part.highest}"
        )
    return tuple(column[part.index] for column in columns)


def rows_of_shard(
    traces: tuple[Trace, Trace], aligned: AlignedShard, stack: str, selection: Selection
) -> Rows:
    """The tokens of a shard of A that reach the routers of a stack and are selected."""
    trace_a, trace_b = traces
    s = aligned.segments
    rows_a, rows_b = rows_of(s.row_a, s.length), rows_of(s.row_b, s.length)
    shard_b = np.repeat(s.shard_b, s.length)
    start_T = np.repeat(s.position - np.cumsum(s.length) + s.length, s.length)
    position_T = start_T + np.arange(len(rows_a))
    tokens_T, last_T = (np.repeat(of_S, s.length) for of_S in (aligned.tokens_S, aligned.last_S))
    shard = trace_a.shard(aligned.number)
    table = shard.tokens(["document", "domain", "phase"])
    code_T, labels = codes(table["domain"])
    phase_T, phases = codes(table["phase"])
    code_T, phase_T = code_T[rows_a], phase_T[rows_a]
    keep_T = _selected(code_T, labels, phase_T, phases, stack, selection)
    document_T = table["document"].to_numpy()[rows_a].astype(np.int64)
    domains = aligned.domains
    domain_of = np.array([domains.index(x) if x in domains else 0 for x in labels], np.int64)
    number_of = np.array([PHASES.index(x) if x in PHASES else 0 for x in phases], np.int64)
    decile_T = np.clip(DECILES * position_T // np.maximum(tokens_T, 1), 0, DECILES - 1)
    unit_T = domain_of[code_T] * CLUSTERS + document_T % CLUSTERS
    cell_T = number_of[phase_T] * DECILES + decile_T
    last_T = position_T == last_T
    if not keep_T.all():
        rows_a, rows_b, shard_b, unit_T, cell_T, document_T, last_T = (
            values[keep_T]
            for values in (rows_a, rows_b, shard_b, unit_T, cell_T, document_T, last_T)
        )
    others = np.unique(shard_b).tolist()
    parts = [
        Part(trace_b.shard(n), rows_b[at], at if len(others) > 1 else None)
        for n in others
        for at in [np.flatnonzero(shard_b == n)]
    ]
    part_a = Part(shard, rows_a)
    alike = len(parts) == 1 and same_files(shard, parts[0].shard)
    alike = alike and np.array_equal(rows_a, rows_b)
    return Rows(part_a, parts, unit_T, cell_T, document_T, last_T, alike)


def _selected(
    code_T: np.ndarray,
    labels: list[str],
    phase_T: np.ndarray,
    phases: list[str],
    stack: str,
    selection: Selection,
) -> np.ndarray:
    """bool [T]: of a selected domain and phase, and seen by the routers of the stack."""
    keep_T = np.ones(len(code_T), bool)
    if selection.domains is not None:
        keep_T &= np.array([x in selection.domains for x in labels], bool)[code_T]
    if selection.phase is not None:
        keep_T &= np.array([x == selection.phase for x in phases], bool)[phase_T]
    if stack:
        encoded = np.array([x == PHASES[2] for x in phases], bool)
        keep_T &= (encoded == (stack == "encoder"))[phase_T]
    return keep_T


def same_files(a: Shard, b: Shard) -> bool:
    """Whether two shards have the same bytes, as the traces state them: nothing is read."""
    tables = set(a.files.stated) & set(b.files.stated) & {"tokens", "routing", "logits"}
    hashes = [(a.files.stated[t].sha256, b.files.stated[t].sha256) for t in sorted(tables)]
    return set(a.files.stated) == set(b.files.stated) and all(
        x is not None and x == y for x, y in hashes
    )


def all_alike(traces: tuple[Trace, Trace], alignment: Alignment) -> bool:
    """Whether every shard that is compared is the same file in both traces, in whole."""
    s = alignment.segments
    if not np.array_equal(s.row_a, s.row_b) or not np.array_equal(s.shard_a, s.shard_b):
        return False
    shards = zip(traces[0].shards, traces[1].shards, strict=False)
    used = set(np.unique(s.shard_a).tolist())
    return all(same_files(a, b) for n, (a, b) in enumerate(shards) if n in used)
