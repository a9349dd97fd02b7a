"""Verification: what verify found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Verification:
    """The result of `verify`.

    ok: no rule is violated. An interrupted trace may be ok.
    status: "complete", "recording" (its writer is at work) or "interrupted".
    resumable: --resume can continue it.
    uncommitted: files that its writer was stopped in. Readers ignore them, --resume deletes them.
    violation, file, row: the first violation, the file it is in, and the row (from 0) where there
        is one; all None of a trace that is ok.
    empty_slots: slots that routed nowhere: Σ counts = tokens × k − empty slots, router by router.
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
    documents: int = 0
    shards: int = 0
    checked: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        return asdict(self)
