"""A trace that stands elsewhere: as much of pathlib as reading one takes, on any filesystem that
fsspec knows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from moe_inspect.errors import MoeInspectError
from moe_inspect.text import first_line


def place(path: str | Path | Remote) -> Path | Remote:
    """A directory of this machine, or what a URL (`s3://bucket/trace`) names."""
    return (
        Remote(path)
        if isinstance(path, str) and "://" in path
        else path
        if isinstance(path, Remote)
        else Path(path)
    )


class Remote:
    """What a URL names."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")

    @cached_property
    def _at(self) -> tuple[Any, str]:
        try:
            from fsspec.core import url_to_fs

            return url_to_fs(self.url)
        except (
            ImportError,
            ValueError,
        ) as error:  # fsspec itself, what it needs for this protocol, a protocol there is not
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
