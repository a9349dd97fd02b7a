"""What trace.json and the lines of shards-*.jsonl may say. Both are data from outside: everything
that other code relies on is checked here, its type and its range, before anything is allocated by
it."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from typing import Any

from moe_inspect.trace import schema, slot_order
from moe_inspect.trace.files import checksums
from moe_inspect.trace.schema import Router

MOST_ROUTERS = 2**16  # the column `router` is uint16
MOST_EXPERTS = 2**16 - 1
MOST_EXPERTS_IN_ALL = 2**24  # of all routers together
MOST_RANKS = 2**20
MOST_SHARD_TOKENS = 2**24  # our shards hold at most 2**19 tokens, or one batch
MOST_MANIFEST_BYTES = 2**26
MOST = 2**62
LINE_KEYS = {
    "table",
    "path",
    "rows",
    "sha256",
    "bytes",
    "footer_crc32",
    "shard",
    "decisions",
    "crc32",
}
SPAN = ("first_token", "last_token", "first_batch", "last_batch")
_REQUIRED = ("layer", "name", "path", "experts", "top_k")


def parsed(data: bytes) -> Any:
    """JSON; ValueError, in one line, where it is none or nested too deeply."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no UTF-8: {error.reason} at byte {error.start}") from None


# --- the manifest


def check_manifest(manifest: Any) -> None:
    """ValueError, naming the key by its full path, for the first thing that is missing or
    impossible."""
    routers = _typed(manifest, "routers", list)
    if not 1 <= len(routers) <= MOST_ROUTERS:
        raise ValueError(f"routers lists {len(routers):,}: 1 to {MOST_ROUTERS:,} are possible")
    if "digest" in manifest and manifest["digest"] != checksums.digest(manifest):
        raise ValueError(
            "it was changed after it was written (its digest says so): restore it, or delete the "
            "key digest to have it believed. "
            f"Free to edit are {', '.join(checksums.FREE_TEXT)}"
        )
    _one_of(manifest, "status", schema.STATUSES)
    tables = _typed(manifest, "tables", list)
    decisions = {"documents", "tokens", "routing"}
    sets = ({"documents", "counts"}, decisions, decisions | {"logits"})
    if (
        not all(isinstance(name, str) for name in tables)
        or set(tables) not in sets
        or len(tables) > len(set(tables))
    ):
        raise ValueError(
            f"tables is {_shown(tables)}, not one of "
            f"{'; '.join(', '.join(sorted(s)) for s in sets)}"
        )
    _typed(manifest, "capture", dict)
    _typed(manifest, "capture.weights", bool)
    for path in ("capture.pid", "capture.process_start"):
        _number(manifest, path, 1, 2**31 - 1 if path == "capture.pid" else MOST, optional=True)
    for path in ("model", "model.config", "corpus", "corpus.plan", "counts", "vocabulary"):
        _typed(manifest, path, dict, optional=True)
    for path in ("model.note", "model.id", "model.class", "capture.host", "capture.dtype"):
        _typed(manifest, path, str, optional=True)
    for name in ("tokens", "decisions", "dropped"):
        _number(manifest, f"counts.{name}", 0, MOST, optional=True)
    if manifest.get("vocabulary") is not None:
        _number(manifest, "vocabulary.bytes", 0, MOST)
        _typed(manifest, "vocabulary.sha256", str)
    _check_routers(routers)


def _check_routers(routers: list[Any]) -> None:
    known, in_all = {field.name: field for field in fields(Router)}, 0
    for r, router in enumerate(routers):
        where = f"routers[{r}]"
        if not isinstance(router, dict):
            raise ValueError(f"{where} is {_shown(router)}, not an object")
        if unknown := sorted(set(router) - set(known)):
            raise ValueError(f"{where}.{_shown(unknown[0])} is no key that a router has")
        if missing := [name for name in _REQUIRED if name not in router]:
            raise ValueError(f"{where}.{missing[0]} is missing")
        for name, value in router.items():
            kind = str if known[name].type == "str" else int
            if type(value) is not kind:
                raise ValueError(f"{where}.{name} is {_shown(value)}, not {_KINDS[kind]}")
        for name, least, most in (
            ("layer", 0, 2**16 - 1),
            ("experts", 1, MOST_EXPERTS),
            ("shared_experts", 0, MOST_EXPERTS),
        ):
            _in_range(router.get(name, least), f"{where}.{name}", least, most)
        _in_range(router["top_k"], f"{where}.top_k", 1, router["experts"])
        for name, allowed in (
            ("stack", ("encoder", "decoder")),
            ("slot_order", (slot_order.BY_WEIGHT, slot_order.UNKNOWN)),
        ):
            if (value := router.get(name, "")) not in ("", *allowed):
                raise ValueError(f"{where}.{name} is {_shown(value)}, not {' or '.join(allowed)}")
        in_all += router["experts"]
    if in_all > MOST_EXPERTS_IN_ALL:
        raise ValueError(
            f"routers have {in_all:,} experts in all: at most {MOST_EXPERTS_IN_ALL:,} are possible"
        )


