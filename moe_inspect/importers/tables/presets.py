"""Formats that are tables: where each of our columns is in them. Those that we know are in
presets.yaml; `--map` says the same of any other table, and `--map FILE.yaml` all of a Preset."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from moe_inspect.errors import MoeInspectError
from moe_inspect.files import read_small
from moe_inspect.text import first_line, no_such

if TYPE_CHECKING:  # it needs NumPy, and --help does not
    from moe_inspect.importers.values import Fields, Json

    # what keys said, the objects on the way, the value
    Found = tuple[dict[str, str], tuple[Json, ...], Json]

ALIASES = {"assignments": "count", "gate_sum": "weight_sum"}
# else any text
PLACES = {"layer": r"(?<!\d)\d+", **dict.fromkeys(("router", "expert"), r"\d+")}
PLACES |= dict.fromkeys(("experts", "top_k"), r"\d{1,6}")
PLACE = re.compile(r"\{(\w+)(?::([^{}]*))?\}|\*")


def _read(path: Path) -> Fields:
    try:
        written = yaml.load(read_small(path), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise MoeInspectError(f"cannot read {path}: {first_line(error)}") from None
    if not isinstance(written, dict):
        raise MoeInspectError(f"{path} has no map, of columns → where they are")
    return {str(name): value for name, value in written.items()}


KNOWN = _read(Path(__file__).with_name("presets.yaml"))
COLUMNS: dict[str, str] = KNOWN.pop("columns")
# a table with names of ours; ? may be missing
OWN = {name: f"{name}?" for name in COLUMNS} | {
    "count": "count|assignments?",
    "weight_sum": "weight_sum|gate_sum?",
    "experts": "experts|expert_[0-9]*?",
    "weights": "weights|weight_[0-9]*?",
}


@dataclass(frozen=True)
class Preset:
    """A table's form.

    map: our column → where it is. In CSV, TSV and Parquet that is a column's name, or the first of
        several that is there (`a|b`); with `?` at the end it may be missing; a pattern (`e_*`) is
        a list of columns. In JSON: a path of keys joined by dots, or a field beside what it leads
        to (mapped_rows). A text in quotes is a constant.
    file: a pattern of the file's name, and folders above it: `*`, {layer}, {domain}, … stand for a
        part, {domain:[a-z]+} for one of this regular expression; `a|b` for either.
    head: such a pattern of a line of comments (#) before the table, of {experts} and {top_k}.
    marks: texts that the first bytes of a file of this form all hold.
    experts, top_k: of the model, where neither the table nor the user says (0: not known).
    layers: the model's layers, where the table numbers those that it has from 0.
    omits_unused: an expert without a row was not chosen, and all layers have as many experts.
    last_layer_omits: a token without rows in the last layer was not routed there. In any other, and
        in tables of other forms, it is missing.
    note: for the manifest."""

    map: dict[str, str] = field(default_factory=lambda: OWN)
    file: str = "*.json|*.jsonl|*.csv|*.tsv|*.parquet"
    reads: str = ""
    gives: str = ""
    head: str = ""
    marks: tuple[str, ...] = ()
    experts: int = 0
    top_k: int = 0
    layers: tuple[int, ...] = ()
    omits_unused: bool = False
    last_layer_omits: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        stated = {*self.map}
        for name, path in self.map.items():
            if name not in COLUMNS:
                raise MoeInspectError(f"--map: {no_such('column', name, COLUMNS)}")
            if not path.strip("?"):
                raise MoeInspectError(f"--map: {name} is nowhere")
            for key in path.split("."):
                parts = [match[1] for match in PLACE.finditer(key) if match[1]]
                if unknown := {*parts} - {*COLUMNS}:
                    raise MoeInspectError(f"--map: {{{min(unknown)}}} is no column of ours")
                if twice := [part for part in parts if parts.count(part) > 1]:
                    raise MoeInspectError(
                        f"--map: {{{twice[0]}}} stands twice in {key}: write * for one"
                    )
                stated |= {*parts}
        stated |= {match[1] for match in PLACE.finditer(self.file)}
        for name in ("layer", "expert"):
            if not {name, f"{name}s"} & stated:
                raise MoeInspectError(f"--map does not say where the {name} is")

    @property
    def constants(self) -> dict[str, str]:
        """Column → the text that it is in every row."""
        return {n: p[1:-1] for n, p in self.map.items() if p[0] in "'\"" and p[-1] == p[0]}

    def said_by(self, path: Path) -> dict[str, str] | None:
        """What a file's name says, also compressed; None where it is none of this form."""
        text = path.absolute().as_posix()
        for one in self.file.split("|"):
            name = rf"(?:.*/)?{pattern(one, '[^/]').pattern}(?:\.gz|\.zst)?"
            if found := re.fullmatch(name, text, re.DOTALL):
                return found.groupdict()
        return None


def pattern(text: str, any: str = ".", named: bool = True) -> re.Pattern[str]:
    """Of "layer_{layer}" one that finds the layer; `*` stands for any text. any: what a character
    of a text is."""
    made, at = "", 0
    for match in PLACE.finditer(text):
        made += re.escape(text[at : match.start()])
        one = match[2] or PLACES.get(match[1], f"{any}+") if match[1] else f"{any}*"
        made += f"(?P<{match[1]}>{one})" if match[1] and named else f"(?:{one})"
        at = match.end()
    try:
        return re.compile(made + re.escape(text[at:]), re.DOTALL)
    except re.error as error:
        raise MoeInspectError(f"--map: {text[:60]} is no pattern: {first_line(error)}") from None


def parse_map(text: str) -> Preset:
    """ "layer=block,expert=id,count=hits", or the name of a .yaml file of a Preset's fields."""
    if text.endswith((".yaml", ".yml")):
        return _from_yaml(Path(text))
    made: dict[str, str] = {}
    for part in text.split(","):
        name, equals, path = part.strip().partition("=")
        if not equals or not path:
            raise MoeInspectError(f"--map {part!r}: write it like layer=block,expert=id,count=hits")
        made[ALIASES.get(name, name)] = path
    file = made.pop("file", Preset.file)
    return Preset(made, file)


def _from_yaml(path: Path) -> Preset:
    written, like = _read(path), vars(Preset())
    if not isinstance(places := written.get("map"), dict):
        raise MoeInspectError(f"{path} has no map, of columns → where they are")
    for name, value in written.items():
        if name not in like:
            raise MoeInspectError(f"{path}: {no_such('field', name, like)}")
        written[name] = tuple(value) if isinstance(value, list) else value
        if type(written[name]) is not (kind := type(like[name])):
            raise MoeInspectError(f"{path}: {name} is {str(value)[:40]!r}, not of {kind.__name__}")
    written["map"] = {ALIASES.get(str(n), str(n)): str(place) for n, place in places.items()}
    return Preset(**written)


PRESETS = {name: Preset(**fields) for name, fields in KNOWN.items()}

ANCHORS = ("count", "share", "experts", "expert")


def mapped_rows(of: dict[str, str], where: str, value: Json) -> list[Fields]:
    """The rows of a JSON value, by our columns. MoeInspectError where the map leads to nothing.

    The path to the counts (else to the share, the experts, or expert) is keys joined by dots. Lists
    on the way are gone through. `*` stands for any key or place in a list, {layer}, {expert}, … for
    a part of a key, or the place in a list, that says so, and a number for a place in a list of
    values. A column whose path has no dot is a field of what is passed on the way; one with a dot
    is another path from the top, whose {…} must agree."""
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


def _rows(of: dict[str, str], where: str, value: Json, anchor: str, path: str) -> Iterator[Fields]:
    others = {name: place for name, place in of.items() if name != anchor and place[0] not in "'\""}
    at_path = {
        name: {tuple(found.items()): one for found, _, one in _walk(value, _steps(place), where)}
        for name, place in others.items()
        if "." in place
    }
    for found, passed, one in _walk(value, _steps(path), where):
        row: Fields = {anchor: one, **found}
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
    value: Json,
    steps: list[str | re.Pattern[str]],
    where: str,
    found: dict[str, str] | None = None,
    passed: tuple[Json, ...] = (),
) -> Iterator[Found]:
    found = found or {}
    if not steps:
        yield found, passed, value
    if not steps or value is None:
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


def _field(place: str, found: dict[str, str], passed: tuple[Json, ...], where: str) -> Json:
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
