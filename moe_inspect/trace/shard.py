"""Shard: one committed shard of a trace, read a table or a router at a time.

T tokens, K slots, E experts, L routers, N rows.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_inspect.errors import Damaged
from moe_inspect.trace import parts, replicas, schema
from moe_inspect.trace.files.location import inside
from moe_inspect.trace.header import TraceHeader
from moe_inspect.trace.parts import FileRows, Stated
from moe_inspect.trace.replicas import PlacedExperts
from moe_inspect.trace.schema import MOST_TOKEN_IDS, Router
from moe_inspect.trace.shard_list import ShardFiles


@dataclass(frozen=True)
class Shard:
    """One committed shard, opened: whole batches, all routers."""

    trace: TraceHeader
    files: ShardFiles
    _opened: dict[str, pq.ParquetFile] = field(default_factory=dict, init=False, compare=False)
    _spans: dict[str, list[tuple[int, int]]] = field(
        default_factory=dict, init=False, compare=False
    )
    # threads, each with routers of its own, ask for the same at once
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, compare=False)

    def table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        return parts.read(self.file(name), self.files.paths[name], columns)

    def schema(self, name: str) -> pa.Schema:
        """The columns of a table, as they are stored."""
        return self.file(name).schema_arrow

    def file(self, name: str) -> pq.ParquetFile:
        """The Parquet file of a table, checked and opened once."""
        with self._lock:
            if name not in self._opened:
                self._opened[name] = self._checked(name)
            return self._opened[name]

    def _checked(self, name: str) -> pq.ParquetFile:
        trace, path = self.trace, self.files.paths[name]
        source = inside(trace.path, path)
        return parts.open_part(source, path, trace.columns_of(name), self.files.stated[name])

    def tokens(self, columns: list[str] | None = None) -> pa.Table:
        """The tokens of this shard, in token order."""
        table = self.table("tokens", columns)
        highest = _highest(table["token_id"]) if "token_id" in table.column_names else 0
        if highest >= MOST_TOKEN_IDS:
            said = f"token_id is {highest}: vocabularies have at most {MOST_TOKEN_IDS:,}"
            raise self._damaged("tokens", said)
        return table

    def counts(self) -> pa.Table:
        """The counts of this shard. MoeInspectError for an expert that its router does not have,
        for negative counts, and for a document that the shard does not list."""
        table, rows = self.table("counts"), FileRows(self.files.paths["counts"])
        check_counts(rows, table, self.trace.routers)
        if self.trace.by_document:
            document_N, listed = table["document"].to_numpy(), self.table("documents", ["document"])
            known_N = np.isin(document_N, listed["document"].to_numpy())
            rows.refuse(~known_N, "document {} is not one of its shard", document_N)
        return table

    def _damaged(self, table: str, what: str) -> Damaged:
        return Damaged(self.files.paths[table], what)

    def routing(self, router: int, columns: list[str] | None = None) -> pa.Table:
        """The decisions of one router, in token order: only its row groups are read. Slots are in
        descending weight where that can be known: those of a trace that does not state its order
        are put in order here."""
        slots = self.trace.slots_to_order(router)
        needed = [*itertools.chain(*slots or ())]
        if not slots or (columns is not None and {*columns}.isdisjoint(needed)):
            return self.rows_of_router("routing", router, columns)
        wanted = None if columns is None else [*dict.fromkeys([*columns, *needed])]
        table = _in_order(self.rows_of_router("routing", router, wanted), slots)
        return table if columns is None else table.select(columns)

    def seen(self, router: int) -> np.ndarray | None:
        """bool [T]: which tokens of the shard reach the router; None where all do. Its decisions
        are theirs, in this order."""
        listed = self.trace.routers[router]
        if not listed.stack:
            return None
        code_T, phases = codes(self.tokens(["phase"])["phase"])
        return np.array([listed.sees(phase) for phase in phases], bool)[code_T]

    def slots(self, router: int, kind: str = "expert") -> tuple[np.ndarray, ...]:
        """The experts of each decision, an array a slot: uint8 or uint16 [T], the number of experts
        where a slot routed nowhere. What the file holds is copied only where some did. `kind`: or
        `schema.DROPPED`, the experts that dropped slots, and their number at all others.
        MoeInspectError for an id out of range."""
        columns, E = self._slots(router, kind), self.trace.routers[router].experts
        narrow = np.iinfo(columns[0].type.to_pandas_dtype()).max < E
        if narrow and any(column.null_count for column in columns):
            columns = [column.cast(pa.uint16()) for column in columns]
        if (highest := max(_highest(column) for column in columns)) >= E:
            said = f"router {router} has {E} experts and an assignment to expert {highest}"
            raise self._damaged("routing", said)
        return tuple(numbers(column, E) for column in columns)

    def ids(self, router: int) -> np.ndarray:
        """int16 [T, K] (int32 beyond 32,767 experts), the experts of each decision, −1 where a slot
        routed nowhere. Slots are contiguous in memory, as they are on disk. MoeInspectError for an
        id out of range."""
        slots, E = self.slots(router), self.trace.routers[router].experts
        ids_KT = np.stack(slots, dtype=np.int16 if E < 2**15 else np.int32)
        ids_KT[ids_KT == E] = -1
        return ids_KT.T

    def slot_weights(self, router: int) -> tuple[np.ndarray, ...]:
        """The gate weights, an array a slot: float32 [T], 0 where it routed nowhere."""
        return self.slot_values(router, "weight")

    def slot_values(self, router: int, value: str) -> tuple[np.ndarray, ...]:
        """One of `schema.SLOT_VALUES` that the trace has, an array a slot: [T], 0 where it routed
        nowhere."""
        return tuple(numbers(column) for column in self._slots(router, value))

    def weights(self, router: int) -> np.ndarray:
        """float32 [T, K], the gate weights, 0 where a slot routed nowhere."""
        return np.stack(self.slot_weights(router)).T

    def replicas(self) -> list[PlacedExperts]:
        """Which experts the physical ones are replicas of, from which forward pass on."""
        columns, name = self.schema("routing"), self.files.paths["routing"]
        return replicas.read(columns, name, self.trace.routers)

    def logits(self, router: int) -> np.ndarray:
        """float16 [T, E], the router logits."""
        table = self.rows_of_router("logits", router, ["logits"]).combine_chunks()
        width = table.schema.field("logits").type.list_size
        flat = table["logits"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(-1, width)[:, : self.trace.routers[router].experts]

    def _slots(self, router: int, kind: str) -> list[pa.ChunkedArray]:
        slots = range(self.trace.routers[router].top_k)
        return self.routing(router, [f"{kind}_{j}" for j in slots]).columns

    def rows_of_router(self, name: str, router: int, columns: list[str] | None = None) -> pa.Table:
        """The rows of one router in a table, as they are stored."""
        file, path, spans = self.file(name), self.files.paths[name], self._routers_of_groups(name)
        groups = [g for g, (first, last) in enumerate(spans) if first <= router <= last]
        if columns is not None and all(spans[g] == (router, router) for g in groups):
            return parts.read(file, path, columns, groups)
        wanted = None if columns is None else [*dict.fromkeys([*columns, "router"])]
        table = parts.read(file, path, wanted, groups)
        routers = numbers(table["router"])
        if (routers != router).any():
            table = table.filter(pa.array(routers == router))
        return table if columns is None else table.select(columns)

    def rows_by_router(self, name: str, columns: list[str] | None = None) -> list[pa.Table]:
        """Those of every router, in one read where each row group is of one. The file is closed
        then: what is kept of hundreds of small ones takes more memory than their rows."""
        routers, spans = range(len(self.trace.routers)), self._routers_of_groups(name)
        if spans != sorted((r, r) for r, _ in spans):
            found = [Shard.rows_of_router(self, name, r, columns) for r in routers]
            self._opened.pop(name, None)
            return found
        table, metadata = self.table(name, columns), self._opened.pop(name).metadata
        rows_R = np.zeros(len(routers) + 1, np.int64)
        for g, (r, _) in enumerate(spans):
            rows_R[r + 1] += metadata.row_group(g).num_rows
        ends = rows_R.cumsum()
        return [table.slice(ends[r], rows_R[r + 1]) for r in routers]

    def _routers_of_groups(self, name: str) -> list[tuple[int, int]]:
        """The first and last router in each row group, any where the file does not say."""
        if name not in self._spans:
            file = self.file(name).metadata
            at = self.file(name).schema_arrow.get_field_index("router")
            found = [file.row_group(g).column(at).statistics for g in range(file.num_row_groups)]
            self._spans[name] = [
                (s.min, s.max) if s is not None and s.has_min_max else (0, 2**16) for s in found
            ]
        return self._spans[name]


@dataclass(frozen=True)
class JoinedShards(Shard):
    """Consecutive small shards of one rank, read as one."""

    parts: Sequence[Shard] = ()
    # (table, columns) → of each part its rows by router
    _read: dict[tuple[str, str], list[list[pa.Table]]] = field(
        default_factory=dict, init=False, compare=False
    )

    @classmethod
    def of(cls, parts: Sequence[Shard]) -> Shard:
        if len(parts) == 1:
            return parts[0]
        first, last = parts[0].files, parts[-1].files
        stated = {
            table: _together([of.files.stated[table] for of in parts]) for table in first.stated
        }
        decisions = sum(part.files.decisions for part in parts)
        span = {"last_token": last.last_token, "last_batch": last.last_batch}
        files = replace(first, decisions=decisions, stated=stated, lines=[], **span)
        return cls(parts[0].trace, files, parts=parts)

    def schema(self, name: str) -> pa.Schema:
        return pa.unify_schemas([part.schema(name) for part in self.parts])

    def replicas(self) -> list[PlacedExperts]:
        return replicas.changes(one for part in self.parts for one in part.replicas())

    def table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        return _joined([part.table(name, columns) for part in self.parts])

    def rows_of_router(self, name: str, router: int, columns: list[str] | None = None) -> pa.Table:
        asked = name, ",".join(columns or ())
        with self._lock:
            if asked not in self._read:
                self._read[asked] = [part.rows_by_router(name, columns) for part in self.parts]
        return _joined([tables[router] for tables in self._read[asked]])


def check_counts(rows: FileRows, table: pa.Table, routers: Sequence[Router]) -> None:
    """Damaged at the first row of a router or an expert that there is not, or of a count that is
    negative or, but for first choices, unknown."""
    router_N, expert_N = table["router"].to_numpy(), table["expert"].to_numpy()
    said = f"router is {{}}, the manifest lists {len(routers)}"
    rows.refuse(router_N >= len(routers), said, router_N)
    experts_N = np.array([r.experts for r in routers])[router_N]
    said = "expert is {}, router {} has {} experts"
    rows.refuse(expert_N >= experts_N, said, expert_N, router_N, experts_N)
    for name in ("assignments", "first_choice"):
        count_N = table[name].fill_null(0).to_numpy()
        rows.refuse(count_N < 0, f"{name} is {{}}", count_N)
    rows.refuse_nulls(table, ["assignments"])


def _together(stated: Sequence[Stated]) -> Stated:
    hashes = [of.sha256 for of in stated if of.sha256 is not None]
    together = "".join(hashes) if len(hashes) == len(stated) else None
    return Stated(rows=sum(of.rows or 0 for of in stated), sha256=together)


def _joined(tables: list[pa.Table]) -> pa.Table:
    # some say that they hold no null
    return pa.concat_tables(tables, promote_options="permissive").unify_dictionaries()


def codes(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """Codes and labels of a dictionary column; a label may be unused."""
    if not len(column):
        return np.zeros(0, np.int32), []
    array = column.unify_dictionaries().combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    return numbers(array.indices), array.dictionary.to_pylist()


def numbers(column: pa.ChunkedArray | pa.Array, null: int = 0) -> np.ndarray:
    """A column of numbers, `null` where there is none; not copied where it is whole and in one
    piece. pyarrow's to_numpy would import pandas, which takes 0.3 s."""
    if column.null_count:
        column = column.fill_null(null)
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    return np.from_dlpack(column)


