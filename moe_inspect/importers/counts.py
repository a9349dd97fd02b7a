"""Tables of counts, of any origin: CSV, Parquet or JSON (a list of objects, one object per line, or
an object of columns). Columns: layer, expert, count (or assignments); optional: router, domain,
first_choice, weight_sum, energy, experts, top_k. Without other columns than layer and expert each
row is one assignment, as llama.cpp's moe-trace writes them (pull request 28544). Other names, and
JSON of another form, are read by a map (mapping.py).

D domains, E experts.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from moe_inspect.errors import MoeInspectError
from moe_inspect.importers.batches import MOST_COUNT, MOST_DOMAINS, batch_of_counts
from moe_inspect.importers.context import MOST_JSON_BYTES, ImportContext, Imported
from moe_inspect.importers.mapping import Map, mapped_rows
from moe_inspect.importers.registry import importer, named
from moe_inspect.importers.values import parsed, parsed_object
from moe_inspect.model.config import MOST_EXPERTS
from moe_inspect.text import first_line
from moe_inspect.trace.schema import Router
from moe_inspect.trace.slot_order import stated
from moe_inspect.trace.writer import CountedBatches

MOST_CELLS = 2**27  # (layer, domain, expert), 1 GiB of sums: no model comes near
KEYS = {
    "layer": 2**16 - 1,
    "router": 2**16 - 1,
    "expert": MOST_EXPERTS - 1,
    "experts": MOST_EXPERTS,
    "top_k": MOST_EXPERTS,
}
MOST = {**KEYS, "count": MOST_COUNT, "first_choice": MOST_COUNT}  # the others: 2**53
SUMS = ("count", "first_choice", "weight_sum", "energy")
ROW = {"layer", "expert"}
COLUMNS = (*KEYS, *SUMS, "domain")
FLOATS = {"weight_sum": -np.inf, "energy": 0.0}  # → the least they may be


@dataclass
class Sums:
    """Sums over the rows of one (layer, router), per column: domain → expert → sum."""

    of: dict[str, dict[str, dict[int, float]]] = field(
        default_factory=lambda: {name: {} for name in SUMS}
    )
    stated: dict[str, set[int]] = field(default_factory=lambda: {"experts": set(), "top_k": set()})

    @property
    def seen(self) -> set[int]:
        return {e for of_domain in self.of["count"].values() for e in of_domain}


def _has_columns(name: str, head: bytes) -> bool:
    """Whether a file has the columns of counts, or its first JSON object the fields, by its first
    bytes (and by the last ones of a .parquet)."""
    if name.endswith(".parquet") and head[:4] == b"PAR1":
        # in the schema at a .parquet's end a name stands behind its length
        columns = {
            column
            for column in (*KEYS, *SUMS, "assignments")
            if bytes([len(column)]) + column.encode() in head
        }
    elif name.endswith(".csv"):
        header = head.decode("utf-8", "replace").lstrip("\ufeff\r\n").partition("\n")[0]
        columns = {column.strip(' "\r') for column in header.split(",")}
    elif name.endswith((".json", ".jsonl")):
        text = head.decode("utf-8", "replace").lstrip()
        try:
            first, _ = json.JSONDecoder().raw_decode(text.removeprefix("[").lstrip())
            columns = set(first) if isinstance(first, dict) else set()
        except (ValueError, RecursionError):  # an object of columns that goes on behind the head
            columns = (
                set(re.findall(r'(?<!\\)"(\w+)"\s*:\s*\[\s*\d', text))
                if text.startswith("{")
                else set()
            )
    else:
        return False
    if name.endswith(".csv") and columns == ROW:
        return True
    return columns >= ROW and bool(columns & {"count", "assignments"})


@importer(
    "counts",
    gives="counts by domain",
    sniff=_has_columns,
)
def counts(context: ImportContext) -> Imported:
    sums: dict[tuple[int, int], Sums] = {}
    columns, some = set(SUMS), set[str]()
    for path, source in context.files(r".*\.(csv|json|jsonl|parquet)", ".csv, .json or .parquet"):
        for table in _tables(context, path):
            columns &= set(table.column_names)
            some |= set(table.column_names)
            _add(sums, table, source.domain or named(path), path)
    where = context.sources[0].path
    if not sums:
        raise MoeInspectError(f"{where} holds no counts")
    if lost := [name for name in SUMS if name in some - columns]:
        context.warn(f"{where}: {' and '.join(lost)} left out: not all of the rows have it")
    domains = sorted({domain for s in sums.values() for domain in s.of["count"]})
    routers = [_router(context, layer, s, where) for (layer, _), s in sorted(sums.items())]
    if sum(r.experts for r in routers) * len(domains) > MOST_CELLS:
        raise MoeInspectError(
            f"{where}: {len(routers):,} routers × {len(domains):,} domains × experts is over "
            f"{MOST_CELLS:,}: import it in parts"
        )

    def dense(name: str, kind: type) -> list[np.ndarray]:
        made = []
        for router, (_, s) in zip(routers, sorted(sums.items()), strict=True):
            values_DE = np.zeros((len(domains), router.experts), kind)
            for d, domain in enumerate(domains):
                for expert, value in s.of[name].get(domain, {}).items():
                    if kind is np.int64 and value > MOST_COUNT:
                        raise MoeInspectError(
                            f"{where}: the rows of expert {expert} of layer {router.layer} sum to "
                            f"a {name} of {value:,}: at most {MOST_COUNT:,} are possible"
                        )
                    values_DE[d, expert] = value
            made.append(values_DE)
        return made

    def batches() -> Iterator[CountedBatches]:
        first = dense("first_choice", np.int64) if "first_choice" in columns else None
        weight = dense("weight_sum", np.float64) if "weight_sum" in columns else None
        energy = dense("energy", np.float64) if "energy" in columns else None
        yield batch_of_counts(dense("count", np.int64), routers, domains, 0, first, weight, energy)

    routers = [stated(router, known="first_choice" in columns) for router in routers]
    return Imported(
        routers,
        batches(),
        weights="weight_sum" in columns,
        energy="energy" in columns,
        counts_only=True,
    )


def _router(context: ImportContext, layer: int, s: Sums, where: Path) -> Router:
    """The number of experts comes from the config, the user or a column; else from the rows, if
    they list every expert from 0 on (an expert without a row may be a dead one)."""
    seen, stated = s.seen, s.stated["experts"]
    if len(stated) == 1 and context.facts is None and context.experts is None:
        experts = stated.pop()
    elif (
        context.facts is None
        and context.experts is None
        and seen == set(range(len(seen)))
        and any(len(d) == len(seen) for d in s.of["count"].values())
    ):
        experts = len(seen)
    else:
        experts = (
            context.facts.experts.get(layer, 0)
            if context.facts and not context.experts
            else context.known_experts(f"{where}: layer {layer} does not list every expert and")
        )
    top_k = (
        s.stated["top_k"].pop()
        if len(s.stated["top_k"]) == 1 and context.facts is None and context.top_k is None
        else None
    )
    top_k = top_k or (
        context.facts.top_k.get(layer, 0)
        if context.facts and not context.top_k
        else context.known_top_k(where)
    )
    if max(seen) >= (experts or max(seen) + 1):
        raise MoeInspectError(f"{where}: layer {layer} has expert {max(seen)} of {experts}")
    return context.routers_of([layer], experts or max(seen) + 1, top_k, where)[0]


def _tables(context: ImportContext, path: Path) -> Iterator[pa.Table]:
    """The rows in chunks, as integers, floats and strings, with our column names."""
    try:
        if path.suffix == ".csv":
            # not a file of Python's: Arrow's thread, which reads ahead, would call Python while it
            # exits, and abort the process
            with pa.OSFile(os.fsencode(path)) as opened, pyarrow.csv.open_csv(opened) as reader:
                for batch in reader:
                    yield _named(pa.table(batch), path, context.map)
        elif path.suffix == ".parquet":
            with open(path, "rb") as opened, pq.ParquetFile(opened) as file:
                for batch in file.iter_batches(2**16, use_threads=False):
                    yield _named(pa.table(batch), path, context.map)
        else:
            yield _named(_json_table(context, path), path)
    # the last three of values that no column holds
    except (pa.ArrowException, UnicodeError, OverflowError, TypeError) as error:
        raise MoeInspectError(f"{path}: {first_line(error)}") from None
    if path.suffix in (".csv", ".parquet"):
        context.read(path.stat().st_size)


def _json_table(context: ImportContext, path: Path) -> pa.Table:
    if path.stat().st_size > MOST_JSON_BYTES:
        raise MoeInspectError(
            f"{path} is of {path.stat().st_size:,} bytes, over {MOST_JSON_BYTES:,}: write it as "
            "csv or parquet"
        )
    data = path.read_bytes()
    context.read(len(data))
    lines = data.strip().splitlines()
    value: Any = None
    if len(lines) > 1 and lines[0].rstrip().endswith(b"}"):
        value = [
            parsed_object(line, f"{path} line {n}")
            for n, line in enumerate(lines, 1)
            if line.strip()
        ]
    else:
        value = parsed(data, str(path))
    if context.map:
        return pa.Table.from_pylist(mapped_rows(value, context.map, str(path)))
    if isinstance(value, list) and all(isinstance(row, dict) for row in value):
        return pa.Table.from_pylist(value)
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        return pa.table(value)
    if isinstance(value, dict):
        return pa.Table.from_pylist([value])
    raise MoeInspectError(
        f"{path} is not a list of objects with layer, expert and count: {json.dumps(value)[:40]}"
    )


def _renamed(table: pa.Table, path: Path, of: Map | None) -> pa.Table:
    """The table with names of ours. `of`: our column → the table's, where a map says so."""
    names = table.column_names
    if not of and set(names) == ROW and len(names) == len(ROW):
        counted = table.group_by([*ROW]).aggregate([([], "count_all")])
        return counted.rename_columns({"count_all": "count"})
    if not of:
        return table
    if missing := [name for name in of.values() if names.count(name) != 1]:
        raise MoeInspectError(
            f"{path} has no column {missing[0]}, or several: it has {', '.join(names[:8])}"
        )
    return table.select([*of.values()]).rename_columns([*of])


