"""Files and folders that a user asked for are written through these functions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_inspect.errors import writing
from moe_inspect.trace.files.atomic import draft_of
from moe_inspect.trace.manifest import refuse_within_trace


@contextmanager
def output_file(path: str | Path) -> Iterator[Path]:
    """A draft of a file (see `draft_of`). MoeInspectError where it would be within a trace, or
    cannot be written."""
    path = Path(path)
    with writing(path):
        refuse_within_trace(path)
        with draft_of(path) as draft:
            yield draft


def output_folder(path: str | Path) -> Path:
    """A folder for such files, made where there is none."""
    path = Path(path)
    with writing(path):
        refuse_within_trace(path)
        path.mkdir(parents=True, exist_ok=True)
    return path
