"""Trace: reads a trace directory lazily, a router or a shard at a time."""

from __future__ import annotations

import itertools
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moe_inspect.errors import MoeInspectError, reading
from moe_inspect.text import ranges
from moe_inspect.trace import parts, schema, slot_order
from moe_inspect.trace.parts import Stated
from moe_inspect.trace.remote import Remote, place
from moe_inspect.trace.schema import MOST_TOKEN_IDS, Router
from moe_inspect.trace.validate import (
    MOST_MANIFEST_BYTES,
    MOST_RANKS,
    SPAN,
    Damaged,
    check_line,
    check_manifest,
    parsed,
)


@dataclass(frozen=True)
class ShardFiles:
    """A committed shard: table → path within the trace, and the lines that committed it."""

    rank: int
    index: int
    first_token: int
    last_token: int
    first_batch: int | None
    last_batch: int
    decisions: int
    paths: dict[str, str] = field(default_factory=dict)
    stated: dict[str, Stated] = field(default_factory=dict)
    lines: list[bytes] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return self.last_token - self.first_token + 1

    @property
    def rows(self) -> dict[str, int]:
        return {table: stated.rows or 0 for table, stated in self.stated.items()}


def read_manifest(root: Path | Remote) -> dict[str, Any]:
    """The manifest, checked as far as everything else relies on it."""
    path = inside(root, schema.MANIFEST)
    if not path.is_file():
        raise MoeInspectError(
            f'no trace at {root}: make one with "moe-inspect trace MODEL -o {root}"'
        )
    try:
        data = (
            path.read_bytes()
            if isinstance(path, Remote)
            else _beginning(path, MOST_MANIFEST_BYTES + 1)
        )
        if len(data) > MOST_MANIFEST_BYTES:
            raise ValueError(f"it has over {MOST_MANIFEST_BYTES:,} bytes")
        manifest = parsed(data)
        if not isinstance(manifest, dict) or type(version := manifest.get("format")) is not int:
            raise ValueError("it is no manifest: format is missing")
    except ValueError as error:
        raise Damaged(path, str(error), schema.MANIFEST) from None
    if version != schema.FORMAT:
        raise MoeInspectError(
            f"{path} has format {version!r:.30}, this moe-inspect reads {schema.FORMAT}: upgrade "
            "moe-inspect"
        )
    try:
        check_manifest(manifest)
    except ValueError as error:
        raise Damaged(path, str(error), schema.MANIFEST) from None
    except RecursionError:
        raise Damaged(path, "it is nested too deeply", schema.MANIFEST) from None
    return manifest


