"""verify: checks a trace by the rules of its format, a shard and a row group at a time, and names
the first violation by file and row.

T tokens, K slots, D domains, E experts, N rows of a table or of a row group.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from moe_inspect.errors import Damaged, MoeInspectError, reading
from moe_inspect.later import pd
from moe_inspect.text import plural, printable
from moe_inspect.trace import parts, schema
from moe_inspect.trace.files.location import Remote, inside
from moe_inspect.trace.files.lock import is_locked, refuse_while_locked, settle
from moe_inspect.trace.manifest import no_trace, writer_of
from moe_inspect.trace.output_dir import OF_A_TABLE, OVERWRITTEN, contents
from moe_inspect.trace.parts import FileRows
from moe_inspect.trace.reader import Trace, address, place_of, shards_of
from moe_inspect.trace.replicas import Maps
from moe_inspect.trace.shard import Shard, check_counts, codes, run_edges

CHECKSUM_KEYS = {"bytes", "footer_crc32", "crc32"}  # all or none in a line, and sha256 with them
STATE = {"complete": "is fine", "recording": "is still being written, and fine so far"}
COUNTED = ("tokens", "decisions", "assignments")


@dataclass(repr=False)
class Verification:
    """The result of `verify`.

    ok: no rule is violated. An interrupted trace may be ok.
    status: "complete", "recording" (its writer is at work) or "interrupted".
    resumable: --resume can continue it.
    uncommitted: files that its writer was stopped in. Readers ignore them, --resume deletes them.
    violation, file, row: the first violation, the file it is in, and the row (from 0) where there
        is one; all None of a trace that is ok.
    empty_slots: slots that routed nowhere: Σ counts = tokens × k − empty slots, router by router.
    dropped: of these, those of which it is known which expert dropped them.
    checked: a line per rule that was checked."""

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
    dropped: int = 0
    documents: int = 0
    shards: int = 0
    checked: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """The state of the trace and what was checked, or the first violation."""
        if not self.ok:
            row = "" if self.row is None else f" row {self.row}"
            return printable(f"{Path(self.path) / (self.file or '')}{row}: {self.violation}")
        counts = (plural(getattr(self, name), name[:-1]) for name in COUNTED)
        first = f"{self.path} {self.state}: {', '.join(counts)} in {plural(self.shards, 'shard')}"
        return "\n".join([printable(first), *(f"  {line}" for line in self.checked)])

    __repr__ = __str__

    @property
    def state(self) -> str:
        """How a trace is that violates no rule, in words."""
        resumed = " and can be resumed" if self.resumable else ""
        interrupted = f"was interrupted{resumed}; what is committed is fine"
        return STATE.get(self.status or "complete", interrupted)


def verify(trace: Trace | str | Path | Remote) -> Verification:
    """Checks a trace by every rule of its format (docs/trace-format.md), every byte of it.

    A damaged file is a violation like any other. MoeInspectError where there is no trace."""
    root = place_of(trace)
    if isinstance(root, Path):
        settle(root)
    if not (root / schema.MANIFEST).is_file():
        raise _missing(root)
    found, opened = Verification(address(trace)), None
    try:
        opened = Trace(root)
        _verify(opened, found)
    except Damaged as error:
        found.ok, found.violation, found.file = False, error.what, error.file
        found.row = error.row
    except MoeInspectError as error:
        if opened is not None:
            raise
        found.ok, found.violation, found.file = False, str(error), schema.MANIFEST
    return found


def _missing(root: Path | Remote) -> MoeInspectError:
    if isinstance(root, Path) and root.is_dir() and any(root.iterdir()) and contents(root).is_free:
        refuse_while_locked(root)
        return MoeInspectError(
            f"no trace at {root} yet: its writer was stopped before anything was committed; "
            "--resume starts it again"
        )
    return no_trace(root)


def _verify(trace: Trace, found: Verification) -> None:
    stated = trace.manifest.get("counts")
    found.status = _status(trace)
    plan = (trace.manifest.get("corpus") or {}).get("plan")
    found.resumable = found.status == "interrupted" and plan is not None
    _check_lines(trace)
    unhashed = sum(_check_files(shard) for shard in shards_of(trace, "checksums", most=0))
    _check_orphans(trace, found)
    hashed = (
        "sha256 and rows of every file are those of its line"
        if not unhashed
        else f"rows of every file are those of its line; {unhashed:,} files state no sha256: "
        "a changed byte may go unseen in them"
    )
    found.checked = [hashed, "no orphaned files", "tokens numbered without a gap"]
    words = len(trace.vocabulary_table) or None
    documents = Documents(trace)
    found.documents = len(documents.code_of)
    found.checked.append("documents declared once")
    positions = Positions(strict=not (stated or {}).get("dropped"))
    for shard in shards_of(trace, "checking rows", most=0):
        if trace.counts_only:
            _check_counts(shard, documents, found)
        else:
            phase_T = _check_tokens(shard, words, documents, positions)
            _check_routing(shard, phase_T, found)
            if "logits" in trace.tables:
                _check_logits(shard, phase_T)
        found.shards += 1
        found.tokens += shard.files.tokens
    if trace.status == "complete" and isinstance(stated, dict):
        for name in ("tokens",) if trace.counts_only else ("tokens", "decisions"):
            if stated.get(name) != (value := getattr(found, name)):
                said = f"counts.{name} is {stated.get(name)}, the shards have {value}"
                raise Damaged(schema.MANIFEST, said)
    found.checked += _rules_of_rows(trace, positions.strict)


def _rules_of_rows(trace: Trace, positions: bool) -> list[str]:
    """What was checked of the rows. `positions`: whether these were."""
    counts, weights = trace.counts_only, trace.has_weights
    ids = "weight", schema.DROPPED, schema.PHYSICAL
    values = [value for value in trace.slot_values if value not in ids]
    of_values = "of outputs finite, not negative, present exactly where an expert is"
    rules = {
        "every expert of every router listed once": counts,
        "Σ counts ≤ tokens × k for each router, none negative, sums finite": counts,
        "the same for each document, whose tokens sum to the shard's": trace.by_document,
        "token ids within the vocabulary": not counts,
        "positions follow each other within a sequence": not counts and positions,
        "positions: not checked, decisions were dropped": not counts and not positions,
        "each router saw each of its tokens once, in order": not counts,
        "ids < E, no expert twice in a decision, Σ counts = tokens × k − empty slots": not counts,
        "weights finite, present exactly where an expert is, descending where stated": (
            not counts and weights
        ),
        "no weights recorded": not counts and not weights,
        **{f"{value}s {of_values}": not counts for value in values},
        "physical experts are replicas of the slots' experts, by the map of their forward pass": (
            not counts and schema.PHYSICAL in trace.slot_values
        ),
        "dropped experts < E, only in slots without an expert, none twice in a decision": (
            not counts and trace.has_dropped
        ),
        "logits of each decision, none NaN": "logits" in trace.tables,
        "the manifest's totals are those of the shards": True,
    }
    return [rule for rule, checked in rules.items() if checked]


def _status(trace: Trace) -> str:
    if trace.status != "recording" or writer_of(trace.manifest) is not None:
        return trace.status
    # of a trace at a URL nobody can tell; a lock may be held by a process of another machine
    is_written = isinstance(trace.path, Remote) or is_locked(trace.path)
    return "recording" if is_written else "interrupted"


# --- files: checksums, numbers of rows, no file that is not listed


def _check_lines(trace: Trace) -> None:
    """No unknown keys, nor checksums that only some lines state: a key may have been renamed."""
    # whether the line before has checksums: a trace begun without them may be resumed with them
    checked, known = False, schema.read_schema("shard_line")["properties"].keys()
    for files in (shard.files for shard in trace.joined(0)):
        for entry in map(json.loads, files.lines):
            stated, said = checked or not CHECKSUM_KEYS.isdisjoint(entry), ""
            if unknown := set(entry) - known:
                said = f"the unknown key {min(unknown)!r}"
            elif stated and (missing := (CHECKSUM_KEYS | {"sha256"}) - set(entry)):
                said = f"no {min(missing)}"
            if said:
                name = f"shards-{files.rank}.jsonl"
                raise Damaged(name, f"the line of {entry['path']} has {said}")
            checked = "crc32" in entry
    manifest = trace.manifest
    if "digest" not in manifest and (checked or "vocabulary" in manifest):
        said = "its digest was removed: lines of the same trace have checksums"
        raise Damaged(schema.MANIFEST, said)
    stated = "vocabulary" in manifest or "digest" not in manifest
    if not stated and (trace.path / schema.VOCABULARY).exists():
        raise Damaged(schema.VOCABULARY, "it was added later: trace.json states no vocabulary")


def _check_files(shard: Shard) -> int:
    """Returns the number of files without a stated sha256."""
    for table, name in shard.files.paths.items():
        path, stated = inside(shard.trace.path, name), shard.files.stated[table].sha256
        if not path.is_file():
            raise Damaged(name, "the file is missing")
        if stated is not None:
            with reading(path), path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != stated:
                raise Damaged(name, f"sha256 is {found[:12]}…, its line says {stated[:12]}…")
        shard.file(table)
    return sum(stated.sha256 is None for stated in shard.files.stated.values())


def _check_orphans(trace: Trace, found: Verification) -> None:
    """No files that no line names. A trace that is being written has some whose lines are to come;
    one that was interrupted may have kept them."""
    known = {path for shard in trace.joined(0) for path in shard.files.paths.values()}
    unfinished = trace.status != "complete" or (trace.path / OVERWRITTEN).exists()
    for table in trace.tables:
        folder = inside(trace.path, table)
        for file in sorted(folder.iterdir(), key=str) if folder.is_dir() else ():
            if (name := f"{table}/{file.name}") in known:
                continue
            if not (unfinished and OF_A_TABLE.fullmatch(file.name)):
                said = "an orphan: no line of shards-*.jsonl names it (--resume deletes it)"
                raise Damaged(name, said)
            found.uncommitted.append(name)


# --- rows: documents and tokens


def _read(shard: Shard, table: str, columns: list[str]) -> tuple[FileRows, pa.Table]:
    name = shard.files.paths[table]
    return FileRows(name), parts.read(shard.file(table), name, columns, nulls=True)


def _codes(column: pa.ChunkedArray, known: dict[str, int]) -> np.ndarray:
    """int64 [T]: codes of the labels in `known`, to which new ones are added."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    code_T, labels = codes(column)
    return np.array([known.setdefault(x, len(known)) for x in labels], np.int64)[code_T]


