"""What a map leads to in a JSON value.

The path to the counts (else to the experts, or expert) is keys joined by dots. Lists on the way are
gone through. `*` stands for any key or place in a list, {layer}, {expert}, … for a part of a key,
or the place in a list, that says so, and a number for a place in a list of values. A column whose
path has no dot is a field of what is passed on the way; one with a dot is another path from the
top, whose {…} must agree.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from moe_inspect.errors import MoeInspectError
from moe_inspect.importers.tables.presets import PLACE, pattern

ANCHORS = ("count", "share", "experts", "expert")
Row = dict[str, Any]
Found = tuple[
    dict[str, str], tuple[Any, ...], Any
]  # what keys said, the objects on the way, the value


def mapped_rows(of: dict[str, str], where: str, value: Any) -> list[Row]:
    """The rows of a JSON value, by our columns. MoeInspectError where the map leads to nothing."""
    anchor = next(name for name in ANCHORS if name in of)
    paths = of[anchor].split("|")
    for path in paths:
        try:
            rows = [*_rows(of, where, value, anchor, path)]
        except RecursionError:
            raise MoeInspectError(f"{where} is nested too deep") from None
        except MoeInspectError:
            if path == paths[-1]:
                raise
            continue
        if rows:
            return rows
    raise MoeInspectError(f"{where} has nothing at {paths[-1]}")


def _rows(of: dict[str, str], where: str, value: Any, anchor: str, path: str) -> Iterator[Row]:
    others = {name: place for name, place in of.items() if name != anchor and place[0] not in "'\""}
    at_path = {
        name: {tuple(found.items()): one for found, _, one in _walk(value, _steps(place), where)}
        for name, place in others.items()
        if "." in place
    }
    for found, passed, one in _walk(value, _steps(path), where):
        row: Row = {anchor: one, **found}
        for name, place in others.items():
            if name in at_path:
                groups = (match[1] for match in PLACE.finditer(place) if match[1])
                key = tuple((group, found.get(group, "")) for group in groups)
                row[name] = at_path[name].get(key)
            else:
                row[name] = _field(place, found, passed, where)
        yield row


def _steps(path: str) -> list[str | re.Pattern[str]]:
    keys = path.removesuffix("?").split(".")
    return [pattern(key) if PLACE.search(key) else key for key in keys]


def _walk(
    value: Any,
    steps: list[str | re.Pattern[str]],
    where: str,
    found: dict[str, str] | None = None,
    passed: tuple[Any, ...] = (),
) -> Iterator[Found]:
    found = found or {}
    if value is None:
        return
    if not steps:
        yield found, passed, value
        return
    step, rest, beside = steps[0], steps[1:], (value, *passed)
    if isinstance(value, list) and isinstance(step, str):
        if not step.isdigit() or any(isinstance(one, dict | list) for one in value):
            for one in value:
                yield from _walk(one, steps, where, found, passed)
        elif int(step) < len(value):
            yield from _walk(value[int(step)], rest, where, found, beside)
    elif not isinstance(value, list | dict):
        name = step if isinstance(step, str) else step.pattern
        raise MoeInspectError(f"{where}: {str(value)[:40]!r} where {name} should be")
    elif isinstance(step, str):
        if isinstance(value, dict) and step in value:
            yield from _walk(value[step], rest, where, found, beside)
    else:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if match := step.fullmatch(str(key)):
                yield from _walk(inner, rest, where, {**found, **match.groupdict()}, beside)


def _field(place: str, found: dict[str, str], passed: tuple[Any, ...], where: str) -> Any:
    name = place.removesuffix("?")
    if "{" in name:
        name = PLACE.sub(lambda match: found.get(match[1] or "", match[0]), name)
    for one in passed:
        if isinstance(one, dict) and name in one:
            return one[name]
        if isinstance(one, list) and name.isdigit() and int(name) < len(one):
            return one[int(name)]
    if place.endswith("?"):
        return None
    raise MoeInspectError(f"{where} has no field {name} beside what the map leads to")
