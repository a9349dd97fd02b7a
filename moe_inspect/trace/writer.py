"""TraceWriter: routed batches → atomic Parquet shards, in a background thread behind a bounded
queue.

T tokens of a batch, K slots, E experts. In memory an expert id is uint8 or uint16 and `NOWHERE`
(the dtype's maximum) marks a slot that routed nowhere; on disk that is null.
"""

from __future__ import annotations

import hashlib
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_inspect.errors import MoeInspectError, writing
from moe_inspect.text import first_line, storable
from moe_inspect.trace import checksums, schema, slot_order
from moe_inspect.trace.lock import Lock, hold
from moe_inspect.trace.schema import MOST_TOKEN_IDS, Router
from moe_inspect.trace.validate import Damaged

SHARD_TOKENS = 65_536
SHARD_BYTES = 60 * 2**20  # of decisions kept in memory: a shard of a deep model holds fewer tokens
SHARD_SECONDS = (
    60.0  # a slow model's decisions become readable, and safe, after so long at the latest
)
CONTINUED = (
    8  # times as much, and as long, where the next batch goes on with sequences of this shard
)
QUEUE_BATCHES = 2


@dataclass(frozen=True)
class Document:
    """`tokens` is what the plan will feed of it, special tokens included."""

    document: int
    domain: str
    source: str
    tokens: int


@dataclass(frozen=True)
class RoutedBatch:
    """One forward pass. Arrays of length T are in execution order; `ids[r]`: uint8 or uint16 [T,
    K_r], `weights[r]`: float16 [T, K_r], the bits of bfloat16 as uint16, float32 that one of the
    two holds exactly, or None (a trace without weights is still ordered by them), `logits[r]`:
    float16 [T, E_r]. `domains[d]` is the label of domain code d. Of an encoder-decoder the first
    `encoded` tokens were fed to the encoder, the others to the decoder, and a router has rows only
    of those it sees."""

    batch: int
    token_id: np.ndarray
    document: np.ndarray
    sequence: np.ndarray
    position: np.ndarray
    domain: np.ndarray
    domains: Sequence[str]
    ids: list[np.ndarray]
    weights: list[np.ndarray] | None
    logits: list[np.ndarray] | None = None
    documents: list[Document] = field(default_factory=list)
    phase: str = "prefill"
    group: int | None = (
        None  # passes of one group follow each other and are committed together, or not at all
    )
    encoded: int = 0

    def seen(self, router: Router) -> slice:
        """Which of its tokens a router sees."""
        if not router.stack:
            return slice(None)
        return slice(self.encoded) if router.stack == "encoder" else slice(self.encoded, None)

    @property
    def nbytes(self) -> int:
        return sum(
            a.nbytes
            for arrays in (self.ids, self.weights, self.logits)
            if arrays is not None
            for a in arrays
        )


@dataclass(frozen=True)
class CountedBatches:
    """Load summed over the batches up to `batch`: integers [D, E_r] a router (`weight_sum`:
    float64). `first_choice` is None where a source does not say: null in the table. `decisions`: of
    all routers, where they did not all see every token."""

    batch: int
    tokens: int
    domains: Sequence[str]
    assignments: list[np.ndarray]
    first_choice: list[np.ndarray] | None
    weight_sum: list[np.ndarray] | None
    documents: list[Document] = field(default_factory=list)
    decisions: int | None = None