# --- lines of shards


def check_line(entry: Any, line: bytes, rank: int, routers: int, tables: list[str]) -> None:
    """ValueError for what a line of shards-<rank>.jsonl cannot say."""
    if not isinstance(entry, dict):
        raise ValueError(f"it is {_shown(entry)}, not an object")
    if "crc32" in entry and not checksums.is_intact(line):
        raise ValueError("it was changed after it was written (its crc32 says so)")
    table = _one_of(entry, "table", tables)
    path = _typed(entry, "path", str)
    if re.fullmatch(rf"{table}/part-{rank}-[0-9]+\.parquet", path, re.ASCII) is None:
        raise ValueError(f"path is {_shown(path)}, not {table}/part-{rank}-<n>.parquet")
    if re.fullmatch(r"[0-9a-f]{64}", _typed(entry, "sha256", str)) is None:
        raise ValueError(f"sha256 is {_shown(entry['sha256'])}, not 64 hexadecimal digits")
    _number(entry, "shard", 0, MOST)
    start = rank * schema.RANK_STRIDE
    first = _number(entry, "first_token", start, start + schema.RANK_STRIDE - 1)
    last = _number(entry, "last_token", first - 1, start + schema.RANK_STRIDE - 1)
    tokens = last - first + 1
    if "routing" in tables and tokens > MOST_SHARD_TOKENS:
        raise ValueError(
            f"it has tokens {first} to {last}: a shard holds at most {MOST_SHARD_TOKENS:,}"
        )
    _number(entry, "first_batch", 0, MOST, optional=True)
    _number(entry, "last_batch", -1, MOST)
    _number(entry, "rows", 0, MOST)
    # a trace that does not say so is one in which every router saw every token
    everywhere = tokens * routers
    decisions = (
        _number(entry, "decisions", 0, everywhere if "routing" in tables else MOST)
        if "decisions" in entry
        else everywhere
    )
    expected = {"tokens": tokens, "routing": decisions, "logits": decisions}.get(table)
    if expected is not None and entry["rows"] != expected:
        raise ValueError(
            f"rows of {path} is {entry['rows']}, of tokens {first} to {last} there are {expected}"
        )
    for name in ("bytes", "footer_crc32"):
        if name in entry:
            _number(entry, name, 0, MOST)


# --- values

_KINDS = {
    str: "text",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    int: "a whole number",
}


def _at(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _typed(container: Any, path: str, kind: type, optional: bool = False) -> Any:
    value = _at(container, path)
    if value is None and optional:
        return None
    if value is None:
        raise ValueError(f"{path} is missing")
    if type(value) is not kind:
        raise ValueError(f"{path} is {_shown(value)}, not {_KINDS[kind]}")
    return value


def _number(container: Any, path: str, least: int, most: int, optional: bool = False) -> Any:
    value = _typed(container, path, int, optional)
    if value is not None:
        _in_range(value, path, least, most)
    return value


def _in_range(value: int, path: str, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ValueError(f"{path} is {_shown(value)}: {least} to {most} are possible")


def _one_of(container: Any, path: str, allowed: Any) -> Any:
    value = _typed(container, path, str)
    if value not in allowed:
        raise ValueError(f"{path} is {_shown(value)}, not one of {', '.join(allowed)}")
    return value


def _shown(value: Any) -> str:
    """A value of unknown size and content, short and in one line."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else f"a list of {len(value):,}"
    if type(value) is int and abs(value) >= 10**30:
        return "a number of over 30 digits"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
