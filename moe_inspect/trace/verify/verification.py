"""Verification: what verify found. Violation, and how files are read so that whatever is wrong with
one becomes a Violation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_inspect.errors import Damaged, MoeInspectError
from moe_inspect.text import plural, printable
from moe_inspect.trace import parts
from moe_inspect.trace.shard import Shard


class Violation(Exception):
    """The first rule that is violated; caught by `verify` only."""

    def __init__(self, file: str, row: int | None, what: str):
        super().__init__(what)
        self.file, self.row, self.what = file, row, what


def violation_of(error: MoeInspectError, name: str) -> Violation:
    return (
        Violation(error.file, None, error.what)
        if isinstance(error, Damaged)
        else Violation(name, None, str(error))
    )


def open_table(shard: Shard, table: str) -> pq.ParquetFile:
    return or_violation(lambda: shard.file(table))


def read_table(shard: Shard, table: str, columns: list[str]) -> pa.Table:
    return or_violation(
        lambda: parts.read(shard.file(table), shard.files.paths[table], columns, nulls=True)
    )


def or_violation(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Damaged as error:
        raise violation_of(error, error.file) from None


def expect_equal(
    name: str, column: str, found_N: np.ndarray, expected_N: np.ndarray, start: int = 0
) -> None:
    if (wrong_N := found_N != expected_N).any():
        n = int(wrong_N.argmax())
        raise Violation(name, start + n, f"{column} is {found_N[n]}, not {expected_N[n]}")


def ids_of(column: pa.ChunkedArray) -> np.ndarray:
    """int64 or narrower, −1 where null."""
    return (
        column.cast(pa.int32()).fill_null(-1).to_numpy() if column.null_count else column.to_numpy()
    )


def codes_of(column: pa.ChunkedArray, name: str, title: str, known: dict[str, int]) -> np.ndarray:
    """int64 [T]: codes of the labels in `known`, to which new ones are added."""
    if column.null_count:
        raise Violation(name, int(column.is_null().to_numpy().argmax()), f"{title} is null")
    if not len(column):
        return np.zeros(0, np.int64)
    array = (
        (column if pa.types.is_dictionary(column.type) else column.dictionary_encode())
        .unify_dictionaries()
        .combine_chunks()
    )
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    codes = np.array(
        [known.setdefault(label, len(known)) for label in array.dictionary.to_pylist()], np.int64
    )
    return codes[array.indices.to_numpy()]


STATE = {"complete": "is fine", "recording": "is still being written, and fine so far"}
COUNTED = ("tokens", "decisions", "assignments")


@dataclass(repr=False)
class Verification:
    """The result of `verify`.

    ok: no rule is violated. An interrupted trace may be ok.
    status: "complete", "recording" (its writer is at work) or "interrupted".
    resumable: --resume can continue it.
    uncommitted: files that its writer was stopped in. Readers ignore them, --resume deletes them.
    violation, file, row: the first violation, the file it is in, and the row (from 0) where there
        is one; all None of a trace that is ok.
    empty_slots: slots that routed nowhere: Σ counts = tokens × k − empty slots, router by router.
    dropped: of these, those of which it is known which expert dropped them.
    checked: a line per rule that was checked."""

    path: str
    ok: bool = True
    status: str | None = None
    resumable: bool = False
    uncommitted: list[str] = field(default_factory=list)
    violation: str | None = None
    file: str | None = None
    row: int | None = None
    tokens: int = 0
    decisions: int = 0
    assignments: int = 0
    empty_slots: int = 0
    dropped: int = 0
    documents: int = 0
    shards: int = 0
    checked: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        """What the command prints: the state of the trace and what was checked, or the first
        violation."""
        if not self.ok:
            row = "" if self.row is None else f" row {self.row}"
            return printable(f"{Path(self.path) / (self.file or '')}{row}: {self.violation}")
        counts = (plural(getattr(self, name), name[:-1]) for name in COUNTED)
        first = f"{self.path} {self.state}: {', '.join(counts)} in {plural(self.shards, 'shard')}"
        return "\n".join([printable(first), *(f"  {line}" for line in self.checked)])

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"

    @property
    def state(self) -> str:
        """How a trace is that violates no rule, in words."""
        resumed = " and can be resumed" if self.resumable else ""
        interrupted = f"was interrupted{resumed}; what is committed is fine"
        return STATE.get(self.status or "complete", interrupted)

    def record(self) -> dict[str, Any]:
        return asdict(self)