class TraceWriter:
    """Writes a new trace at `root`, or appends to one that `resume_point` prepared. `write` may
    block (back-pressure) and re-raises what the background thread met, as a MoeInspectError where
    the user can mend it (a full disk). Leaving the `with` block by KeyboardInterrupt or any other
    exception closes the trace as "interrupted". The trace is locked until then, by the caller where
    a `lock` is given."""

    def __init__(
        self,
        root: str | Path,
        manifest: dict[str, Any],
        routers: Sequence[Router],
        *,
        weights: bool = True,
        logits: bool = False,
        counts_only: bool = False,
        vocabulary: pa.Table | None = None,
        rank: int = 0,
        shard_tokens: int = SHARD_TOKENS,
        shard_seconds: float = SHARD_SECONDS,
        queue_batches: int = QUEUE_BATCHES,
        resume: ResumePoint | None = None,
        lock: Lock | None = None,
    ):
        self.root, self.rank = Path(root), rank
        self.weights, self.logits, self.counts_only = weights, logits, counts_only
        self.shard_tokens, self.shard_seconds = shard_tokens, shard_seconds
        start = resume or ResumePoint()
        self.routers = [
            self._with_order(router, start.slot_orders.get(r)) for r, router in enumerate(routers)
        ]
        self.next_shard, self.next_token = (
            start.shards,
            start.next_token or rank * schema.RANK_STRIDE,
        )
        self.tokens, self.decisions = start.tokens, start.decisions
        self.dropped = 0  # decisions that were made and not handed over, told by who records
        self.others: Callable[[str], str] = lambda status: (
            status
        )  # own status → that of all ranks, when they have closed
        self.at_close: dict[
            str, Any
        ] = {}  # merged into the manifest's sections when the background thread is done
        self.tables = ["documents", "counts"] if counts_only else ["documents", "tokens", "routing"]
        self.tables += ["logits"] if logits else []
        self.manifest = {
            "format": schema.FORMAT,
            "status": "recording",
            **manifest,
            "capture": {**manifest.get("capture", {}), "weights": weights},
            "routers": [asdict(r) for r in self.routers],
            "tables": self.tables,
            "columns": schema.GLOSSARY,
            "counts": {"tokens": self.tokens, "decisions": self.decisions, "dropped": 0},
        }
        self._pending: list[RoutedBatch] = []
        self._pending_tokens = self._pending_bytes = 0
        self._pending_since = time.monotonic()
        self._reached: dict[
            tuple[int, int], int
        ] = {}  # document, sequence → its last position among what is pending
        self._error: BaseException | None = None
        self._lock = hold(self.root) if lock is None else None
        try:
            with writing(self.root):
                self._begin(vocabulary)
        except BaseException:
            self._unlock()
            raise
        self._queue: queue.Queue[RoutedBatch | CountedBatches | None] = queue.Queue(queue_batches)
        self._thread = threading.Thread(target=self._run, name="moe-inspect-writer", daemon=True)
        self._thread.start()

    def _begin(self, vocabulary: pa.Table | None) -> None:
        if self.rank == 0:
            self._write_vocabulary(vocabulary)
        self._write_manifest()
        for table in self.tables:
            (self.root / table).mkdir(exist_ok=True)
        (self.root / f"shards-{self.rank}.jsonl").touch()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close("complete" if kind is None else "interrupted", quiet=kind is not None)

    @property
    def full(self) -> bool:
        """Whether `write` would wait."""
        return self._queue.full()

    def write(self, batch: RoutedBatch | CountedBatches) -> None:
        self._raise()
        assert self._thread.is_alive(), "written to after close"
        if (
            isinstance(batch, RoutedBatch)
            and (highest := int(batch.token_id.max(initial=0))) >= MOST_TOKEN_IDS
        ):
            raise MoeInspectError(
                f"token id {highest} cannot be recorded: vocabularies have at most "
                f"{MOST_TOKEN_IDS:,} tokens"
            )
        self._queue.put(batch)

    def close(self, status: str = "complete", quiet: bool = False) -> None:
        """Commits what is pending and sets the status. With `quiet`, a failure of the writer does
        not hide the exception that is already on its way."""
        try:
            self._close(status)
        finally:
            self._unlock()
        if not quiet:
            self._raise()

    def _close(self, status: str) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        try:
            if (
                status != "complete"
                and self._pending
                and (group := self._pending[-1].group) is not None
            ):
                self._pending = [
                    b for b in self._pending if b.group != group
                ]  # more of it may have been to come
            if self._pending and self._error is None:
                self._commit_routing()
        except OSError as error:
            self._error = error
        for section, values in self.at_close.items():
            self.manifest[section] = {**self.manifest.get(section, {}), **values}
        interrupted: KeyboardInterrupt | None = None
        try:
            self.manifest["status"] = self.others("interrupted" if self._error else status)
        except KeyboardInterrupt as error:  # while waiting for other ranks
            self.manifest["status"], interrupted = "interrupted", error
        self.manifest["counts"]["dropped"] = self.dropped
        try:
            if self.rank == 0:
                self.manifest["counts"] |= committed_counts(self.root, self.manifest)
            self._write_manifest()
        except OSError as error:
            self._error = self._error or error
        if interrupted is not None:
            raise interrupted

    def _with_order(self, router: Router, written: str | None) -> Router:
        """The router with the order of its slots stated: that of what is `written` already, else by
        weight where decisions come with weights or logits, or where the caller says that it is
        known."""
        if written is not None:
            return replace(router, slot_order=written)
        known = router.first_choice_known or (
            not self.counts_only and (self.weights or self.logits)
        )
        return slot_order.stated(router, known)

    def _write_vocabulary(self, vocabulary: pa.Table | None) -> None:
        """Before the manifest, which states its checksum."""
        from moe_inspect.trace.reader import read_manifest

        path, resumed = self.root / schema.VOCABULARY, (self.root / schema.MANIFEST).exists()
        if vocabulary is not None and not (resumed and path.exists()):
            sink = pa.BufferOutputStream()
            pq.write_table(
                vocabulary.cast(schema.VOCABULARY_SCHEMA),
                sink,
                compression="zstd",
                write_page_checksum=True,
            )
            schema.write_atomically(path, sink.getvalue().to_pybytes())
        if path.exists():
            data = path.read_bytes()
            found = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            if resumed and read_manifest(self.root).get("vocabulary", found) != found:
                raise Damaged(
                    path,
                    "it was changed after it was written (trace.json says so)",
                    schema.VOCABULARY,
                )
            self.manifest["vocabulary"] = found

    def _write_manifest(self) -> None:
        if self.rank == 0:
            schema.write_manifest(self.root, self.manifest)

    def _raise(self) -> None:
        if isinstance(self._error, OSError):
            raise MoeInspectError(
                f"cannot write {self.root}: {first_line(self._error)}; {self.tokens:,} tokens "
                "are safe there: "
                "mend it and go on with --resume"
            ) from self._error
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            for batch in iter(self._queue.get, None):
                if isinstance(batch, CountedBatches):
                    self._commit_counts(batch)
                else:
                    self._take(batch)
        except BaseException as error:
            self._error = error
            for _ in iter(
                self._queue.get, None
            ):  # whoever waits in write() must wake, and learn of it at the next call
                pass

    def _take(self, batch: RoutedBatch) -> None:
        together = (
            self._pending and batch.group is not None and batch.group == self._pending[-1].group
        )
        reached = _reached(batch)
        if self._pending and not together and self._is_due(batch):
            # what is counted of consecutive tokens is counted shard by shard: a sequence stays in
            # one, as far as memory allows
            continued = any(
                self._reached.get(key) == first - 1 for key, (first, _) in reached.items()
            )
            if not continued or self._is_due(batch, CONTINUED):
                self._commit_routing()
        if not self._pending:
            self._pending_since = time.monotonic()
        self._pending.append(batch)
        self._reached.update((key, last) for key, (_, last) in reached.items())
        self._pending_tokens += len(batch.token_id)
        self._pending_bytes += batch.nbytes

    def _is_due(self, batch: RoutedBatch, times: int = 1) -> bool:
        """Whether the shard is to be committed before `batch` joins it: it would grow too large, or
        has waited too long."""
        return (
            self._pending_tokens + len(batch.token_id) > times * self.shard_tokens
            or self._pending_bytes + batch.nbytes > times * SHARD_BYTES
            or time.monotonic() - self._pending_since > times * self.shard_seconds
        )

    # --- commits: documents, tokens, routing, then the shard's lines in one write

    def _commit_routing(self) -> None:
        batches, self._pending, self._pending_tokens, self._pending_bytes = self._pending, [], 0, 0
        self._reached = {}
        sizes = [len(b.token_id) for b in batches]
        T = sum(sizes)
        token = pa.array(np.arange(self.next_token, self.next_token + T, dtype=np.int64))
        domains = list(max((b.domains for b in batches), key=len))
        facts = {
            name: _column(batches, name)
            for name in ("token_id", "document", "sequence", "position")
        }
        tokens = pa.table(
            {
                "token": token,
                **facts,
                "domain": _labels(np.concatenate([b.domain for b in batches]), domains),
                "phase": _labels(
                    np.concatenate([_phases(b) for b in batches]),
                    list(
                        schema.PHASES if any(r.stack for r in self.routers) else schema.PHASES[:2]
                    ),
                ),
                "batch": pa.array(np.repeat(np.array([b.batch for b in batches], np.int32), sizes)),
            },
            schema=schema.TOKENS,
        )
        columns = schema.routing_schema(
            self.routers, self.weights, nullable=self._routed_nowhere(batches)
        )
        lines = [
            self._write_documents([d for b in batches for d in b.documents]),
            self._write_part("tokens", schema.TOKENS, [lambda: tokens]),
            self._write_part(
                "routing",
                columns,
                [self._routing_of(r, batches, token, columns) for r in range(len(self.routers))],
                bf16=all(w.dtype == np.uint16 for b in batches for w in b.weights or []),
            ),
        ]
        decisions = lines[-1]["rows"]
        if self.logits:
            experts = max(r.experts for r in self.routers)
            lines.append(
                self._write_part(
                    "logits",
                    schema.logits_schema(experts),
                    [self._logits_of(r, batches, token, experts) for r in range(len(self.routers))],
                )
            )
        self._commit(lines, T, decisions, batches[0].batch, batches[-1].batch)

    def _routed_nowhere(self, batches: list[RoutedBatch]) -> bool:
        """Whether any slot of these batches is null in the table."""
        slots = max(r.top_k for r in self.routers)
        return any(r.top_k < slots for r in self.routers) or any(
            _holds_nowhere(ids, r.experts)
            for b in batches
            for ids, r in zip(b.ids, self.routers, strict=True)
        )

    def _routing_of(
        self, r: int, batches: list[RoutedBatch], token: pa.Array, schema_of: pa.Schema
    ) -> Callable[[], pa.Table]:
        def table() -> pa.Table:
            parts = [b.ids[r] for b in batches]
            ids_KT = _slot_major(
                parts, max((p.dtype for p in parts if len(p)), default=parts[0].dtype)
            )
            assert len(ids_KT) == self.routers[r].top_k
            seen = self._seen(r, batches, token)
            nowhere_KT = (
                ids_KT == np.iinfo(ids_KT.dtype).max
                if _holds_nowhere(ids_KT, self.routers[r].experts)
                else None
            )
            experts_KT = ids_KT.astype(schema.id_dtype(self.routers).to_pandas_dtype(), copy=False)
            weights = [_widened(b.weights[r]) for b in batches if b.weights is not None]
            weights_KT = _slot_major(weights, np.float32) if weights else None
            order_KT = self._slot_order(r, batches, experts_KT, nowhere_KT, weights_KT)
            if order_KT is not None:
                experts_KT = np.take_along_axis(experts_KT, order_KT, 0)
                nowhere_KT = (
                    None if nowhere_KT is None else np.take_along_axis(nowhere_KT, order_KT, 0)
                )
                weights_KT = (
                    None if weights_KT is None else np.take_along_axis(weights_KT, order_KT, 0)
                )
            columns = [seen, *self._router_columns(r, len(seen))]
            columns += _slots(experts_KT, nowhere_KT, schema_of, "expert")
            if self.weights:
                assert weights_KT is not None
                columns += _slots(weights_KT, nowhere_KT, schema_of, "weight")
            return pa.Table.from_arrays(columns, schema=schema_of)

        return table

    def _slot_order(
        self,
        r: int,
        batches: list[RoutedBatch],
        experts_KT: np.ndarray,
        nowhere_KT: np.ndarray | None,
        weights_KT: np.ndarray | None,
    ) -> np.ndarray | None:
        """How the slots of these decisions come into the order that the manifest states; None where
        they are in it."""
        if not self.routers[r].first_choice_known:
            return None
        if weights_KT is not None:
            return slot_order.descending(weights_KT, nowhere_KT)
        if not self.logits:
            return None
        logits_TE = np.concatenate([b.logits[r] for b in batches if b.logits is not None])
        return slot_order.descending(
            slot_order.chosen_logits(logits_TE, experts_KT, nowhere_KT), nowhere_KT
        )

    def _logits_of(
        self, r: int, batches: list[RoutedBatch], token: pa.Array, experts: int
    ) -> Callable[[], pa.Table]:
        def table() -> pa.Table:
            logits_TE = np.concatenate(
                [b.logits[r] for b in batches if b.logits is not None]
            ).astype(np.float16, copy=False)
            # a router of fewer experts than the widest is padded with NaN: one table, one width
            padded_TE = np.pad(
                logits_TE, ((0, 0), (0, experts - logits_TE.shape[1])), constant_values=np.nan
            )
            values = pa.FixedSizeListArray.from_arrays(pa.array(padded_TE.reshape(-1)), experts)
            seen = self._seen(r, batches, token)
            return pa.Table.from_arrays(
                [seen, *self._router_columns(r, len(seen)), values],
                schema=schema.logits_schema(experts),
            )

        return table

    def _seen(self, r: int, batches: list[RoutedBatch], token: pa.Array) -> pa.Array:
        """Those of the tokens that router r sees."""
        if not self.routers[r].stack:
            return token
        parts, start = [], 0
        for batch in batches:
            parts.append(token[start : start + len(batch.token_id)][batch.seen(self.routers[r])])
            start += len(batch.token_id)
        return pa.concat_arrays(parts)

    def _router_columns(self, r: int, rows: int) -> list[pa.Array]:
        return [pa.array(np.full(rows, value, np.uint16)) for value in (self.routers[r].layer, r)]

    def _commit_counts(self, counted: CountedBatches) -> None:
        def table_of(r: int) -> Callable[[], pa.Table]:
            def table() -> pa.Table:
                D, E = counted.assignments[r].shape
                columns = [
                    *self._router_columns(r, D * E),
                    _labels(np.repeat(np.arange(D), E), list(counted.domains)),
                    pa.array(np.tile(np.arange(E, dtype=np.uint16), D)),
                    pa.array(counted.assignments[r].reshape(-1).astype(np.int64)),
                    pa.nulls(D * E, pa.int64())
                    if counted.first_choice is None
                    else pa.array(counted.first_choice[r].reshape(-1).astype(np.int64)),
                ]
                columns += (
                    [pa.array(counted.weight_sum[r].reshape(-1))]
                    if counted.weight_sum is not None
                    else []
                )
                return pa.Table.from_arrays(columns, schema=schema.counts_schema(self.weights))

            return table

        lines = [
            self._write_documents(counted.documents),
            self._write_part(
                "counts",
                schema.counts_schema(self.weights),
                [table_of(r) for r in range(len(self.routers))],
            ),
        ]
        decisions = (
            counted.decisions
            if counted.decisions is not None
            else counted.tokens * len(self.routers)
        )
        self._commit(lines, counted.tokens, decisions, None, counted.batch)

    def _write_documents(self, documents: list[Document]) -> dict[str, Any]:
        rows = {
            "document": pa.array([d.document for d in documents], pa.int32()),
            "domain": pa.array(
                [storable(d.domain) for d in documents], pa.string()
            ).dictionary_encode(),
            "source": pa.array(
                [storable(d.source) for d in documents], pa.string()
            ).dictionary_encode(),
            "tokens": pa.array([d.tokens for d in documents], pa.int32()),
        }
        return self._write_part(
            "documents", schema.DOCUMENTS, [lambda: pa.table(rows, schema=schema.DOCUMENTS)]
        )

    def _write_part(
        self,
        table: str,
        columns: pa.Schema,
        groups: Sequence[Callable[[], pa.Table]],
        bf16: bool = False,
    ) -> dict[str, Any]:
        """One part file, a row group at a time: temporary name, fsync, rename. `bf16`: its weights
        are. Returns its line for shards-<rank>.jsonl."""
        name = f"part-{self.rank}-{self.next_shard}.parquet"
        codecs = {f.name: _codec(f.name, bf16) for f in columns}
        rows, labels = (
            0,
            [f.name for f in columns if f.name in _DICTIONARY or f.name.startswith("expert")],
        )
        encodings = {f.name: _encoding(f) for f in columns if f.name not in labels}
        with (
            schema.draft_of(self.root / table / name) as draft,
            open(draft, "wb", buffering=2**20) as file,
        ):
            sink = _HashingFile(file)
            # (pyarrow's stubs know only one value for all columns)
            with pq.ParquetWriter(
                pa.PythonFile(sink, "w"),
                columns,
                compression=codecs,  # pyright: ignore[reportArgumentType]
                compression_level={name: 1 for name, codec in codecs.items() if codec == "zstd"},
                use_dictionary=labels,  # pyright: ignore[reportArgumentType]
                column_encoding={name: code for name, code in encodings.items() if code},
                write_statistics=[f.name for f in columns if f.name in _STATISTICS],  # pyright: ignore[reportArgumentType]
                write_page_checksum=True,
            ) as writer:
                for make in groups:
                    part = make()
                    rows += len(part)
                    writer.write_table(part, row_group_size=max(len(part), 1))
            file.flush()
            os.fsync(file.fileno())
            with open(draft, "rb") as written:
                footer_crc32 = checksums.footer_crc32(pa.PythonFile(written))
        line = {"table": table, "path": f"{table}/{name}", "rows": rows, "bytes": sink.size}
        return {**line, "footer_crc32": footer_crc32, "sha256": sink.digest.hexdigest()}

    def _commit(
        self,
        lines: list[dict[str, Any]],
        tokens: int,
        decisions: int,
        first_batch: int | None,
        last_batch: int,
    ) -> None:
        for table in self.tables:
            schema.sync_directory(self.root / table)
        span = {
            "shard": self.next_shard,
            "first_token": self.next_token,
            "last_token": self.next_token + tokens - 1,
            "decisions": decisions,
            "first_batch": first_batch,
            "last_batch": last_batch,
        }
        text = b"".join(checksums.sealed({**line, **span}) for line in lines)
        with open(self.root / f"shards-{self.rank}.jsonl", "ab") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self.next_shard += 1
        self.next_token += tokens
        self.tokens += tokens
        self.decisions += decisions
        self.manifest["counts"] = {
            "tokens": self.tokens,
            "decisions": self.decisions,
            "dropped": self.dropped,
        }
        self._write_manifest()


