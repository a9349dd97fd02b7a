"""Merges traces of one model: with the same columns, of one vocabulary. Their shards become shards
of the merged trace: numbers change, everything else stays as it is. A router of a shard at a time
is in memory.

T tokens, D documents.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from moe_inspect.errors import MoeInspectError
from moe_inspect.text import cut, plural
from moe_inspect.trace import replicas, schema
from moe_inspect.trace.files import checksums
from moe_inspect.trace.files.atomic import append, write_atomically
from moe_inspect.trace.files.checksums import FREE_TEXT, Json
from moe_inspect.trace.files.location import Remote, output_location
from moe_inspect.trace.files.lock import refuse_while_locked
from moe_inspect.trace.header import TraceHeader
from moe_inspect.trace.manifest import refuse_while_written, this_process, write_manifest
from moe_inspect.trace.output_dir import check_directory, whole_trace
from moe_inspect.trace.reader import MOST_TOKENS, Trace, place_of, shards_of
from moe_inspect.trace.shard import Shard
from moe_inspect.trace.verify import Verification, verify
from moe_inspect.trace.writer.tables import vocabulary_bytes, write_shard

MOST_NUMBER = 2**31 - 1  # of documents and forward passes, which are int32
NONE = np.zeros(0, np.int32)  # documents
Change = Callable[[np.ndarray], np.ndarray]
Changes = dict[str, Change]  # of columns

# entries of a config that say how the weights are run or who wrote the file, not what the model is
OF_A_RUN = {
    "_name_or_path",
    "dtype",
    "output_router_logits",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
# facts of a model: where only one trace states one of the first, that is no difference
MAY_LACK = ("model.id", "model.revision", "model.class", "capture.dtype", "capture.weight_dtype")
ALWAYS = ("model.adapter", "model.dequantized_from", "model.note", "plan.random_init")
# what a corpus states of its documents
COUNTED = ("split_documents", "empty_documents")
OF_A_PROCESS = {"command", "host", "pid", "process_start"}


def check_alike(traces: Sequence[Trace]) -> None:
    """MoeInspectError where two traces are of different models, or hold different columns."""
    for a, b in pairwise(traces):
        _check_columns(a, b)
    for a, b in [(a, b) for i, b in enumerate(traces) for a in traces[:i]]:
        for name, of_a, of_b in _model_facts(a, b):
            if of_a != of_b:
                edit = "; if they are the same, edit trace.json" if name in FREE_TEXT else ""
                differs = f"{name} is {cut(str(of_a), 60)} and {cut(str(of_b), 60)}{edit}"
                raise MoeInspectError(f"{a.path} and {b.path} are of different models: {differs}")


def _check_columns(a: Trace, b: Trace) -> None:
    if a.counts_only != b.counts_only:
        counts, decisions = (a, b) if a.counts_only else (b, a)
        said = f"{counts.path} holds counts only, {decisions.path} decisions: they cannot be merged"
        raise MoeInspectError(said)
    for trace in (a, b):
        if trace.is_history:
            said = f"{trace.path} is the history of a training run: its windows cannot be merged"
            raise MoeInspectError(said)
    for one, other in ((a, b), (b, a)):
        if more := [name for name in _columns(one) if name not in _columns(other)]:
            said = f"{one.path} has {more[0]}, {other.path} does not: trace both the same way"
            raise MoeInspectError(said)


def _columns(trace: Trace) -> list[str]:
    """What a trace may hold or not: columns, and the table of logits."""
    there = {f"{value}_j": not trace.counts_only for value in trace.slot_values}
    there |= dict.fromkeys(trace.sums, trace.counts_only) | {"document": trace.by_document}
    there["logits"] = "logits" in trace.tables
    return [name for name, holds in there.items() if holds]


def _model_facts(a: Trace, b: Trace) -> Iterator[tuple[str, object, object]]:
    """What has to be the same of both, where both state it or its absence says something."""
    sections = [
        {
            "model": trace.manifest.get("model") or {},
            "capture": trace.manifest["capture"],
            "plan": (trace.manifest.get("corpus") or {}).get("plan") or {},
        }
        for trace in (a, b)
    ]
    for name in (*MAY_LACK, *ALWAYS):
        section, key = name.split(".")
        of_a, of_b = (each[section].get(key) for each in sections)
        if name in ALWAYS or (of_a is not None and of_b is not None):
            yield name, of_a, of_b
    configs = [each["model"].get("config") or {} for each in sections]
    for key in sorted(configs[0].keys() & configs[1].keys() - OF_A_RUN):
        yield f"config.{key}", *(config[key] for config in configs)
    yield "the routers", plural(len(a.routers), "router"), plural(len(b.routers), "router")
    for r, (of_a, of_b) in enumerate(zip(a.routers, b.routers, strict=True)):
        for key, value in asdict(of_a).items():
            yield f"routers[{r}].{key}", value, getattr(of_b, key)


def united_vocabulary(traces: Sequence[Trace]) -> pa.Table | None:
    """token_id, token: the longest vocabulary, of which the others are the beginning; None where no
    trace has one. MoeInspectError where they are not."""
    longest = max(traces, key=lambda trace: len(trace.vocabulary_table))
    words = longest.vocabulary_table
    for trace in traces:
        found = trace.vocabulary_table["token"]
        expected = words["token"].slice(0, len(found))
        if not found.equals(expected):
            pairs = enumerate(zip(found.to_pylist(), expected.to_pylist(), strict=True))
            at, (here, there) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
            raise MoeInspectError(
                f"{trace.path} and {longest.path} have different vocabularies: token {at} is "
                f"{cut(repr(here))} and {cut(repr(there))}"
            )
    return words if len(words) else None


def merge(
    traces: Sequence[Trace | str | Path], out: str | Path, *, overwrite: bool = False
) -> Trace:
    """Writes one trace at `out` that holds what all `traces` hold, and returns it.

    Every part is verified first. Documents are numbered from 0, tokens and forward passes follow
    those of the part before, rank by rank; `parts` in its trace.json says what came from where. It
    is "complete" where all parts are. Small shards become larger ones, also those of a single
    trace. In memory is a router of a shard, and a number per document.

    Args:
        traces: directories of traces of the same model, with the same columns.
        out: the directory to write.
        overwrite: replace a trace at `out`.

    Raises:
        MoeInspectError: a part is damaged or still written, or two are not alike. Nothing is left
            at `out`.
    """
    place, paths = output_location(out), [place_of(trace) for trace in traces]
    if not paths:
        raise MoeInspectError("give traces to merge")
    check_directory(place, overwrite, resumable=False)
    if any(place.resolve() == path.resolve() for path in paths):
        raise MoeInspectError(f"{out} is one of the traces to merge: choose another directory")
    opened = [Trace(path) for path in paths]
    check_alike(opened)
    for a, b in combinations(opened, 2):
        if _share(a, b):
            raise MoeInspectError(f"{b.path} holds documents of {a.path}: they would count twice")
    vocabulary = united_vocabulary(opened)
    found = [_verified(trace, path) for trace, path in zip(opened, paths, strict=True)]
    with whole_trace(place, overwrite, "nothing was merged") as (draft, _):
        manifest = _manifest(opened, found)
        target = Target(draft, manifest, vocabulary)
        for trace in opened:
            target.add(trace)
        for name, copied, checked in target.differences(found):
            raise MoeInspectError(
                f"the traces have {checked:,} {name}, {copied:,} were merged: one was changed "
                "meanwhile"
            )
        write_manifest(draft, manifest)
    return Trace(place)


def _verified(trace: Trace, path: Path | Remote) -> Verification:
    """MoeInspectError where the trace is damaged or still written."""
    refuse_while_written(path, trace.manifest)
    if isinstance(path, Path):
        refuse_while_locked(path)
    if not (found := verify(path)).ok:
        raise MoeInspectError(f"{found}")
    return found


def _share(a: Trace, b: Trace) -> bool:
    """Whether two hold the same documents, as far as they state what they were merged of."""
    return not _held(a).isdisjoint(_held(b))


def _held(trace: Trace) -> set[str]:
    """The contents of the trace and of all traces that were merged into it."""
    merged = map(_contents_in, trace.manifest.get("parts") or [])
    return {c for c in (_contents(trace), *merged) if c is not None}


def _contents(trace: Trace) -> str | None:
    """A hash of all that a trace holds; None where its lines do not state that of each file."""
    files = [part.sha256 for shard in trace.joined(0) for part in shard.files.stated.values()]
    stated = " ".join(file or "" for file in files)
    return sha256(stated.encode()).hexdigest() if files and all(files) else None


def _contents_in(stated: object) -> str | None:
    found = stated.get("contents") if isinstance(stated, dict) else None
    return found if isinstance(found, str) else None


def _manifest(traces: list[Trace], found: list[Verification]) -> Json:
    """Of what all parts state alike; `parts` has what each states of its own."""
    first = traces[0]
    corpora = [trace.manifest.get("corpus") or {} for trace in traces]
    columns = {k: v for trace in traces for k, v in trace.manifest.get("columns", {}).items()}
    models = [trace.manifest.get("model") or {} for trace in reversed(traces)]
    counted = [n for n in COUNTED if all(isinstance(c.get(n), int) for c in corpora)]
    parts, documents = list[Json](), 0  # of a part its documents are those from this number on
    for trace, part in zip(traces, found, strict=True):
        own = {k: v for k, v in trace.manifest["capture"].items() if k not in ("command", "host")}
        about = {
            "name": trace.path.resolve().name,
            "digest": trace.manifest.get("digest") or checksums.digest(trace.manifest),
            "contents": _contents(trace),
            "status": part.status,
            "documents": part.documents,
            "tokens": part.tokens,
            "decisions": trace.n_decisions,
        }
        parts.append({**about, "first_document": documents, "capture": own})
        documents += part.documents
    texts = [
        {k: v for k, v in corpus.items() if k not in ("plan_hash", *COUNTED)} for corpus in corpora
    ]
    # without the whole plan, the trace is none that --resume can go on with
    random_init = (corpora[0].get("plan") or {}).get("random_init")
    capture = _shared([trace.manifest["capture"] for trace in traces])
    stated = [trace.manifest.get("counts") or {} for trace in traces]
    unlinked = sum(counts.get("unlinked", 0) for counts in stated)
    return {
        "format": schema.FORMAT,
        "status": "complete" if all(p.status == "complete" for p in found) else "interrupted",
        "model": {k: v for model in models for k, v in model.items() if v is not None},
        "corpus": {
            **_shared(texts),
            "documents": documents,
            **{name: sum(c[name] for c in corpora) for name in counted},
            "notes": list(dict.fromkeys(note for c in corpora for note in c.get("notes") or [])),
            "plan": None if random_init is None else {"random_init": random_init},
        },
        "capture": this_process() | {k: v for k, v in capture.items() if k not in OF_A_PROCESS},
        "routers": [asdict(router) for router in first.routers],
        "tables": first.tables,
        "columns": columns,
        "counts": {
            "tokens": sum(trace.n_tokens for trace in traces),
            "decisions": sum(trace.n_decisions for trace in traces),
            "dropped": sum(counts.get("dropped", 0) for counts in stated),
            **({"unlinked": unlinked} if unlinked else {}),
        },
        "parts": parts,
    }


def _shared(sections: list[Json]) -> Json:
    """The entries that all have."""
    first, *others = sections
    return {k: v for k, v in first.items() if all(k in of and of[k] == v for of in others)}


@dataclass
class Target:
    """The trace that shards are copied to: what it holds so far. It begins with its vocabulary, if
    it has one, whose checksum is added to `manifest`, and says "recording". `tokens`, `shards`: of
    each rank. `batches`, `sequences`: one above the highest number of a forward pass and of a
    sequence, over all ranks. `assignments`: counted in what was copied."""

    root: Path
    manifest: Json
    vocabulary: pa.Table | None
    documents: int = 0
    batches: int = 0
    sequences: int = 0
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

    def _copy(self, shard: Shard, change: Changes, batches: int) -> None:
        """`batches`: added to the numbers of forward passes."""
        files, trace = shard.files, shard.trace
        rank, number = files.rank, self.shards[files.rank]
        first_token = rank * schema.RANK_STRIDE + self.tokens[rank]
        bf16 = trace.manifest["capture"].get("weight_dtype") == "bfloat16"
        columns = {table: _columns_of(shard, table) for table in trace.tables}
        if schema.PHYSICAL in trace.slot_values:
            stated = replicas.metadata(shard.replicas(), batches)
            columns["routing"] = columns["routing"].with_metadata(stated)
        groups, token_shift = dict[str, list[partial[pa.Table]]](), first_token - files.first_token
        change = {**change, "token": lambda token_T: token_T + token_shift}
        for table, of_table in columns.items():
            of_routers = len(trace.routers) if table in ("routing", "logits") else 1
            asked = shard, table, of_table, change
            groups[table] = [partial(self._renumbered, r, *asked) for r in range(of_routers)]
        lines = write_shard(self.root, rank, number, columns, groups, bf16)
        span = {
            "shard": number,
            "first_token": first_token,
            "last_token": first_token + files.tokens - 1,
            "decisions": files.decisions,
            "first_batch": None if files.first_batch is None else files.first_batch + batches,
            "last_batch": files.last_batch + batches,
        }
        text = b"".join(checksums.sealed({**line, **span}) for line in lines)
        append(self.root / f"shards-{rank}.jsonl", text)
        self.tokens[rank] += files.tokens
        self.shards[rank] += 1

    def _renumbered(
        self, router: int, shard: Shard, table: str, columns: pa.Schema, change: Changes
    ) -> pa.Table:
        """A table of the shard, or the rows of a router, with the new numbers."""
        match table:
            case "routing":
                found = shard.routing(router)
                experts = [name for name in found.column_names if name.startswith("expert_")]
                self.assignments += sum(len(found) - found[name].null_count for name in experts)
            case "logits":
                found = shard.rows_of_router("logits", router)
            case "documents":
                found = shard.table("documents")
            case "counts":
                found = shard.counts()
                self.assignments += int(found["assignments"].to_numpy().sum())
            case _:
                found = shard.tokens()
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
        held = {"tokens": sum(self.tokens.values())}
        held |= {"assignments": self.assignments, "documents": self.documents}
        for name, copied in held.items():
            if copied != (checked := sum(getattr(part, name) for part in found)):
                yield name, copied, checked


def _columns_of(shard: Shard, table: str) -> pa.Schema:
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
