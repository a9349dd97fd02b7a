"""What `import` reads: a registry of formats, from which the command line, the fuzzer and the
documentation take their lists."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from moe_inspect.errors import MoeInspectError
from moe_inspect.files import why_unread
from moe_inspect.importers import MODULES
from moe_inspect.importers.context import ImportContext, Imported, ImportSource
from moe_inspect.importers.tables.presets import PRESETS

Sniffer = Callable[[str, bytes], bool]
HEAD_BYTES = 65_536
CODECS = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class Format:
    """A format that can be imported.

    name: what the user calls it.
    reads: which files it reads, for help and documentation.
    gives: what the resulting trace holds.
    run: reads the files of an ImportContext.
    sniff: whether a file belongs to the format, by its name and its first HEAD_BYTES bytes (of a
        Parquet file, whose columns are named at its end, followed by its last HEAD_BYTES)."""

    name: str
    reads: str
    gives: str
    run: Callable[[ImportContext], Imported]
    sniff: Sniffer


_registered: dict[str, Format] = {}


def importer(
    name: str, gives: str, sniff: Sniffer
) -> Callable[[Callable[[ImportContext], Imported]], Callable[[ImportContext], Imported]]:
    """Registers a function as the importer of a format: see Format."""

    def register(run: Callable[[ImportContext], Imported]) -> Callable[[ImportContext], Imported]:
        _registered[name] = Format(name, MODULES[name][1], gives, run, sniff)
        return run

    return register


def formats() -> dict[str, Format]:
    """All formats of MODULES, in their order."""
    for module, _ in MODULES.values():
        importlib.import_module(f"moe_inspect.importers.{module}")
    return {name: _registered[name] for name in MODULES}


def sniff(sources: list[ImportSource]) -> str:
    """The format of the first source, by its first file that any format recognises."""
    path = sources[0].path
    files = sorted(p for p in path.rglob("*") if p.is_file())[:1000] if path.is_dir() else [path]
    near: dict[str, list[str]] = {}
    for file in files:
        if not file.is_file():
            raise MoeInspectError(why_unread(file))
        head = _head(file)
        for name, format in formats().items():
            if format.sniff(file.name, head):
                return name
        near |= {
            name: [mark for mark in preset.marks if mark.encode() not in head]
            for name, preset in PRESETS.items()
            if any(mark.encode() in head for mark in preset.marks)
        }
    looks = "".join(f"; it looks like {n}, but lacks {', '.join(of)}" for n, of in near.items())
    raise MoeInspectError(
        f"cannot tell the format of {path}: name one of {', '.join(MODULES)}{looks}"
    )


def _head(file: Path) -> bytes:
    """The first HEAD_BYTES of what the file holds uncompressed, and the last of a Parquet file."""
    if file.suffix in CODECS:
        try:
            with (
                pa.OSFile(os.fsencode(file)) as raw,
                pa.CompressedInputStream(raw, CODECS[file.suffix]) as stream,
            ):
                return stream.read(HEAD_BYTES)
        except (OSError, pa.ArrowException):
            return b""
    with open(file, "rb") as opened:
        head = opened.read(HEAD_BYTES)
        if head[:4] == b"PAR1":  # its columns are named at its end
            opened.seek(max(file.stat().st_size - HEAD_BYTES, 0))
            head += opened.read(HEAD_BYTES)
    return head


def named(path: Path) -> str:
    """The domain of a file without a label: the file's name."""
    return path.name.split(".")[0] or path.name
