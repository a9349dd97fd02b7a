"""The location of a trace: a local directory or a URL of object storage. `Remote` is a subset of
pathlib over fsspec.

An object appears whole or not at all, and is replaced whole; there are no directories, and nothing
is renamed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from io import BufferedIOBase
from pathlib import Path
from typing import Any, Literal

from moe_inspect.errors import Damaged, MoeInspectError
from moe_inspect.text import first_line

FileSystem = Any  # of fsspec, whose types are wider than what its methods return here
BLOCK_BYTES = 2**23  # read at a time, of a file that is hashed


def location(path: str | Path | Remote) -> Path | Remote:
    """A Path for a local directory, a Remote for a URL (`s3://bucket/trace`)."""
    if isinstance(path, str) and "://" in path:
        return Remote(path.rstrip("/"))
    return path if isinstance(path, Remote) else Path(path)


def output_location(path: str | Path | Remote) -> Path | Remote:
    """As `location`, of what is to be written: files of this machine are written as such by their
    URL too."""
    where = location(path)
    if isinstance(where, Remote) and where.url.startswith(("file://", "local://")):
        return Path(where.path)
    return where


@dataclass(frozen=True)
class Remote:
    """An object at a URL, or those whose names begin with it, with the methods of pathlib.Path
    that reading and writing a trace need. Whatever fails is an OSError."""

    url: str

    @cached_property
    def _at(self) -> tuple[FileSystem, str]:
        try:
            from fsspec.core import url_to_fs

            return url_to_fs(self.url)
        # fsspec is missing, or what it needs for this protocol; or there is no such protocol
        except (ImportError, ValueError) as error:
            raise MoeInspectError(f"cannot open {self.url}: {first_line(error)}") from None

    @property
    def filesystem(self) -> FileSystem:
        return self._at[0]

    @property
    def path(self) -> str:
        return self._at[1]

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.url}/{name}")

    def resolve(self) -> Remote:
        return self

    # --- reading

    def is_file(self) -> bool:
        with _told():
            return self._fresh().isfile(self.path)

    def is_dir(self) -> bool:
        with _told():
            return self._fresh().isdir(self.path)

    def exists(self) -> bool:
        with _told():
            return self._fresh().exists(self.path)

    def read_bytes(self) -> bytes:
        with _told():
            return self.filesystem.cat_file(self.path)

    @contextmanager
    def open(self, mode: Literal["rb"]) -> Iterator[BufferedIOBase]:
        with _told(), self.filesystem.open(self.path, mode, block_size=BLOCK_BYTES) as file:
            yield file

    def iterdir(self) -> Iterator[Remote]:
        """What is directly below it; nothing where nothing is."""
        names: list[str] = []
        with suppress(FileNotFoundError), _told():
            names = self._fresh().ls(self.path, detail=False)
        for name in names:
            if last := str(name).rstrip("/").rpartition("/")[2]:
                yield self / last

    def sizes(self) -> dict[str, int]:
        """Name within it → bytes, of every object below."""
        with _told():
            found = self._fresh().find(self.path, detail=True)
        start = len(self.path.strip("/")) + 1
        return {str(name).strip("/")[start:]: int(of["size"]) for name, of in found.items()}

    def _fresh(self) -> FileSystem:
        """The file system, without listings that it remembers."""
        self.filesystem.invalidate_cache()
        return self.filesystem

    # --- writing

    def write_bytes(self, data: bytes) -> None:
        with _told():
            self.filesystem.pipe_file(self.path, data)

    def create(self, data: bytes) -> bool:
        """Writes it where nothing is; returns whether it did."""
        if self.exists():  # file systems without exclusive creation overwrite it
            return False
        with suppress(FileExistsError), _told():
            self.filesystem.pipe_file(self.path, data, mode="create")
            return True
        return False

    def upload(self, file: Path) -> None:
        with _told():
            self.filesystem.put_file(str(file), self.path)

    def unlink(self, missing_ok: bool = False) -> None:
        with suppress(FileNotFoundError) if missing_ok else _told(), _told():
            self.filesystem.rm_file(self.path)


@contextmanager
def _told() -> Iterator[None]:
    """Exceptions of a client's own are made OSErrors, which callers convert to messages."""
    try:
        yield
    except (OSError, MoeInspectError):
        raise
    except Exception as error:
        raise OSError(first_line(error)) from error


def inside(root: Path | Remote, name: str) -> Path | Remote:
    """The path of a file or folder that is named in the trace. MoeInspectError if it is a link to
    outside the trace, or a pipe or device, which may never end."""
    if isinstance(root, Remote):
        if root.url.startswith("file://"):
            inside(Path(root.path), name)
        return root / name
    path = root / name
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(os.path.realpath(root)):
        said = f"it is a link to {real}, outside of the trace: copy the file there"
        raise Damaged(path, said, name)
    if real.exists() and not (real.is_file() or real.is_dir()):
        raise Damaged(path, "it is not a regular file", name)
    return path
