"""Shards of one trace become shards of another, whole or some of their documents: numbers change,
everything else stays as it is. A router of a shard at a time is in memory.

T tokens, D documents.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa

from moe_inspect.errors import MoeInspectError
from moe_inspect.trace import replicas, schema
from moe_inspect.trace.files import checksums
from moe_inspect.trace.files.atomic import append, write_atomically
from moe_inspect.trace.files.checksums import Json
from moe_inspect.trace.files.location import Remote, output_location
from moe_inspect.trace.files.lock import refuse_while_locked
from moe_inspect.trace.header import TraceHeader
from moe_inspect.trace.manifest import refuse_while_written, this_process, write_manifest
from moe_inspect.trace.reader import MOST_TOKENS, Trace, shards_of
from moe_inspect.trace.shard import Shard
from moe_inspect.trace.verify import Verification, verify
from moe_inspect.trace.writer.tables import vocabulary_bytes, write_shard

MOST_NUMBER = 2**31 - 1  # of documents and forward passes, which are int32
NONE = np.zeros(0, np.int32)  # documents
Change = Callable[[np.ndarray], np.ndarray]
Changes = dict[str, Change]  # of columns


@dataclass
class Target:
    """The trace that shards are copied to: what it holds so far. It begins with its vocabulary, if
    it has one, whose checksum is added to `manifest`, and says "recording". `tokens`, `shards`: of
    each rank. `batches`, `sequences`: one above the highest number of a forward pass and of a
    sequence, over all ranks. `decisions`, `assignments`: counted in what was copied."""

    root: Path
    manifest: Json
    vocabulary: pa.Table | None
    documents: int = 0
    batches: int = 0
    sequences: int = 0
    decisions: int = 0
    assignments: int = 0
    tokens: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    shards: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    _sequences_before: int = 0  # of the traces before the one that is copied

    def __post_init__(self) -> None:
        if self.vocabulary is not None:
            data = vocabulary_bytes(self.vocabulary)
            write_atomically(self.root / schema.VOCABULARY, data)
            self.manifest["vocabulary"] = checksums.stated(data)
        write_manifest(self.root, {**self.manifest, "status": "recording"})
        for table in self.manifest["tables"]:
            (self.root / table).mkdir()

    def add(self, trace: Trace) -> None:
        """Copies a trace behind what is there, each rank behind the same rank."""
        document_D = np.sort(np.concatenate([NONE, *map(_documents, trace.shards)]))
        batches = 1 + max((shard.files.last_batch for shard in trace.shards), default=-1)
        _check_number(trace, self.documents + len(document_D), "documents")
        _check_number(trace, self.batches + batches, "forward passes")
        self._sequences_before = self.sequences
        first, before, sequences = self.documents, self.batches, self.sequences
        change: Changes = {
            "document": lambda document_T: first + np.searchsorted(document_D, document_T),
            "sequence": lambda sequence_T: sequence_T.astype(np.int64) + sequences,
            "batch": lambda batch_T: batch_T + before,
        }
        for shard in shards_of(trace, "merging", MOST_TOKENS):
            self._copy(shard, change, before)
        self.documents += len(document_D)
        self.batches += batches

    def add_documents(self, trace: Trace, document_D: np.ndarray) -> None:
        """Copies the documents of these numbers, which they keep, as sequences and forward passes
        do; only tokens are numbered anew. For a target that holds nothing yet."""
        for shard in shards_of(trace, "sampling"):
            kept = KeptDocuments(shard, document_D)
            if kept.tokens or np.isin(_documents(shard), document_D).any():
                self._copy(shard, {}, 0, kept)
        self.documents = len(document_D)

    def _copy(
        self, shard: Shard, change: Changes, batches: int, kept: KeptDocuments | None = None
    ) -> None:
        """`batches`: added to the numbers of forward passes. `kept`: None for the whole shard."""
        files, trace = shard.files, shard.trace
        rank, number = files.rank, self.shards[files.rank]
        first_token = rank * schema.RANK_STRIDE + self.tokens[rank]
        tokens = files.tokens if kept is None else kept.tokens

        def renumbered(token_T: np.ndarray) -> np.ndarray:
            place_T = token_T - files.first_token
            return first_token + (place_T if kept is None else kept.place_T[place_T])

        bf16 = trace.manifest["capture"].get("weight_dtype") == "bfloat16"
        columns = {table: _columns(shard, table) for table in trace.tables}
        if schema.PHYSICAL in trace.slot_values:
            stated = replicas.metadata(shard.replicas(), batches)
            columns["routing"] = columns["routing"].with_metadata(stated)
        groups, change = dict[str, list[partial[pa.Table]]](), {**change, "token": renumbered}
        for table, of_table in columns.items():
            of_routers = len(trace.routers) if table in ("routing", "logits") else 1
            asked = shard, table, of_table, change, kept
            groups[table] = [partial(self._renumbered, r, *asked) for r in range(of_routers)]
        lines = write_shard(self.root, rank, number, columns, groups, bf16)
        rows = {line["table"]: line["rows"] for line in lines}
        span = {
            "shard": number,
            "first_token": first_token,
            "last_token": first_token + tokens - 1,
            "decisions": files.decisions if kept is None else rows["routing"],
            "first_batch": None if files.first_batch is None else files.first_batch + batches,
            "last_batch": files.last_batch + batches,
        }
        text = b"".join(checksums.sealed({**line, **span}) for line in lines)
        append(self.root / f"shards-{rank}.jsonl", text)
        self.tokens[rank] += tokens
        self.decisions += span["decisions"]
        self.shards[rank] += 1

    def _renumbered(
        self,
        router: int,
        shard: Shard,
        table: str,
        columns: pa.Schema,
        change: Changes,
        kept: KeptDocuments | None,
    ) -> pa.Table:
        """A table of the shard, or the rows of a router, with the new numbers."""
        match table:
            case "routing":
                found = shard.routing(router)
            case "logits":
                found = shard.rows_of_router("logits", router)
            case "documents":
                found = shard.table("documents")
            case _:  # tokens and counts, which are checked
                found = getattr(shard, table)()
        if kept is not None:
            found = kept.of(found)
        if table == "routing":
            experts = [name for name in found.column_names if name.startswith("expert_")]
            self.assignments += sum(len(found) - found[name].null_count for name in experts)
        elif table == "counts":
            self.assignments += int(found["assignments"].to_numpy().sum())
        elif table == "tokens":
            self._check_tokens(shard.trace, found)
        arrays = [_column(found[one.name], one, change.get(one.name)) for one in columns]
        return pa.Table.from_arrays(arrays, schema=columns).unify_dictionaries()

    def _check_tokens(self, trace: TraceHeader, tokens: pa.Table) -> None:
        """Their ids are within the vocabulary; their sequences are counted."""
        token_id, sequence = (
            int(tokens[name].to_numpy().max(initial=-1)) for name in ("token_id", "sequence")
        )
        if self.vocabulary is not None and token_id >= (words := len(self.vocabulary)):
            what = f"token id {token_id}, beyond the {words:,} tokens of the vocabulary"
            raise MoeInspectError(f"{trace.path} has {what}")
        self.sequences = max(self.sequences, self._sequences_before + sequence + 1)
        _check_number(trace, self.sequences, "sequences")

    def differences(self, found: Sequence[Verification]) -> Iterator[tuple[str, int, int]]:
        """Where what was copied is not what was verified: of what, how many of each."""
        for name, copied in self.copied.items():
            if copied != (checked := sum(getattr(part, name) for part in found)):
                yield name, copied, checked

    @property
    def copied(self) -> dict[str, int]:
        """How many tokens, assignments and documents there are, by these names."""
        tokens = sum(self.tokens.values())
        return {"tokens": tokens, "assignments": self.assignments, "documents": self.documents}


class KeptDocuments:
    """The documents of a shard that are copied. `tokens`: how many they have in it. keep_T: bool,
    which of the shard's tokens these are. place_T: where each of them stands among them."""

    def __init__(self, shard: Shard, document_D: np.ndarray):
        self.document_D, self.first_token = document_D, shard.files.first_token
        self.keep_T = np.isin(shard.tokens(["document"])["document"].to_numpy(), document_D)
        self.place_T, self.tokens = np.cumsum(self.keep_T) - 1, int(self.keep_T.sum())

    def of(self, table: pa.Table) -> pa.Table:
        """The rows of these documents. Labels become text: what none of them has is not to stay in
        a dictionary."""
        if "token" in table.column_names:
            rows = self.keep_T[table["token"].to_numpy() - self.first_token]
        else:
            rows = np.isin(table["document"].to_numpy(), self.document_D)
        text = [
            pa.field(f.name, pa.string() if pa.types.is_dictionary(f.type) else f.type)
            for f in table.schema
        ]
        return table.filter(pa.array(rows)).cast(pa.schema(text))