class Documents:
    """The documents of all shards, with the codes of their domains. Damaged where one is declared
    twice."""

    def __init__(self, trace: Trace):
        self.labels: dict[str, int] = {}
        found = list[tuple[FileRows, pd.Series]]()
        for shard in trace.joined(0):
            rows, table = _read(shard, "documents", ["document", "domain"])
            rows.refuse_nulls(table, ["domain"])
            number_D = table["document"].to_numpy()
            found.append((rows, pd.Series(_codes(table["domain"], self.labels), number_D)))
            rows.refuse(number_D < 0, "document is {}", number_D)
        self.code_of = pd.concat([pd.Series(dtype=np.int64), *(codes for _, codes in found)])
        twice_D, end = self.code_of.index.duplicated(), 0
        for rows, of_file in found:
            start, end = end, end + len(of_file)
            number_D, said = of_file.index.to_numpy(), "document {} is declared a second time"
            rows.refuse(twice_D[start:end], said, number_D)

    def check(self, rows: FileRows, document_T: np.ndarray, code_T: np.ndarray) -> None:
        expected_T = self.code_of.reindex(document_T, fill_value=-1).to_numpy()
        rows.refuse(expected_T < 0, "document {} is not declared in any shard", document_T)
        label = np.array([*map(repr, self.labels)], object)
        said = "domain is {}, document {} is of {}"
        rows.refuse(expected_T != code_T, said, label[code_T], document_T, label[expected_T])


