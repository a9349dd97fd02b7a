"""How things are written for people: numbers, counts, lists, names of routers, errors in one line,
text that others wrote."""

from __future__ import annotations

import contextlib
import io
import math
import numbers
import os
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TextIO

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # how a cell begins that a spreadsheet may run


def printable(text: str) -> str:
    """A text of which nothing can steer a terminal: control characters, escapes and direction marks
    are spelled out."""
    return (
        text
        if text.isprintable()
        else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    )


def storable(text: str) -> str:
    """A text that UTF-8 can hold: the bytes of a file name that are no text, and halves of
    characters, are spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


def safe_cell(text: str) -> str:
    """The text of a cell that no spreadsheet takes for a formula: one that begins like it gets an
    apostrophe in front."""
    return f"'{text}" if text.startswith(FORMULA) else text


def readable(text: object) -> str:
    """A text in which every character is seen: line ends, control and direction marks as escapes, a
    blank at an end as ␣."""
    text = "".join(
        c if c == " " or unicodedata.category(c)[0] not in "CZ" else _escape(c) for c in str(text)
    )
    inner = text.strip(" ")
    lead = len(text) - len(text.lstrip(" "))
    return "␣" * lead + inner + "␣" * (len(text) - lead - len(inner)) if inner else "␣" * len(text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def number(value: Any) -> str:
    """A cell as people read it; "–" where there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)) or str(value) == "<NA>":
        return "–"
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return f"{int(value):,}"
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        real = float(value)
        return f"{real:,.3f}" if abs(real) >= 0.001 or real == 0 else f"{real:.1e}"
    return readable(value)


def cut(text: str, most: int = 18) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def small(ratio: float) -> str:
    """A ratio to two decimals, or to two digits where those would hide it."""
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def some(items: list[str], most: int, between: str) -> str:
    return between.join(items[:most]) + (
        f"{between}{len(items) - most} more" if len(items) > most else ""
    )


def listed(ids: list[int]) -> str:
    return some([str(i) for i in ids], 6, ", ")


def verb(subjects: Any, verb: str) -> str:
    return f"{verb}s" if len(subjects) == 1 else verb


def ranges(values: Iterable[int]) -> str:
    """[0, 1, 2, 3, 7] → "0-3,7", as options take it."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ",".join(f"{a}-{b}" if a < b else f"{a}" for a, b in runs)


class NamedRouter(Protocol):
    """What a router's name is made of: `trace.schema.Router` has it."""

    @property
    def layer(self) -> int: ...
    @property
    def stack(self) -> str: ...


def layer_label(routers: Sequence[NamedRouter], r: int) -> str:
    """What router r of a model is called, after the word "layer": "3"; "3/5", with the number of
    the router, where its layer has several; "3 (encoder)" in a model of two stacks. The one name of
    a router in every text, table title, picture and page."""
    this = routers[r]
    several = sum((other.layer, other.stack) == (this.layer, this.stack) for other in routers) > 1
    return (
        f"{this.layer}" + (f"/{r}" if several else "") + (f" ({this.stack})" if this.stack else "")
    )


def first_line(error: BaseException) -> str:
    """The reason the system gives, else the first line of the message (with the next, where it ends
    in a colon), else the name of the error's class."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = [line.strip() for line in said.splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def say(line: str) -> None:
    """One line on stderr, cleaned: it may quote a server, a path or a label."""
    try:
        print(printable(line), file=sys.stderr, flush=True)
    except OSError:  # it is full or gone: nobody can be told, and the work must not be lost for it
        abandon(sys.stderr)


def abandon(stream: TextIO) -> None:
    """What is still buffered in a stream that cannot be written must not raise at exit."""
    with (
        contextlib.suppress(io.UnsupportedOperation),
        open(os.devnull, "wb") as nowhere,
    ):  # a notebook's has no number
        os.dup2(nowhere.fileno(), stream.fileno())
