"""Tables of any origin, by a map of their columns: tables of counts, and the choice between counts
and decisions (decisions.py).

N rows, D domains, E experts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from moe_inspect.errors import MoeInspectError
from moe_inspect.importers.batches import MOST_COUNT, MOST_DOMAINS, batch_of_counts
from moe_inspect.importers.context import ImportContext, Imported, importer, named
from moe_inspect.importers.tables.decisions import decisions, in_order
from moe_inspect.importers.tables.presets import COLUMNS, OWN, PRESETS, Preset, parse_map
from moe_inspect.importers.tables.read import TableChunk, chunks_of
from moe_inspect.model.config import MOST_EXPERTS
from moe_inspect.text import ranges, storable
from moe_inspect.trace import schema
from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer import CountedBatches

MOST_CELLS = 2**27  # (layer, domain, expert), 1 GiB of sums: no model comes near
BATCH_CELLS = 2**22  # (document, layer, expert) of a shard
MOST_LAYER = 2**16 - 1
ROW = {"layer", "expert"}
CSV = (".csv", ".tsv")
SUMS = ("count", "first_choice", *schema.SUMS)
PENDING = 2**22  # rows that are added up together: so few that no sum of counts overflows
Columns = dict[str, np.ndarray]
# the last three: −1, 0 and 0 if not said
KEYS = ("layer", "router", "domain", "expert", "document", "experts", "top_k")
OF_COUNTS = {*KEYS, *SUMS, "share", "tokens", "samples", "saliency"}
# (file, or folder of files of a layer each; number of the domain; name) → number
Documents = dict[tuple[Path, int, str], int]


def _fits(name: str, file: str, head: bytes) -> bool:
    """By the texts that the format's files hold, else their names; `counts` and `table`: by the
    columns, or the fields of the first JSON object."""
    preset = PRESETS[name]
    if preset.map is not OWN:
        if preset.marks:
            return all(mark.encode() in head for mark in preset.marks)
        return preset.said_by(Path(file)) is not None
    file = file.removesuffix(".gz").removesuffix(".zst")
    columns = _columns_of(file, head)
    if name == "table":
        return "layer" in columns and bool(columns & {"experts", "expert_0"})
    is_counts = columns >= ROW and bool(columns & {"count", "assignments"})
    return is_counts or (columns == ROW and file.endswith(CSV))


def _columns_of(file: str, head: bytes) -> set[str]:
    if head[:4] == b"PAR1":
        # in the schema at its end a name stands behind its length
        names = (*COLUMNS, "assignments", "expert_0")
        return {name for name in names if bytes([len(name)]) + name.encode() in head}
    text = head.decode("utf-8", "replace").lstrip("\ufeff\r\n ")
    if file.endswith(CSV):
        header = text.partition("\n")[0].lower()  # nearly ours: the reader says what to write
        return {column.strip(' "\r') for column in re.split("[,;\t]", header)}
    first = None
    if file.endswith((".json", ".jsonl")):
        try:
            first, _ = json.JSONDecoder().raw_decode(text.removeprefix("[").lstrip())
        except (ValueError, RecursionError):  # an object of columns that goes on behind the head
            if text.startswith("{"):
                return set(re.findall(r'(?<!\\)"(\w+)"\s*:\s*\[\s*\d', text))
    return set(first) if isinstance(first, dict) else set()


def run(context: ImportContext, name: str) -> Imported:
    by_map = context.options.get("map")
    preset = PRESETS[name] if by_map is None else parse_map(by_map)
    chunks = chunks_of(context, preset)
    first = next(chunks)
    lists = "experts" in first and "expert" not in first
    placed = "position" in first and not ("count" in first or "share" in first)
    is_decision = "slot" in first or lists or placed
    return (decisions if is_decision else _counts)(context, preset, chain([first], chunks))


for name, preset in PRESETS.items():
    options = ("map",) if preset.map is OWN else ()
    importer(name, preset.gives, partial(_fits, name), options)(partial(run, name=name))


def _counts(context: ImportContext, preset: Preset, chunks: Iterator[TableChunk]) -> Imported:
    where, notes = context.sources[0].path, [preset.note] * bool(preset.note)
    every, some, code_of, documents = set[str](SUMS), set[str](), dict[str, int](), Documents()
    parts, path = list[pa.Table](), where  # the first: of sums
    for chunk in _apart(chunks):
        columns, path = _columns(context, chunk, preset, code_of, documents), chunk.path
        every &= columns.keys()
        some |= columns.keys()
        parts.append(pa.table(columns))
        if sum(map(len, parts[1:])) >= PENDING:
            parts = [_summed(parts, every, path)]
    frame = _summed(parts, every, path).to_pandas()
    if lost := [name for name in SUMS if name in some - every]:
        context.warn(f"{where}: {' and '.join(lost)} left out: not all of the rows have it")
    of_layer = frame.groupby("layer")["count"].sum()
    known = context.facts.experts if context.facts else {}
    unused = [layer for layer in of_layer.index[of_layer == 0] if layer not in known]
    if unused and len(unused) < len(of_layer):
        frame = frame[~frame["layer"].isin(unused)].copy()
        if context.facts is None:
            why = "hold no assignments: dense layers, or not recorded"
            notes.append(f"layers {ranges(unused)} {why}")
            context.warn(f"{where}: {notes[-1]}")
    domains, numbered = _placed(frame, code_of, documents)
    frame = frame.sort_values("row", kind="stable")
    of_router = [part for _, part in frame.groupby(["layer", "router"])]
    listings = [frame] * len(of_router) if preset.omits_unused else of_router
    routers = [_router(context, preset, *of, where) for of in zip(of_router, listings, strict=True)]
    experts = sum(r.experts for r in routers)
    step = max(1, BATCH_CELLS // experts) if documents else len(domains)
    if experts * step > MOST_CELLS:
        raise MoeInspectError(
            f"{where}: {len(routers):,} routers × {len(domains):,} domains × experts is over "
            f"{MOST_CELLS:,}: import it in parts"
        )

    def dense(name: str, at: slice) -> list[np.ndarray] | None:
        if name not in every:
            return None
        made = [np.zeros((len(domains[at]), r.experts), frame[name].dtype) for r in routers]
        for sums_DE, part in zip(made, of_router, strict=True):
            of = part.iloc[slice(*np.searchsorted(part["row"], [at.start, at.stop]))]
            place = of["row"].to_numpy() - at.start, of["expert"].to_numpy()
            np.add.at(sums_DE, place, of[name])
        return made

    def batches() -> Iterator[CountedBatches]:
        for n, start in enumerate(range(0, len(domains), step)):
            at = slice(start, start + step)
            count, first_choice, *each = (dense(name, at) for name in SUMS)
            sums = {name: of for name, of in zip(schema.SUMS, each, strict=True) if of is not None}
            counts = first_choice, sums, numbered[at]
            yield batch_of_counts(count or [], routers, domains[at], n, *counts)

    extras = {of.stated: name in every for name, of in schema.SUMS.items()}
    extras["by_document"], weights = bool(documents), extras.pop("weights")
    routers = [router.with_slot_order(known="first_choice" in every) for router in routers]
    return Imported(routers, batches(), weights, counts_only=True, notes=notes, extras=extras)


def _apart(chunks: Iterator[TableChunk]) -> Iterator[TableChunk]:
    """Refuses files of one name in two folders of a source: of two models, perhaps."""
    folders: dict[object, Path] = {}
    for chunk in chunks:
        alike = chunk.source, chunk.path.name, *chunk.said.values()
        if (other := folders.setdefault(alike, chunk.path.parent)) != chunk.path.parent:
            why = f"both have {alike[1]}: give one of the folders, or each, to add them up"
            raise MoeInspectError(f"{other} and {chunk.path.parent} {why}")
        yield chunk


def _placed(
    frame: pd.DataFrame, code_of: dict[str, int], documents: Documents
) -> tuple[list[str], list[tuple[int, str]]]:
    """Adds to the frame the `row` that each of its rows is of: a document, else a domain. Returns
    the domain of each, and number and name of each document."""
    names, listed = [*code_of], [*documents]
    if not documents:
        domains = sorted(names[code] for code in frame["domain"].unique())
        row_of = {code_of[name]: n for n, name in enumerate(domains)}
        frame["row"] = frame["domain"].map(row_of)
        return domains, []
    if (frame["document"] < 0).any():
        raise MoeInspectError(f"{listed[0][0]} has documents, not all of the other files have")
    order = in_order([(group, name) for group, _, name in listed])
    frame["row"] = frame["document"].map({d: n for n, d in enumerate(order)})
    numbered = [(n, listed[d][2]) for n, d in enumerate(order)]
    return [names[listed[d][1]] for d in order], numbered


def _router(
    context: ImportContext, preset: Preset, part: pd.DataFrame, listing: pd.DataFrame, where: object
) -> Router:
    """E and k are what the user, the config, the table or the preset says. Else E is what the rows
    of `listing` list, if a layer of a domain has all from 0 on (an expert without a row may be a
    dead one)."""
    layer = int(part["layer"].iloc[0])

    def said(name: str) -> int:
        found = {*part[name].unique().tolist()} - {0}
        by_config = getattr(context.facts, name).get(layer, 0) if context.facts else 0
        if len(every := sorted(found | ({by_config} - {0}))) > 1:
            by = ", one of them by the config" * bool(by_config)
            said = " and ".join(map(str, every))
            raise MoeInspectError(f"{where}: layer {layer} has {name} {said}{by}: of one model?")
        return getattr(context, name) or (every[0] if every else 0)

    experts, most = said("experts") or preset.experts, int(listing["expert"].max()) + 1
    if not experts and (listing.groupby(["layer", "domain"])["expert"].nunique() == most).any():
        experts = most
    one = f"layer {layer} does not list every expert and"
    which = one if listing is part else "no layer lists every expert, and it"
    experts = experts or context.known_experts(f"{where}: {which}")
    if (largest := int(part["expert"].max())) >= experts:
        raise MoeInspectError(f"{where}: layer {layer} has expert {largest} of {experts}")
    top_k = said("top_k") or min(preset.top_k, experts) or context.known_top_k(where)
    return context.routers_of([layer], experts, top_k, where)[0]


def _columns(
    context: ImportContext,
    chunk: TableChunk,
    preset: Preset,
    code_of: dict[str, int],
    documents: Documents,
) -> Columns:
    """The KEYS, and the SUMS that the rows have. code_of: the number of each domain so far."""
    for name in ("layer", "expert"):
        if name not in chunk:
            raise chunk.lacks(name)
    lost = [name for name in chunk.table.column_names if name not in OF_COUNTS]
    if lost and preset.map is not OWN:
        why = "decisions have a position, and no count"
        raise MoeInspectError(f"{chunk.path}: rows are counts, which have no {lost[0]}: {why}")
    layer_N = chunk.numbers("layer", 0, MOST_LAYER if not preset.layers else len(preset.layers) - 1)
    layer_N = np.array(preset.layers)[layer_N] if preset.layers else layer_N
    label = storable(chunk.source.domain or chunk.said.get("domain") or named(chunk.path))
    domains, which_N = [label], np.zeros(len(chunk), np.intp)
    if "domain" in chunk:
        within = f"{label}/" if "domain" in chunk.said else ""
        texts, which_N = chunk.labels("domain")
        domains = [f"{within}{text}" if text else label for text in texts]
    code_D = [code_of.setdefault(domain, len(code_of)) for domain in domains]
    if len(code_of) > MOST_DOMAINS:
        raise MoeInspectError(f"{chunk.path} has over {MOST_DOMAINS:,} domains")
    made: Columns = {
        "layer": layer_N,
        "router": chunk.numbers("router", 0, MOST_LAYER) if "router" in chunk else layer_N,
        "domain": np.array(code_D)[which_N],
    }
    for name, given in (("experts", context.experts), ("top_k", context.top_k)):
        made[name] = _stated(chunk, name, given)
    experts = context.experts or (0 if context.facts or "experts" in chunk else preset.experts)
    made["expert"] = chunk.numbers("expert", 0, (experts or MOST_EXPERTS) - 1)
    made["document"] = _numbered(chunk, made["domain"], documents)
    kinds = dict.fromkeys(KEYS, np.uint16) | {"document": np.int32}
    made = {name: made[name].astype(kind) for name, kind in kinds.items()}
    count_N = made["count"] = _count(chunk, preset)
    if "first_choice" in chunk:
        first_N = chunk.numbers("first_choice", 0, MOST_COUNT)
        said = "is {:,} of {:,} assignments"
        chunk.refuse(
            first_N > count_N, "first_choice", lambda n: said.format(first_N[n], count_N[n])
        )
        made["first_choice"] = first_N
    for name, of in schema.SUMS.items():
        if name in chunk:
            made[name] = _score(chunk, name, of.least, count_N)
    if "saliency" in chunk:
        made["saliency_sum"] = _score(chunk, "saliency", -(2**53), count_N) * count_N
    return made


def _stated(chunk: TableChunk, name: str, given: int | None) -> np.ndarray:
    """E or k by the rows, 0 where they do not say it. given: by the user."""
    if name not in chunk:
        return np.zeros(len(chunk), np.int64)
    stated_N = chunk.numbers(name, 0, MOST_EXPERTS)
    odd_N, by = (stated_N > 0) & (stated_N != (given or stated_N)), f"--{name.replace('_', '-')}"
    chunk.refuse(odd_N, name, lambda row: f"is {stated_N[row]}, {by} {given}")
    return stated_N


def _score(chunk: TableChunk, name: str, least: float, count_N: np.ndarray) -> np.ndarray:
    """float64 [N], 0 where there is none of an expert that was never chosen."""
    return np.nan_to_num(chunk.numbers(name, least, 2**53, np.nan, count_N > 0, real=True))


def _numbered(chunk: TableChunk, domain_N: np.ndarray, documents: Documents) -> np.ndarray:
    """The number of the document of each row."""
    if "document" not in chunk:
        return np.full(len(chunk), -1)
    group = chunk.path.parent if "layer" in chunk.said else chunk.path
    texts, at_N = chunk.labels("document")
    which_N, pairs = pd.factorize(domain_N * len(texts) + at_N)
    keys = ((group, int(n) // len(texts), storable(texts[n % len(texts)])) for n in pairs)
    return np.array([documents.setdefault(key, len(documents)) for key in keys])[which_N]


def _count(chunk: TableChunk, preset: Preset) -> np.ndarray:
    """int64 [N]: the assignments of each row."""
    if "count" in chunk:
        return chunk.numbers("count", 0, MOST_COUNT)
    if "share" in chunk:
        count_N = chunk.numbers("share", 0, 1, real=True)
        for name in ("tokens", "samples"):
            if name in chunk:
                count_N = count_N * chunk.numbers(name, 0, MOST_COUNT, real=True)
        if (count_N > MOST_COUNT).any():
            row = int(count_N.argmax())
            raise chunk.error(row, "share", f"makes {count_N[row]:,.0f} assignments")
        return np.rint(count_N).astype(np.int64)
    if preset.map is OWN and {*chunk.names} != ROW:
        raise chunk.lacks("count")
    return np.ones(len(chunk), np.int64)


def _summed(parts: list[pa.Table], names: set[str], path: object) -> pa.Table:
    """The sums by KEYS of rows, which are added in their order."""
    rows = pa.concat_tables([part.select([*KEYS, *sorted(names)]) for part in parts])
    sums = rows.group_by([*KEYS], use_threads=False).aggregate([(n, "sum") for n in sorted(names)])
    summed = sums.rename_columns([name.removesuffix("_sum") for name in sums.column_names])
    count_N = summed["count"].to_numpy()
    if len(summed) and int(count_N.max()) > MOST_COUNT:
        row = summed.slice(int(count_N.argmax()), 1).to_pylist()[0]
        raise MoeInspectError(
            f"{path}: the rows of expert {row['expert']} of layer {row['layer']} sum to a "
            f"count of {row['count']:,}: at most {MOST_COUNT:,} are possible"
        )
    if len(summed) > MOST_CELLS:
        raise MoeInspectError(f"{path} has over {MOST_CELLS:,} layers × domains × experts")
    return summed
