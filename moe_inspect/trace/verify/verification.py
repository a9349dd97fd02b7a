"""What verify finds: a Verification, or a Violation, the first row of a file that is against a
rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from moe_inspect.errors import Damaged
from moe_inspect.text import plural, printable
from moe_inspect.trace import parts
from moe_inspect.trace.shard import Shard, codes


class Violation(Damaged):
    """The first rule that is violated, and the row of the file where there is one."""

    def __init__(self, file: str, row: int | None, what: str):
        super().__init__(file, what)
        self.row = row


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a file, from row `start` on, that are checked."""

    file: str
    start: int = 0

    def refuse(self, wrong_N: np.ndarray, what: str, *of_row: np.ndarray) -> None:
        """Violation at the first row that is wrong. `what`: with a {} for the value that each of
        the arrays `of_row` has there."""
        if wrong_N.any():
            n = int(wrong_N.argmax())
            said = what.format(*(values_N[n] for values_N in of_row))
            raise Violation(self.file, self.start + n, said)

    def expect(self, column: str, found_N: np.ndarray, expected_N: np.ndarray) -> None:
        self.refuse(found_N != expected_N, f"{column} is {{}}, not {{}}", found_N, expected_N)

    def refuse_nulls(self, table: pa.Table, columns: Sequence[str]) -> None:
        for column in columns:
            if table[column].null_count:
                self.refuse(table[column].is_null().to_numpy(), f"{column} is null")


def read_table(shard: Shard, table: str, columns: list[str]) -> pa.Table:
    return parts.read(shard.file(table), shard.files.paths[table], columns, nulls=True)


def codes_of(column: pa.ChunkedArray, known: dict[str, int]) -> np.ndarray:
    """int64 [T]: codes of the labels in `known`, to which new ones are added."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    code_T, labels = codes(column)
    return np.array([known.setdefault(x, len(known)) for x in labels], np.int64)[code_T]


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
