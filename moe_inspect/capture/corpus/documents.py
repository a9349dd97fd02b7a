"""Reads the files of a corpus as documents (text and domain), streamed, in a fixed order."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moe_inspect.capture.corpus.sources import Source, kind_of, opened
from moe_inspect.errors import MoeInspectError
from moe_inspect.text import first_line

DOMAIN_FIELD = "domain"
MOST_ROW_BYTES = 2**28  # of a line of JSON
SURROGATE = re.compile("[\ud800-\udfff]")  # no tokenizer accepts it


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
    rows = {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}[kind or ""]
    for number, (row, size) in enumerate(rows(source, (text_field, wanted)), 1):
        if text_field in row and row[text_field] is None:
            row[text_field] = ""  # counted as an empty document
        if not isinstance(row.get(text_field), str):
            raise MoeInspectError(_no_text(source.path, number, row, text_field))
        if (broken := SURROGATE.search(row[text_field])) is not None:
            raise MoeInspectError(
                f"{source.path} row {number}: character {broken.start()} is a lone surrogate: "
                "not valid Unicode"
            )
        label = row.get(wanted)
        if label is None and domain_field is not None and not source.fixed:
            why = (
                f"field {wanted!r} is null"
                if wanted in row
                else f"no domain field {wanted!r}: its fields are {_fields(row)}"
            )
            raise MoeInspectError(f"{source.path} row {number}: {why}")
        yield source.domain if source.fixed or label is None else str(label), row[text_field], size


def _no_text(path: str, number: int, row: dict[str, Any], text_field: str) -> str:
    if text_field in row:
        return (
            f"{path} row {number}: field {text_field!r} holds {type(row[text_field]).__name__}, "
            "not text"
        )
    return (
        f"{path} row {number}: no text field {text_field!r}: choose one with --text-field from "
        f"{_fields(row)}"
    )


def _fields(row: dict[str, Any]) -> str:
    return ", ".join(map(str, row)) or "none"


def _utf8(data: bytes, path: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MoeInspectError(
            f"{path} is not UTF-8 (byte {error.start}): convert it first"
        ) from None


Row = tuple[dict[str, Any], int]  # fields, bytes of the row in the file


def _json_rows(source: Source, _: tuple[str, ...]) -> Iterator[Row]:
    path = source.path
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
                raise MoeInspectError(
                    f"{path} line {number} is not JSON: {first_line(error)}"
                ) from None
            if not isinstance(row, dict):
                raise MoeInspectError(
                    f"{path} line {number}: expected a JSON object, got {type(row).__name__}"
                )
            yield row, len(line)


def _csv_rows(source: Source, _: tuple[str, ...]) -> Iterator[Row]:
    path = source.path
    csv.field_size_limit(sys.maxsize)
    with opened(path) as file:
        try:
            for row in csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline="")):
                yield row, sum(len(str(value).encode()) + 1 for value in row.values())
        except UnicodeDecodeError as error:
            raise MoeInspectError(
                f"{path} is not UTF-8: {error.reason}: convert it first"
            ) from None
        except csv.Error as error:
            raise MoeInspectError(f"{path} is not CSV: {first_line(error)}") from None


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
            raise MoeInspectError(
                f"{path} is not a readable Parquet file: {first_line(error)}"
            ) from None


def interleaved(
    sources: Sequence[Source], text_field: str, domain_field: str | None, stats: CorpusStats
) -> Iterator[tuple[str, str, str]]:
    """(domain, source, text), round-robin over domains, so that `--max-tokens` cuts all domains
    alike and a forward pass mixes them. Documents of white space only are skipped and counted."""
    files_of: dict[str, list[Source]] = {}
    for source in sources:
        files_of.setdefault(source.domain, []).append(source)
    turns = [_documents_of(files, text_field, domain_field, stats) for files in files_of.values()]
    while turns:
        for turn in list(turns):
            document = next(turn, None)
            if document is None:
                turns.remove(turn)
            elif document[2].strip():
                yield document
            else:
                stats.empty_documents += 1


def _documents_of(
    sources: Sequence[Source], text_field: str, domain_field: str | None, stats: CorpusStats
) -> Iterator[tuple[str, str, str]]:
    for source in sources:
        for domain, text, size in read_documents(source, text_field, domain_field):
            stats.bytes_read += size
            yield domain, source.path, text
