"""Values of a source file, checked: JSON, integers in a range, arrays of them (`where` is the file
and the field, for the error); and lines of JSON, parsed and prepared by several processes. A file
is cut into chunks of whole lines, and what they hold comes back in its order. Errors too: the first
that reading line by line meets is the one that is raised."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import tee
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.files import MOST_LINE_BYTES, next_line
from moe_inspect.text import first_line
from moe_inspect.workers import Processes

Json = Any  # a JSON value
Fields = dict[str, Json]
Prepare = Callable[[str, Fields], Any]


def parsed(data: bytes, where: str) -> Json:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MoeInspectError(f"{where} is not JSON: {first_line(error)}") from None


def parsed_object(data: bytes, where: str) -> Fields:
    value = parsed(data, where)
    if not isinstance(value, dict):
        raise MoeInspectError(f"{where} is {str(value)[:40]!r}, not an object")
    return value


def integer(value: object, where: str, low: int = 0, high: int = 2**31 - 1) -> int:
    """`value`, if it is an integer of that range. `where`: file and field, for the error."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise MoeInspectError(
            f"{where} is {str(value)[:60]!r}, not a number from {low:,} to {high:,}"
        )
    return value


def integers(
    values: object,
    where: str,
    shape: tuple[int | None, ...] = (None,),
    low: int = 0,
    high: int = 2**31 - 1,
) -> np.ndarray:
    """int64 array of nested lists of integers of that range. None in `shape`: any length."""
    try:
        array = np.array(values) if isinstance(values, list) else None
    except (ValueError, OverflowError, RecursionError):  # ragged
        array = None
    if array is not None and not array.size and all(extent in (None, 0) for extent in shape[:1]):
        array = np.zeros([extent or 0 for extent in shape], np.int64)
    if array is None or array.dtype.kind not in "iu" or len(array.shape) != len(shape):
        raise MoeInspectError(
            f"{where} is not a {len(shape)}-dimensional list of integers: {str(values)[:40]!r}"
        )
    check_shape(array.shape, where, shape)
    check_range(array, where, low, high)
    return array.astype(np.int64, copy=False)


def check_shape(found: Sequence[int], where: str, shape: Sequence[int | None]) -> None:
    """MoeInspectError where an array has another shape. None: any length."""
    if len(found) != len(shape) or any(
        wanted not in (None, n) for wanted, n in zip(shape, found, strict=True)
    ):
        wanted = ["any" if w is None else w for w in shape]
        raise MoeInspectError(f"{where} has shape {list(found)}, not {wanted}")


def check_range(array: np.ndarray, where: str, low: int, high: int) -> None:
    """MoeInspectError where an integer array holds a value below `low` or above `high`."""
    if array.size and not (low <= int(array.min()) and int(array.max()) <= high):
        wrong = array[(array < low) | (array > high)].reshape(-1)[0]
        raise MoeInspectError(f"{where} holds {int(wrong)}, not of {low:,} to {high:,}")


CHUNK_BYTES = 2**22


class Chunk(NamedTuple):
    """`number`: of its first line, from 1."""

    start: int
    size: int
    number: int


def prepared_lines(
    path: Path, prepare: Prepare, workers: Processes | None, read: Callable[[int], None]
) -> Iterator[Any]:
    """prepare(where, JSON object) of each line that is not blank, in order. `prepare` is pickled.
    `read` is called with the bytes of each chunk."""
    chunks, ahead = tee(chunks_of(path))
    given = prepare, path
    alone = (_prepared(*given, *chunk) for chunk in ahead)
    found = alone if workers is None else workers.each(_prepared, given, ahead)
    for (values, error), chunk in zip(found, chunks, strict=True):
        read(chunk.size)
        yield from values
        if error is not None:
            raise error


def chunks_of(path: Path) -> Iterator[Chunk]:
    """MoeInspectError where a line is too long."""
    with open(path, "rb") as file:
        start, number = 0, 1
        while block := file.read(CHUNK_BYTES):
            end = block.rfind(b"\n") + 1
            lines = block.count(b"\n")
            if not end:  # a line that is longer than a chunk, or the last one
                file.seek(start)
                if (line := next_line(file)) is None:
                    raise too_long(path, number)
                end, lines = len(line), 1
            yield Chunk(start, end, number)
            start, number = start + end, number + lines
            file.seek(start)


def too_long(path: Path, number: int) -> MoeInspectError:
    return MoeInspectError(
        f"{path} line {number} is over {MOST_LINE_BYTES:,} bytes long: it is not a file of this "
        "format"
    )


def _prepared(
    prepare: Prepare, path: Path, start: int, size: int, number: int
) -> tuple[list[Any], MoeInspectError | None]:
    """What the lines of a chunk hold, and what is wrong with the line after them."""
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read(size)
    if len(data) != size:
        raise MoeInspectError(
            f"{path} ends at byte {start + len(data):,} where it is parsed, before line {number:,} "
            "and those after it do: it was changed meanwhile"
        )
    lines, values = data.removesuffix(b"\n").split(b"\n"), []
    together = _together(lines)
    for n, line in enumerate(lines):
        if not line or line.isspace():
            continue
        where = f"{path} line {number + n}"
        try:
            values.append(prepare(where, together[n] if together else parsed_object(line, where)))
        except MoeInspectError as error:
            return values, error
    return values, None


def _together(lines: list[bytes]) -> list[Json] | None:
    """The objects of these lines, parsed at once: short ones a third of the time. None where one
    holds none, or more."""
    if not all(line[:1] == b"{" and line[-1:] == b"}" for line in lines):  # one goes over two
        return None
    try:
        found = json.loads(b"[%b]" % b",".join(lines))
    except (ValueError, RecursionError):
        return None
    return found if [*map(type, found)] == [dict] * len(lines) else None


def as_it_is(where: str, fields: Fields) -> tuple[str, Fields]:
    """For lines that need no preparation."""
    return where, fields
