"""Rules of files: checksums, numbers of rows, no file that is not listed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from moe_inspect.errors import MoeInspectError, reading
from moe_inspect.trace import schema
from moe_inspect.trace.files.location import Remote, inside
from moe_inspect.trace.header import TraceHeader
from moe_inspect.trace.output_dir import OF_A_TABLE, OVERWRITTEN
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.shard import Shard
from moe_inspect.trace.shard_list import ShardFiles
from moe_inspect.trace.validate import line_keys
from moe_inspect.trace.verify.verification import Verification, Violation, open_table

CHECKSUM_KEYS = {"bytes", "footer_crc32", "crc32"}  # all or none in a line, and sha256 with them


def check_lines(trace: Trace, files: list[ShardFiles]) -> None:
    """No unknown keys, and no checksums missing where others are stated: a key may have been
    renamed."""
    # whether the line before has checksums: a trace begun without them may be resumed with them
    checked, known = False, line_keys()
    for shard in files:
        for entry in map(json.loads, shard.lines):
            name = f"shards-{shard.rank}.jsonl"
            if unknown := set(entry) - known:
                raise Violation(
                    name, None, f"the line of {entry['path']} has the unknown key {min(unknown)!r}"
                )
            stated = checked or not CHECKSUM_KEYS.isdisjoint(entry)
            if stated and (missing := (CHECKSUM_KEYS | {"sha256"}) - set(entry)):
                raise Violation(name, None, f"the line of {entry['path']} has no {min(missing)}")
            checked = "crc32" in entry
    manifest = trace.manifest
    if "digest" not in manifest and (checked or "vocabulary" in manifest):
        raise Violation(
            schema.MANIFEST,
            None,
            "its digest was removed: lines of the same trace have checksums",
        )
    if (
        "digest" in manifest
        and "vocabulary" not in manifest
        and (trace.path / schema.VOCABULARY).exists()
    ):
        raise Violation(
            schema.VOCABULARY, None, "it was added later: trace.json states no vocabulary"
        )


def check_files(shard: Shard) -> int:
    """Returns the number of files without a stated sha256."""
    files = shard.files
    for table, name in files.paths.items():
        path = plain_file(shard.trace, name)
        if not path.is_file():
            raise Violation(name, None, "the file is missing")
        stated = files.stated[table].sha256
        if stated is not None and (digest := _sha256(path)) != stated:
            said = f"sha256 is {digest[:12]}…, its line says {stated[:12]}…"
            raise Violation(name, None, said)
        open_table(shard, table)
    return sum(stated.sha256 is None for stated in files.stated.values())


def check_orphans(trace: Trace, files: list[ShardFiles], found: Verification) -> None:
    """No files that no line names. A trace that is being written has some whose lines are to come;
    one that was interrupted may have kept them."""
    known = {path for shard in files for path in shard.paths.values()}
    for table in trace.tables:
        folder = plain_file(trace, table)
        for file in sorted(folder.iterdir(), key=str) if folder.is_dir() else ():
            if f"{table}/{file.name}" in known:
                continue
            unfinished = trace.status != "complete" or (trace.path / OVERWRITTEN).exists()
            if unfinished and OF_A_TABLE.fullmatch(file.name):
                found.uncommitted.append(f"{table}/{file.name}")
            else:
                raise Violation(
                    f"{table}/{file.name}",
                    None,
                    "an orphan: no line of shards-*.jsonl names it (--resume deletes it)",
                )


def plain_file(trace: TraceHeader, name: str) -> Path | Remote:
    try:
        inside(trace.path, name)
    except MoeInspectError as error:
        raise Violation(name, None, str(error)) from None
    return trace.path / name


def _sha256(path: Path | Remote) -> str:
    with reading(path):
        if isinstance(path, Remote):
            digest = hashlib.sha256()
            for block in path.blocks():
                digest.update(block)
            return digest.hexdigest()
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
