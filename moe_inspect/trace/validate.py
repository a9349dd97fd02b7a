"""Checks of trace.json and of the lines of shards-*.jsonl.

Both are untrusted input. The JSON Schemas of this folder check types and ranges; this module checks
conditions on several values. All before memory is allocated by them.
"""

from __future__ import annotations

import json
from typing import Any

from moe_inspect.trace import json_schema, schema
from moe_inspect.trace.files import checksums

MOST_EXPERTS_IN_ALL = 2**24  # of all routers together
MOST_RANKS = 2**20
MOST_SHARD_TOKENS = 2**24  # our shards hold at most 2**19 tokens, or one batch
SPAN = ("first_token", "last_token", "first_batch", "last_batch")


def parsed(data: bytes) -> Any:
    """Parses JSON. ValueError, in one line, if it is invalid or nested too deeply."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8: {error.reason} at byte {error.start}") from None


def check_manifest(manifest: Any) -> None:
    """ValueError for the first value that is missing or impossible, with the full path of its
    key."""
    json_schema.checker("trace_json")(manifest)
    if "digest" in manifest and manifest["digest"] != checksums.digest(manifest):
        raise ValueError(
            "it was changed after it was written (its digest differs): restore it, or delete the "
            "key digest to accept the change. "
            f"These values may be edited: {', '.join(checksums.FREE_TEXT)}"
        )
    experts = 0
    for r, router in enumerate(manifest["routers"]):
        if router["top_k"] > router["experts"]:
            raise ValueError(
                f"routers[{r}].top_k is {router['top_k']}: 1 to {router['experts']} are possible"
            )
        experts += router["experts"]
    if experts > MOST_EXPERTS_IN_ALL:
        raise ValueError(
            f"routers have {experts:,} experts in all: at most {MOST_EXPERTS_IN_ALL:,} are possible"
        )


def line_keys() -> set[str]:
    """The keys that a line of shards-<rank>.jsonl may have."""
    return set(json_schema.read_schema("shard_line")["properties"])


def check_line(entry: Any, line: bytes, rank: int, routers: int, tables: list[str]) -> None:
    """ValueError for what a line of shards-<rank>.jsonl cannot say."""
    if isinstance(entry, dict) and "crc32" in entry and not checksums.is_intact(line):
        raise ValueError("it was changed after it was written (its crc32 differs)")
    json_schema.checker("shard_line")(entry)
    table, path = entry["table"], entry["path"]
    if table not in tables:
        raise ValueError(f"table is {json_schema.shown(table)}, not one of {', '.join(tables)}")
    if not path.startswith(f"{table}/part-{rank}-"):
        raise ValueError(f"path is {json_schema.shown(path)}, not {table}/part-{rank}-<n>.parquet")
    start = rank * schema.RANK_STRIDE
    first, last = entry["first_token"], entry["last_token"]
    if not start <= first < start + schema.RANK_STRIDE:
        raise ValueError(
            f"first_token is {first}: {start} to {start + schema.RANK_STRIDE - 1} are possible"
        )
    if not first - 1 <= last < start + schema.RANK_STRIDE:
        raise ValueError(
            f"last_token is {last}: {first - 1} to {start + schema.RANK_STRIDE - 1} are possible"
        )
    tokens = last - first + 1
    if "routing" in tables and tokens > MOST_SHARD_TOKENS:
        raise ValueError(
            f"it has tokens {first} to {last}: a shard holds at most {MOST_SHARD_TOKENS:,}"
        )
    everywhere = tokens * routers  # every router saw every token
    decisions = entry.get("decisions", everywhere)
    if "routing" in tables and decisions > everywhere:
        raise ValueError(f"decisions is {decisions}: 0 to {everywhere} are possible")
    expected = {"tokens": tokens, "routing": decisions, "logits": decisions}.get(table)
    if expected is not None and entry["rows"] != expected:
        raise ValueError(
            f"rows of {path} is {entry['rows']}, of tokens {first} to {last} there are {expected}"
        )
