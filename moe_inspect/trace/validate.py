"""Checks of trace.json and of the lines of shards-*.jsonl: what is wrong and where, in one line.

Both are untrusted input. The JSON Schemas of this folder say what types and ranges are possible,
`check_manifest` and `check_line` check conditions on several values. All before memory is allocated
by them.

Of JSON Schema (draft 2020-12) the keywords that our two schemas use are known, others are refused,
so that none is passed over. Stricter than the standard in one point: 5.0 is no integer.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from moe_inspect.trace import schema
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
    check_schema("trace_json", manifest)
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


def check_line(entry: Any, line: bytes, rank: int, routers: int, tables: list[str]) -> None:
    """ValueError for what a line of shards-<rank>.jsonl cannot say."""
    if isinstance(entry, dict) and "crc32" in entry and not checksums.is_intact(line):
        raise ValueError("it was changed after it was written (its crc32 differs)")
    check_schema("shard_line", entry)
    table, path = entry["table"], entry["path"]
    if table not in tables:
        raise ValueError(f"table is {shown(table)}, not one of {', '.join(tables)}")
    if not path.startswith(f"{table}/part-{rank}-"):
        raise ValueError(f"path is {shown(path)}, not {table}/part-{rank}-<n>.parquet")
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


TYPES = {
    "object": (dict, "an object"),
    "array": (list, "a list"),
    "string": (str, "text"),
    "integer": (int, "a whole number"),
    "boolean": (bool, "true or false"),
    "null": (type(None), ""),
}
KEYWORDS = {"type", "const", "enum", "minimum", "maximum", "pattern", "examples", "items"}
KEYWORDS |= {"minItems", "maxItems", "properties", "required", "additionalProperties"}
KEYWORDS |= {"$schema", "$id", "$defs", "title", "description"}


@cache
def read_schema(name: str) -> dict[str, Any]:
    """The JSON Schema of "trace_json" or "shard_line"."""
    return json.loads(Path(__file__).with_name(f"{name}.schema.json").read_text(encoding="utf-8"))


def check_schema(name: str, value: Any) -> None:
    """ValueError in one line where a value does not follow a schema (see `read_schema`). It names
    what is wrong by its path from the root (`capture.weights`, `routers[3].top_k`)."""
    check_value(value, read_schema(name), read_schema(name))


def check_value(value: Any, rule: dict[str, Any], root: dict[str, Any], path: str = "") -> None:
    """As `check_schema`, by a part of a schema. `root`: the schema, which `$ref` refers to."""
    if "$ref" in rule:
        rule = root["$defs"][rule["$ref"].removeprefix("#/$defs/")]
    if unknown := rule.keys() - KEYWORDS:
        raise NotImplementedError(f"JSON Schema's {min(unknown)}")
    if said := _refusal(value, rule):
        raise ValueError(f"{path or 'it'} {said}")
    if "items" in rule and isinstance(value, list):
        for n, item in enumerate(value):
            check_value(item, rule["items"], root, f"{path}[{n}]")
    if "properties" in rule and isinstance(value, dict):
        before = f"{path}." if path else ""
        for name in rule.get("required", []):
            if name not in value:
                raise ValueError(f"{before}{name} is missing")
        for name, one in value.items():
            if name in rule["properties"]:
                check_value(one, rule["properties"][name], root, before + name)
            elif rule.get("additionalProperties") is False:
                raise ValueError(f"{before}{shown(name)} is not a known key")


def _refusal(value: Any, rule: dict[str, Any]) -> str:
    """What is wrong with a value, but for what is in it: "" where nothing is."""
    kinds = rule.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and type(value) not in [TYPES[kind][0] for kind in kinds]:  # a bool is no int
        wanted = " or ".join(TYPES[kind][1] for kind in kinds if kind != "null")
        return f"is {shown(value)}, not {wanted}"
    allowed = [rule["const"]] if "const" in rule else rule.get("enum")
    if allowed and (value not in allowed or isinstance(value, (bool, float))):
        names = [", ".join(a) if isinstance(a, list) else str(a) for a in allowed if a != ""]
        said = ("; " if isinstance(allowed[0], list) else ", ").join(names)
        return f"is {shown(value)}, not {'one of ' * (len(allowed) > 1)}{said}"
    if type(value) is int and "minimum" in rule:
        if not rule["minimum"] <= value <= rule["maximum"]:
            return f"is {shown(value)}: {rule['minimum']} to {rule['maximum']} are possible"
    elif isinstance(value, str) and "pattern" in rule:
        if not re.search(rule["pattern"].replace("$", r"\Z"), value, re.ASCII):
            return f"is {shown(value)}, not like {rule['examples'][0]}"
    elif isinstance(value, list) and "items" in rule:
        least, most = rule["minItems"], rule["maxItems"]
        if not least <= len(value) <= most:
            return f"lists {len(value):,}: {least:,} to {most:,} are possible"
    return ""


def shown(value: Any) -> str:
    """A value of unknown size and content, short and in one line."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else f"a list of {len(value):,}"
    if type(value) is int and abs(value) >= 10**30:
        return "a number of over 30 digits"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