class Positions:
    """The last position of each sequence of the shard before: a sequence may continue in the next
    shard, and its positions with it. `strict`: what was dropped leaves gaps."""

    def __init__(self, strict: bool):
        self.strict = strict
        self.last = pd.Series(dtype=np.int64)

    def check(
        self, rows: FileRows, sequence_T: np.ndarray, encoded_T: np.ndarray, position_T: np.ndarray
    ) -> None:
        if not self.strict or not len(sequence_T):
            return
        # what an encoder reads has positions of its own
        key_T = pd.Series(sequence_T.astype(np.int64) * 2 + encoded_T)
        of_key = pd.Series(position_T).groupby(key_T)
        before_T = of_key.shift().fillna(key_T.map(self.last))
        wrong_T = (before_T.notna() & (before_T + 1 != position_T)).to_numpy()
        said = "position is {} in sequence {}, not the position before + 1"
        rows.refuse(wrong_T, said, position_T, sequence_T)
        self.last = of_key.last()


def _check_tokens(
    shard: Shard, words: int | None, documents: Documents, positions: Positions
) -> np.ndarray:
    """The phase of each token, as an index into PHASES."""
    columns = schema.TOKENS.names
    rows, table = _read(shard, "tokens", columns)
    rows.refuse_nulls(table, columns)
    of = {name: table[name].to_numpy() for name in columns if name not in ("phase", "domain")}
    expected_T = np.arange(shard.files.first_token, shard.files.last_token + 1)
    rows.expect("token", of["token"], expected_T)
    wrong_T = (of["token_id"] < -1) | (of["token_id"] >= (2**31 if words is None else words))
    rows.refuse(wrong_T, f"token_id is {{}}, of a vocabulary of {words}", of["token_id"])
    for column in ("document", "sequence", "position", "batch"):
        rows.refuse(of[column] < 0, f"{column} is {{}}", of[column])
    labels = {label: code for code, label in enumerate(schema.PHASES)}
    phase_T = _codes(table["phase"], labels)
    said = f"phase is {{!r}}, not one of {', '.join(schema.PHASES)}"
    rows.refuse(phase_T >= len(schema.PHASES), said, np.array([*labels], object)[phase_T])
    documents.check(rows, of["document"], _codes(table["domain"], documents.labels))
    encoded_T = phase_T == schema.PHASES.index("encode")
    positions.check(rows, of["sequence"], encoded_T, of["position"])
    return phase_T


