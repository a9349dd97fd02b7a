"""verify: checks a trace by the rules of its format, a shard and a row group at a time, and names
the first violation by file and row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from moe_inspect.errors import Damaged, MoeInspectError, reading
from moe_inspect.trace import schema
from moe_inspect.trace.files.location import Remote, inside
from moe_inspect.trace.files.lock import is_locked, refuse_while_locked, settle
from moe_inspect.trace.manifest import no_trace, writer_of
from moe_inspect.trace.output_dir import OF_A_TABLE, OVERWRITTEN, contents
from moe_inspect.trace.reader import TRIES, Trace, address, place_of, shards_of
from moe_inspect.trace.shard import Shard
from moe_inspect.trace.shard_list import ShardFiles
from moe_inspect.trace.validate import read_schema
from moe_inspect.trace.verify.rules import (
    Documents,
    Positions,
    Verification,
    Violation,
    check_counts,
    check_logits,
    check_routing,
    check_tokens,
)

CHECKSUM_KEYS = {"bytes", "footer_crc32", "crc32"}  # all or none in a line, and sha256 with them


def verify(
    trace: Trace | str | Path | Remote, progress: Callable[[int], None] | None = None
) -> Verification:
    """Checks a trace by every rule of its format (docs/trace-format.md), every byte of it.

    A damaged file is a violation like any other. MoeInspectError where there is no trace.
    `progress` is called with the number of tokens of each shard that is done."""
    root = place_of(trace)
    settle(root)
    if not (root / schema.MANIFEST).is_file():
        if root.is_dir() and any(root.iterdir()) and contents(root).is_free:
            refuse_while_locked(root)
            raise MoeInspectError(
                f"no trace at {root} yet: its writer was stopped before anything was committed; "
                "--resume starts it again"
            )
        raise no_trace(root)
    for _ in range(TRIES):
        found = Verification(address(trace))
        opened = None
        try:
            opened = Trace(root)
            _verify(opened, found, progress)
        except Damaged as error:
            found.ok, found.violation, found.file = False, error.what, error.file
            found.row = error.row if isinstance(error, Violation) else None
        except MoeInspectError as error:
            if opened is not None:
                raise
            found.ok, found.violation, found.file = False, str(error), schema.MANIFEST
        if found.ok or opened is None or not opened.is_replaced():
            break
    return found


def _verify(trace: Trace, found: Verification, progress: Callable[[int], None] | None) -> None:
    files = [shard.files for shard in trace.shards]
    found.status = _status(trace)
    found.resumable = (
        found.status == "interrupted"
        and (trace.manifest.get("corpus") or {}).get("plan") is not None
    )
    check_lines(trace, files)
    unhashed = sum(check_files(shard) for shard in shards_of(trace, "checksums"))
    check_orphans(trace, files, found)
    found.checked += [
        "sha256 and rows of every file are those of its line"
        if not unhashed
        else f"rows of every file are those of its line; {unhashed:,} files state no sha256: "
        "a changed byte may go unseen in them",
        "no orphaned files",
        "tokens numbered without a gap",
    ]
    words = len(trace.vocabulary_table) or None
    documents = Documents(trace)
    found.documents = len(documents.number)
    found.checked.append("documents declared once")
    positions = Positions(bool(trace.manifest.get("counts", {}).get("dropped")))
    for shard in shards_of(trace, "checking rows"):
        if trace.counts_only:
            check_counts(shard, found)
        else:
            phase_T = check_tokens(shard, words, documents, positions)
            check_routing(shard, phase_T, found)
            if "logits" in trace.tables:
                check_logits(shard, phase_T)
        found.shards += 1
        found.tokens += shard.files.tokens
        if progress:
            progress(shard.files.tokens)
    _check_totals(trace, found)
    if trace.counts_only:
        found.checked += [
            "every expert of every router listed once",
            "Σ counts ≤ tokens × k for each router, none negative, sums finite",
        ]
    else:
        found.checked += [
            "token ids within the vocabulary",
            "positions follow each other within a sequence"
            if positions.strict
            else "positions: not checked, decisions were dropped",
            "each router saw each of its tokens once, in order",
            "ids < E, no expert twice in a decision, Σ counts = tokens × k − empty slots",
            "weights finite, present exactly where an expert is, descending where stated"
            if trace.has_weights
            else "no weights recorded",
            *(
                f"{value}s of outputs finite, not negative, present exactly where an expert is"
                for value in trace.slot_values
                if value not in ("weight", schema.DROPPED)
            ),
            *(
                ["dropped experts < E, only in slots without an expert, none twice in a decision"]
                if trace.has_dropped
                else []
            ),
            *(
                ["losses and entropies not negative, null in both or neither"]
                if trace.has_loss
                else []
            ),
            *(["logits of each decision, none NaN"] if "logits" in trace.tables else []),
        ]
    found.checked.append("the manifest's totals are those of the shards")


def _status(trace: Trace) -> str:
    if trace.status != "recording" or writer_of(trace.manifest) is not None:
        return trace.status
    locked = is_locked(trace.path)  # by a process of another machine
    unknown = locked is None and isinstance(trace.path, Remote)
    return "recording" if locked or unknown else "interrupted"


def _check_totals(trace: Trace, found: Verification) -> None:
    stated = trace.manifest.get("counts")
    if trace.status != "complete" or not isinstance(stated, dict):
        return
    totals = {
        "tokens": found.tokens,
        **({} if trace.counts_only else {"decisions": found.decisions}),
    }
    for name, value in totals.items():
        if stated.get(name) != value:
            raise Violation(
                schema.MANIFEST,
                None,
                f"counts.{name} is {stated.get(name)}, the shards have {value}",
            )


# --- files: checksums, numbers of rows, no file that is not listed


def check_lines(trace: Trace, files: list[ShardFiles]) -> None:
    """No unknown keys, and no checksums missing where others are stated: a key may have been
    renamed."""
    # whether the line before has checksums: a trace begun without them may be resumed with them
    checked, known = False, read_schema("shard_line")["properties"].keys()
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
        path = inside(shard.trace.path, name)
        if not path.is_file():
            raise Violation(name, None, "the file is missing")
        stated = files.stated[table].sha256
        if stated is not None and (digest := _sha256(path)) != stated:
            said = f"sha256 is {digest[:12]}…, its line says {stated[:12]}…"
            raise Violation(name, None, said)
        shard.file(table)
    return sum(stated.sha256 is None for stated in files.stated.values())


def check_orphans(trace: Trace, files: list[ShardFiles], found: Verification) -> None:
    """No files that no line names. A trace that is being written has some whose lines are to come;
    one that was interrupted may have kept them."""
    known = {path for shard in files for path in shard.paths.values()}
    for table in trace.tables:
        folder = inside(trace.path, table)
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


def _sha256(path: Path | Remote) -> str:
    with reading(path):
        if isinstance(path, Remote):
            digest = hashlib.sha256()
            for block in path.blocks():
                digest.update(block)
            return digest.hexdigest()
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
