"""MoeInspectError, the exception for what a user can fix, its kind for a damaged trace, and the
conversion of an OSError to it."""

# pyright: strict, reportMissingTypeStubs=false

from __future__ import annotations

import re
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import requires
from numbers import Real
from typing import Any

from moe_inspect.text import first_line, printable

INSTALL_TRACE = "pip install 'moe-inspect[trace]'"  # the capture side is an extra


def missing_for_capture() -> str | None:
    """The package that recording needs and that is not installed."""
    try:
        import torch  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import transformers  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        return error.name or "torch"
    return None


def missing_package(module: str) -> str:
    """One line on a module that is not installed: the package, and how to install it."""
    package = module.partition(".")[0]
    of_extra = re.compile(rf"{re.escape(package)}\b.*extra == ['\"](\w+)", re.IGNORECASE)
    extras = [match[1] for line in requires("moe-inspect") or () if (match := of_extra.match(line))]
    wanted = f"'moe-inspect[{extras[0]}]'" if len(extras) == 1 else package
    return f"this needs {package}: pip install {wanted}"


class MoeInspectError(Exception):
    """Something the user can fix. The message is one line: the thing, the value, the way out; the
    command line prints it and exits with 1. Line ends and control characters of what it quotes are
    backslash escapes. Our own mistakes are other exceptions and keep their traceback."""

    def __init__(self, message: str):
        super().__init__(printable(message))


class Damaged(MoeInspectError):
    """A file of a trace is not as it was written. `file`: its path within the trace, where that is
    not `where`. `row`: the first row that is wrong, from 0, where it is one's."""

    def __init__(self, where: object, what: str, file: str = "", row: int | None = None):
        super().__init__(f"damaged trace: {where}: {what}")
        self.where, self.file, self.what, self.row = where, file or str(where), what, row

    def __reduce__(self) -> tuple[type[Damaged], tuple[object, str, str, int | None]]:
        return Damaged, (self.where, self.what, self.file, self.row)


def check_whole(name: str, value: object, least: int = 0) -> None:
    """MoeInspectError unless it is a whole number from `least` up; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, Real) or value % 1 or value < least:
        raise MoeInspectError(f"{name} is {value!r}: give a whole number, {least} or more")


def own_options(
    format: str, options: Mapping[str, Any], takers: Mapping[str, Collection[str]]
) -> dict[str, Any]:
    """The options that have a value. MoeInspectError if the format does not take one of them.
    takers: the options of each format."""
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in takers[format]:
            others = ", ".join(other for other, names in takers.items() if name in names)
            option = name.replace("_", "-")
            raise MoeInspectError(
                f"--{option} is an option of the format {others}, not of {format}"
            )
    return given


@contextmanager
def reading(path: object, doing: str = "read") -> Generator[None, None, None]:
    """An OSError in the block becomes a MoeInspectError: cannot read (or `doing`) `path`."""
    try:
        yield
    except OSError as error:
        raise MoeInspectError(f"cannot {doing} {path}: {first_line(error)}") from error


writing = partial(reading, doing="write")  # "cannot write …"
