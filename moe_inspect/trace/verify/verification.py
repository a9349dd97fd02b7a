"""Verification: what verify found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from moe_inspect.text import plural, printable

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
