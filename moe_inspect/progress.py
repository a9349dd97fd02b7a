"""How far a long command is. What reads a trace names the phase that it is in and counts; commands
on a terminal listen. Where nobody listens, nothing happens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Item = TypeVar("Item")
Advance = Callable[[int], None]  # called with what was done since the last call
Listener = Callable[[str, int, str], Advance]  # (phase, total, unit)
_listener: ContextVar[Listener | None] = ContextVar("progress", default=None)


@contextmanager
def listening(listener: Listener) -> Generator[None]:
    """Tells `listener` of every phase that begins, with its total and the unit of that."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def phase(name: str, total: int = 0, unit: str = "") -> Advance:
    """Begins a phase. Returns what to call with every amount that is done, which add up to the
    total; from any thread. A total of 0 is not known."""
    listener = _listener.get()
    return (lambda done: None) if listener is None else listener(name, total, unit)


def tracked(items: Collection[Item], name: str, unit: str) -> Iterator[Item]:
    """Yields the items, in a phase: each counts as done when the next is asked for."""
    advance = phase(name, len(items), unit)
    for item in items:
        yield item
        advance(1)
