"""Atomic writes: a reader sees the old file or the new one, even after a power failure. An object
of object storage is so by itself."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moe_inspect.trace.files.location import Remote


def write_atomically(path: Path | Remote, data: bytes) -> None:
    """Readers see the old file or the new one, never half of one, also after a power cut."""
    if isinstance(path, Remote):
        path.write_bytes(data)
        return
    with draft_of(path) as draft, open(draft, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(path.parent)


def append(path: Path | Remote, data: bytes) -> None:
    """Adds to a file. On disk when this returns; an object is written anew, with what it held."""
    if isinstance(path, Remote):
        before = b""
        with suppress(FileNotFoundError):
            before = path.read_bytes()
        path.write_bytes(before + data)
        return
    with open(path, "ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def draft_of(path: Path | Remote) -> Iterator[Path]:
    """A temporary path. On success the file is renamed to `path`, or uploaded, on an exception it
    is removed. A device or a pipe is written directly."""
    if isinstance(path, Remote):
        with tempfile.TemporaryDirectory(prefix="moe-inspect-") as folder:
            yield (draft := Path(folder) / path.name)
            path.upload(draft)
        return
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


def make_folder(path: Path | Remote) -> None:
    """The folder of a table; object storage has none."""
    if isinstance(path, Path):
        path.mkdir(exist_ok=True)


def sync_directory(path: Path | Remote) -> None:
    if isinstance(path, Remote):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
