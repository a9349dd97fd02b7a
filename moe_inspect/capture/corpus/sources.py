"""The files of a corpus: resolves and opens the values of `--data`."""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_inspect.demo import CORPUS_DIR
from moe_inspect.errors import MoeInspectError
from moe_inspect.files import open_regular
from moe_inspect.text import first_line
from moe_inspect.trace.files.location import Remote

READERS = (".txt", ".jsonl", ".csv", ".parquet")
COMPRESSED = (".gz", ".bz2", ".xz")
BUNDLED = "demo:"  # replaces the folder of the bundled corpus in the name of a source


@dataclass(frozen=True)
class Source:
    """One file of the corpus. `fixed`: the domain was given with DOMAIN=SRC, and a domain field
    does not override it."""

    path: str
    domain: str
    fixed: bool
    bytes: int | None
    sha256: str


def find_sources(data: Sequence[str], leave_out: Path | Remote | None = None) -> list[Source]:
    """`--data` values → files, in a fixed order; without values the bundled corpus. Each value: a
    file, a folder (subfolders are domains), a glob or an fsspec URL, optionally behind `DOMAIN=`.
    Files below `leave_out` (the trace) are skipped."""
    found: list[Source] = []
    for value in data or [str(CORPUS_DIR)]:
        domain, location = _split_label(value)
        files = [
            f
            for f in _expand(location)
            if leave_out is None or not _is_below(f[0], f[1], leave_out)
        ]
        if not files:
            reached = " (or it cannot be reached)" if "://" in location else ""
            raise MoeInspectError(
                f"no text at {location}{reached}: give a file, folder or glob of "
                f"{', '.join(READERS)}"
            )
        for filesystem, path, guess in files:
            found.append(
                Source(
                    _shown(filesystem, path),
                    domain or guess,
                    domain is not None,
                    *_identity(filesystem, path),
                )
            )
    return found


def _split_label(value: str) -> tuple[str | None, str]:
    label, equals, location = value.partition("=")
    if equals and location and re.fullmatch(r"[^/\\:*?\[\]]+", label) and not Path(value).exists():
        return label, location
    return None, value


def _expand(location: str) -> Iterator[tuple[Any, str, str]]:
    """(filesystem, path, domain by folder or file name) of each file at `location`."""
    import fsspec

    try:
        if "://" in location:
            filesystem, path = fsspec.core.url_to_fs(location)
        else:
            filesystem, path = (
                fsspec.filesystem("file"),
                os.path.abspath(os.path.expanduser(location)),
            )
        if any(c in path for c in "*?[") and not filesystem.exists(path):
            for match in sorted(filesystem.glob(path)):
                if filesystem.isfile(match) and kind_of(match):
                    yield filesystem, match, _stem(match)
            return
        if filesystem.isdir(path):
            root = path.rstrip("/")
            for match in sorted(filesystem.find(root)):
                inside = match[len(root) + 1 :].split("/")
                if kind_of(match) and not any(part.startswith(".") for part in inside):
                    yield (
                        filesystem,
                        match,
                        inside[0] if len(inside) > 1 else root.rsplit("/", 1)[-1],
                    )
            return
        if filesystem.exists(path):
            if not kind_of(path):
                raise MoeInspectError(
                    f"cannot read {location}: its name must end in {', '.join(READERS)}"
                )
            yield filesystem, path, _stem(path)
    # fsspec does not know the protocol, or lacks a package for it
    except (ImportError, ValueError) as error:
        raise MoeInspectError(f"cannot open {location}: {first_line(error)}") from None
    except OSError as error:
        raise MoeInspectError(f"cannot read {location}: {first_line(error)}") from None


def kind_of(path: str) -> str | None:
    """Which of `READERS` reads a file, by its name; None where none does."""
    name = path.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return next((k for k in READERS if name.endswith(k)), None)


def _stem(path: str) -> str:
    return path.rsplit("/", 1)[-1].split(".")[0]


def _shown(filesystem: Any, path: str) -> str:
    """The name of a source in the trace: that of the bundled corpus does not depend on where it is
    installed."""
    if not _is_local(filesystem):
        return filesystem.unstrip_protocol(path)
    return (
        BUNDLED + str(Path(path).relative_to(CORPUS_DIR))
        if Path(path).is_relative_to(CORPUS_DIR)
        else path
    )


def _located(name: str) -> str:
    return str(CORPUS_DIR / name.removeprefix(BUNDLED)) if name.startswith(BUNDLED) else name


def _is_below(filesystem: Any, path: str, place: Path | Remote) -> bool:
    if isinstance(place, Path):
        return _is_local(filesystem) and Path(path).is_relative_to(place.resolve())
    return type(filesystem) is type(place.filesystem) and path.startswith(f"{place.path}/")


def _is_local(filesystem: Any) -> bool:
    return "file" in (
        (filesystem.protocol,) if isinstance(filesystem.protocol, str) else filesystem.protocol
    )


def _identity(filesystem: Any, path: str) -> tuple[int | None, str]:
    """(size, hash of the content). A remote file is not downloaded: the hash is that of its store's
    unique key (ETag, modification time …)."""
    if not _is_local(filesystem):
        return filesystem.size(path), hashlib.sha256(
            str(filesystem.ukey(path)).encode()
        ).hexdigest()
    try:
        with open_regular(path) as file:
            return Path(path).stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise MoeInspectError(f"cannot read {path}: {first_line(error)}") from None


@contextmanager
def opened(path: str) -> Iterator[Any]:
    """A file of the corpus for reading, decompressed. MoeInspectError where that fails."""
    import fsspec

    try:
        filesystem, location = (
            fsspec.core.url_to_fs(path)
            if "://" in path
            else (fsspec.filesystem("file"), _located(path))
        )
        with filesystem.open(location, "rb", compression="infer") as file:
            yield file
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise MoeInspectError(f"cannot read {path}: {first_line(error)}") from None
