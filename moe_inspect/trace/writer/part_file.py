"""One Parquet file of a shard: written under a temporary name, flushed to disk, then renamed.

Only encodings that every reader supports: DuckDB reads BYTE_STREAM_SPLIT of float32, but not of
float16.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moe_inspect.trace import schema
from moe_inspect.trace.files import checksums
from moe_inspect.trace.files.atomic import draft_of
from moe_inspect.trace.files.location import Remote

DICTIONARY = {
    "layer",
    "router",
    "token_id",
    "document",
    "sequence",
    "position",
    "domain",
    "source",
    "phase",
    "batch",
}
STATISTICS = {"token", "layer", "router", "document", "batch"}


def write_part(
    path: Path | Remote,
    columns: pa.Schema,
    groups: Sequence[Callable[[], pa.Table]],
    bf16: bool = False,
) -> dict[str, Any]:
    """Writes a Parquet file, a row group at a time. `bf16`: its weights are values of bfloat16.
    Returns what its line in shards-<rank>.jsonl states: rows, bytes, footer_crc32, sha256."""
    codecs = {f.name: _codec(f.name, bf16) for f in columns}
    labels = [f.name for f in columns if f.name in DICTIONARY or f.name.startswith("expert")]
    encodings = {f.name: _encoding(f) for f in columns if f.name not in labels}
    rows = 0
    with draft_of(path) as draft, open(draft, "wb", buffering=2**20) as file:
        sink = _HashingFile(file)
        # (pyarrow's stubs know only one value for all columns)
        with pq.ParquetWriter(
            pa.PythonFile(sink, "w"),
            columns,
            compression=codecs,  # pyright: ignore[reportArgumentType]
            compression_level={name: 1 for name, codec in codecs.items() if codec == "zstd"},
            use_dictionary=labels,  # pyright: ignore[reportArgumentType]
            column_encoding={name: code for name, code in encodings.items() if code},
            write_statistics=[f.name for f in columns if f.name in STATISTICS],  # pyright: ignore[reportArgumentType]
            write_page_checksum=True,
        ) as writer:
            for make in groups:
                part = make()
                rows += len(part)
                writer.write_table(part, row_group_size=max(len(part), 1))
        file.flush()
        with open(draft, "rb") as written:
            footer_crc32 = checksums.footer_crc32(pa.PythonFile(written))
    return {
        "rows": rows,
        "bytes": sink.size,
        "footer_crc32": footer_crc32,
        "sha256": sink.digest.hexdigest(),
    }


def vocabulary_bytes(vocabulary: pa.Table) -> bytes:
    """The file vocabulary.parquet of token_id, token."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        vocabulary.cast(schema.VOCABULARY_SCHEMA),
        sink,
        compression="zstd",
        write_page_checksum=True,
    )
    return sink.getvalue().to_pybytes()


def _codec(column: str, bf16: bool) -> str:
    # expert ids leave the dictionary encoding bit-packed and near their entropy: a codec only costs
    # time on them
    if column.startswith("expert"):
        return "none"
    # of the bytes of a bf16 weight two are zero and one is nearly always the same: lz4 takes a
    # third of zstd's time to read and half to write, for a fifth more of space; fp16's third byte
    # has 3 bits of use, which only an entropy coder finds
    return "lz4" if bf16 and column.startswith("weight") else "zstd"


def _encoding(column: pa.Field) -> str | None:
    if pa.types.is_float32(column.type):
        return "BYTE_STREAM_SPLIT"
    return "DELTA_BINARY_PACKED" if column.name == "token" else None


class _HashingFile:
    """A file that computes the sha256 while it is written, so that no byte is read again."""

    closed = False

    def __init__(self, file: Any):
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        self.file.write(data)
        return len(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.closed = True