# --- decisions: one per router and token that reaches it; possible ids, weights and logits


def _check_routing(shard: Shard, phase_T: np.ndarray, found: Verification) -> None:
    trace, values = shard.trace, shard.trace.slot_values
    slots = range(max(r.top_k for r in trace.routers))
    columns = [f"{name}_{j}" for name in ("expert", *values) for j in slots]
    batch_T, maps = np.zeros(0), None
    if schema.PHYSICAL in values:
        batch_T = shard.tokens(["batch"])["batch"].to_numpy()
        maps = Maps(shard.replicas(), len(trace.routers))
    for r, rows, table in _parts_of_routers(shard, "routing", columns, phase_T):
        K = trace.routers[r].top_k
        ids = _experts(rows, table, slots, "expert", trace.routers[r], r)
        meant = list(ids)
        if schema.DROPPED in values:
            dropped = _experts(rows, table, slots, schema.DROPPED, trace.routers[r], r)
            for j, (id_N, dropped_N) in enumerate(zip(ids, dropped, strict=True)):
                said = f"{schema.DROPPED}_{j} is {{}}, expert_{j} is {{}}: a slot is dropped or not"
                rows.refuse((dropped_N >= 0) & (id_N >= 0), said, dropped_N, id_N)
                meant[j] = np.where(id_N >= 0, id_N, dropped_N)
                found.dropped += int((dropped_N >= 0).sum())
        for (i, one_N), (j, other_N) in combinations(enumerate(meant), 2):
            said = f"expert {{}} is in slots {i} and {j} of one decision of router {r}"
            rows.refuse((one_N == other_N) & (other_N >= 0), said, other_N)
        empty = sum(int((id_N < 0).sum()) for id_N in ids[:K])
        found.decisions += len(table)
        found.empty_slots += empty
        found.assignments += len(table) * K - empty
        for value in values:
            if value != schema.DROPPED:
                _check_values(rows, table, ids, value)
        if maps is not None:
            batch_N = batch_T[table["token"].to_numpy() - shard.files.first_token]
            _check_physical(rows, table, ids, batch_N, r, maps)
        # as the manifest states: what does not state its order is put in order as it is read
        if trace.has_weights and trace.stated_routers[r].first_choice_known:
            weights = [  # of slots that routed nowhere the least: they are last
                np.where(id_N >= 0, table[f"weight_{j}"].fill_null(0).to_numpy(), -np.inf)
                for j, id_N in enumerate(ids[:K])
            ]
            for j, (one_N, next_N) in enumerate(pairwise(weights)):
                said = f"weight_{j} is {{:.6g}}, weight_{j + 1} is {{:.6g}}: the manifest says that"
                rows.refuse(one_N < next_N, f"{said} weights descend", one_N, next_N)