def run_edges(*keys_T: np.ndarray) -> np.ndarray:
    """Where each run of consecutive rows with the same keys begins, and the number of rows as the
    last edge: [0] where there are no rows. keys_T: arrays [T] or [T, X]. int64 [runs + 1]"""
    changed_T = np.ones(len(keys_T[0]) + 1, bool)
    changed_T[1:-1] = False
    for key_T in keys_T:
        differs = key_T[1:] != key_T[:-1]
        changed_T[1:-1] |= differs if differs.ndim == 1 else differs.any(1)
    return np.flatnonzero(changed_T)


def _in_order(table: pa.Table, slots: list[list[str]]) -> pa.Table:
    """The table with each decision's slots in descending weight, those that routed nowhere last.
    `slots`: the columns of experts, of weights, and of what else there is."""

    def stacked(names: list[str]) -> tuple[np.ndarray, np.ndarray]:
        columns = [table[name] for name in names]
        null = [c.is_null().to_numpy() if c.null_count else np.zeros(len(c), bool) for c in columns]
        return np.stack([numbers(column) for column in columns]), np.stack(null)

    order_KT = schema.descending_slots(stacked(slots[1])[0], stacked(slots[0])[1])
    if order_KT is None:
        return table
    for names in slots:
        ordered = (np.take_along_axis(found_KT, order_KT, 0) for found_KT in stacked(names))
        for name, values_T, null_T in zip(names, *ordered, strict=True):
            at = table.schema.get_field_index(name)
            table = table.set_column(at, table.schema.field(at), pa.array(values_T, mask=null_T))
    return table


def _highest(column: pa.ChunkedArray) -> int:
    """The largest value of a column of integers, 0 where there is none above."""
    return int(numbers(column).max(initial=0))
