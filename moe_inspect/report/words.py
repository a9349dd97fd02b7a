"""What sentences are put together from."""

from __future__ import annotations

from typing import Any


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def small(ratio: float) -> str:
    """A ratio to two decimals, or to two digits where those would hide it."""
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def some(items: list[str], most: int, between: str) -> str:
    return between.join(items[:most]) + (f"{between}{len(items) - most} more" if len(items) > most else "")


def listed(ids: list[int]) -> str:
    return some([str(i) for i in ids], 6, ", ")


def verb(subjects: Any, verb: str) -> str:
    return f"{verb}s" if len(subjects) == 1 else verb
