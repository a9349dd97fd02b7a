"""Checksums of a trace, by which a changed byte in any of its files is found.

| what                   | covered by                                         | checked            |
|------------------------|----------------------------------------------------|--------------------|
| pages of Parquet files | CRC-32 in the page headers                         | when read          |
| footers and sizes      | `footer_crc32`, `bytes` in the shard's line        | when opened        |
| whole Parquet files    | `sha256` in the shard's line                       | by verify, and of  |
|                        |                                                    | small files when   |
|                        |                                                    | opened             |
| vocabulary.parquet     | `vocabulary` in trace.json: bytes, sha256          | when read          |
| lines of shards-*      | `crc32`, the last key of the line                  | when a trace opens |
| trace.json             | `digest`, of everything but FREE_TEXT              | when a trace opens |

All are optional: docs/trace-format.md.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from typing import Any

import pyarrow as pa

# may be edited: no number depends on them, and they may name what is not to be published
FREE_TEXT = (
    "model.id",
    "model.note",
    "capture.command",
    "capture.host",
    "corpus.plan.sources.path",
)
END_BYTES = 8  # of a Parquet file: the length of its footer, and a magic word
_CRC = b', "crc32": '
Json = dict[str, Any]  # an object of trace.json or of a line of shards-*.jsonl


def sealed(entry: Json) -> bytes:
    """A line of shards-<rank>.jsonl, with the CRC-32 of all that comes before the key `crc32`."""
    text = json.dumps({key: value for key, value in entry.items() if key != "crc32"}).encode()[:-1]
    return b"%s%s%d}\n" % (text, _CRC, zlib.crc32(text))


def is_intact(line: bytes) -> bool:
    """Whether a line that states its CRC-32 is as it was written."""
    text, _, stated = line.rpartition(_CRC)
    return stated.rstrip(b"\n") == b"%d}" % zlib.crc32(text)


def footer_crc32(file: pa.NativeFile) -> int:
    """CRC-32 of a Parquet file's footer, from its first byte to the end of the file. ValueError
    where there is none."""
    size = file.size()
    end = file.read_at(END_BYTES, size - END_BYTES) if size > END_BYTES else b""
    length = int.from_bytes(end[:4], "little") + END_BYTES
    if not end.endswith(b"PAR1") or length > size:
        raise ValueError("it has no Parquet footer")
    return zlib.crc32(file.read_at(length, size - length))


def file_sha256(file: pa.NativeFile) -> str:
    return hashlib.sha256(file.read_at(file.size(), 0)).hexdigest()


def stated(data: bytes) -> Json:
    """What the manifest states of vocabulary.parquet."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _remove(section: object, path: list[str]) -> None:
    """Removes a value by its path, in an object or in each object of a list."""
    if isinstance(section, list):
        for entry in section:
            _remove(entry, path)
    elif isinstance(section, dict) and len(path) > 1:
        _remove(section.get(path[0]), path[1:])
    elif isinstance(section, dict):
        section.pop(path[0], None)


def digest(manifest: Json) -> str:
    """sha256 of what a manifest states, without its own digest and the values of FREE_TEXT."""
    content = json.loads(json.dumps({k: v for k, v in manifest.items() if k != "digest"}))
    for path in FREE_TEXT:
        _remove(content, [*path.split(".")])
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