_DICTIONARY = {
    "layer",
    "router",
    "token_id",
    "document",
    "sequence",
    "position",
    "domain",
    "source",
    "phase",
    "batch",
}
_STATISTICS = {"token", "layer", "router", "document", "batch"}


def _codec(column: str, bf16: bool) -> str:
    # expert ids leave the dictionary encoding bit-packed and near their entropy: a codec only costs
    # time on them
    if column.startswith("expert"):
        return "none"
    # of the bytes of a bf16 weight two are zero and one is nearly always the same: lz4 takes a
    # third of zstd's time to read and half to write, for a fifth more of space; fp16's third byte
    # has 3 bits of use, which only an entropy coder finds
    return "lz4" if bf16 and column.startswith("weight") else "zstd"


def _encoding(column: pa.Field) -> str | None:
    # every reader can read these: DuckDB reads BYTE_STREAM_SPLIT of float32, but not of float16
    if pa.types.is_float32(column.type):
        return "BYTE_STREAM_SPLIT"
    return "DELTA_BINARY_PACKED" if column.name == "token" else None


def _reached(batch: RoutedBatch) -> dict[tuple[int, int], tuple[int, int]]:
    """(document, sequence) → the first and the last position of its last run of rows; those of an
    encoder come before."""
    changed_T = np.ones(len(batch.document) + 1, bool)
    changed_T[1:-1] = (np.diff(batch.document) != 0) | (np.diff(batch.sequence) != 0)
    changed_T[min(batch.encoded, len(batch.document))] = True
    edges = np.flatnonzero(changed_T)
    first, last = edges[:-1], edges[1:] - 1
    keys = zip(batch.document[first].tolist(), batch.sequence[first].tolist(), strict=True)
    return dict(
        zip(
            keys,
            zip(batch.position[first].tolist(), batch.position[last].tolist(), strict=True),
            strict=True,
        )
    )


