"""Opens and reads the Parquet files of a trace. Sizes, types and checksums are checked before
memory is allocated by them. Anything wrong with a file raises a `Damaged` that names it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_inspect.errors import Damaged
from moe_inspect.text import first_line
from moe_inspect.trace import schema
from moe_inspect.trace.files import checksums
from moe_inspect.trace.files.location import Remote
from moe_inspect.trace.schema import MOST_SHARD_TOKENS, MOST_TOKEN_IDS

# a file of this size is hashed when it is opened, which takes less than opening it
SMALL_BYTES = 2**20
MOST_COUNT_ROWS = 2**26
TEXT_BYTES = 2**28  # of the texts of a table: far above any, far below what memory holds
# the other columns of the format may be null, and so may columns that the format does not name
NEVER_NULL = {*schema.TOKENS.names, *schema.DOCUMENTS.names, "logits"}
NEVER_NULL |= {*schema.counts_schema(schema.SUMS, by_document=True).names} - {"first_choice"}


@dataclass(frozen=True)
class Stated:
    """What the line of a shard or the manifest states about a file; None where it does not."""

    rows: int | None = None
    bytes: int | None = None
    footer_crc32: int | None = None
    sha256: str | None = None


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Converts exceptions of Arrow and the operating system, raised while a file of a trace is
    read, to a `Damaged`."""
    try:
        yield
    except Damaged:
        raise
    except FileNotFoundError:
        raise Damaged(name, "it is missing") from None
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError, MemoryError) as error:
        raise Damaged(name, first_line(error)) from None


def open_part(path: Path | Remote, name: str, columns: pa.Schema, stated: Stated) -> pq.ParquetFile:
    """Opens a file of a trace and checks everything except its pages; their CRCs are checked when
    they are read."""
    with reading(name):
        file = _source(path)
        _check_bytes(file, name, stated)
        opened = _parquet(file)
        rows, found = opened.metadata.num_rows, opened.schema_arrow
        if stated.rows is not None and rows != stated.rows:
            raise Damaged(name, f"it has {rows} rows, its line says {stated.rows}")
        _check_size(opened, name)
        # labels as plain text instead of an Arrow dictionary, as other programs write them
        text = [
            field.name
            for field in columns
            if pa.types.is_dictionary(field.type)
            and (at := found.get_field_index(field.name)) >= 0
            and _alike(found.types[at], pa.string())
        ]
        if text:
            opened = _parquet(_source(path), read_dictionary=text)
            found = opened.schema_arrow
        for field in columns:
            if (at := found.get_field_index(field.name)) < 0:
                raise Damaged(name, f"it has no column {field.name}")
            if not _alike(found.types[at], field.type):
                raise Damaged(name, f"{field.name} is of {found.types[at]}, not {field.type}")
        return opened


def _parquet(file: pa.NativeFile, read_dictionary: list[str] | None = None) -> pq.ParquetFile:
    # routers of a shard are read from several threads, which Arrow's buffer of what comes next does
    # not stand
    return pq.ParquetFile(
        file, read_dictionary=read_dictionary, page_checksum_verification=True, pre_buffer=False
    )


def _source(path: Path | Remote) -> pa.NativeFile:
    if isinstance(path, Remote):
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        return PyFileSystem(FSSpecHandler(path.filesystem)).open_input_file(path.path)
    try:
        str(path).encode()
    except UnicodeEncodeError:  # a name that Arrow cannot be given
        return pa.PythonFile(open(path, "rb"))
    return pa.memory_map(str(path))


def _check_bytes(file: pa.NativeFile, name: str, stated: Stated) -> None:
    size = file.size()
    if stated.bytes is not None and size != stated.bytes:
        raise Damaged(name, f"it has {size:,} bytes, {stated.bytes:,} were written")
    if stated.sha256 is not None and (size <= SMALL_BYTES or name == schema.VOCABULARY):
        if (found := checksums.file_sha256(file)) != stated.sha256:
            said = f"sha256 is {found[:12]}…, {stated.sha256[:12]}… was written"
            raise Damaged(name, f"it was changed after it was written: {said}")
    elif stated.footer_crc32 is not None and checksums.footer_crc32(file) != stated.footer_crc32:
        said = "its footer was changed after it was written (its footer_crc32 differs)"
        raise Damaged(name, said)


def _check_size(file: pq.ParquetFile, name: str) -> None:
    """Refuses row groups that become larger than their rows: kilobytes can become gigabytes."""
    table = name.partition("/")[0]
    most_rows = {"counts": MOST_COUNT_ROWS, schema.VOCABULARY: MOST_TOKEN_IDS}.get(
        table, MOST_SHARD_TOKENS
    )
    width = sum(_width(kind) for kind in file.schema_arrow.types)
    for g in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(g)
        rows, size = group.num_rows, group.total_byte_size
        if not 0 <= rows <= most_rows:
            said = f"a row group of it has {rows:,} rows: at most {most_rows:,} are possible"
            raise Damaged(name, said)
        if not 0 <= size <= 2 * width * rows + TEXT_BYTES:
            said = f"a row group of {rows:,} rows decompresses to {size:,} bytes, more than {table}"
            raise Damaged(name, f"{said} can take")


