"""The location of a trace: a local directory or a URL. `Remote` is a read-only subset of pathlib
over fsspec."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from moe_inspect.errors import MoeInspectError
from moe_inspect.text import first_line
from moe_inspect.trace.files.damaged import Damaged


def location(path: str | Path | Remote) -> Path | Remote:
    """A Path for a local directory, a Remote for a URL (`s3://bucket/trace`)."""
    if isinstance(path, str) and "://" in path:
        return Remote(path)
    return path if isinstance(path, Remote) else Path(path)


class Remote:
    """A file or directory at a URL, with the methods of pathlib.Path that reading a trace needs."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")

    @cached_property
    def _at(self) -> tuple[Any, str]:
        try:
            from fsspec.core import url_to_fs

            return url_to_fs(self.url)
        # fsspec is missing, or what it needs for this protocol; or there is no such protocol
        except (ImportError, ValueError) as error:
            raise MoeInspectError(f"cannot open {self.url}: {first_line(error)}") from None

    @property
    def filesystem(self) -> Any:
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
        return self.filesystem.isfile(self.path)

    def exists(self) -> bool:
        return self.filesystem.exists(self.path)

    def read_bytes(self) -> bytes:
        return self.filesystem.cat_file(self.path)

    def iterdir(self) -> Iterator[Remote]:
        return (
            self / str(name).rstrip("/").rpartition("/")[2]
            for name in self.filesystem.ls(self.path, detail=False)
        )


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
        raise Damaged(
            root / name, f"it is a link to {real}, outside of the trace: copy the file there", name
        )
    if real.exists() and not (real.is_file() or real.is_dir()):
        raise Damaged(root / name, "it is not a regular file", name)
    return path
