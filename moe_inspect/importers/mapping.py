"""`import counts --map`: where the numbers of a table stand that has other names than ours.

A map says where each of our columns is. In CSV and Parquet that is a column's name. In JSON the
path of `count` leads to the numbers, keys joined by dots; lists on the way are gone through. `*`
stands for any key, and {layer}, {expert} or {domain} for a part of a key, or the number of a list's
element, that is the layer, expert or domain. The other columns are fields of an object on the way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from moe_inspect.errors import MoeInspectError
from moe_inspect.text import no_such

PLACES = {"layer": r"\d+", "router": r"\d+", "expert": r"\d+", "domain": r".+"}

Map = dict[str, str]


def parse_map(text: str, columns: tuple[str, ...]) -> Map:
    """ "layer=block,expert=id,count=hits" → {"layer": "block", …}. MoeInspectError where it is not
    of this form, or has no place for the layer, the expert or the count."""
    made: Map = {}
    for part in text.split(","):
        name, equals, path = part.strip().partition("=")
        if not equals or not path:
            raise MoeInspectError(f"--map {part!r}: write it like layer=block,expert=id,count=hits")
        if name not in columns:
            raise MoeInspectError(f"--map: {no_such('column', name, columns)}")
        made[name] = path
    stated = {*made, *re.findall(r"\{(\w+)\}", made.get("count", ""))}
    if unknown := stated - {*columns}:
        raise MoeInspectError(
            f"--map: {{{min(unknown)}}} is none of {', '.join(f'{{{name}}}' for name in PLACES)}"
        )
    for key in made.get("count", "").split("."):
        parts = re.findall(r"\{(\w+)\}", key)
        if twice := [part for part in parts if parts.count(part) > 1]:
            raise MoeInspectError(f"--map: {{{twice[0]}}} stands twice in {key}: write * for one")
    if missing := [name for name in ("layer", "expert", "count") if name not in stated]:
        raise MoeInspectError(f"--map does not say where the {missing[0]} is")
    return made


def mapped_rows(value: Any, of: Map, where: str) -> list[dict[str, Any]]:
    """The rows of a JSON value, by our columns. MoeInspectError where the map leads to nothing."""
    steps = [_pattern(key) for key in of["count"].split(".")]
    fields = {name: path for name, path in of.items() if name != "count"}
    try:
        rows = [*_walk(value, steps, fields, {}, [], where)]
    except RecursionError:
        raise MoeInspectError(f"{where} is nested too deep") from None
    if not rows:
        raise MoeInspectError(f"{where} has nothing at {of['count']}")
    return rows


def _pattern(key: str) -> re.Pattern[str]:
    """A key of a path as a pattern: of "layer_{layer}" one that finds the layer."""
    made, at = "", 0
    for match in re.finditer(r"\{(\w+)\}|\*", key):
        made += re.escape(key[at : match.start()])
        made += f"(?P<{match[1]}>{PLACES.get(match[1], '.+')})" if match[1] else ".*"
        at = match.end()
    return re.compile(made + re.escape(key[at:]))


def _walk(
    value: Any,
    steps: list[re.Pattern[str]],
    fields: Map,
    found: dict[str, Any],
    passed: list[dict[str, Any]],
    where: str,
) -> Iterator[dict[str, Any]]:
    """`found`: what keys on the way said. `passed`: the objects on the way."""
    if isinstance(value, list) and not (steps and steps[0].groups):
        for one in value:
            yield from _walk(one, steps, fields, found, passed, where)
        return
    if not steps:
        stated = {name: _field(path, passed, where) for name, path in fields.items()}
        yield {**stated, **found, "count": value}
        return
    if not isinstance(value, dict | list):
        raise MoeInspectError(f"{where}: {str(value)[:40]!r} where {steps[0].pattern} should be")
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    passed = [value, *passed] if isinstance(value, dict) else passed
    for key, inner in entries:
        if match := steps[0].fullmatch(str(key)):
            yield from _walk(
                inner, steps[1:], fields, {**found, **match.groupdict()}, passed, where
            )


def _field(path: str, passed: list[dict[str, Any]], where: str) -> Any:
    for one in passed:
        if path in one:
            return one[path]
    raise MoeInspectError(f"{where} has no field {path} beside a count")