def _width(kind: pa.DataType) -> int:
    if pa.types.is_fixed_size_list(kind):
        return kind.list_size * _width(kind.value_type)
    try:
        return max(kind.bit_width // 8, 1)
    except ValueError:  # text
        return 4


def _alike(found: pa.DataType, expected: pa.DataType) -> bool:
    if pa.types.is_dictionary(expected) and pa.types.is_dictionary(found):
        return _alike(found.value_type, expected.value_type)
    if pa.types.is_string(expected):
        return pa.types.is_string(found) or pa.types.is_large_string(found)
    return found == expected or (
        pa.types.is_unsigned_integer(expected) and found in (pa.uint8(), pa.uint16())
    )


def read(
    file: pq.ParquetFile,
    name: str,
    columns: list[str] | None = None,
    groups: list[int] | None = None,
    nulls: bool = False,
) -> pa.Table:
    """Row groups of a file, or all. MoeInspectError for a null where there can be none, unless
    `nulls`."""
    with reading(name):
        if groups is None:
            table, rows = file.read(columns, use_threads=False), file.metadata.num_rows
        else:
            table = file.read_row_groups(groups, columns, use_threads=False)
            rows = sum(file.metadata.row_group(g).num_rows for g in groups)
        _check_text(table)
    if len(table) != rows:
        raise Damaged(name, f"{len(table)} rows could be read, it has {rows}")
    for title, column in zip(table.column_names, table.columns, strict=True):
        if column.null_count and not nulls and title in NEVER_NULL:
            raise Damaged(name, f"{title} is null in {column.null_count:,} rows")
    return table


def _check_text(table: pa.Table) -> None:
    """ArrowInvalid where a text is no UTF-8, of which Parquet's readers take no notice."""
    for column in table.columns:
        if pa.types.is_dictionary(column.type):
            for chunk in column.chunks:
                chunk.dictionary.validate(full=True)
        elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            column.validate(full=True)


def read_vocabulary(path: Path | Remote, stated: Stated) -> pa.Table:
    """token_id, token. A dictionary can repeat one long text a million times: the length of all is
    checked before they are copied."""
    import pyarrow.compute as pc

    name, columns = schema.VOCABULARY, schema.VOCABULARY_SCHEMA.names
    file = open_part(path, name, schema.VOCABULARY_SCHEMA, stated)
    with reading(name):
        words = _parquet(_source(path), read_dictionary=["token"]).read(use_threads=False)
        _check_text(words)
        total = 0
        for chunk in words["token"].chunks:
            bytes_N = pc.binary_length(chunk.dictionary).take(chunk.indices)  # pyright: ignore[reportAttributeAccessIssue]
            total += int(bytes_N.fill_null(0).to_numpy().sum(dtype=np.int64))
        if total > TEXT_BYTES:
            said = f"its {file.metadata.num_rows:,} tokens are {total:,} bytes of text"
            raise Damaged(name, f"{said}: at most {TEXT_BYTES:,} are possible")
        for column in columns:
            if words[column].null_count:
                raise Damaged(name, f"{column} is null")
        ids = words["token_id"].to_numpy()
        if (wrong := ids != np.arange(len(ids))).any():
            row = int(wrong.argmax())
            raise Damaged(name, f"row {row}: token_id is {ids[row]}, not {row}")
        at = words.column_names.index("token")
        return words.set_column(at, "token", words["token"].cast(pa.string())).select(columns)


@dataclass(frozen=True)
class FileRows:
    """Consecutive rows of a file, from row `start` on, that are checked."""

    file: str
    start: int = 0

    def refuse(self, wrong_N: np.ndarray, what: str, *of_row: np.ndarray) -> None:
        """Damaged at the first row that is wrong. `what`: with a {} for the value that each of
        the arrays `of_row` has there."""
        if wrong_N.any():
            n = int(wrong_N.argmax())
            said = what.format(*(values_N[n] for values_N in of_row))
            raise Damaged(self.file, said, row=self.start + n)

    def expect(self, column: str, found_N: np.ndarray, expected_N: np.ndarray) -> None:
        self.refuse(found_N != expected_N, f"{column} is {{}}, not {{}}", found_N, expected_N)

    def expect_size(self, column: str, values_N: np.ndarray, least: float = -np.inf) -> None:
        wrong_N = ~(np.isfinite(values_N) & (values_N >= least))
        self.refuse(wrong_N, f"{column} is {{}}", values_N)

    def refuse_nulls(self, table: pa.Table, columns: Sequence[str]) -> None:
        for column in columns:
            if table[column].null_count:
                self.refuse(table[column].is_null().to_numpy(), f"{column} is null")
