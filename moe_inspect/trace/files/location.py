"""The location of a trace: a local directory, or a URL that fsspec reads. `Remote` is a subset of
pathlib over fsspec."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from io import BufferedIOBase
from pathlib import Path
from typing import Any, Literal, overload

from moe_inspect.errors import Damaged, MoeInspectError, missing_package
from moe_inspect.text import first_line

FileSystem = Any  # of fsspec, whose types are wider than what its methods return here
BLOCK_BYTES = 2**23  # read at a time, of a file that is hashed


def location(path: str | Path | Remote) -> Path | Remote:
    """A Path for a local directory, a Remote for a URL (`s3://bucket/trace`)."""
    if isinstance(path, str) and "://" in path:
        remote = Remote(path.rstrip("/"))
        return Path(remote.path) if path.startswith(("file://", "local://")) else remote
    return path if isinstance(path, Remote) else Path(path)


def output_location(path: str | Path) -> Path:
    """The directory to write to. MoeInspectError for a URL."""
    if isinstance(where := location(path), Remote):
        raise MoeInspectError(f"{path} is a URL: write to a local directory, then copy it there")
    return where


@dataclass(frozen=True)
class Remote:
    """An object at a URL, or those whose names begin with it, with the methods of pathlib.Path
    that reading a trace needs. Whatever fails is an OSError."""

    url: str

    @cached_property
    def _at(self) -> tuple[FileSystem, str]:
        try:
            from fsspec.core import url_to_fs

            return url_to_fs(self.url)
        # fsspec is missing, or what it needs for this protocol; or there is no such protocol
        except ModuleNotFoundError as error:
            raise MoeInspectError(missing_package(error.name or "fsspec")) from None
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

    def _fresh(self) -> FileSystem:
        """The file system, without listings that it remembers."""
        self.filesystem.invalidate_cache()
        return self.filesystem


@contextmanager
def _told() -> Iterator[None]:
    """Exceptions of a client's own are made OSErrors, which callers convert to messages."""
    try:
        yield
    except (OSError, MoeInspectError):
        raise
    except Exception as error:
        raise OSError(first_line(error)) from error


@overload
def inside(root: Path, name: str) -> Path: ...
@overload
def inside(root: Remote, name: str) -> Remote: ...
def inside(root: Path | Remote, name: str) -> Path | Remote:
    """The path of a file or folder that is named in the trace. MoeInspectError if it is a link to
    outside the trace, or a pipe or device, which may never end."""
    if isinstance(root, Remote):
        return root / name
    path = root / name
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(os.path.realpath(root)):
        said = f"it is a link to {real}, outside of the trace: copy the file there"
        raise Damaged(path, said, name)
    if real.exists() and not (real.is_file() or real.is_dir()):
        raise Damaged(path, "it is not a regular file", name)
    return path
