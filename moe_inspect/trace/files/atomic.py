"""Atomic writes: a reader sees the old file or the new one, even after a power failure."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Readers see the old file or the new one, never half of one, also after a power cut."""
    with draft_of(path) as draft, open(draft, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(path.parent)


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """A temporary path. On success the file is renamed to `path`, on an exception it is removed. A
    device or a pipe is written directly."""
    if path.exists() and not path.is_file():
        yield path
        return
    draft = path.with_name(f".{path.name}.tmp")
    try:
        yield draft
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    os.replace(draft, path)


def sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