def _experts(
    rows: FileRows, table: pa.Table, slots: range, kind: str, router: schema.Router, r: int
) -> list[np.ndarray]:
    """The columns `kind` of experts, all of them the router's, −1 where null."""
    ids = list[np.ndarray]()
    for j in slots:
        column, taken = table[f"{kind}_{j}"], j < router.top_k
        if column.null_count:
            column = column.cast(pa.int32()).fill_null(-1)
        ids.append(column.to_numpy())
        has = f"has {router.experts} experts" if taken else f"takes {router.top_k}"
        wrong_N = ids[j] >= (router.experts if taken else 0)
        rows.refuse(wrong_N, f"{kind}_{j} is {{}}, router {r} {has}", ids[j])
    return ids


def _check_values(rows: FileRows, table: pa.Table, ids: list[np.ndarray], value: str) -> None:
    """One of `schema.SLOT_VALUES` is there where an expert is, and nowhere else; and possible."""
    least = -np.inf if value == "weight" else 0
    for j, id_N in enumerate(ids):
        name, column = f"{value}_{j}", table[f"{value}_{j}"]
        there_N = column.is_valid().to_numpy()
        rows.refuse((id_N >= 0) & ~there_N, f"{name} is null, expert_{j} is there")
        rows.refuse(there_N & (id_N < 0), f"{name} is there, expert_{j} is null")
        rows.expect_size(name, column.fill_null(0).to_numpy(), least)


def _check_physical(
    rows: FileRows, table: pa.Table, ids: list[np.ndarray], batch_N: np.ndarray, r: int, maps: Maps
) -> None:
    """Each physical expert is a replica of the slot's expert."""
    for j, id_N in enumerate(ids):
        physical_N = table[f"{schema.PHYSICAL}_{j}"].fill_null(0).to_numpy()
        found_N = maps.experts(r, batch_N, physical_N)
        said = f"{schema.PHYSICAL}_{j} is {{}}, a replica of expert {{}} in forward pass {{}}, "
        said += f"expert_{j} is {{}}"
        rows.refuse((id_N >= 0) & (found_N != id_N), said, physical_N, found_N, batch_N, id_N)


def _check_logits(shard: Shard, phase_T: np.ndarray) -> None:
    for r, rows, table in _parts_of_routers(shard, "logits", ["logits"], phase_T):
        column = table["logits"].combine_chunks()
        width, E = getattr(column.type, "list_size", 0), shard.trace.routers[r].experts
        if width < E or column.null_count:
            said = f"logits are {width} wide, router {r} has {E} experts"
            raise Damaged(rows.file, said, row=rows.start)
        values_NE = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)[:, :E]
        rows.refuse(np.isnan(values_NE).any(1), f"a router logit of router {r} is NaN")


def _parts_of_routers(
    shard: Shard, table: str, columns: list[str], phase_T: np.ndarray
) -> Iterator[tuple[int, FileRows, pa.Table]]:
    """(router, its rows, decisions) of each part of a row group that is of one router. Checks that
    each router has the tokens that reach it, once and in order."""
    name, routers, file = shard.files.paths[table], shard.trace.routers, shard.file(table)
    sees_rP = [np.array([router.sees(phase) for phase in schema.PHASES]) for router in routers]
    named = [f"router {r} (layer {router.layer})" for r, router in enumerate(routers)]
    done, before = [0] * len(routers), 0
    for g in range(file.metadata.num_row_groups):
        group = parts.read(file, name, ["token", "layer", "router", *columns], [g])
        router_N = group["router"].to_numpy()
        for start, end in pairwise(run_edges(router_N).tolist()):
            r, part, rows = int(router_N[start]), group[start:end], FileRows(name, before + start)
            _check_routers(rows, part, routers)
            token_N = shard.files.first_token + np.flatnonzero(sees_rP[r][phase_T])
            if done[r] + len(part) > len(token_N):
                said = f"{named[r]} has more decisions than the {len(token_N)} tokens that reach it"
                raise Damaged(name, said, row=rows.start + len(token_N) - done[r])
            expected_N = token_N[done[r] : done[r] + len(part)]
            rows.expect("token", part["token"].to_numpy(), expected_N)
            done[r] += len(part)
            yield r, rows, part
        before += len(group)
    for r, n in enumerate(done):
        if n != (tokens := int(sees_rP[r][phase_T].sum())):
            said = f"{named[r]} has {n} decisions for the {tokens} tokens that reach it"
            raise Damaged(name, said, row=before)


