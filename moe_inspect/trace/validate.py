"""Checks of trace.json and of the lines of shards-*.jsonl: what is wrong and where, in one line.

Both are untrusted input. The JSON Schemas of this folder say what types and ranges are possible,
`check_manifest` and `check_line` check conditions on several values. All before memory is allocated
by them.

A JSON Schema (draft 2020-12) is compiled to functions once: a manifest may list 65,536 routers, a
trace has a line per file. The keywords that our two schemas use are known, others are refused, so
that none is passed over. Stricter than the standard in one point: 5.0 is no integer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
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
    checker("trace_json")(manifest)
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
    return set(read_schema("shard_line")["properties"])


def check_line(entry: Any, line: bytes, rank: int, routers: int, tables: list[str]) -> None:
    """ValueError for what a line of shards-<rank>.jsonl cannot say."""
    if isinstance(entry, dict) and "crc32" in entry and not checksums.is_intact(line):
        raise ValueError("it was changed after it was written (its crc32 differs)")
    checker("shard_line")(entry)
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


Check = Callable[[Any, str], None]  # (value, its path); ValueError for the first violation
TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "boolean": bool,
    "null": type(None),
}
NAMES = {
    dict: "an object",
    list: "a list",
    str: "text",
    int: "a whole number",
    bool: "true or false",
}
ANNOTATIONS = {"$schema", "$id", "$defs", "title", "description", "examples"}


@cache
def checker(name: str) -> Callable[[Any], None]:
    """The check of a schema beside this file, e.g. "trace_json". ValueError in one line, which
    names the value by its path from the root (`capture.weights`, `routers[3].top_k`)."""
    schema = read_schema(name)
    check = compiled(schema, schema)
    return lambda value: check(value, "")


@cache
def read_schema(name: str) -> dict[str, Any]:
    """The JSON Schema of "trace_json" or "shard_line"."""
    return json.loads(Path(__file__).with_name(f"{name}.schema.json").read_text(encoding="utf-8"))


def shown(value: Any) -> str:
    """A value of unknown size and content, short and in one line."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else f"a list of {len(value):,}"
    if type(value) is int and abs(value) >= 10**30:
        return "a number of over 30 digits"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def compiled(schema: dict[str, Any], root: dict[str, Any] | None = None) -> Check:
    """The check of a schema. `root`: the schema that `$ref` refers to."""
    root = schema if root is None else root
    if "$ref" in schema:
        return compiled(root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root)
    checks: list[Check] = []
    for keyword, argument in schema.items():
        if keyword in _KEYWORDS:
            checks.append(_KEYWORDS[keyword](argument, schema, root))
        elif keyword not in ANNOTATIONS | _WITH_OTHERS:
            raise NotImplementedError(f"JSON Schema's {keyword}")
    if len(checks) == 1:
        return checks[0]

    def check(value: Any, path: str) -> None:
        for one in checks:
            one(value, path)

    return check


def _type(names: str | list[str], schema: dict[str, Any], root: dict[str, Any]) -> Check:
    kinds = [TYPES[name] for name in ([names] if isinstance(names, str) else names)]
    wanted = " or ".join(NAMES[kind] for kind in kinds if kind in NAMES)

    def check(value: Any, path: str) -> None:
        if type(value) not in kinds:  # a bool is an int to isinstance
            raise ValueError(f"{path or 'it'} is {shown(value)}, not {wanted}")

    return check


def _const(constant: Any, schema: dict[str, Any], root: dict[str, Any]) -> Check:
    return _enum([constant], schema, root)


def _enum(allowed: list[Any], schema: dict[str, Any], root: dict[str, Any]) -> Check:
    said = (
        "; ".join(", ".join(a) for a in allowed)
        if isinstance(allowed[0], list)
        else ", ".join(str(a) for a in allowed if a != "")
    )

    def check(value: Any, path: str) -> None:
        if value not in allowed or isinstance(value, (bool, float)):
            raise ValueError(
                f"{path} is {shown(value)}, not {'one of ' * (len(allowed) > 1)}{said}"
            )

    return check


def _range(least: int, schema: dict[str, Any], root: dict[str, Any]) -> Check:
    most = schema["maximum"]

    def check(value: Any, path: str) -> None:
        if type(value) is int and not least <= value <= most:
            raise ValueError(f"{path} is {shown(value)}: {least} to {most} are possible")

    return check


def _pattern(pattern: str, schema: dict[str, Any], root: dict[str, Any]) -> Check:
    example = schema["examples"][0]
    find = re.compile(pattern.replace("$", r"\Z"), re.ASCII).search

    def check(value: Any, path: str) -> None:
        if isinstance(value, str) and find(value) is None:
            raise ValueError(f"{path} is {shown(value)}, not like {example}")

    return check


def _items(schema_of: dict[str, Any], schema: dict[str, Any], root: dict[str, Any]) -> Check:
    item, least, most = compiled(schema_of, root), schema["minItems"], schema["maxItems"]

    def check(value: Any, path: str) -> None:
        if not isinstance(value, list):
            return
        if not least <= len(value) <= most:
            raise ValueError(f"{path} lists {len(value):,}: {least:,} to {most:,} are possible")
        for n, one in enumerate(value):
            item(one, f"{path}[{n}]")

    return check


def _properties(properties: dict[str, Any], schema: dict[str, Any], root: dict[str, Any]) -> Check:
    checks = {name: compiled(one, root) for name, one in properties.items()}
    required, closed = schema.get("required", []), schema.get("additionalProperties") is False

    def check(value: Any, path: str) -> None:
        if not isinstance(value, dict):
            return
        before = f"{path}." if path else ""
        for name in required:
            if name not in value:
                raise ValueError(f"{before}{name} is missing")
        for name, one in value.items():
            if name in checks:
                checks[name](one, before + name)
            elif closed:
                raise ValueError(f"{before}{shown(name)} is not a known key")

    return check


_KEYWORDS: dict[str, Callable[[Any, dict[str, Any], dict[str, Any]], Check]] = {
    "type": _type,
    "const": _const,
    "enum": _enum,
    "minimum": _range,
    "pattern": _pattern,
    "items": _items,
    "properties": _properties,
}
_WITH_OTHERS = {"maximum", "minItems", "maxItems", "required", "additionalProperties"}