def _named(table: pa.Table, path: Path, of: Map | None = None) -> pa.Table:
    """The table with our columns, checked."""
    table = _renamed(table, path, of)
    names = table.column_names
    if "assignments" in names and "count" not in names:
        names = ["count" if name == "assignments" else name for name in names]
        table = table.rename_columns(names)
    if missing := [name for name in ("layer", "expert", "count") if name not in names]:
        raise MoeInspectError(f"{path} has no column {missing[0]}: it has {', '.join(names[:8])}")
    made = {}
    for name in COLUMNS:
        if name not in names:
            continue
        if names.count(name) > 1:
            raise MoeInspectError(f"{path} has several columns {name}")
        kind = pa.string() if name == "domain" else pa.float64() if name in FLOATS else pa.int64()
        column = table[name]
        if name == "first_choice" and column.null_count == len(column):
            continue
        if column.null_count:
            row = pc.index(pc.is_null(column), True).as_py()  # pyright: ignore[reportAttributeAccessIssue]
            raise MoeInspectError(f"{path} row {row}: {name} is empty")
        try:
            column = column.cast(kind)
        except pa.ArrowException as error:
            raise MoeInspectError(f"{path}: {name} is not of {kind}: {first_line(error)}") from None
        if kind != pa.string():
            values, high = column.to_numpy(), MOST.get(name, 2**53)
            with np.errstate(invalid="ignore"):
                wrong = ~((values >= FLOATS.get(name, 0)) & (values <= high))
            if wrong.any():
                row = int(wrong.argmax())
                raise MoeInspectError(
                    f"{path} row {row}: {name} is {values[row]}, not of 0 to {high:,}"
                )
        made[name] = column
    if "first_choice" in made:
        _check_first_choices(made["first_choice"].to_numpy(), made["count"].to_numpy(), path)
    return pa.table(made)


def _check_first_choices(first: np.ndarray, count: np.ndarray, path: Path) -> None:
    if (wrong := first > count).any():
        row = int(wrong.argmax())
        raise MoeInspectError(
            f"{path} row {row}: first_choice is {first[row]:,} of {count[row]:,} assignments"
        )


def _add(sums: dict[tuple[int, int], Sums], table: pa.Table, domain: str, path: Path) -> None:
    columns = {name: table[name].to_pylist() for name in table.column_names}
    n = len(table)
    domains = columns.get("domain", [domain] * n)
    if len(set(domains)) > MOST_DOMAINS:
        raise MoeInspectError(f"{path} has over {MOST_DOMAINS:,} domains")
    for row in range(n):
        layer = columns["layer"][row]
        s = sums.setdefault(
            (layer, columns["router"][row] if "router" in columns else layer), Sums()
        )
        for name in SUMS:
            if name in columns:
                of_domain = s.of[name].setdefault(domains[row], {})
                of_domain[columns["expert"][row]] = (
                    of_domain.get(columns["expert"][row], 0) + columns[name][row]
                )
        for name in s.stated:
            if name in columns:
                s.stated[name].add(columns[name][row])
