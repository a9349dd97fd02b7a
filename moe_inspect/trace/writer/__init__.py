"""Writes a trace: batches of what is recorded or imported become shards of Parquet files, committed
by a background thread behind a bounded queue."""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from moe_inspect.errors import Damaged, MoeInspectError, writing
from moe_inspect.text import first_line
from moe_inspect.trace import schema
from moe_inspect.trace.files import checksums
from moe_inspect.trace.files.atomic import append, write_atomically
from moe_inspect.trace.files.checksums import Json
from moe_inspect.trace.files.location import inside, output_location
from moe_inspect.trace.files.lock import Lock, drafts_of, hold
from moe_inspect.trace.header import TraceHeader
from moe_inspect.trace.manifest import read_manifest, write_manifest
from moe_inspect.trace.schema import MOST_TOKEN_IDS, Router
from moe_inspect.trace.shard import Shard
from moe_inspect.trace.shard_list import ShardFiles, committed_shards
from moe_inspect.trace.writer import tables
from moe_inspect.trace.writer.batches import (
    CountedBatches,
    Document,
    PendingShard,
    RoutedBatch,
    ShardLimits,
)
from moe_inspect.trace.writer.tables import vocabulary_bytes, write_shard


@dataclass(frozen=True)
class ResumePoint:
    """What a rank has committed, and the numbers of the next shard, token and batch. `slot_orders`:
    router → the order of its slots in what is written."""

    rank: int = 0
    shards: int = 0
    next_token: int = 0
    next_batch: int = 0
    tokens: int = 0
    decisions: int = 0
    slot_orders: dict[int, str] = field(default_factory=dict)


def committed_counts(root: Path, manifest: Json) -> dict[str, int]:
    """Tokens and decisions in the committed shards of all ranks."""
    return _counts(committed_shards(root, manifest))


def _counts(shards: list[ShardFiles]) -> dict[str, int]:
    return {"tokens": sum(s.tokens for s in shards), "decisions": sum(s.decisions for s in shards)}


def resume_point(root: Path, rank: int = 0) -> ResumePoint:
    """Where rank `rank` of the trace at `root` continues: after its last shard. Deletes the rank's
    files that no line names. Damaged if a file of a shard is damaged or missing. The caller holds
    the lock."""
    manifest = read_manifest(root)
    shards = [s for s in committed_shards(root, manifest) if s.rank == rank]
    for shard in (Shard(TraceHeader(root, manifest), files) for files in shards):
        for table in shard.files.paths:
            shard.file(table)
    _list_shards(root, rank, shards)  # without a partial last line
    keep = {root / path for s in shards for path in s.paths.values()}
    part = rf"part-{rank}-\d+\.parquet"
    own = re.compile(rf"{part}|{drafts_of(part)}")
    for table in manifest["tables"]:
        folder = inside(root, table)
        for file in folder.iterdir() if folder.is_dir() else ():
            if own.fullmatch(file.name) and file not in keep and not file.is_dir():
                file.unlink()
    slot_orders = {r: router.get("slot_order", "") for r, router in enumerate(manifest["routers"])}
    if not shards:
        return ResumePoint(rank, slot_orders=slot_orders)
    return ResumePoint(
        rank,
        shards=shards[-1].index + 1,
        next_token=shards[-1].last_token + 1,
        next_batch=shards[-1].last_batch + 1,
        **_counts(shards),
        slot_orders=slot_orders,
    )


def drop_after(root: Path, batch: int) -> int | None:
    """Takes from the list of rank 0 the shards that hold any batch after `batch`; their files
    are deleted by `resume_point`. For traces of one rank. Returns the last batch that is left, None
    where none is. The caller holds the lock."""
    manifest = read_manifest(root)
    shards = committed_shards(root, manifest)
    kept = [s for s in shards if s.last_batch <= batch]
    if len(kept) < len(shards):
        # first, so that it never counts more tokens than the shards have
        counts = {**_counts(kept), "dropped": 0}
        write_manifest(root, {**manifest, "status": "recording", "counts": counts})
    _list_shards(root, 0, kept)
    return kept[-1].last_batch if kept else None


