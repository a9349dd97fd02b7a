"""MoeInspectError, the one exception for what the user can fix, and how an OSError becomes one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moe_inspect.text import first_line


class MoeInspectError(Exception):
    """Something the user can mend: the message names the thing, the value and the way out. The CLI
    prints it as one line and exits with 1. What only we can mend is an assert or another exception,
    and keeps its traceback."""


@contextmanager
def reading(place: object) -> Iterator[None]:
    """An OSError in the block becomes one line: `place` cannot be read."""
    try:
        yield
    except OSError as error:
        raise MoeInspectError(f"cannot read {place}: {first_line(error)}") from error


@contextmanager
def writing(place: object) -> Iterator[None]:
    """An OSError in the block becomes one line: `place` cannot be written."""
    try:
        yield
    except OSError as error:
        raise MoeInspectError(f"cannot write {place}: {first_line(error)}") from error
