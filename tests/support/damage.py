"""Damage to a trace: values edited with the checksums made to fit, so that only the value is wrong;
and bytes changed without."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_inspect.trace import schema
from moe_inspect.trace.files import checksums
from moe_inspect.trace.manifest import write_manifest


def edit_manifest(root: Path, **values: Any) -> None:
    """Sets sections of trace.json, and its digest; `digest=None` removes that."""
    manifest = json.loads((root / schema.MANIFEST).read_text()) | values
    write_manifest(root, manifest)
    if manifest["digest"] is None:
        del manifest["digest"]
        (root / schema.MANIFEST).write_text(json.dumps(manifest))


def edit_lines(
    root: Path, lines: list[dict[str, Any]] | None = None, rank: int = 0
) -> list[dict[str, Any]]:
    """The lines of shards-<rank>.jsonl, after `lines`, if given, took their place."""
    path = root / f"shards-{rank}.jsonl"
    if lines is not None:
        path.write_bytes(b"".join(map(checksums.sealed, lines)))
    return [json.loads(line) for line in path.read_text().splitlines()]


def edit_line(root: Path, at: int, **values: Any) -> None:
    """Sets values in a line of shards-0.jsonl."""
    lines = edit_lines(root)
    lines[at] |= values
    edit_lines(root, lines)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def restate(root: Path, name: str, **more: Any) -> None:
    """Makes the line of a file that was changed fit what it holds now; and sets other values."""
    file = pa.memory_map(str(root / name))
    facts = {
        "rows": pq.read_metadata(root / name).num_rows,
        "bytes": file.size(),
        "footer_crc32": checksums.footer_crc32(file),
        "sha256": checksums.file_sha256(file),
    }
    edit_lines(
        root, [line | (facts | more if line["path"] == name else {}) for line in edit_lines(root)]
    )


def without_checksums(source: Path, root: Path, hashes: bool = True) -> None:
    """Copies a trace as it would be had it been written before there were checksums in lines and
    manifest; `hashes`: but for the sha256 of files."""
    shutil.copytree(source, root)
    gone = {"crc32", "bytes", "footer_crc32", *(() if hashes else ("sha256",))}
    for path in root.glob("shards-*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [{k: v for k, v in line.items() if k not in gone} for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    manifest = json.loads((root / schema.MANIFEST).read_text())
    text = json.dumps(
        {k: v for k, v in manifest.items() if k not in ("digest", "vocabulary")}, indent=1
    )
    (root / schema.MANIFEST).write_text(text)


def with_a_bit_less(path: Path, place: int) -> None:
    """Another byte at a place of a file."""
    whole = path.read_bytes()
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])


def last_byte(column: pq.ColumnChunkMetaData) -> int:
    """Of a column's pages in its file."""
    first = column.dictionary_page_offset or column.data_page_offset
    return first + column.total_compressed_size - 1


def changed_bytes(root: Path, tries: int, seed: int = 0) -> Iterator[tuple[str, int, int, int]]:
    """Changes one byte of a trace at a time, drawn over all its files by their sizes, every file at
    least once: (file, place, byte before, byte now). What was changed is restored before the
    next."""
    rng = np.random.default_rng(seed)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    sizes = np.array([path.stat().st_size for path in files])
    chosen = [
        *range(len(files)),
        *rng.choice(len(files), max(tries - len(files), 0), p=sizes / sizes.sum()),
    ]
    for n, f in enumerate(chosen[:tries]):
        path, place = files[f], int(rng.integers(sizes[f]))
        whole = path.read_bytes()
        # half of them a single bit, as memory and disks lose them
        now = whole[place] ^ (1 << int(rng.integers(8)) if n % 2 else int(rng.integers(1, 256)))
        path.write_bytes(whole[:place] + bytes([now]) + whole[place + 1 :])
        try:
            yield str(path.relative_to(root)), place, whole[place], now
        finally:
            path.write_bytes(whole)


@contextmanager
def disk_of(most_bytes: int) -> Iterator[None]:
    """No file grows beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
