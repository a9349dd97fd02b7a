"""shards-<rank>.jsonl: which shards of a trace are committed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import Path

from moe_inspect.errors import Damaged
from moe_inspect.files import read_small
from moe_inspect.trace import schema
from moe_inspect.trace.files import checksums
from moe_inspect.trace.files.checksums import Json
from moe_inspect.trace.files.location import Remote, inside
from moe_inspect.trace.parts import Stated
from moe_inspect.trace.schema import MOST_SHARD_TOKENS, check_schema, parsed, shown

MOST_RANKS = 2**20
MOST_BYTES = 2**30  # of a list: a million shards
SPAN = ("first_token", "last_token", "first_batch", "last_batch")


@dataclass(frozen=True)
class ShardFiles:
    """A committed shard: table → path within the trace, and the lines that committed it."""

    rank: int
    index: int
    first_token: int
    last_token: int
    first_batch: int | None
    last_batch: int
    decisions: int
    paths: dict[str, str] = field(default_factory=dict)
    stated: dict[str, Stated] = field(default_factory=dict)
    lines: list[bytes] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return self.last_token - self.first_token + 1

    @property
    def rows(self) -> dict[str, int]:
        return {table: stated.rows or 0 for table, stated in self.stated.items()}


Known = dict[tuple[int, bytes], Json]  # (rank, a line that was checked) → what it says


def committed_shards(
    root: Path | Remote, manifest: Json, known: Known | None = None
) -> list[ShardFiles]:
    """Every shard with a line for each table, by rank and index. A last line without a line feed is
    not committed; any other that is not possible is damage. `known`: lines of the same trace that
    need no check any more; the others are added."""
    shards: list[ShardFiles] = []
    ranks = {
        int(m[1]): p
        for p in root.iterdir()
        if (m := re.fullmatch(r"shards-(\d{1,18})\.jsonl", p.name, re.ASCII))
    }
    for rank, path in sorted(ranks.items()):
        try:
            if rank >= MOST_RANKS:
                raise ValueError(f"there are at most {MOST_RANKS:,} ranks")
            at = inside(root, path.name)
            data = at.read_bytes() if isinstance(at, Remote) else read_small(at, MOST_BYTES)
            shards += _shards_in(data, rank, manifest, {} if known is None else known)
        except ValueError as error:
            raise Damaged(path, str(error), path.name) from None
    return shards


def _shards_in(data: bytes, rank: int, manifest: Json, known: Known) -> list[ShardFiles]:
    """The shards of a list that holds `data`. ValueError for what is not possible."""
    found, taken = dict[int, ShardFiles](), set[str]()
    for n, line in enumerate(data[: data.rfind(b"\n") + 1].split(b"\n")[:-1], 1):
        try:
            entry = known[rank, line] if (rank, line) in known else parsed(line)
            if (rank, line) not in known:
                check_line(entry, line, rank, len(manifest["routers"]), manifest["tables"])
                known[rank, line] = entry
            _list(entry, line + b"\n", rank, found)
            if entry["path"] in taken:
                raise ValueError(f"{entry['path']} is listed twice")
            taken.add(entry["path"])
        except ValueError as error:
            raise ValueError(f"line {n}: {error}") from None
    shards, ended = list[ShardFiles](), rank * schema.RANK_STRIDE
    for index, shard in sorted(found.items()):
        if set(shard.paths) != set(manifest["tables"]):
            continue
        if shard.first_token != ended:
            raise ValueError(
                f"shard {index} has tokens {shard.first_token} to {shard.last_token}, {ended} is "
                "the next"
            )
        ended = shard.last_token + 1
        shards.append(shard)
    return shards


def check_line(entry: Json, line: bytes, rank: int, routers: int, tables: list[str]) -> None:
    """ValueError for what a line of shards-<rank>.jsonl cannot say. Where it does not state its
    decisions, every router saw every token: they are added to `entry`."""
    if isinstance(entry, dict) and "crc32" in entry and not checksums.is_intact(line):
        raise ValueError("it was changed after it was written (its crc32 differs)")
    check_schema("shard_line", entry)
    table, path = entry["table"], entry["path"]
    if table not in tables:
        raise ValueError(f"table is {shown(table)}, not one of {', '.join(tables)}")
    if not path.startswith(f"{table}/part-{rank}-"):
        raise ValueError(f"path is {shown(path)}, not {table}/part-{rank}-<n>.parquet")
    start, end = rank * schema.RANK_STRIDE, (rank + 1) * schema.RANK_STRIDE
    first, last = entry["first_token"], entry["last_token"]
    for key, least in (("first_token", start), ("last_token", first - 1)):
        if not least <= entry[key] < end:
            raise ValueError(f"{key} is {entry[key]}: {least} to {end - 1} are possible")
    tokens = last - first + 1
    if "routing" in tables and tokens > MOST_SHARD_TOKENS:
        said = f"it has tokens {first} to {last}: a shard holds at most {MOST_SHARD_TOKENS:,}"
        raise ValueError(said)
    decisions = entry.setdefault("decisions", tokens * routers)
    if "routing" in tables and decisions > tokens * routers:
        raise ValueError(f"decisions is {decisions}: 0 to {tokens * routers} are possible")
    expected = {"tokens": tokens, "routing": decisions, "logits": decisions}.get(table)
    if expected is not None and entry["rows"] != expected:
        raise ValueError(
            f"rows of {path} is {entry['rows']}, of tokens {first} to {last} there are {expected}"
        )


def _list(entry: Json, line: bytes, rank: int, found: dict[int, ShardFiles]) -> None:
    """Adds a line to its shard. ValueError where it contradicts another line."""
    table, index = entry["table"], entry["shard"]
    span: Json = {key: entry.get(key) for key in SPAN}
    shard = found.setdefault(index, ShardFiles(rank, index, **span, decisions=entry["decisions"]))
    given, stated = (*span.values(),), tuple(getattr(shard, key) for key in SPAN)
    if given != stated:
        said = f"it states tokens and batches {given}, another line of shard {index} {stated}"
        raise ValueError(said)
    if table in shard.paths:
        raise ValueError(f"{table} of shard {index} is listed twice")
    shard.paths[table] = entry["path"]
    shard.stated[table] = Stated(*(entry.get(f.name) for f in fields(Stated)))
    shard.lines.append(line)
