"""shards-<rank>.jsonl: which shards of a trace are committed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_inspect.errors import Damaged
from moe_inspect.files import read_small
from moe_inspect.trace import schema
from moe_inspect.trace.files.location import Remote, inside
from moe_inspect.trace.parts import Stated
from moe_inspect.trace.validate import MOST_RANKS, SPAN, check_line, parsed

MOST_BYTES = 2**30  # of a list: a million shards


@dataclass(frozen=True)
class ShardFiles:
    """A committed shard: table → path within the trace, and the lines that committed it. `early`:
    one that holds more will replace it."""

    rank: int
    index: int
    first_token: int
    last_token: int
    first_batch: int | None
    last_batch: int
    decisions: int
    early: bool = False
    paths: dict[str, str] = field(default_factory=dict)
    stated: dict[str, Stated] = field(default_factory=dict)
    lines: list[bytes] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return self.last_token - self.first_token + 1

    @property
    def rows(self) -> dict[str, int]:
        return {table: stated.rows or 0 for table, stated in self.stated.items()}


def committed_shards(root: Path | Remote, manifest: dict[str, Any]) -> list[ShardFiles]:
    """Every shard with a line for each table, by rank and index. A last line without a line feed is
    not committed; any other that is not possible is damage."""
    return ShardLists(root).read(manifest)


def are_replaced(root: Path | Remote, manifest: dict[str, Any], shards: list[ShardFiles]) -> bool:
    """Whether one of these shards is not listed any more: a full one has replaced it, or the trace
    was resumed before it."""
    listed = {(s.rank, s.index): s.lines for s in committed_shards(root, manifest)}
    return any(listed.get((s.rank, s.index)) != s.lines for s in shards)


class ShardLists:
    """The lists of all ranks, which grow while the trace is written: of a list that was read before
    only the new lines are checked."""

    def __init__(self, root: Path | Remote):
        self.root = root
        self._of_rank: dict[int, _RankList] = {}

    def read(self, manifest: dict[str, Any]) -> list[ShardFiles]:
        """As `committed_shards`, of what the lists hold now."""
        shards: list[ShardFiles] = []
        ranks = {
            int(m[1]): p
            for p in self.root.iterdir()
            if (m := re.fullmatch(r"shards-(\d{1,18})\.jsonl", p.name, re.ASCII))
        }
        for rank, path in sorted(ranks.items()):
            if rank >= MOST_RANKS:
                raise Damaged(path, f"there are at most {MOST_RANKS:,} ranks", path.name)
            at = inside(self.root, path.name)
            try:
                data = at.read_bytes() if isinstance(at, Remote) else read_small(at, MOST_BYTES)
            except ValueError as error:
                raise Damaged(path, str(error), path.name) from None
            before = self._of_rank.get(rank)
            generation = manifest.get("generation")
            if (
                before is None
                or before.generation != generation
                or not data.startswith(before.data)
            ):
                before = self._of_rank[rank] = _RankList(rank, path, generation)
            shards += before.read(data, manifest)
        return shards


class _RankList:
    """A list of shards. `data`: the whole lines that were read."""

    def __init__(self, rank: int, path: Path | Remote, generation: str | None):
        self.rank, self.path, self.data = rank, path, b""
        self.generation = generation
        self._lines = 0
        self._found: dict[int, ShardFiles] = {}
        self._taken: set[str] = set()

    def read(self, data: bytes, manifest: dict[str, Any]) -> list[ShardFiles]:
        """Its shards, where the file holds `data`, which begins with what was read before."""
        whole = data[: data.rfind(b"\n") + 1]
        for line in whole[len(self.data) :].split(b"\n")[:-1]:
            self._lines += 1
            try:
                entry = parsed(line)
                if isinstance(entry, dict) and entry.get("generation") != self.generation:
                    continue  # of a trace that is being replaced
                check_line(entry, line, self.rank, len(manifest["routers"]), manifest["tables"])
                _list(entry, line + b"\n", self.rank, len(manifest["routers"]), self._found)
                if entry["path"] in self._taken:
                    raise ValueError(f"{entry['path']} is listed twice")
                self._taken.add(entry["path"])
            except ValueError as error:
                said = f"line {self._lines}: {error}"
                raise Damaged(self.path, said, self.path.name) from None
        self.data = whole
        return self._whole_shards(set(manifest["tables"]))

    def _whole_shards(self, tables: set[str]) -> list[ShardFiles]:
        shards: list[ShardFiles] = []
        ended = self.rank * schema.RANK_STRIDE
        for index, shard in sorted(self._found.items()):
            if set(shard.paths) != tables:
                continue
            if shard.first_token != ended:
                said = (
                    f"shard {index} has tokens {shard.first_token} to {shard.last_token}, "
                    f"{ended} is the next"
                )
                raise Damaged(self.path, said, self.path.name)
            ended = shard.last_token + 1
            shards.append(shard)
        return shards


def _list(
    entry: dict[str, Any], line: bytes, rank: int, routers: int, found: dict[int, ShardFiles]
) -> None:
    """Adds a line to its shard. ValueError where it contradicts another line."""
    table, index = entry["table"], entry["shard"]
    span: dict[str, Any] = {key: entry.get(key) for key in SPAN}
    # a trace that does not say so is one in which every router saw every token
    everywhere = (span["last_token"] - span["first_token"] + 1) * routers
    shard = found.setdefault(
        index,
        ShardFiles(
            rank,
            index,
            **span,
            decisions=entry.get("decisions", everywhere),
            early=entry.get("early", False),
        ),
    )
    if span != (stated := {key: getattr(shard, key) for key in SPAN}):
        raise ValueError(
            f"it states tokens and batches {tuple(span.values())}, another line of shard {index} "
            f"{tuple(stated.values())}"
        )
    if table in shard.paths:
        raise ValueError(f"{table} of shard {index} is listed twice")
    shard.paths[table] = entry["path"]
    shard.stated[table] = Stated(
        *(entry.get(name) for name in ("rows", "bytes", "footer_crc32", "sha256"))
    )
    shard.lines.append(line)
