"""The invariants of any trace, ours or imported: a shard and a row group at a time, the first
violation named by file and row.

T tokens, K slots, E experts, N rows of a row group.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_inspect.errors import MoeInspectError, reading
from moe_inspect.trace import parts, schema
from moe_inspect.trace.lock import refuse_while_locked
from moe_inspect.trace.output_dir import OF_A_TABLE, contents
from moe_inspect.trace.reader import Shard, ShardFiles, Trace, inside, writer_of
from moe_inspect.trace.validate import LINE_KEYS, SPAN, Damaged

CHECKSUM_KEYS = {"bytes", "footer_crc32", "crc32"}
NO_ID = -1


@dataclass
class Verification:
    """What was found. `file` and `row` (from 0, in that file) are where the first violation is;
    both None of a fine trace. `empty_slots` are assignments that were routed nowhere: Σ counts =
    tokens × k − empty slots, router by router. `status`: "complete", "recording" (by a process that
    is at work) or "interrupted". A trace may be interrupted and fine: `uncommitted` are the files
    that its writer was stopped in, which readers ignore and --resume deletes. `resumable`: --resume
    can go on with it."""

    path: str
    ok: bool = True
    status: str | None = None
    resumable: bool = False
    uncommitted: list[str] = field(default_factory=list)
    violation: str | None = None
    file: str | None = None
    row: int | None = None
    tokens: int = 0
    decisions: int = 0
    assignments: int = 0
    empty_slots: int = 0
    documents: int = 0
    shards: int = 0
    checked: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        return asdict(self)


class Violation(Exception):
    """The first thing that is wrong; caught by `verify` and nowhere else."""

    def __init__(self, file: str, row: int | None, what: str):
        super().__init__(what)
        self.file, self.row, self.what = file, row, what


def verify(path: str | Path, progress: Callable[[int], None] | None = None) -> Verification:
    """Checks every invariant. MoeInspectError where there is no trace; a damaged one is a violation
    like any other. `progress` is told of the tokens of each shard done."""
    root = Path(path)
    found = Verification(str(path))
    if not (root / schema.MANIFEST).is_file():
        if root.is_dir() and any(root.iterdir()) and contents(root).is_free:
            refuse_while_locked(root)
            raise MoeInspectError(
                f"no trace at {root} yet: its writer was stopped before anything was committed; "
                "--resume starts it again"
            )
        raise MoeInspectError(
            f'no trace at {root}: make one with "moe-inspect trace MODEL -o {root}"'
        )
    try:
        _verify(_opened(root), found, progress)
    except Violation as violation:
        found.ok, found.violation, found.file, found.row = (
            False,
            violation.what,
            violation.file,
            violation.row,
        )
    return found


def _opened(root: Path) -> Trace:
    try:
        return Trace(root)
    except MoeInspectError as error:
        raise _violation(error, schema.MANIFEST) from None


def _violation(error: MoeInspectError, name: str) -> Violation:
    return (
        Violation(error.file, None, error.what)
        if isinstance(error, Damaged)
        else Violation(name, None, str(error))
    )


def _verify(trace: Trace, found: Verification, progress: Callable[[int], None] | None) -> None:
    files = [shard.files for shard in trace.shards]
    found.status = _status(trace)
    found.resumable = (
        found.status == "interrupted"
        and (trace.manifest.get("corpus") or {}).get("plan") is not None
    )
    _check_lines(trace, files)
    for shard in trace.shards:
        _check_files(shard)
    _check_orphans(trace, files, found)
    found.checked += [
        "sha256 and rows of every file are those of its line",
        "no orphans",
        "tokens numbered without a gap",
    ]
    words = _check_vocabulary(trace)
    documents = _Documents(trace)
    found.documents = len(documents.number)
    found.checked.append("documents declared once")
    positions = _Positions(bool(trace.manifest.get("counts", {}).get("dropped")))
    for shard in trace.shards:
        if trace.counts_only:
            _check_counts(shard, found)
        else:
            phase_T = _check_tokens(shard, words, documents, positions)
            _check_routing(shard, phase_T, found)
            if "logits" in trace.tables:
                _check_logits(shard, phase_T)
        found.shards += 1
        found.tokens += shard.files.tokens
        if progress:
            progress(shard.files.tokens)
    _check_totals(trace, found)
    if trace.counts_only:
        found.checked += [
            "every expert of every router listed once",
            "Σ counts ≤ tokens × k for each router, none negative, sums finite",
        ]
    else:
        found.checked += [
            "token ids within the vocabulary",
            "positions follow each other within a sequence"
            if positions.strict
            else "positions: not checked, decisions were dropped",
            "each router saw each of its tokens once, in order",
            "ids < E, no expert twice in a decision, Σ counts = tokens × k − empty slots",
            "weights finite, descending where the manifest says so, and there where an expert is"
            if trace.has_weights
            else "no weights recorded",
            *(["logits of each decision, none NaN"] if "logits" in trace.tables else []),
        ]
    found.checked.append("the manifest's totals are those of the shards")


# --- files


def _check_lines(trace: Trace, files: list[ShardFiles]) -> None:
    """Keys that no version writes, and checksums that are no longer there: a key may have been
    changed to another."""
    # whether a shard before it was: a trace that was begun before there were checksums may have
    # gone on with them
    checked = False
    for shard in files:
        for entry in map(json.loads, shard.lines):
            name = f"shards-{shard.rank}.jsonl"
            if unknown := set(entry) - LINE_KEYS - set(SPAN):
                raise Violation(
                    name, None, f"the line of {entry['path']} has the unknown key {min(unknown)!r}"
                )
            if (
                missing := CHECKSUM_KEYS - set(entry)
                if checked or not CHECKSUM_KEYS.isdisjoint(entry)
                else None
            ):
                raise Violation(name, None, f"the line of {entry['path']} has no {min(missing)}")
            checked = "crc32" in entry
    manifest = trace.manifest
    if "digest" not in manifest and (checked or "vocabulary" in manifest):
        raise Violation(
            schema.MANIFEST,
            None,
            "it has no digest, although it was written with one: it was edited",
        )
    if (
        "digest" in manifest
        and "vocabulary" not in manifest
        and (trace.path / schema.VOCABULARY).exists()
    ):
        raise Violation(
            schema.VOCABULARY, None, "it was put there later: trace.json does not state it"
        )


def _check_files(shard: Shard) -> None:
    files = shard.files
    for table, name in files.paths.items():
        path = _plain(shard.trace, name)
        if not path.is_file():
            raise Violation(name, None, "the file is missing")
        with reading(path), open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != files.stated[table].sha256:
            raise Violation(
                name,
                None,
                f"sha256 is {digest[:12]}…, its line says {str(files.stated[table].sha256)[:12]}…",
            )
        _parquet(shard, table)


def _local(trace: Trace) -> Path:
    if not isinstance(trace.path, Path):
        raise MoeInspectError(
            f"verify reads every byte of a trace: copy {trace.path} to this machine"
        )
    return trace.path


def _plain(trace: Trace, name: str) -> Path:
    try:
        inside(_local(trace), name)
    except MoeInspectError as error:
        raise Violation(name, None, str(error)) from None
    return _local(trace) / name


def _status(trace: Trace) -> str:
    if trace.status != "recording" or writer_of(trace.manifest) is not None:
        return trace.status
    try:
        refuse_while_locked(_local(trace))
    except MoeInspectError:  # by a process of another machine
        return "recording"
    return "interrupted"


def _check_orphans(trace: Trace, files: list[ShardFiles], found: Verification) -> None:
    """A complete trace has none. One that is written has files whose lines are yet to come, one
    that was stopped may have kept them."""
    known = {path for shard in files for path in shard.paths.values()}
    for table in trace.tables:
        folder = _plain(trace, table)
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            if f"{table}/{file.name}" in known:
                continue
            if trace.status != "complete" and OF_A_TABLE.fullmatch(file.name):
                found.uncommitted.append(f"{table}/{file.name}")
            else:
                raise Violation(
                    f"{table}/{file.name}",
                    None,
                    "an orphan: no line of shards-*.jsonl speaks of it (--resume deletes it)",
                )


def _check_vocabulary(trace: Trace) -> int | None:
    """How many token ids there are; None where the trace has no vocabulary."""
    try:
        ids = trace._vocabulary["token_id"].to_numpy()
    except MoeInspectError as error:
        raise _violation(error, schema.VOCABULARY) from None
    if (wrong := ids != np.arange(len(ids))).any():
        row = int(wrong.argmax())
        raise Violation(schema.VOCABULARY, row, f"token_id is {ids[row]}, not {row}")
    return len(ids) or None


def _check_totals(trace: Trace, found: Verification) -> None:
    stated = trace.manifest.get("counts")
    if trace.status != "complete" or not isinstance(stated, dict):
        return
    totals = {
        "tokens": found.tokens,
        **({} if trace.counts_only else {"decisions": found.decisions}),
    }
    for name, value in totals.items():
        if stated.get(name) != value:
            raise Violation(
                schema.MANIFEST,
                None,
                f"counts.{name} is {stated.get(name)}, the shards have {value}",
            )


# --- documents and tokens


class _Documents:
    """The documents declared in all shards: number → domain."""

    def __init__(self, trace: Trace):
        numbers, codes = [], []
        self.labels: dict[str, int] = {}
        for shard in trace.shards:
            name = shard.files.paths["documents"]
            table = _table(shard, "documents", ["document", "domain"])
            document, code = (
                table["document"].to_numpy(),
                _labels(table["domain"], name, "domain", self.labels),
            )
            numbers.append(document)
            codes.append(code)
            if len(document) and document.min() < 0:
                raise Violation(name, int(document.argmin()), f"document is {document.min()}")
        number = np.concatenate([*numbers, np.zeros(0, np.int32)])
        order = np.argsort(number, kind="stable")
        self.number, self.code = (
            number[order],
            np.concatenate([*codes, np.zeros(0, np.int64)])[order],
        )
        if (twice := np.nonzero(self.number[1:] == self.number[:-1])[0]).size:
            at, n = int(order[twice[0] + 1]), 0
            for shard, part in zip(trace.shards, numbers, strict=True):
                if at < n + len(part):
                    raise Violation(
                        shard.files.paths["documents"],
                        at - n,
                        f"document {number[at]} is declared a second time",
                    )
                n += len(part)

    def check(self, name: str, document_T: np.ndarray, code_T: np.ndarray) -> None:
        at_T = np.searchsorted(self.number, document_T)
        at_T[at_T == len(self.number)] = 0
        if len(
            wrong := np.nonzero(
                (self.number[at_T] != document_T)
                if len(self.number)
                else np.ones(len(document_T), bool)
            )[0]
        ):
            raise Violation(
                name, int(wrong[0]), f"document {document_T[wrong[0]]} is declared nowhere"
            )
        if len(wrong := np.nonzero(self.code[at_T] != code_T)[0]):
            row = int(wrong[0])
            label = {code: label for label, code in self.labels.items()}
            said = (
                f"domain is {label[int(code_T[row])]!r}, document {document_T[row]} is of "
                f"{label[int(self.code[at_T[row]])]!r}"
            )
            raise Violation(name, row, said)


class _Positions:
    """Where the sequences of the last shard ended: a sequence may go on in the next, and positions
    with it."""

    def __init__(self, dropped: bool):
        self.strict = not dropped  # what was dropped leaves gaps
        self.last: dict[int, int] = {}

    def check(
        self, name: str, sequence_T: np.ndarray, encoded_T: np.ndarray, position_T: np.ndarray
    ) -> None:
        if not self.strict or not len(sequence_T):
            return
        key_T = (
            sequence_T.astype(np.int64) * 2 + encoded_T
        )  # what an encoder reads has positions of its own
        order_T = np.argsort(key_T, kind="stable")
        key_T, position_T = key_T[order_T], position_T[order_T]
        wrong_T = np.zeros(len(key_T), bool)
        wrong_T[1:] = (key_T[1:] == key_T[:-1]) & (position_T[1:] != position_T[:-1] + 1)
        first = np.nonzero(np.concatenate([[True], key_T[1:] != key_T[:-1]]))[0]
        for i in first:
            if (before := self.last.get(int(key_T[i]))) is not None and position_T[i] != before + 1:
                wrong_T[i] = True
        if wrong_T.any():
            rows = order_T[wrong_T]
            row = int(rows.min())
            at = int(np.nonzero(order_T == row)[0][0])
            said = (
                f"position is {position_T[at]} in sequence {key_T[at] // 2}, where the one "
                "before it is followed by another"
            )
            raise Violation(name, row, said)
        ends = np.concatenate([first[1:], [len(key_T)]]) - 1
        self.last = dict(zip(key_T[ends].tolist(), position_T[ends].tolist(), strict=True))


def _check_tokens(
    shard: Shard, words: int | None, documents: _Documents, positions: _Positions
) -> np.ndarray:
    """The phase of each token, as an index into PHASES."""
    name = shard.files.paths["tokens"]
    columns = ["token", "token_id", "document", "sequence", "position", "domain", "phase", "batch"]
    table = _table(shard, "tokens", columns)
    for column in columns:
        if table[column].null_count:
            raise Violation(
                name, int(table[column].is_null().to_numpy().argmax()), f"{column} is null"
            )
    token_T = table["token"].to_numpy()
    _same(name, "token", token_T, np.arange(shard.files.first_token, shard.files.last_token + 1))
    token_id_T = table["token_id"].to_numpy()
    wrong_T = (token_id_T < NO_ID) | (token_id_T >= (words if words is not None else 2**31))
    if wrong_T.any():
        row = int(wrong_T.argmax())
        raise Violation(name, row, f"token_id is {token_id_T[row]}, of a vocabulary of {words}")
    for column in ("document", "sequence", "position", "batch"):
        if len(token_T) and (values := table[column].to_numpy()).min() < 0:
            raise Violation(name, int((values < 0).argmax()), f"{column} is {values.min()}")
    labels = {label: code for code, label in enumerate(schema.PHASES)}
    phase_T = _labels(table["phase"], name, "phase", labels)
    if len(labels) > len(schema.PHASES) and (phase_T >= len(schema.PHASES)).any():
        row = int((phase_T >= len(schema.PHASES)).argmax())
        raise Violation(
            name,
            row,
            f"phase is {list(labels)[int(phase_T[row])]!r}, not one of {', '.join(schema.PHASES)}",
        )
    documents.check(
        name,
        table["document"].to_numpy(),
        _labels(table["domain"], name, "domain", documents.labels),
    )
    encoded_T = phase_T == schema.PHASES.index("encode")
    positions.check(name, table["sequence"].to_numpy(), encoded_T, table["position"].to_numpy())
    return phase_T


# --- decisions


def _check_routing(shard: Shard, phase_T: np.ndarray, found: Verification) -> None:
    slots = range(max(r.top_k for r in shard.trace.routers))
    columns = [f"expert_{j}" for j in slots] + (
        [f"weight_{j}" for j in slots] if shard.trace.has_weights else []
    )
    name = shard.files.paths["routing"]
    for r, start, table in _of_routers(shard, "routing", columns, phase_T):
        router = shard.trace.routers[r]
        ids = [_ids(table[f"expert_{j}"]) for j in slots]
        for j, ids_N in enumerate(ids):
            wrong_N = ids_N >= (router.experts if j < router.top_k else 0)
            if wrong_N.any():
                n = int(wrong_N.argmax())
                said = (
                    f"expert_{j} is {ids_N[n]}, router {r} has {router.experts} experts"
                    if j < router.top_k
                    else f"expert_{j} is {ids_N[n]}, router {r} takes {router.top_k}"
                )
                raise Violation(name, start + n, said)
            for i in range(min(j, router.top_k)):
                twice_N = (ids_N == ids[i]) & (ids_N >= 0)
                if twice_N.any():
                    n = int(twice_N.argmax())
                    raise Violation(
                        name,
                        start + n,
                        f"expert {ids_N[n]} is in slots {i} and {j} of one decision of router {r}",
                    )
        empty = sum(int((i < 0).sum()) for i in ids[: router.top_k])
        found.decisions += len(table)
        found.empty_slots += empty
        found.assignments += len(table) * router.top_k - empty
        if shard.trace.has_weights:
            _check_weights(name, start, table, ids)
            if (
                shard.trace._listed[r].first_choice_known
            ):  # as the manifest says: a trace that does not is put in order as it is read
                _check_descending(name, start, table, ids[: router.top_k])


def _check_weights(name: str, start: int, table: pa.Table, ids: list[np.ndarray]) -> None:
    for j, ids_N in enumerate(ids):
        column = table[f"weight_{j}"]
        there_N = column.is_valid().to_numpy() if column.null_count else np.ones(len(ids_N), bool)
        wrong_N = there_N != (ids_N >= 0)
        if wrong_N.any():
            n = int(wrong_N.argmax())
            raise Violation(
                name,
                start + n,
                f"weight_{j} is {'there' if there_N[n] else 'null'}, expert_{j} is "
                f"{'null' if there_N[n] else 'there'}",
            )
        weights_N = column.fill_null(0).to_numpy() if column.null_count else column.to_numpy()
        if not np.isfinite(weights_N).all():
            n = int((~np.isfinite(weights_N)).argmax())
            raise Violation(name, start + n, f"weight_{j} is {weights_N[n]}")


def _check_descending(name: str, start: int, table: pa.Table, ids: list[np.ndarray]) -> None:
    """Slots are in descending weight, those that routed nowhere last."""
    weights = [
        np.where(ids_N >= 0, table[f"weight_{j}"].fill_null(0).to_numpy(), -np.inf)
        for j, ids_N in enumerate(ids)
    ]
    for j, (before_N, after_N) in enumerate(itertools.pairwise(weights)):
        if (wrong_N := before_N < after_N).any():
            n = int(wrong_N.argmax())
            said = (
                f"weight_{j} is {before_N[n]:.6g}, weight_{j + 1} is {after_N[n]:.6g}: the "
                "manifest says that weights descend"
            )
            raise Violation(name, start + n, said)


def _check_logits(shard: Shard, phase_T: np.ndarray) -> None:
    name = shard.files.paths["logits"]
    for r, start, table in _of_routers(shard, "logits", ["logits"], phase_T):
        column = table["logits"].combine_chunks()
        width = getattr(column.type, "list_size", 0)
        E = shard.trace.routers[r].experts
        if width < E or column.null_count:
            raise Violation(name, start, f"logits are {width} wide, router {r} has {E} experts")
        values_NE = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)[:, :E]
        if (wrong_N := np.isnan(values_NE).any(1)).any():
            raise Violation(
                name, start + int(wrong_N.argmax()), f"a router logit of router {r} is NaN"
            )


def _of_routers(
    shard: Shard, table: str, columns: list[str], phase_T: np.ndarray
) -> Iterator[tuple[int, int, pa.Table]]:
    """(router, first row, decisions) of each row group or part of one, having checked that each
    router has its tokens, once and in order."""
    name, routers = shard.files.paths[table], shard.trace.routers
    file = _parquet(shard, table)
    sees_rP = [np.array([router.sees(phase) for phase in schema.PHASES]) for router in routers]
    done = [0] * len(routers)
    rows = 0
    for g in range(file.metadata.num_row_groups):
        group = _read(
            lambda g=g: parts.read(file, name, ["token", "layer", "router", *columns], [g])
        )
        router_N = group["router"].to_numpy()
        starts = [0, *(np.nonzero(router_N[1:] != router_N[:-1])[0] + 1)] if len(router_N) else []
        for start, end in zip(starts, [*starts[1:], len(router_N)], strict=True):
            r, part = int(router_N[start]), group.slice(start, end - start)
            if r >= len(routers):
                raise Violation(
                    name, rows + start, f"router is {r}, the manifest lists {len(routers)}"
                )
            _same(
                name,
                "layer",
                part["layer"].to_numpy(),
                np.full(len(part), routers[r].layer),
                rows + start,
            )
            token_N = _tokens_of(phase_T, sees_rP[r], shard.files.first_token)
            if done[r] + len(part) > len(token_N):
                row = rows + start + len(token_N) - done[r]
                raise Violation(
                    name,
                    row,
                    f"router {r} (layer {routers[r].layer}) has more decisions than the "
                    f"{len(token_N)} tokens it saw",
                )
            _same(
                name,
                "token",
                part["token"].to_numpy(),
                token_N[done[r] : done[r] + len(part)],
                rows + start,
            )
            done[r] += len(part)
            yield r, rows + start, part
        rows += len(group)
    for r, n in enumerate(done):
        if n != (tokens := int(sees_rP[r][phase_T].sum())):
            raise Violation(
                name,
                rows,
                f"router {r} (layer {routers[r].layer}) has {n} decisions, it saw {tokens} tokens",
            )


def _tokens_of(phase_T: np.ndarray, sees_P: np.ndarray, first_token: int) -> np.ndarray:
    if sees_P.all():
        return np.arange(first_token, first_token + len(phase_T))
    return first_token + np.nonzero(sees_P[phase_T])[0]


# --- counts


def _check_counts(shard: Shard, found: Verification) -> None:
    name, routers = shard.files.paths["counts"], shard.trace.routers
    table = _table(shard, "counts", [f.name for f in schema.counts_schema(shard.trace.has_weights)])
    labels: dict[str, int] = {}
    router_N, layer_N, expert_N = (table[c].to_numpy() for c in ("router", "layer", "expert"))
    domain_N = _labels(table["domain"], name, "domain", labels)
    if (wrong_N := router_N >= len(routers)).any():
        raise Violation(
            name,
            int(wrong_N.argmax()),
            f"router is {router_N[wrong_N.argmax()]}, the manifest lists {len(routers)}",
        )
    _same(name, "layer", layer_N, np.array([r.layer for r in routers])[router_N])
    for column in ("assignments", "first_choice"):
        values = table[column].fill_null(0).to_numpy()
        if (wrong_N := values < 0).any():
            raise Violation(name, int(wrong_N.argmax()), f"{column} is {values[wrong_N.argmax()]}")
    if table["assignments"].null_count:
        raise Violation(
            name, int(table["assignments"].is_null().to_numpy().argmax()), "assignments is null"
        )
    load_N, first_N = table["assignments"].to_numpy(), table["first_choice"].fill_null(0).to_numpy()
    if (wrong_N := first_N > load_N).any():
        n = int(wrong_N.argmax())
        raise Violation(name, n, f"first_choice is {first_N[n]} of {load_N[n]} assignments")
    for r, router in enumerate(routers):
        rows = np.nonzero(router_N == r)[0]
        if (wrong := expert_N[rows] >= router.experts).any():
            n = int(rows[wrong.argmax()])
            raise Violation(
                name, n, f"expert is {expert_N[n]}, router {r} has {router.experts} experts"
            )
        times_DE = np.zeros((len(labels), router.experts), np.int64)
        np.add.at(times_DE, (domain_N[rows], expert_N[rows]), 1)
        times_DE = times_DE[np.unique(domain_N)]
        if (times_DE != 1).any():
            d, e = (int(i[0]) for i in np.nonzero(times_DE != 1))
            raise Violation(
                name,
                int(rows[0]) if len(rows) else 0,
                f"router {r} lists expert {e} {times_DE[d, e]} times in one domain",
            )
        total, most = int(load_N[rows].sum()), shard.files.tokens * router.top_k
        if total > most or int(first_N[rows].sum()) > shard.files.tokens:
            said = (
                f"router {r} has {total} assignments and {int(first_N[rows].sum())} first "
                f"choices of {shard.files.tokens} tokens × {router.top_k}"
            )
            raise Violation(name, int(rows[0]), said)
        found.assignments += total
        found.empty_slots += most - total
        found.decisions += shard.files.tokens
    if shard.trace.has_weights and not np.isfinite(sums := table["weight_sum"].to_numpy()).all():
        n = int((~np.isfinite(sums)).argmax())
        raise Violation(name, n, f"weight_sum is {sums[n]}")


# --- reading


def _parquet(shard: Shard, table: str) -> pq.ParquetFile:
    return _read(lambda: shard.file(table))


def _table(shard: Shard, table: str, columns: list[str]) -> pa.Table:
    return _read(
        lambda: parts.read(shard.file(table), shard.files.paths[table], columns, nulls=True)
    )


def _read(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Damaged as error:
        raise _violation(error, error.file) from None


def _same(
    name: str, column: str, found_N: np.ndarray, expected_N: np.ndarray, start: int = 0
) -> None:
    if (wrong_N := found_N != expected_N).any():
        n = int(wrong_N.argmax())
        raise Violation(name, start + n, f"{column} is {found_N[n]}, not {expected_N[n]}")


def _ids(column: pa.ChunkedArray) -> np.ndarray:
    """int64 or narrower, −1 where null."""
    return (
        column.cast(pa.int32()).fill_null(-1).to_numpy() if column.null_count else column.to_numpy()
    )


def _labels(column: pa.ChunkedArray, name: str, title: str, known: dict[str, int]) -> np.ndarray:
    """int64 [T]: codes of the labels in `known`, to which new ones are added."""
    if column.null_count:
        raise Violation(name, int(column.is_null().to_numpy().argmax()), f"{title} is null")
    if not len(column):
        return np.zeros(0, np.int64)
    array = (
        (column if pa.types.is_dictionary(column.type) else column.dictionary_encode())
        .unify_dictionaries()
        .combine_chunks()
    )
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    codes = np.array(
        [known.setdefault(label, len(known)) for label in array.dictionary.to_pylist()], np.int64
    )
    return codes[array.indices.to_numpy()]