def _phases(batch: RoutedBatch) -> np.ndarray:
    codes = np.full(len(batch.token_id), schema.PHASES.index(batch.phase))
    codes[: batch.encoded] = schema.PHASES.index("encode")
    return codes


def _column(batches: list[RoutedBatch], name: str) -> pa.Array:
    return pa.array(
        np.concatenate([getattr(b, name) for b in batches]).astype(np.int32, copy=False)
    )


def _labels(codes: np.ndarray, labels: list[str]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(
        pa.array(codes.astype(np.int32, copy=False)), pa.array(map(storable, labels), pa.string())
    )


def _holds_nowhere(ids: np.ndarray, experts: int) -> bool:
    return bool(ids.size) and int(ids.max()) >= experts


def _slot_major(parts_TK: list[np.ndarray], dtype: Any) -> np.ndarray:
    """[K, T], each slot contiguous: what a column is made of without another copy."""
    values_KT = np.empty((parts_TK[0].shape[1], sum(map(len, parts_TK))), dtype)
    return np.concatenate([part.T for part in parts_TK], axis=1, out=values_KT)


def _widened(weights_TK: np.ndarray) -> np.ndarray:
    return (
        (weights_TK.astype(np.uint32) << 16).view(np.float32)
        if weights_TK.dtype == np.uint16
        else weights_TK
    )


def _slots(
    values_KT: np.ndarray, nowhere_KT: np.ndarray | None, columns: pa.Schema, prefix: str
) -> list[pa.Array]:
    fields = [f for f in columns if f.name.startswith(prefix)]
    masks = nowhere_KT if nowhere_KT is not None else [None] * len(values_KT)
    arrays = [_array(v, m, f.type) for v, m, f in zip(values_KT, masks, fields, strict=False)]
    # slots beyond this router's own top-k
    return arrays + [pa.nulls(values_KT.shape[1], f.type) for f in fields[len(arrays) :]]


def _array(values_T: np.ndarray, null_T: np.ndarray | None, kind: pa.DataType) -> pa.Array:
    if null_T is not None:
        return pa.array(values_T, type=kind, mask=null_T)
    assert values_T.flags.c_contiguous
    return pa.Array.from_buffers(kind, len(values_T), [None, pa.py_buffer(values_T)])


class _HashingFile:
    """A file that knows the sha256 of what went through it, so that no byte is read twice."""

    closed = False

    def __init__(self, file: Any):
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        self.file.write(data)
        return len(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.closed = True


# --- where a trace stands


@dataclass(frozen=True)
class ResumePoint:
    """What a rank has committed: the next batch, document… to do. `slot_orders`: of the routers, by
    index."""

    shards: int = 0
    next_token: int = 0
    next_batch: int = 0
    tokens: int = 0
    decisions: int = 0
    slot_orders: dict[int, str] = field(default_factory=dict)


def committed_counts(root: Path, manifest: dict[str, Any]) -> dict[str, int]:
    """Tokens and decisions in the committed shards of all ranks."""
    from moe_inspect.trace.reader import committed_shards

    shards = committed_shards(root, manifest)
    return {"tokens": sum(s.tokens for s in shards), "decisions": sum(s.decisions for s in shards)}


def resume_point(root: Path, rank: int = 0) -> ResumePoint:
    """Where rank `rank` of the trace at `root` goes on; deletes the files no committed line speaks
    of. Its caller holds the lock."""
    from moe_inspect.trace.reader import committed_shards, inside, read_manifest

    manifest = read_manifest(root)
    shards = [s for s in committed_shards(root, manifest) if s.rank == rank]
    keep = {root / path for s in shards for path in s.paths.values()}
    own = re.compile(rf"part-{rank}-\d+\.parquet|\.part-{rank}-\d+\.parquet\.tmp")
    for table in manifest["tables"]:
        inside(root, table)
        for file in (root / table).iterdir() if (root / table).is_dir() else ():
            if own.fullmatch(file.name) and file not in keep and not file.is_dir():
                file.unlink()
    lines = b"".join(line for s in shards for line in s.lines)
    schema.write_atomically(root / f"shards-{rank}.jsonl", lines)  # without the torn tail
    slot_orders = {r: router.get("slot_order", "") for r, router in enumerate(manifest["routers"])}
    if not shards:
        return ResumePoint(slot_orders=slot_orders)
    return ResumePoint(
        shards=shards[-1].index + 1,
        next_token=shards[-1].last_token + 1,
        next_batch=shards[-1].last_batch + 1,
        tokens=sum(s.tokens for s in shards),
        decisions=sum(s.decisions for s in shards),
        slot_orders=slot_orders,
    )