def _beginning(path: Path, most_bytes: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(most_bytes)


def writer_of(manifest: dict[str, Any]) -> int | None:
    """The process that is writing this trace, as far as this machine can tell: None where it is
    done or gone."""
    capture = manifest["capture"]
    pid = capture.get("pid")
    if (
        manifest["status"] != "recording"
        or capture.get("host") != socket.gethostname()
        or pid in (None, os.getpid())
    ):
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # it runs, as another user
    then, now = capture.get("process_start"), schema.process_start(pid)
    return (
        pid if then is None or now is None or then == now else None
    )  # the number may have gone to another process


def refuse_while_written(root: Path, manifest: dict[str, Any]) -> None:
    """MoeInspectError where the process that writes this trace is still at work on this machine."""
    if (pid := writer_of(manifest)) is not None:
        raise MoeInspectError(f"process {pid} is still writing {root}: wait for it, or stop it")


def inside(root: Path | Remote, name: str) -> Path | Remote:
    """What `name`, of a trace's own lists, stands for. MoeInspectError where a link leads out of
    the trace, or it is a pipe or a device, which may never end."""
    if isinstance(root, Remote):
        if root.url.startswith("file://"):
            inside(Path(root.path), name)
        return root / name
    path = root / name
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(os.path.realpath(root)):
        raise Damaged(
            root / name, f"it is a link to {real}, outside of the trace: copy the file there", name
        )
    if real.exists() and not (real.is_file() or real.is_dir()):
        raise Damaged(root / name, "it is no plain file", name)
    return path


def committed_shards(root: Path | Remote, manifest: dict[str, Any]) -> list[ShardFiles]:
    """Every shard whose lines are all there, by rank and index. A last line without an end is an
    uncommitted shard; any other that cannot be is damage."""
    shards: list[ShardFiles] = []
    ranks = {
        int(m[1]): p
        for p in root.iterdir()
        if (m := re.fullmatch(r"shards-(\d{1,18})\.jsonl", p.name, re.ASCII))
    }
    for rank, path in sorted(ranks.items()):
        if rank >= MOST_RANKS:
            raise Damaged(path, f"there are at most {MOST_RANKS:,} ranks", path.name)
        found: dict[int, ShardFiles] = {}
        taken: set[str] = set()
        for number, line in enumerate(inside(root, path.name).read_bytes().split(b"\n")[:-1], 1):
            try:
                entry = parsed(line)
                check_line(entry, line, rank, len(manifest["routers"]), manifest["tables"])
                _list(entry, line + b"\n", rank, len(manifest["routers"]), found)
                if entry["path"] in taken:
                    raise ValueError(f"{entry['path']} is listed twice")
                taken.add(entry["path"])
            except ValueError as error:
                raise Damaged(path, f"line {number}: {error}", path.name) from None
        ended = rank * schema.RANK_STRIDE
        for index, shard in sorted(found.items()):
            if set(shard.paths) != set(manifest["tables"]):
                continue
            if shard.first_token != ended:
                said = (
                    f"shard {index} has tokens {shard.first_token} to {shard.last_token}, "
                    f"{ended} is the next"
                )
                raise Damaged(path, said, path.name)
            ended = shard.last_token + 1
            shards.append(shard)
    return shards


def _list(
    entry: dict[str, Any], line: bytes, rank: int, routers: int, found: dict[int, ShardFiles]
) -> None:
    """Adds a line to the shard that it is of. ValueError where they do not agree."""
    table, index, span = entry["table"], entry["shard"], {key: entry[key] for key in SPAN}
    # a trace that does not say so is one in which every router saw every token
    everywhere = (span["last_token"] - span["first_token"] + 1) * routers
    shard = found.setdefault(
        index, ShardFiles(rank, index, **span, decisions=entry.get("decisions", everywhere))
    )
    if span != (stated := {key: getattr(shard, key) for key in SPAN}):
        raise ValueError(
            f"it states tokens and batches {tuple(span.values())}, another line of shard {index} "
            f"{tuple(stated.values())}"
        )
    if table in shard.paths:
        raise ValueError(f"{table} of shard {index} is listed twice")
    shard.paths[table] = entry["path"]
    shard.stated[table] = Stated(
        *(entry.get(name) for name in ("rows", "bytes", "footer_crc32", "sha256"))
    )
    shard.lines.append(line)


@dataclass(frozen=True)
class Shard:
    """One committed shard, opened: whole batches, all routers."""

    trace: Trace
    files: ShardFiles

    def table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        return parts.read(self.file(name), self.files.paths[name], columns)

    def file(self, name: str) -> pq.ParquetFile:
        """The Parquet file of a table, checked and opened once."""
        if name not in self._opened:
            expected = parts.columns_of(name, self.trace.routers, self.trace.has_weights)
            path = self.files.paths[name]
            self._opened[name] = parts.open_part(
                inside(self.trace.path, path), path, expected, self.files.stated[name]
            )
        return self._opened[name]

    @cached_property
    def _opened(self) -> dict[str, pq.ParquetFile]:
        return {}

    @cached_property
    def _spans(self) -> dict[str, list[tuple[int, int]]]:
        return {}

    def tokens(self, columns: list[str] | None = None) -> pa.Table:
        """The tokens table of this shard, in token order."""
        table = self.table("tokens", columns)
        if (
            "token_id" in table.column_names
            and (highest := _highest(table["token_id"])) >= MOST_TOKEN_IDS
        ):
            raise self._damaged(
                "tokens", f"token_id is {highest}: vocabularies have at most {MOST_TOKEN_IDS:,}"
            )
        return table

    def counts(self) -> pa.Table:
        """The counts of this shard: every row of an expert that its router has, and none
        negative."""
        table, routers = self.table("counts"), self.trace.routers
        router_N, expert_N = table["router"].to_numpy(), table["expert"].to_numpy()
        experts_L = np.array([router.experts for router in routers])
        if (router_N >= len(routers)).any():
            raise self._damaged(
                "counts", f"router is {router_N.max()}, the manifest lists {len(routers)}"
            )
        if (wrong_N := expert_N >= experts_L[router_N]).any():
            n = int(wrong_N.argmax())
            raise self._damaged(
                "counts",
                f"expert is {expert_N[n]}, router {router_N[n]} has {experts_L[router_N[n]]} "
                "experts",
            )
        for name in ("assignments", "first_choice"):
            lowest = pc.min(table[name]).as_py()  # pyright: ignore[reportAttributeAccessIssue]
            if (lowest or 0) < 0 or (name == "assignments" and table[name].null_count):
                raise self._damaged(
                    "counts", f"{name} is {lowest if lowest is not None else 'null'}"
                )
        return table

    def _damaged(self, table: str, what: str) -> Damaged:
        return Damaged(self.files.paths[table], what, self.files.paths[table])

    def routing(self, router: int, columns: list[str] | None = None) -> pa.Table:
        """The decisions of one router, in token order: only its row groups are read. Slots are in
        descending weight where that can be known: those of a trace that does not state its order
        are put in order here."""
        slots = self.trace._slots_to_order(router)
        if not slots or (
            columns is not None and not {*columns}.intersection(itertools.chain(*slots))
        ):
            return self._of_router("routing", router, columns)
        wanted = None if columns is None else [*dict.fromkeys([*columns, *itertools.chain(*slots)])]
        table = _in_order(self._of_router("routing", router, wanted), *slots)
        return table if columns is None else table.select(columns)

    def seen(self, router: int) -> np.ndarray | None:
        """bool [T]: which tokens of the shard reach the router; None where all do. Its decisions
        are theirs, in this order."""
        listed = self.trace.routers[router]
        if not listed.stack:
            return None
        code_T, phases = codes(self.tokens(["phase"])["phase"])
        return np.array([listed.sees(phase) for phase in phases], bool)[code_T]

    def slots(self, router: int) -> tuple[np.ndarray, ...]:
        """The experts of each decision, an array a slot: uint8 or uint16 [T], the number of experts
        where a slot routed nowhere. What the file holds is copied only where some did.
        MoeInspectError for an id out of range."""
        columns, E = self._slots(router, "expert"), self.trace.routers[router].experts
        if np.iinfo(columns[0].type.to_pandas_dtype()).max < E and any(
            column.null_count for column in columns
        ):
            columns = [column.cast(pa.uint16()) for column in columns]
        if (highest := max(_highest(column) for column in columns)) >= E:
            raise self._damaged(
                "routing", f"router {router} has {E} experts and an assignment to expert {highest}"
            )
        return tuple(
            (column.fill_null(E) if column.null_count else column).to_numpy() for column in columns
        )

    def ids(self, router: int) -> np.ndarray:
        """int16 [T, K], the experts of each decision, −1 where a slot routed nowhere. Slots are
        contiguous in memory, as they are on disk. MoeInspectError for an id out of range."""
        slots, E = self.slots(router), self.trace.routers[router].experts
        ids_KT = np.empty((len(slots), len(slots[0])), np.int16)
        for ids_T, slot_T in zip(ids_KT, slots, strict=True):
            ids_T[:] = slot_T
            if slot_T.max(initial=0) == E:
                ids_T[slot_T == E] = -1
        return ids_KT.T

    def slot_weights(self, router: int) -> tuple[np.ndarray, ...]:
        """The gate weights, an array a slot: float32 [T], 0 where it routed nowhere."""
        return tuple(
            (c.fill_null(0) if c.null_count else c).to_numpy()
            for c in self._slots(router, "weight")
        )

    def weights(self, router: int) -> np.ndarray:
        """float32 [T, K], the gate weights, 0 where a slot routed nowhere."""
        return np.stack(self.slot_weights(router)).T

    def logits(self, router: int) -> np.ndarray:
        """float16 [T, E], the router logits."""
        table = self._of_router("logits", router, ["logits"]).combine_chunks()
        width = table.schema.field("logits").type.list_size
        flat = table["logits"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(-1, width)[:, : self.trace.routers[router].experts]

    def _slots(self, router: int, kind: str) -> list[pa.ChunkedArray]:
        return self.routing(
            router, [f"{kind}_{j}" for j in range(self.trace.routers[router].top_k)]
        ).columns

    def _of_router(self, name: str, router: int, columns: list[str] | None) -> pa.Table:
        file, path = self.file(name), self.files.paths[name]
        if name not in self._spans:
            self._spans[name] = _routers_of_groups(file)
        spans = self._spans[name]
        groups = [g for g, (first, last) in enumerate(spans) if first <= router <= last]
        if columns is not None and all(spans[g] == (router, router) for g in groups):
            return parts.read(file, path, columns, groups)
        wanted = None if columns is None else [*dict.fromkeys([*columns, "router"])]
        table = parts.read(file, path, wanted, groups)
        routers = table["router"].to_numpy()
        if len(routers) and (routers != router).any():
            table = table.filter(pa.array(routers == router))
        return table if columns is None else table.select(columns)


def _in_order(table: pa.Table, experts: list[str], weights: list[str]) -> pa.Table:
    """The table with each decision's slots in descending weight, those that routed nowhere last."""
    nowhere_KT = np.stack([table[name].is_null().to_numpy() for name in experts])
    weights_KT = np.stack([table[name].fill_null(0).to_numpy() for name in weights])
    order_KT = slot_order.descending(weights_KT, nowhere_KT)
    if order_KT is None:
        return table
    ids_KT = np.stack([table[name].fill_null(0).to_numpy() for name in experts])
    ids_KT, weights_KT, nowhere_KT = (
        np.take_along_axis(values_KT, order_KT, 0) for values_KT in (ids_KT, weights_KT, nowhere_KT)
    )
    for names, values_KT in ((experts, ids_KT), (weights, weights_KT)):
        for name, values_T, nowhere_T in zip(names, values_KT, nowhere_KT, strict=True):
            at = table.schema.get_field_index(name)
            table = table.set_column(at, table.schema.field(at), pa.array(values_T, mask=nowhere_T))
    return table


def _highest(column: pa.ChunkedArray) -> int:
    """The largest value of a column of integers, 0 where there is none above."""
    return int((column.fill_null(0) if column.null_count else column).to_numpy().max(initial=0))


def _routers_of_groups(file: pq.ParquetFile) -> list[tuple[int, int]]:
    """The first and last router in each row group, any where the file does not say."""
    index = file.schema_arrow.get_field_index("router")
    found = [
        file.metadata.row_group(g).column(index).statistics
        for g in range(file.metadata.num_row_groups)
    ]
    return [(s.min, s.max) if s is not None and s.has_min_max else (0, 2**16) for s in found]


class Trace:
    """A trace. Tables come as pandas DataFrames; large ones by router (`routing(layer=3)`), or by
    shard (`for shard in trace.shards`), which is how everything that must not depend on the trace's
    length reads them."""

    def __init__(self, path: str | Path | Remote):
        self.path = place(path)
        with reading(self.path):
            self.manifest = read_manifest(self.path)
            self._listed = [Router(**r) for r in self.manifest["routers"]]
            self.routers = [
                router if router.slot_order else slot_order.stated(router, self._orderable)
                for router in self._listed
            ]
            self._files = committed_shards(self.path, self.manifest)
        self._check_total()

    def _check_total(self) -> None:
        """The manifest is written after the lines that it counts: lines that are lost are
        missed."""
        stated = (self.manifest.get("counts") or {}).get("tokens", 0)
        if self.n_tokens < stated:
            raise Damaged(
                self.path / schema.MANIFEST,
                f"counts.tokens is {stated}, the shards have {self.n_tokens}",
                schema.MANIFEST,
            )

    def __repr__(self) -> str:
        return (
            f"Trace({str(self.path)!r}: {self.n_tokens:,} tokens, {len(self.routers)} routers, "
            f"{self.status})"
        )

    @property
    def status(self) -> str:
        return self.manifest["status"]

    @property
    def tables(self) -> list[str]:
        return self.manifest["tables"]

    @property
    def counts_only(self) -> bool:
        return "routing" not in self.tables

    @property
    def has_weights(self) -> bool:
        return bool(self.manifest["capture"]["weights"])

    @property
    def _orderable(self) -> bool:
        """Whether the first choice can be known of routers whose slot order nobody stated: by the
        weights, or since a source of counts said it (where it did not, it is null)."""
        return self.has_weights if not self.counts_only else self.imported

    def _slots_to_order(self, router: int) -> tuple[list[str], list[str]] | None:
        """The columns of experts and of weights whose order has to be looked at while they are
        read."""
        listed = self._listed[router]
        if listed.slot_order or not self.has_weights or listed.top_k == 1:
            return None
        return [f"expert_{j}" for j in range(listed.top_k)], [
            f"weight_{j}" for j in range(listed.top_k)
        ]

    @property
    def n_tokens(self) -> int:
        """Tokens in committed shards, whatever the manifest last said."""
        return sum(f.tokens for f in self._files)

    @property
    def n_decisions(self) -> int:
        """Decisions in committed shards, counted ones included: tokens × routers, unless it is an
        encoder-decoder's."""
        return sum(f.decisions for f in self._files)

    @property
    def shards(self) -> Iterator[Shard]:
        return (Shard(self, f) for f in self._files)

    @property
    def imported(self) -> bool:
        return self.manifest.get("capture", {}).get("mode") == "import"

    @property
    def more_than_counts(self) -> str:
        """How to get more than a trace of counts only has."""
        return (
            "import a recording of every token" if self.imported else "trace without --counts-only"
        )

    def router_index(self, layer: int | None = None, router: int | None = None) -> list[int]:
        """The routers meant: all, those of a layer, or one."""
        chosen = [
            i
            for i, r in enumerate(self.routers)
            if (layer is None or r.layer == layer) and (router is None or i == router)
        ]
        if not chosen:
            layers = sorted({r.layer for r in self.routers})
            asked = f"layer {layer}" if layer is not None else f"router {router}"
            raise MoeInspectError(
                f"no {asked} in {self.path}: it has layers {ranges(layers)} and routers "
                f"0-{len(self.routers) - 1}"
            )
        return chosen

    def routing(self, layer: int | None = None, router: int | None = None) -> pd.DataFrame:
        """The routing table, of all routers, one layer or one router."""
        if self.counts_only:
            raise MoeInspectError(
                f"{self.path} holds counts only, no decisions: {self.more_than_counts}"
            )
        chosen = self.router_index(layer, router)
        return self._frame("routing", [s.routing(r) for r in chosen for s in self.shards])

    def tokens(self) -> pd.DataFrame:
        if self.counts_only:
            raise MoeInspectError(
                f"{self.path} holds counts only, no tokens: {self.more_than_counts}"
            )
        return self._frame("tokens", [s.tokens() for s in self.shards])

    def documents(self) -> pd.DataFrame:
        return self._frame("documents", [s.table("documents") for s in self.shards])

    def counts(self) -> pd.DataFrame:
        """The counts table of a trace made with --counts-only."""
        if not self.counts_only:
            raise MoeInspectError(
                f'{self.path} holds decisions, not counts: report(trace).tables["load"] counts them'
            )
        return self._frame("counts", [s.counts() for s in self.shards])

    def logits(self, layer: int | None = None, router: int | None = None) -> pd.DataFrame:
        if "logits" not in self.tables:
            raise MoeInspectError(f"{self.path} has no logits: trace with --logits")
        chosen = self.router_index(layer, router)
        return self._frame(
            "logits", [s._of_router("logits", r, None) for r in chosen for s in self.shards]
        )

    def vocabulary(self) -> pd.DataFrame:
        """token_id, token; empty where the trace was recorded without a tokenizer."""
        return self._vocabulary.to_pandas()

    @cached_property
    def _vocabulary(self) -> pa.Table:
        path, stated = inside(self.path, schema.VOCABULARY), self.manifest.get("vocabulary")
        if stated is None and not path.exists():
            return schema.VOCABULARY_SCHEMA.empty_table()
        return parts.read_vocabulary(
            path, Stated(**{key: (stated or {}).get(key) for key in ("bytes", "sha256")})
        )

    def _frame(self, name: str, parts: list[pa.Table]) -> pd.DataFrame:
        if not parts:
            empty = {
                "routing": schema.routing_schema(self.routers, self.has_weights),
                "tokens": schema.TOKENS,
                "documents": schema.DOCUMENTS,
                "counts": schema.counts_schema(self.has_weights),
                "logits": schema.logits_schema(max(r.experts for r in self.routers)),
            }
            return empty[name].empty_table().to_pandas()
        joined = pa.concat_tables(
            parts, promote_options="permissive"
        )  # some shards say that they hold no null
        return joined.unify_dictionaries().to_pandas()


def codes(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """Codes and labels of a dictionary column; a label may be unused."""
    if not len(column):
        return np.zeros(0, np.int32), []
    array = column.unify_dictionaries().combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    return array.indices.to_numpy(), array.dictionary.to_pylist()


def open_trace(path: str | Path) -> Trace:
    """Opens a trace directory, of this machine or by a URL that fsspec can read
    (`s3://bucket/trace`). MoeInspectError where there is none, or it is damaged or of a newer
    format."""
    return Trace(path)