def _columns(shard: Shard, table: str) -> pa.Schema:
    """Those of a table; not nullable where they are not in the shard."""
    trace, columns = shard.trace, shard.schema(table)
    if table == "routing" and not any(c.nullable for c in columns if c.name.startswith("expert_")):
        return schema.routing_schema(trace.routers, trace.slot_values, nullable=False)
    return trace.columns_of(table)


def _check_number(trace: TraceHeader, highest: int, what: str) -> None:
    if highest > MOST_NUMBER:
        raise MoeInspectError(
            f"with {trace.path} numbers of {what} go beyond {MOST_NUMBER:,}, the highest possible"
        )


def _documents(shard: Shard) -> np.ndarray:
    return shard.table("documents", ["document"])["document"].to_numpy()


def _column(
    found: pa.ChunkedArray, one: pa.Field, change: Change | None
) -> pa.Array | pa.ChunkedArray:
    if change is not None:
        return pa.array(change(found.to_numpy())).cast(one.type)
    if found.type == one.type:
        return found
    if pa.types.is_dictionary(one.type):
        return found.cast(pa.string()).dictionary_encode()
    return found.cast(one.type)


# what a corpus states of its documents
COUNTED = ("split_documents", "empty_documents")
OF_A_PROCESS = {"command", "host", "pid", "process_start"}


