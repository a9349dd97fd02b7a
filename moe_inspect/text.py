"""Text for people: formats of numbers, counts and lists, names of routers, errors in one line, and
escaping of untrusted text."""

# pyright: strict, reportMissingTypeStubs=false

from __future__ import annotations

import contextlib
import io
import numbers
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TextIO

JOINERS = "\u200c\u200d"  # join or part letters of Persian or Hindi, and emoji
MANY_NAMES = 20  # more are not listed where one is meant
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # a spreadsheet may run a cell that begins so


def printable(text: str) -> str:
    """Text that is safe on a terminal: control characters, escapes and direction marks become
    backslash escapes."""
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def storable(text: str) -> str:
    """Text that UTF-8 can encode: surrogates, such as undecodable bytes of a file name, become
    backslash escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def safe_cell(text: str) -> str:
    """The text of a spreadsheet cell: what would be run as a formula gets an apostrophe in
    front."""
    return f"'{text}" if text.startswith(FORMULA) else text


def readable(text: object) -> str:
    """Text in which every character is visible or joins others: line ends, control and direction
    marks as escapes, a leading or trailing space as ␣."""
    text = str(text)
    text = "".join(
        c
        if c == " " or unicodedata.category(c)[0] not in "CZ" or (c in JOINERS and _joins(before))
        else _escape(c)
        for before, c in zip(f" {text}", text, strict=False)
    )
    inner = text.strip(" ")
    lead = len(text) - len(text.lstrip(" "))
    return "␣" * lead + inner + "␣" * (len(text) - lead - len(inner)) if inner else "␣" * len(text)


def legible(text: str) -> str:
    """Text that can be read as text, with its line ends, tabs, spaces and joined letters; control
    characters, direction marks and other invisible ones become backslash escapes."""
    if text.isprintable():
        return text
    kept = "\n\t" + JOINERS
    return "".join(
        c if c in kept or c.isprintable() or unicodedata.category(c) == "Zs" else _escape(c)
        for c in text
    )


def _joins(before: str) -> bool:
    """Whether a joiner after this character changes how it is drawn."""
    return not before.isascii() and unicodedata.category(before)[0] in "LMS"


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def is_missing(value: Any) -> bool:
    """Whether a plain value is None, NaN or the NA of pandas, which equals nothing."""
    return value is None or str(value != value) in ("True", "<NA>")


def number(value: object) -> str:
    """A table cell: numbers with thousands separators and three decimals, "–" for a missing
    value."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, numbers.Integral):
        return f"{int(value):,}"
    if is_missing(value):
        return "–"
    if isinstance(value, numbers.Real):
        real = float(value)
        return f"{real:,.3f}" if abs(real) >= 0.001 or real == 0 else f"{real:.1e}"
    return readable(value)


def cut(text: str, most: int = 18) -> str:
    """The text, shortened to at most so many characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def plural(count: int, noun: str) -> str:
    """ "1 expert", "2,000 experts"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def format_ratio(ratio: float) -> str:
    """A ratio to two decimals; below 0.1 to two significant digits."""
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def join_first(items: Iterable[object], most: int = 6, between: str = ", ") -> str:
    """The first `most` items, and how many more there are: "1, 2, 3 more"."""
    every = [str(item) for item in items]
    more = [f"{len(every) - most} more"] * (len(every) > most)
    return between.join([*every[:most], *more])


def separated(text: str) -> list[str]:
    """ "a, b" → ["a", "b"]. A comma after a backslash belongs to a value."""
    return [part.strip().replace("\\,", ",") for part in re.split(r"(?<!\\),", text)]


def no_such(what: str, name: str, known: Iterable[str]) -> str:
    """ "no table 'lod' (did you mean load?): there are balance, load"; of many, similar ones."""
    known = list(known)
    near = did_you_mean(name, known, 3)
    return f"no {what} {name!r}{near}" + (
        f": there are {', '.join(known)}" if len(known) <= MANY_NAMES or not near else ""
    )


def did_you_mean(name: str, known: Iterable[str], most: int = 1) -> str:
    """ " (did you mean load?)": known names that are similar or contain the name; else nothing."""
    from difflib import get_close_matches

    known = list(known)
    inside = [other for other in known if len(name) > 2 and name in other]
    close = list(dict.fromkeys([*get_close_matches(name, known, most), *inside]))[:most]
    return f" (did you mean {', '.join(close)}?)" if close else ""


def ranges(values: Iterable[int]) -> str:
    """[0, 1, 2, 3, 7] → "0-3,7", the form that --layers takes."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ",".join(f"{a}-{b}" if a < b else f"{a}" for a, b in runs)


class NamedRouter(Protocol):
    """What the name of a router is made from; `trace.schema.Router` is one."""

    @property
    def layer(self) -> int: ...
    @property
    def stack(self) -> str: ...


def layer_label(routers: Sequence[NamedRouter], r: int) -> str:
    """The name of router r after the word "layer", in all text, charts and pages: "3"; "3/5", with
    the index of the router, where its layer has several; "3 (encoder)" in a model with two
    stacks."""
    this = routers[r]
    several = sum((other.layer, other.stack) == (this.layer, this.stack) for other in routers) > 1
    return (
        f"{this.layer}" + (f"/{r}" if several else "") + (f" ({this.stack})" if this.stack else "")
    )


def first_line(error: BaseException) -> str:
    """The system's reason of an OSError, else the first line of the message (with the next where it
    ends in a colon), else the name of the error's class."""
    message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    lines = lines or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def print_stderr(line: str) -> None:
    """Prints one line to stderr, escaped: it may quote a server, a path or a label."""
    try:
        print(printable(line), file=sys.stderr, flush=True)
    except OSError:  # it is full or gone: nobody can be told, and the work must not be lost for it
        abandon(sys.stderr)


def abandon(stream: TextIO) -> None:
    """Redirects a stream that cannot be written to the null device: what it still buffers must not
    raise at exit."""
    # a notebook's has no number
    with contextlib.suppress(io.UnsupportedOperation), open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), stream.fileno())
