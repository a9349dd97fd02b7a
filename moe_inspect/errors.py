"""The one exception a user ever sees, and how other errors become one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class MoeInspectError(Exception):
    """Something the user can mend: the message names the thing, the value and the way out. The CLI prints it as one line
    and exits with 1. What only we can mend is an assert or another exception, and keeps its traceback."""


def first_line(error: BaseException) -> str:
    """The reason the system gives, else the first line of the message (with the next, where it ends in a colon), else the name of the
    error's class."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = [line.strip() for line in said.splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


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
