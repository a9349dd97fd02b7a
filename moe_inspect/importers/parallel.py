"""Lines of JSON, parsed and prepared by several workers: a file is cut into chunks of whole lines,
and what they hold comes back in its order. Errors too: the first that reading line by line meets is
the one that is raised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from moe_inspect.errors import MoeInspectError
from moe_inspect.files import MOST_LINE_BYTES, next_line
from moe_inspect.importers.values import parsed_object
from moe_inspect.workers import Processes, Workers

CHUNK_BYTES = 2**22

Prepare = Callable[[str, dict[str, Any]], Any]


class Chunk(NamedTuple):
    """`number`: of its first line, from 1."""

    start: int
    size: int
    number: int


def prepared_lines(
    path: Path, prepare: Prepare, workers: Workers, read: Callable[[int], None]
) -> Iterator[Any]:
    """prepare(where, JSON object) of each line that is not blank, in order. `prepare` is pickled.
    `read` is called with the bytes of each chunk."""
    sizes = list[int]()

    def tasks() -> Iterator[Chunk]:
        for chunk in chunks_of(path):
            sizes.append(chunk.size)
            yield chunk

    # workers of a cluster are in directories of their own
    found = workers.each(_prepared, (prepare, path, path.resolve()), tasks())
    for n, (values, error) in enumerate(found):
        read(sizes[n])
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
    prepare: Prepare, path: Path, whole_path: Path, start: int, size: int, number: int
) -> tuple[list[Any], MoeInspectError | None]:
    """What the lines of a chunk hold, and what is wrong with the line after them. `path`: as the
    user gave it."""
    with open(whole_path, "rb") as file:
        file.seek(start)
        data = file.read(size)
    if len(data) != size:
        raise MoeInspectError(
            f"{path} ends at byte {start + len(data):,} where it is parsed, before line {number:,} "
            f"and those after it do: it was changed meanwhile, or a worker sees another file"
        )
    values = list[Any]()
    for n, line in enumerate(data.split(b"\n"), number):
        if not line or line.isspace():
            continue
        where = f"{path} line {n}"
        try:
            values.append(prepare(where, parsed_object(line, where)))
        except MoeInspectError as error:
            return values, error
    return values, None


def at_work(workers: int | Workers) -> AbstractContextManager[Workers | None]:
    """So many processes of this machine, or the workers that are given; None: this process reads
    alone."""
    if isinstance(workers, int):
        return Processes(workers) if workers > 1 else nullcontext()
    return nullcontext(workers)
