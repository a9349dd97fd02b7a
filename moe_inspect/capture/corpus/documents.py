"""The files of a corpus, found by the values of `--data`, and their documents (text and domain),
streamed in a fixed order."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import lzma
import os
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_inspect.demo import CORPUS_DIR
from moe_inspect.errors import MoeInspectError, missing_package
from moe_inspect.files import open_regular
from moe_inspect.text import first_line

Filesystem = Any  # of fsspec, which has no types
Fields = dict[str, Any]  # of a row
READERS = (".txt", ".jsonl", ".csv", ".parquet")
COMPRESSED = (".gz", ".bz2", ".xz")
BUNDLED = "demo:"  # replaces the folder of the bundled corpus in the name of a source
DOMAIN_FIELD = "domain"
MOST_ROW_BYTES = 2**28  # of a line of JSON
SURROGATE = re.compile("[\ud800-\udfff]")  # no tokenizer accepts it


@dataclass(frozen=True)
class Source:
    """One file of the corpus. `fixed`: the domain was given with DOMAIN=SRC, and a domain field
    does not override it."""

    path: str
    domain: str
    fixed: bool
    bytes: int | None
    sha256: str


def find_sources(data: Sequence[str], leave_out: Path | None = None) -> list[Source]:
    """`--data` values → files, in a fixed order; without values the bundled corpus. Each value: a
    file, a folder (subfolders are domains), a glob or an fsspec URL, optionally behind `DOMAIN=`.
    Files below `leave_out` (the trace) are skipped."""
    return [
        Source(_shown(fs, path), label or domain, bool(label), *_identity(fs, path))
        for value in data or [str(CORPUS_DIR)]
        for label, fs, path, domain in _files(value, leave_out)
    ]


def _files(value: str, leave_out: Path | None) -> list[tuple[str, Filesystem, str, str]]:
    """(domain given in the value, filesystem, path, domain by folder or file name) of each file
    that a `--data` value names. MoeInspectError if there is none."""
    label, equals, location = value.partition("=")
    is_label = equals and location and re.fullmatch(r"[^/\\:*?\[\]]+", label)
    if not is_label or Path(value).exists():
        label, location = "", value
    files = [
        (label, fs, path, domain)
        for fs, path, domain in _expand(location)
        if not _is_below(fs, path, leave_out)
    ]
    if not files:
        reached = " (or it cannot be reached)" if "://" in location else ""
        kinds = ", ".join(READERS)
        raise MoeInspectError(
            f"no text at {location}{reached}: give a file, folder or glob of {kinds}"
        )
    return files


def check_first_document(
    data: Sequence[str],
    text_field: str,
    domain_field: str | None,
    leave_out: Path | None = None,
) -> None:
    """Read the first document of each local `--data` value, so that a missing file or field is
    refused before a model is loaded. Raise MoeInspectError if there is none."""
    for value in data:
        if "://" not in value:
            label, fs, path, domain = _files(value, leave_out)[0]
            with _local_file(path):  # no pipe or device, which may have no end
                pass
            first = Source(_shown(fs, path), label or domain, bool(label), None, "")
            next(read_documents(first, text_field, domain_field), None)


def _expand(location: str) -> Iterator[tuple[Filesystem, str, str]]:
    """(filesystem, path, domain by folder or file name) of each file at `location`."""
    try:
        filesystem, path = _resolved(location)
        if any(c in path for c in "*?[") and not filesystem.exists(path):
            for match in sorted(filesystem.glob(path)):
                if filesystem.isfile(match) and kind_of(match):
                    yield filesystem, match, _stem(match)
        elif filesystem.isdir(path):
            root = path.rstrip("/")
            for match in sorted(filesystem.find(root)):
                inside = match[len(root) + 1 :].split("/")
                if kind_of(match) and not any(part.startswith(".") for part in inside):
                    domain = inside[0] if len(inside) > 1 else root.rsplit("/", 1)[-1]
                    yield filesystem, match, domain
        elif filesystem.exists(path):
            if not kind_of(path):
                raise MoeInspectError(
                    f"cannot read {location}: its name must end in {', '.join(READERS)}"
                )
            yield filesystem, path, _stem(path)
    except ModuleNotFoundError as error:
        raise MoeInspectError(missing_package(error.name or "fsspec")) from None
    # fsspec does not know the protocol, or lacks a package for it
    except (ImportError, ValueError) as error:
        raise MoeInspectError(f"cannot open {location}: {first_line(error)}") from None
    except OSError as error:
        raise MoeInspectError(f"cannot read {location}: {first_line(error)}") from None


def _resolved(name: str) -> tuple[Filesystem, str]:
    """The filesystem and the path of a file, a folder or a glob, also as a trace names it."""
    import fsspec

    if "://" in name:
        return fsspec.core.url_to_fs(name)
    if name.startswith(BUNDLED):
        name = str(CORPUS_DIR / name.removeprefix(BUNDLED))
    return fsspec.filesystem("file"), os.path.abspath(os.path.expanduser(name))


def kind_of(path: str) -> str | None:
    """Which of `READERS` reads a file, by its name; None where none does."""
    name = path.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return next((k for k in READERS if name.endswith(k)), None)


def _stem(path: str) -> str:
    return path.rsplit("/", 1)[-1].split(".")[0]


def _shown(filesystem: Filesystem, path: str) -> str:
    """The name of a source in the trace: that of the bundled corpus does not depend on where it is
    installed."""
    if not _is_local(filesystem):
        return filesystem.unstrip_protocol(path)
    if Path(path).is_relative_to(CORPUS_DIR):
        return BUNDLED + str(Path(path).relative_to(CORPUS_DIR))
    return path


def _is_below(filesystem: Filesystem, path: str, place: Path | None) -> bool:
    if place is None or not _is_local(filesystem):
        return False
    return Path(path).is_relative_to(place.resolve())


def _is_local(filesystem: Filesystem) -> bool:
    protocol = filesystem.protocol
    return "file" in ((protocol,) if isinstance(protocol, str) else protocol)


def _identity(filesystem: Filesystem, path: str) -> tuple[int | None, str]:
    """(size, hash of the content). A remote file is not downloaded: the hash is that of its store's
    unique key (ETag, modification time …)."""
    if not _is_local(filesystem):
        key = str(filesystem.ukey(path)).encode()
        return filesystem.size(path), hashlib.sha256(key).hexdigest()
    with _local_file(path) as file:
        return Path(path).stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _local_file(path: str) -> Iterator[io.BufferedReader]:
    """A local file for reading. MoeInspectError if it is no regular file, or cannot be read."""
    try:
        with open_regular(path) as file:
            yield file
    except OSError as error:
        raise MoeInspectError(f"cannot read {path}: {first_line(error)}") from None


@contextmanager
def opened(path: str) -> Iterator[Any]:
    """A file of the corpus for reading, decompressed. MoeInspectError where that fails."""
    try:
        filesystem, location = _resolved(path)
        with filesystem.open(location, "rb", compression="infer") as file:
            yield file
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise MoeInspectError(f"cannot read {path}: {first_line(error)}") from None


# --- documents


@dataclass
class CorpusStats:
    """Counts of documents for the manifest; tokens and bytes read for the progress bar."""

    documents: int = 0
    split_documents: int = 0
    empty_documents: int = 0
    tokens: int = 0
    bytes_read: int = 0

    def record(self) -> dict[str, int]:
        return {k: getattr(self, k) for k in ("documents", "split_documents", "empty_documents")}


def read_documents(
    source: Source, text_field: str, domain_field: str | None
) -> Iterator[tuple[str, str, int]]:
    """(domain, text, bytes of the file) of each document. A .txt is one document; other files hold
    one per row."""
    kind = kind_of(source.path)
    if kind == ".txt":
        with opened(source.path) as file:
            data = file.read()
        yield source.domain, _utf8(data, source.path), len(data)
        return
    wanted = domain_field or DOMAIN_FIELD
    if kind == ".parquet":
        rows = _parquet_rows(source, (text_field, wanted))
    else:
        rows = (_json_rows if kind == ".jsonl" else _csv_rows)(source.path)
    for number, (row, size) in enumerate(rows, 1):
        if text_field in row and row[text_field] is None:
            row[text_field] = ""  # counted as an empty document
        if not isinstance(row.get(text_field), str):
            raise MoeInspectError(_no_text(source.path, number, row, text_field))
        if (broken := SURROGATE.search(row[text_field])) is not None:
            said = f"character {broken.start()} is a lone surrogate: not valid Unicode"
            raise MoeInspectError(f"{source.path} row {number}: {said}")
        label = row.get(wanted)
        if label is None and domain_field is not None and not source.fixed:
            why = f"no domain field {wanted!r}: its fields are {_fields(row)}"
            why = f"field {wanted!r} is null" if wanted in row else why
            raise MoeInspectError(f"{source.path} row {number}: {why}")
        yield source.domain if source.fixed or label is None else str(label), row[text_field], size


def _no_text(path: str, number: int, row: Fields, text_field: str) -> str:
    why = f"no text field {text_field!r}: choose one with --text-field from {_fields(row)}"
    if text_field in row:
        why = f"field {text_field!r} holds {type(row[text_field]).__name__}, not text"
    return f"{path} row {number}: {why}"


def _fields(row: Fields) -> str:
    return ", ".join(map(str, row)) or "none"


def _utf8(data: bytes, path: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        said = f"{path} is not UTF-8 (byte {error.start}): convert it first"
        raise MoeInspectError(said) from None


Row = tuple[Fields, int]  # and the bytes of the row in the file


def _json_rows(path: str) -> Iterator[Row]:
    with opened(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MOST_ROW_BYTES), b""), 1):
            if len(line) == MOST_ROW_BYTES:
                raise MoeInspectError(
                    f"{path} line {number} has over {MOST_ROW_BYTES:,} bytes: write a text per line"
                )
            if not line.strip():
                continue
            try:
                row = json.loads(_utf8(line, path))
            except (ValueError, RecursionError) as error:
                said = f"{path} line {number} is not JSON: {first_line(error)}"
                raise MoeInspectError(said) from None
            if not isinstance(row, dict):
                said = f"expected a JSON object, got {type(row).__name__}"
                raise MoeInspectError(f"{path} line {number}: {said}")
            yield row, len(line)


def _csv_rows(path: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    with opened(path) as file:
        try:
            for row in csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline="")):
                yield row, sum(len(str(value).encode()) + 1 for value in row.values())
        except (UnicodeDecodeError, csv.Error) as error:
            why = f"CSV: {first_line(error)}"
            if isinstance(error, UnicodeDecodeError):
                why = f"UTF-8: {error.reason}: convert it first"
            raise MoeInspectError(f"{path} is not {why}") from None


def _parquet_rows(source: Source, wanted: tuple[str, ...]) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = source.path
    with opened(path) as file:
        try:
            table = pq.ParquetFile(file)
            names = table.schema_arrow.names
            columns = [c for c in wanted if c in names]
            if wanted[0] not in names:
                raise MoeInspectError(_no_text(path, 1, dict.fromkeys(names), wanted[0]))
            size = (source.bytes or 0) // max(table.metadata.num_rows, 1)
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                yield from ((row, size) for row in batch.to_pylist())
        except (pa.ArrowException, UnicodeDecodeError) as error:
            said = f"{path} is not a readable Parquet file: {first_line(error)}"
            raise MoeInspectError(said) from None


def interleaved(
    sources: Sequence[Source], text_field: str, domain_field: str | None, stats: CorpusStats
) -> Iterator[tuple[str, str, str]]:
    """(domain, source, text), round-robin over domains, so that `--max-tokens` cuts all domains
    alike and a forward pass mixes them. Documents of white space only are skipped and counted."""

    def documents_of(files: list[Source]) -> Iterator[tuple[str, str, str]]:
        for source in files:
            for domain, text, size in read_documents(source, text_field, domain_field):
                stats.bytes_read += size
                yield domain, source.path, text

    files_of: dict[str, list[Source]] = {}
    for source in sources:
        files_of.setdefault(source.domain, []).append(source)
    turns = [documents_of(files) for files in files_of.values()]
    while turns:
        for turn in list(turns):
            document = next(turn, None)
            if document is None:
                turns.remove(turn)
            elif document[2].strip():
                yield document
            else:
                stats.empty_documents += 1