def same_place(a: Path | Remote, b: Path | Remote) -> bool:
    """Whether two locations are one: a file's URL is its path."""
    return output_location(a).resolve() == output_location(b).resolve()


def contents(trace: Trace) -> str | None:
    """A hash of all that a trace holds; None where its lines do not state that of each file."""
    files = [part.sha256 for shard in trace.joined(0) for part in shard.files.stated.values()]
    stated = " ".join(file or "" for file in files)
    return sha256(stated.encode()).hexdigest() if files and all(files) else None


def verified(trace: Trace, path: Path | Remote) -> Verification:
    """MoeInspectError where the trace is damaged or still written."""
    refuse_while_written(path, trace.manifest)
    refuse_while_locked(path)
    if not (found := verify(path)).ok:
        raise MoeInspectError(f"{found}")
    return found


def origin(trace: Trace, found: Verification) -> Json:
    """Which trace it was: its name, the digest of its manifest, a hash of its files and what it
    held."""
    return {
        "name": trace.path.resolve().name,
        "digest": trace.manifest.get("digest") or checksums.digest(trace.manifest),
        "contents": contents(trace),
        "status": found.status,
        "documents": found.documents,
        "tokens": found.tokens,
        "decisions": trace.n_decisions,
    }


def written_here(capture: Json) -> Json:
    """What `capture` states of how was recorded, and which process wrote this trace of it."""
    how = {k: v for k, v in capture.items() if k not in OF_A_PROCESS}
    return {**this_process(), **how}


def of_text(corpus: Json) -> Json:
    """What a corpus states of its text, whichever documents of it there are."""
    return {k: v for k, v in corpus.items() if k not in ("plan_hash", *COUNTED)}


def random_weights(corpus: Json) -> Json | None:
    """Of the plan of a corpus only that weights were drawn at random: a trace without the whole
    plan is none that --resume can go on with."""
    plan = corpus.get("plan") or {}
    return {k: plan[k] for k in ("random_init",) if plan.get(k) is not None} or None