def _list_shards(root: Path, rank: int, shards: list[ShardFiles]) -> None:
    """Write the list of a rank's shards."""
    write_atomically(root / f"shards-{rank}.jsonl", b"".join(x for s in shards for x in s.lines))


QUEUE_BATCHES = 2
Groups = dict[str, Sequence[Callable[[], pa.Table]]]  # table → what makes each of its row groups


class TraceWriter:
    """Writes a new trace at `root`, or appends to one that `resume_point` prepared. `resume` names
    the rank too, if there are several.

    `write` may block (back-pressure) and re-raises the background thread's exception, as a
    MoeInspectError where the user can fix it (a full disk). Leaving the `with` block by
    KeyboardInterrupt or any other exception closes the trace as "interrupted". The writer holds the
    trace's lock until then, unless the caller holds it and passes it as `lock`.

    `extras`: what the trace has too: logits=True, or the
    name of any of `schema.OPTIONAL_GLOSSARY`."""

    def __init__(
        self,
        root: str | Path,
        manifest: Json,
        routers: Sequence[Router],
        *,
        weights: bool = True,
        counts_only: bool = False,
        vocabulary: pa.Table | None = None,
        limits: ShardLimits | None = None,
        resume: ResumePoint | None = None,
        lock: Lock | None = None,
        **extras: bool,
    ):
        if unknown := extras.keys() - schema.OPTIONAL_GLOSSARY.keys() - {"logits"}:
            raise TypeError(f"a trace has no {unknown.pop()}")
        start = resume or ResumePoint()
        self.root, self.rank = output_location(root), start.rank
        self.limits = limits or ShardLimits()
        self.logits = extras.get("logits", False)
        by_values = not counts_only and (weights or self.logits)
        self.routers = [  # with the order of what is written already, else the one that is known
            replace(router, slot_order=start.slot_orders[r])
            if r in start.slot_orders
            else router.with_slot_order(router.first_choice_known or by_values)
            for r, router in enumerate(routers)
        ]
        facts = [name for name in schema.OPTIONAL_GLOSSARY if extras.get(name)]
        columns = dict(schema.GLOSSARY)
        for name in facts:
            columns |= schema.OPTIONAL_GLOSSARY[name]
        self.next_shard = start.shards
        self.next_token = start.next_token or self.rank * schema.RANK_STRIDE
        self.tokens, self.decisions = start.tokens, start.decisions
        self.dropped = 0  # decisions that the recorder made but could not hand over
        self.unlinked = 0  # sequences that began because what they continue was not recorded
        # where what is lost cannot be recorded again, the decisions that were to be written: those
        # that are missing at a failed close were dropped
        self.given: int | None = None
        # own status → that of all ranks, when they have closed
        self.others: Callable[[str], str] = lambda status: status
        # merged into the manifest's sections when the background thread is done
        self.at_close: Json = {}
        self.tables = ["documents", "counts"] if counts_only else ["documents", "tokens", "routing"]
        self.tables += ["logits"] if self.logits else []
        stated = {"weights": weights, **dict.fromkeys(facts, True)}
        self.manifest = {
            "format": schema.FORMAT,
            "status": "recording",
            **manifest,
            "capture": {**manifest.get("capture", {}), **stated},
            "routers": [asdict(r) for r in self.routers],
            "tables": self.tables,
            "columns": columns,
            "counts": self._totals(),
        }
        self.header = TraceHeader(self.root, self.manifest)
        self._pending = PendingShard(self.limits)
        self._shard_list = self.root / f"shards-{self.rank}.jsonl"
        self._last_commit = time.monotonic()
        self._error: BaseException | None = None
        self._lock = lock or hold(self.root)
        self._release = self._lock.release if lock is None else lambda: None
        try:
            with writing(self.root):
                self._begin(vocabulary)
        except BaseException:
            self._release()
            raise
        self._queue: queue.Queue[RoutedBatch | CountedBatches | None] = queue.Queue(QUEUE_BATCHES)
        self._thread = threading.Thread(target=self._run, name="moe-inspect-writer", daemon=True)
        self._thread.start()

    def _begin(self, vocabulary: pa.Table | None) -> None:
        """Writes the vocabulary, the manifest, which states its checksum, and what shards need."""
        path, resumed = self.root / schema.VOCABULARY, (self.root / schema.MANIFEST).exists()
        if self.rank == 0:
            if vocabulary is not None and not (resumed and path.exists()):
                write_atomically(path, vocabulary_bytes(vocabulary))
            if path.exists():
                found = checksums.stated(path.read_bytes())
                if resumed and read_manifest(self.root).get("vocabulary", found) != found:
                    said = "it was changed after it was written (trace.json states another sha256)"
                    raise Damaged(path, said, schema.VOCABULARY)
                self.manifest["vocabulary"] = found
        self._write_manifest()
        for folder in (self.root / table for table in self.tables):
            folder.mkdir(exist_ok=True)
        append(self._shard_list, b"")  # it is there, if empty

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close("complete" if kind is None else "interrupted", quiet=kind is not None)

    @property
    def full(self) -> bool:
        """Whether `write` would wait."""
        return self._queue.full()

    @property
    def failed(self) -> bool:
        return self._error is not None

    def write(self, batch: RoutedBatch | CountedBatches) -> None:
        self.check()
        assert self._thread.is_alive(), "written to after close"
        highest = int(batch.token_id.max(initial=0)) if isinstance(batch, RoutedBatch) else 0
        if highest >= MOST_TOKEN_IDS:
            said = f"vocabularies have at most {MOST_TOKEN_IDS:,} tokens"
            raise MoeInspectError(f"token id {highest} cannot be recorded: {said}")
        self._queue.put(batch)

    def close(self, status: str = "complete", quiet: bool = False) -> None:
        """Commits what is pending and sets the status. With `quiet`, a failure of the writer does
        not hide the exception that is already on its way."""
        try:
            self._close(status)
        finally:
            self._release()
        if not quiet:
            self.check()

    def _close(self, status: str) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        try:
            closed = None if status == "complete" else self._pending.of_closed_groups()
            if self._error is None and self._pending.batches[:closed]:
                self._commit_routing(self._pending.take(closed))
        except OSError as error:
            self._error = error
        for section, values in self.at_close.items():
            self.manifest[section] = {**self.manifest.get(section, {}), **values}
        interrupted: KeyboardInterrupt | None = None
        try:
            self.manifest["status"] = self.others("interrupted" if self._error else status)
        except KeyboardInterrupt as error:  # while waiting for other ranks
            self.manifest["status"], interrupted = "interrupted", error
        if self._error is not None and self.given is not None:
            self.dropped += self.given - self.decisions
        self.manifest["counts"] |= self._totals()
        try:
            if self.rank == 0:
                self.manifest["counts"] |= committed_counts(self.root, self.manifest)
            self._write_manifest()
        except OSError as error:
            self._error = self._error or error
        if interrupted is not None:
            raise interrupted

    def _write_manifest(self) -> None:
        if self.rank == 0:
            write_manifest(self.root, self.manifest)

    def check(self) -> None:
        """Raises what ended the background thread, as `write` does."""
        if isinstance(self._error, OSError):
            safe = f"{self.tokens:,} tokens are safe there: mend it and go on with --resume"
            said = f"cannot write {self.root}: {first_line(self._error)}; {safe}"
            raise MoeInspectError(said) from self._error
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            for batch in iter(self._next, None):
                if isinstance(batch, CountedBatches):
                    self._commit_counts(batch)
                else:
                    self._take(batch)
        except BaseException as error:
            self._error = error
            # a blocked write() must wake up; the next call raises the error
            for _ in iter(self._queue.get, None):
                pass

    def _next(self) -> RoutedBatch | CountedBatches | None:
        """Return the next batch. Pending batches that are due by `commit_every` are committed
        before and while it waits."""
        while True:
            closed, wait_s = self._pending.of_closed_groups(), None
            if self.limits.commit_every is not None and closed:
                due = self._last_commit + self.limits.commit_every
                wait_s = max(0.0, due - time.monotonic())
            try:
                if wait_s != 0:
                    return self._queue.get(timeout=wait_s)
            except queue.Empty:
                pass
            self._commit_routing(self._pending.take(closed))

    def _take(self, batch: RoutedBatch) -> None:
        # where a shard ends must not depend on how many passes came together
        alone = batch.batches is None or not self._pending.is_due(batch)
        for part in [batch] if alone else batch.passes():
            if self._pending.ends_before(part):
                self._commit_routing(self._pending.take())
            self._pending.add(part)

    # --- commits: documents, tokens, routing, then the shard's lines in one write

    def _commit_routing(self, batches: list[RoutedBatch]) -> None:
        trace, T = self.header, sum(len(b.token_id) for b in batches)
        token = pa.array(np.arange(self.next_token, self.next_token + T, dtype=np.int64))
        tokens = tables.tokens_table(batches, token, trace)
        columns = {"tokens": tokens.schema, "routing": tables.routing_columns(trace, batches)}
        columns |= {"logits": trace.columns_of("logits")} if self.logits else {}
        make = {"routing": tables.routing_table, "logits": tables.logits_table}
        groups: Groups = {
            table: [
                partial(make[table], trace, r, batches, token, columns[table])
                for r in range(len(self.routers))
            ]
            for table in columns.keys() & make.keys()
        }
        self._commit(
            [d for b in batches for d in b.documents],
            columns,
            {"tokens": [lambda: tokens], **groups},
            tokens=T,
            decisions=None,
            batches=(batches[0].first_batch, batches[-1].batch),
            bf16=all(w.dtype == np.uint16 for b in batches for w in b.weights or []),
        )

    def _commit_counts(self, counted: CountedBatches) -> None:
        L = len(self.routers)
        everywhere = counted.tokens * L
        self._commit(
            counted.documents,
            {"counts": self.header.columns_of("counts")},
            {"counts": [partial(tables.counts_table, self.header, r, counted) for r in range(L)]},
            tokens=counted.tokens,
            decisions=everywhere if counted.decisions is None else counted.decisions,
            batches=(counted.first_batch, counted.batch),
        )

    def _commit(
        self,
        documents: list[Document],
        columns: dict[str, pa.Schema],
        groups: Groups,
        *,
        tokens: int,
        decisions: int | None,
        batches: tuple[int | None, int],
        bf16: bool = False,
    ) -> None:
        """Write the tables of the next shard, documents first, each from its columns and row
        groups, and commit it. `decisions`: None for the rows of its routing table. `batches`: the
        first and the last."""
        listed = tables.documents_table(documents)
        columns = {"documents": schema.DOCUMENTS, **columns}
        groups = {"documents": [lambda: listed], **groups}
        lines = write_shard(self.root, self.rank, self.next_shard, columns, groups, bf16)
        rows = {line["table"]: line["rows"] for line in lines}
        decisions = int(rows["routing"]) if decisions is None else decisions
        stated = {
            "shard": self.next_shard,
            "first_token": self.next_token,
            "last_token": self.next_token + tokens - 1,
            "decisions": decisions,
            "first_batch": batches[0],
            "last_batch": batches[1],
        }
        if stated["last_token"] >= (self.rank + 1) * schema.RANK_STRIDE:
            said = f"over {schema.RANK_STRIDE:,} tokens, more than a trace can number"
            raise MoeInspectError(f"{said}: write several")
        append(self._shard_list, b"".join(checksums.sealed({**line, **stated}) for line in lines))
        self._last_commit = time.monotonic()
        self.next_shard += 1
        self.next_token += tokens
        self.tokens += tokens
        self.decisions += decisions
        self.manifest["counts"] = self._totals()
        self._write_manifest()

    def _totals(self) -> Json:
        """Return the counts that the manifest states."""
        names = ("tokens", "decisions", "dropped", *(["unlinked"] if self.unlinked else []))
        return {name: getattr(self, name) for name in names}
