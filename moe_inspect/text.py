"""Text that others wrote (labels, paths, answers of servers), made safe for a terminal, a file and a spreadsheet."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import TextIO

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # how a cell begins that a spreadsheet may run


def printable(text: str) -> str:
    """A text of which nothing can steer a terminal: control characters, escapes and direction marks are spelled out."""
    return text if text.isprintable() else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def storable(text: str) -> str:
    """A text that UTF-8 can hold: the bytes of a file name that are no text, and halves of characters, are spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


def safe_cell(text: str) -> str:
    """The text of a cell that no spreadsheet takes for a formula: one that begins like it gets an apostrophe in front."""
    return f"'{text}" if text.startswith(FORMULA) else text


def say(line: str) -> None:
    """One line on stderr, cleaned: it may quote a server, a path or a label."""
    try:
        print(printable(line), file=sys.stderr, flush=True)
    except OSError:  # it is full or gone: nobody can be told, and the work must not be lost for it
        abandon(sys.stderr)


def abandon(stream: TextIO) -> None:
    """What is still buffered in a stream that cannot be written must not raise at exit."""
    with contextlib.suppress(io.UnsupportedOperation), open(os.devnull, "wb") as nowhere:  # a notebook's has no number
        os.dup2(nowhere.fileno(), stream.fileno())
