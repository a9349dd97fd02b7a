"""Finds what is committed in a trace, and where its writer continues."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from moe_inspect.trace.files.atomic import write_atomically
from moe_inspect.trace.files.location import Remote, inside
from moe_inspect.trace.files.lock import drafts_of
from moe_inspect.trace.manifest import read_manifest, write_manifest
from moe_inspect.trace.shard_list import ShardFiles, committed_shards


@dataclass(frozen=True)
class ResumePoint:
    """What a rank has committed, and the numbers of the next shard, token and batch. `slot_orders`:
    router → the order of its slots in what is written."""

    shards: int = 0
    next_token: int = 0
    next_batch: int = 0
    tokens: int = 0
    decisions: int = 0
    slot_orders: dict[int, str] = field(default_factory=dict)


def committed_counts(root: Path | Remote, manifest: dict[str, Any]) -> dict[str, int]:
    """Tokens and decisions in the committed shards of all ranks."""
    return _counts(committed_shards(root, manifest))


def _counts(shards: list[ShardFiles]) -> dict[str, int]:
    return {"tokens": sum(s.tokens for s in shards), "decisions": sum(s.decisions for s in shards)}


def resume_point(root: Path | Remote, rank: int = 0) -> ResumePoint:
    """Where rank `rank` of the trace at `root` continues: after its last shard that was not
    committed early. Deletes the rank's files that no line names, and its early shards. The caller
    holds the lock."""
    manifest = read_manifest(root)
    committed = [s for s in committed_shards(root, manifest) if s.rank == rank]
    shards = list(takewhile(lambda s: not s.early, committed))
    _keep(root, manifest, rank, shards, len(committed))
    # then, so that no line names what is not there
    keep = {root / path for s in shards for path in s.paths.values()}
    part = rf"part-{rank}-\d+\.parquet"
    own = re.compile(rf"{part}|{drafts_of(part)}")
    for table in manifest["tables"]:
        inside(root, table)
        for file in (root / table).iterdir() if (root / table).is_dir() else ():
            if own.fullmatch(file.name) and file not in keep and not file.is_dir():
                file.unlink()
    slot_orders = {r: router.get("slot_order", "") for r, router in enumerate(manifest["routers"])}
    if not shards:
        return ResumePoint(slot_orders=slot_orders)
    return ResumePoint(
        shards=shards[-1].index + 1,
        next_token=shards[-1].last_token + 1,
        next_batch=shards[-1].last_batch + 1,
        **_counts(shards),
        slot_orders=slot_orders,
    )


def drop_after(root: Path | Remote, batch: int) -> int | None:
    """Takes from the list of rank 0 the shards that hold any batch after `batch`; their files
    are deleted by `resume_point`. For traces of one rank. Returns the last batch that is left, None
    where none is. The caller holds the lock."""
    manifest = read_manifest(root)
    shards = committed_shards(root, manifest)
    kept = [s for s in shards if s.last_batch <= batch]
    _keep(root, manifest, 0, kept, len(shards))
    return kept[-1].last_batch if kept else None


def _keep(
    root: Path | Remote, manifest: dict[str, Any], rank: int, shards: list[ShardFiles], before: int
) -> None:
    """Lists these shards of a rank alone, without a partial last line. `before`: how many there
    were."""
    if rank == 0 and len(shards) < before:
        # first, so that it never counts more tokens than the shards have
        counts = {**_counts(shards), "dropped": 0}
        write_manifest(root, {**manifest, "status": "recording", "counts": counts})
    write_atomically(root / f"shards-{rank}.jsonl", b"".join(x for s in shards for x in s.lines))
