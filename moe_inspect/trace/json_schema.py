"""Checks a JSON value by a JSON Schema (draft 2020-12): what is wrong and where, in one line.

It knows the keywords that our two schemas use and refuses others, so that none is passed over. A
schema is compiled to functions once: a manifest may list 65,536 routers, a trace has a line per
file. Stricter than the standard in one point: 5.0 is no integer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

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