def _check_routers(rows: FileRows, table: pa.Table, routers: list[schema.Router]) -> np.ndarray:
    """The routers are those of the manifest, of the layers that it states. Returns them."""
    router_N, layer_L = table["router"].to_numpy(), np.array([r.layer for r in routers])
    said = f"router is {{}}, the manifest lists {len(routers)}"
    rows.refuse(router_N >= len(routers), said, router_N)
    rows.expect("layer", table["layer"].to_numpy(), layer_L[router_N])
    return router_N


# --- counts: every expert of every router once, sums within what the tokens allow


def _documents_counted(
    shard: Shard, rows: FileRows, document_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which of the shard's documents each row is of, and the tokens of each document."""
    listed, table = _read(shard, "documents", ["document", "tokens"])
    number_P, tokens_P = (table[name].to_numpy().astype(np.int64) for name in table.column_names)
    listed.refuse(tokens_P < 0, "tokens is {}", tokens_P)
    if (total := int(tokens_P.sum())) != shard.files.tokens:
        said = f"its documents have {total} tokens, the shard {shard.files.tokens}"
        raise Damaged(listed.file, said)
    known_N = np.isin(document_N, number_P)
    rows.refuse(~known_N, "document {} is not one of its shard", document_N)
    if len(lacking := np.setdiff1d(number_P, document_N)):
        raise Damaged(rows.file, f"document {lacking[0]} has no counts")
    order_P = np.argsort(number_P, kind="stable")
    return order_P[np.searchsorted(number_P[order_P], document_N)], tokens_P


def _check_counts(shard: Shard, documents: Documents, found: Verification) -> None:
    routers, tokens = shard.trace.routers, shard.files.tokens
    rows, table = _read(shard, "counts", shard.trace.columns_of("counts").names)
    rows.refuse_nulls(table, ["domain"])
    domain_N = part_N = _codes(table["domain"], documents.labels)
    P, tokens_P, of = len(documents.labels), None, "domain"
    if shard.trace.by_document:
        documents.check(rows, table["document"].to_numpy(), domain_N)
        part_N, tokens_P = _documents_counted(shard, rows, table["document"].to_numpy())
        P, of = len(tokens_P), "document"
    router_N, expert_N = _check_routers(rows, table, routers), table["expert"].to_numpy()
    check_counts(rows, table, routers)
    load_N, first_N = (
        table[column].fill_null(0).to_numpy() for column in ("assignments", "first_choice")
    )
    rows.refuse(first_N > load_N, "first_choice is {} of {} assignments", first_N, load_N)
    for r, router in enumerate(routers):
        of_router = np.flatnonzero(router_N == r)
        row = int(of_router[0]) if len(of_router) else 0
        times_PE = np.zeros((P, router.experts), np.int64)
        np.add.at(times_PE, (part_N[of_router], expert_N[of_router]), 1)
        times_PE = times_PE[np.unique(part_N)]
        for p, e in np.argwhere(times_PE != 1)[:1]:
            said = f"router {r} lists expert {e} {times_PE[p, e]} times in one {of}"
            raise Damaged(rows.file, said, row=row)
        if tokens_P is not None:
            total_P = np.zeros(P, np.int64)
            np.add.at(total_P, part_N[of_router], load_N[of_router])
            wrong_N = (total_P > tokens_P * router.top_k)[part_N] & (router_N == r)
            said = f"router {r} has {{}} assignments of a document of {{}} tokens × {router.top_k}"
            rows.refuse(wrong_N, said, total_P[part_N], tokens_P[part_N])
        total, firsts = int(load_N[of_router].sum()), int(first_N[of_router].sum())
        most = tokens * router.top_k
        if total > most or firsts > tokens:
            said = f"router {r} has {total} assignments and {firsts} first choices of {tokens}"
            raise Damaged(rows.file, f"{said} tokens × {router.top_k}", row=row)
        found.assignments += total
        found.empty_slots += most - total
        found.decisions += tokens
    for name in shard.trace.sums:
        rows.expect_size(name, table[name].to_numpy(), schema.SUMS[name].least)
