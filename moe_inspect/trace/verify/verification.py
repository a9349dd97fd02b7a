"""Verification: what verify found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Verification:
    """What was found. `file` and `row` (from 0, in that file) are where the first violation is;
    both None of a fine trace. `empty_slots` are assignments that were routed nowhere: Σ counts =
    tokens × k − empty slots, router by router. `status`: "complete", "recording" (by a process that
    is at work) or "interrupted". A trace may be interrupted and fine: `uncommitted` are the files
    that its writer was stopped in, which readers ignore and --resume deletes. `resumable`: --resume
    can go on with it."""

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
