"""Shards of one trace become shards of another: tokens, documents and forward passes get new
numbers, everything else stays as it is. A router of a shard at a time is in memory.

T tokens, D documents.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moe_inspect.errors import MoeInspectError
from moe_inspect.trace import parts, schema
from moe_inspect.trace.files import checksums
from moe_inspect.trace.files.atomic import sync_directory
from moe_inspect.trace.header import TraceHeader
from moe_inspect.trace.reader import Trace, shards_of
from moe_inspect.trace.shard import Shard
from moe_inspect.trace.writer.part_file import write_part

MOST_NUMBER = 2**31 - 1  # of documents and forward passes, which are int32
Change = Callable[[np.ndarray], np.ndarray]


@dataclass
class Target:
    """The trace that shards are copied to: what it holds so far. `words`: the length of its
    vocabulary, if it has one. `tokens`, `shards`: of each rank. `batches`, `sequences`: one above
    the highest number of a forward pass and of a sequence, over all ranks. `assignments`: counted
    in what was copied."""

    root: Path
    words: int | None
    documents: int = 0
    batches: int = 0
    sequences: int = 0
    assignments: int = 0
    tokens: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    shards: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    _sequences_before: int = 0  # of the traces before the one that is copied

    def add(self, trace: Trace) -> None:
        """Copies a trace behind what is there, each rank behind the same rank."""
        document_D = np.sort(
            np.concatenate([np.zeros(0, np.int32), *map(_documents, trace.shards)])
        )
        batches = 1 + max((shard.files.last_batch for shard in trace.shards), default=-1)
        _check_number(trace, self.documents + len(document_D), "documents")
        _check_number(trace, self.batches + batches, "forward passes")
        self._sequences_before = self.sequences
        for shard in shards_of(trace, "merging"):
            self._copy(shard, document_D)
        self.documents += len(document_D)
        self.batches += batches

    def _copy(self, shard: Shard, document_D: np.ndarray) -> None:
        files, first = shard.files, self.documents
        rank, number = files.rank, self.shards[files.rank]
        first_token = rank * schema.RANK_STRIDE + self.tokens[rank]
        batches, sequences = self.batches, self._sequences_before
        change: dict[str, Change] = {
            "token": lambda token_T: token_T + (first_token - files.first_token),
            "document": lambda document_T: first + np.searchsorted(document_D, document_T),
            "sequence": lambda sequence_T: sequence_T.astype(np.int64) + sequences,
            "batch": lambda batch_T: batch_T + batches,
        }
        span = {
            "shard": number,
            "first_token": first_token,
            "last_token": first_token + files.tokens - 1,
            "decisions": files.decisions,
            "first_batch": None if files.first_batch is None else files.first_batch + batches,
            "last_batch": files.last_batch + batches,
        }
        lines = b""
        for table in shard.trace.tables:
            path = f"{table}/part-{rank}-{number}.parquet"
            written = self._write(shard, table, self.root / path, change)
            lines += checksums.sealed({"table": table, "path": path, **written, **span})
            sync_directory(self.root / table)
        with open(self.root / f"shards-{rank}.jsonl", "ab") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        self.tokens[rank] += files.tokens
        self.shards[rank] += 1

    def _write(
        self, shard: Shard, table: str, path: Path, change: dict[str, Change]
    ) -> dict[str, Any]:
        trace = shard.trace
        columns = parts.columns_of(
            table, trace.routers, trace.slot_values, trace.has_energy, trace.has_loss
        )
        if table == "routing" and not any(
            one.nullable for one in shard.file(table).schema_arrow if one.name.startswith("expert_")
        ):
            columns = schema.routing_schema(trace.routers, trace.slot_values, nullable=False)
        of_routers = table in ("routing", "logits")
        groups = [
            partial(self._renumbered, shard, table, r, columns, change)
            for r in (range(len(trace.routers)) if of_routers else [0])
        ]
        bf16 = trace.manifest["capture"].get("weight_dtype") == "bfloat16"
        return write_part(path, columns, groups, bf16)

    def _renumbered(
        self,
        shard: Shard,
        table: str,
        router: int,
        columns: pa.Schema,
        change: dict[str, Change],
    ) -> pa.Table:
        """A table of the shard, or the rows of a router, with the new numbers."""
        if table == "routing":
            found = shard.routing(router)
            self.assignments += sum(
                len(found) - found[name].null_count
                for name in found.column_names
                if name.startswith("expert_")
            )
        elif table == "logits":
            found = shard.rows_of_router("logits", router, None)
        elif table == "counts":
            found = shard.counts()
            self.assignments += pc.sum(found["assignments"]).as_py() or 0  # pyright: ignore[reportAttributeAccessIssue]
        elif table == "tokens":
            found = shard.tokens()
            self._check_words(shard, found)
            self._count_sequences(shard, found)
        else:
            found = shard.table(table)
        arrays = [_column(found[one.name], one, change.get(one.name)) for one in columns]
        return pa.Table.from_arrays(arrays, schema=columns).unify_dictionaries()

    def _check_words(self, shard: Shard, tokens: pa.Table) -> None:
        highest = int(tokens["token_id"].to_numpy().max(initial=-1))
        if self.words is not None and highest >= self.words:
            raise MoeInspectError(
                f"{shard.trace.path} has token id {highest}, the vocabulary of the others "
                f"{self.words:,} tokens"
            )

    def _count_sequences(self, shard: Shard, tokens: pa.Table) -> None:
        highest = int(tokens["sequence"].to_numpy().max(initial=-1))
        self.sequences = max(self.sequences, self._sequences_before + highest + 1)
        _check_number(shard.trace, self.sequences, "sequences")


def _check_number(trace: TraceHeader, highest: int, what: str) -> None:
    if highest > MOST_NUMBER:
        raise MoeInspectError(
            f"with {trace.path} numbers of {what} go beyond {MOST_NUMBER:,}, the highest possible"
        )


def _documents(shard: Shard) -> np.ndarray:
    return shard.table("documents", ["document"])["document"].to_numpy()


def _column(found: pa.ChunkedArray, one: pa.Field, change: Change | None) -> Any:
    if change is not None:
        return pa.array(change(found.to_numpy())).cast(one.type)
    if found.type == one.type:
        return found
    if pa.types.is_dictionary(one.type):
        return found.cast(pa.string()).dictionary_encode()
    return found.cast(one.type)
