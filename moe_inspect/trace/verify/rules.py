"""What verify finds, and the rules of the rows of a trace: of its documents and tokens, of
decisions, of counts.

T tokens, K slots, D domains, E experts, N rows of a table or of a row group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from itertools import combinations, pairwise, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from moe_inspect.errors import Damaged
from moe_inspect.text import plural, printable
from moe_inspect.trace import parts, schema
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.runs import run_edges
from moe_inspect.trace.shard import Shard, codes


class Violation(Damaged):
    """The first rule that is violated, and the row of the file where there is one."""

    def __init__(self, file: str, row: int | None, what: str):
        super().__init__(file, what)
        self.row = row


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a file, from row `start` on, that are checked."""

    file: str
    start: int = 0

    def refuse(self, wrong_N: np.ndarray, what: str, *of_row: np.ndarray) -> None:
        """Violation at the first row that is wrong. `what`: with a {} for the value that each of
        the arrays `of_row` has there."""
        if wrong_N.any():
            n = int(wrong_N.argmax())
            said = what.format(*(values_N[n] for values_N in of_row))
            raise Violation(self.file, self.start + n, said)

    def expect(self, column: str, found_N: np.ndarray, expected_N: np.ndarray) -> None:
        self.refuse(found_N != expected_N, f"{column} is {{}}, not {{}}", found_N, expected_N)

    def refuse_nulls(self, table: pa.Table, columns: Sequence[str]) -> None:
        for column in columns:
            if table[column].null_count:
                self.refuse(table[column].is_null().to_numpy(), f"{column} is null")


def read_table(shard: Shard, table: str, columns: list[str]) -> pa.Table:
    return parts.read(shard.file(table), shard.files.paths[table], columns, nulls=True)


def codes_of(column: pa.ChunkedArray, known: dict[str, int]) -> np.ndarray:
    """int64 [T]: codes of the labels in `known`, to which new ones are added."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    code_T, labels = codes(column)
    return np.array([known.setdefault(x, len(known)) for x in labels], np.int64)[code_T]


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

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        """What the command prints: the state of the trace and what was checked, or the first
        violation."""
        if not self.ok:
            row = "" if self.row is None else f" row {self.row}"
            return printable(f"{Path(self.path) / (self.file or '')}{row}: {self.violation}")
        counts = (plural(getattr(self, name), name[:-1]) for name in COUNTED)
        first = f"{self.path} {self.state}: {', '.join(counts)} in {plural(self.shards, 'shard')}"
        return "\n".join([printable(first), *(f"  {line}" for line in self.checked)])

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"

    @property
    def state(self) -> str:
        """How a trace is that violates no rule, in words."""
        resumed = " and can be resumed" if self.resumable else ""
        interrupted = f"was interrupted{resumed}; what is committed is fine"
        return STATE.get(self.status or "complete", interrupted)

    def record(self) -> dict[str, Any]:
        return asdict(self)


NO_ID = -1


# --- documents and tokens


class Documents:
    """The documents of all shards: number → domain. Violation where one is declared twice."""

    def __init__(self, trace: Trace):
        numbers, codes = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
        self.labels: dict[str, int] = {}
        for shard in trace.shards:
            rows = Rows(shard.files.paths["documents"])
            table = read_table(shard, "documents", ["document", "domain"])
            rows.refuse_nulls(table, ["domain"])
            numbers.append(table["document"].to_numpy())
            codes.append(codes_of(table["domain"], self.labels))
            rows.refuse(numbers[-1] < 0, "document is {}", numbers[-1])
        number = np.concatenate(numbers)
        order = np.argsort(number, kind="stable")
        self.number, self.code = number[order], np.concatenate(codes)[order]
        twice = np.zeros(len(number), bool)
        twice[order[1:]] = self.number[1:] == self.number[:-1]
        ends = np.cumsum([len(part) for part in numbers])
        for shard, start, end in zip(trace.shards, ends[:-1], ends[1:], strict=True):
            rows = Rows(shard.files.paths["documents"])
            rows.refuse(twice[start:end], "document {} is declared a second time", number[start:])

    def check(self, rows: Rows, document_T: np.ndarray, code_T: np.ndarray) -> None:
        at_T = np.searchsorted(self.number, document_T)
        known_T = np.isin(document_T, self.number)
        rows.refuse(~known_T, "document {} is not declared in any shard", document_T)
        label = np.array([*map(repr, self.labels)], object)
        rows.refuse(
            self.code[at_T] != code_T,
            "domain is {}, document {} is of {}",
            label[code_T],
            document_T,
            label[self.code[at_T]],
        )


class Positions:
    """The last position of each sequence of the shard before: a sequence may continue in the next
    shard, and its positions with it."""

    def __init__(self, dropped: bool):
        self.strict = not dropped  # what was dropped leaves gaps
        self.last: dict[int, int] = {}

    def check(
        self, rows: Rows, sequence_T: np.ndarray, encoded_T: np.ndarray, position_T: np.ndarray
    ) -> None:
        if not self.strict or not len(sequence_T):
            return
        # what an encoder reads has positions of its own
        key_T = sequence_T.astype(np.int64) * 2 + encoded_T
        order_T = np.argsort(key_T, kind="stable")
        sorted_T, at_T = key_T[order_T], position_T[order_T]
        wrong_T = np.zeros(len(key_T), bool)
        wrong_T[order_T[1:]] = (sorted_T[1:] == sorted_T[:-1]) & (at_T[1:] != at_T[:-1] + 1)
        edges = run_edges(sorted_T)
        for i in edges[:-1]:
            before = self.last.get(int(sorted_T[i]))
            wrong_T[order_T[i]] = before is not None and at_T[i] != before + 1
        said = "position is {} in sequence {}, not the position before + 1"
        rows.refuse(wrong_T, said, position_T, sequence_T)
        ends = edges[1:] - 1
        self.last = dict(zip(sorted_T[ends].tolist(), at_T[ends].tolist(), strict=True))


def check_tokens(
    shard: Shard, words: int | None, documents: Documents, positions: Positions
) -> np.ndarray:
    """The phase of each token, as an index into PHASES."""
    files, columns = shard.files, schema.TOKENS.names
    loss = shard.trace.columns_of("tokens").names[len(columns) :]
    rows, table = Rows(files.paths["tokens"]), read_table(shard, "tokens", [*columns, *loss])
    rows.refuse_nulls(table, columns)
    rows.expect(
        "token", table["token"].to_numpy(), np.arange(files.first_token, files.last_token + 1)
    )
    token_id_T = table["token_id"].to_numpy()
    wrong_T = (token_id_T < NO_ID) | (token_id_T >= (words if words is not None else 2**31))
    rows.refuse(wrong_T, f"token_id is {{}}, of a vocabulary of {words}", token_id_T)
    for column in ("document", "sequence", "position", "batch"):
        values_T = table[column].to_numpy()
        rows.refuse(values_T < 0, f"{column} is {{}}", values_T)
    labels = {label: code for code, label in enumerate(schema.PHASES)}
    phase_T = codes_of(table["phase"], labels)
    rows.refuse(
        phase_T >= len(schema.PHASES),
        f"phase is {{!r}}, not one of {', '.join(schema.PHASES)}",
        np.array([*labels], object)[phase_T],
    )
    code_T = codes_of(table["domain"], documents.labels)
    documents.check(rows, table["document"].to_numpy(), code_T)
    if loss:
        _check_loss(rows, table.select(loss))
    encoded_T = phase_T == schema.PHASES.index("encode")
    positions.check(rows, table["sequence"].to_numpy(), encoded_T, table["position"].to_numpy())
    return phase_T


def _check_loss(rows: Rows, values: pa.Table) -> None:
    """A loss or an entropy is a number, at least 0 but for rounding, and there is one of each or
    none. (A loss is infinite where the model gave the token no probability.)"""
    null_of = {name: values[name].is_null().to_numpy() for name in values.column_names}
    for (one, one_T), (other, other_T) in permutations(null_of.items(), 2):
        rows.refuse(one_T & ~other_T, f"{one} is null where {other} is not")
    for column in values.column_names:
        values_T = values[column].fill_null(0).to_numpy()
        rows.refuse(np.isnan(values_T) | (values_T < -1e-3), f"{column} is {{}}", values_T)


# --- decisions: one per router and token that reaches it; possible ids, weights and logits


def check_routing(shard: Shard, phase_T: np.ndarray, found: Verification) -> None:
    slots = range(max(r.top_k for r in shard.trace.routers))
    values = shard.trace.slot_values
    columns = [f"{name}_{j}" for name in ("expert", *values) for j in slots]
    for r, rows, table in _parts_of_routers(shard, "routing", columns, phase_T):
        router = shard.trace.routers[r]
        ids = _experts(rows, table, slots, "expert", router, r)
        meant = list(ids)
        if schema.DROPPED in values:
            dropped = _experts(rows, table, slots, schema.DROPPED, router, r)
            for j, dropped_N in enumerate(dropped):
                rows.refuse(
                    (dropped_N >= 0) & (ids[j] >= 0),
                    f"{schema.DROPPED}_{j} is {{}}, expert_{j} is {{}}: a slot is dropped or not",
                    dropped_N,
                    ids[j],
                )
                meant[j] = np.where(ids[j] >= 0, ids[j], dropped_N)
                found.dropped += int((dropped_N >= 0).sum())
        for (i, one_N), (j, other_N) in combinations(enumerate(meant), 2):
            said = f"expert {{}} is in slots {i} and {j} of one decision of router {r}"
            rows.refuse((one_N == other_N) & (other_N >= 0), said, other_N)
        empty = sum(int((i < 0).sum()) for i in ids[: router.top_k])
        found.decisions += len(table)
        found.empty_slots += empty
        found.assignments += len(table) * router.top_k - empty
        for value in values:
            if value != schema.DROPPED:
                _check_values(rows, table, ids, value)
        # as the manifest states: what does not state its order is put in order as it is read
        if shard.trace.has_weights and shard.trace.stated_routers[r].first_choice_known:
            _check_descending(rows, table, ids[: router.top_k])


def _experts(
    rows: Rows, table: pa.Table, slots: range, kind: str, router: schema.Router, r: int
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


def _check_values(rows: Rows, table: pa.Table, ids: list[np.ndarray], value: str) -> None:
    """One of `schema.SLOT_VALUES` is there where an expert is, and nowhere else; finite, and norms
    and peaks not negative."""
    for j, ids_N in enumerate(ids):
        column, wanted_N = table[f"{value}_{j}"], ids_N >= 0
        there_N = column.is_valid().to_numpy()
        rows.refuse(wanted_N & ~there_N, f"{value}_{j} is null, expert_{j} is there")
        rows.refuse(there_N & ~wanted_N, f"{value}_{j} is there, expert_{j} is null")
        values_N = column.fill_null(0).to_numpy()
        least = -np.inf if value == "weight" else 0
        rows.refuse(_is_no_size(values_N, least), f"{value}_{j} is {{}}", values_N)


def _is_no_size(values_N: np.ndarray, least: float) -> np.ndarray:
    return ~(np.isfinite(values_N) & (values_N >= least))


def _check_descending(rows: Rows, table: pa.Table, ids: list[np.ndarray]) -> None:
    """Slots are in descending weight, those that routed nowhere last."""
    weights = [
        np.where(ids_N >= 0, table[f"weight_{j}"].fill_null(0).to_numpy(), -np.inf)
        for j, ids_N in enumerate(ids)
    ]
    for j, (before_N, after_N) in enumerate(pairwise(weights)):
        said = f"weight_{j} is {{:.6g}}, weight_{j + 1} is {{:.6g}}"
        rows.refuse(
            before_N < after_N,
            f"{said}: the manifest says that weights descend",
            before_N,
            after_N,
        )


def check_logits(shard: Shard, phase_T: np.ndarray) -> None:
    for r, rows, table in _parts_of_routers(shard, "logits", ["logits"], phase_T):
        column = table["logits"].combine_chunks()
        width = getattr(column.type, "list_size", 0)
        E = shard.trace.routers[r].experts
        if width < E or column.null_count:
            said = f"logits are {width} wide, router {r} has {E} experts"
            raise Violation(rows.file, rows.start, said)
        values_NE = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)[:, :E]
        rows.refuse(np.isnan(values_NE).any(1), f"a router logit of router {r} is NaN")


def _parts_of_routers(
    shard: Shard, table: str, columns: list[str], phase_T: np.ndarray
) -> Iterator[tuple[int, Rows, pa.Table]]:
    """(router, its rows, decisions) of each part of a row group that is of one router. Checks that
    each router has the tokens that reach it, once and in order."""
    name, routers, first = shard.files.paths[table], shard.trace.routers, shard.files.first_token
    file = shard.file(table)
    sees_rP = [np.array([router.sees(phase) for phase in schema.PHASES]) for router in routers]
    done = [0] * len(routers)
    before = 0
    for g in range(file.metadata.num_row_groups):
        group = parts.read(file, name, ["token", "layer", "router", *columns], [g])
        router_N = group["router"].to_numpy()
        for start, end in pairwise(run_edges(router_N).tolist()):
            r, part, rows = int(router_N[start]), group[start:end], Rows(name, before + start)
            _refuse_strange_routers(rows, part, routers)
            token_N = first + np.flatnonzero(sees_rP[r][phase_T])
            if done[r] + len(part) > len(token_N):
                raise Violation(
                    name,
                    rows.start + len(token_N) - done[r],
                    f"router {r} (layer {routers[r].layer}) has more decisions than the "
                    f"{len(token_N)} tokens that reach it",
                )
            expected_N = token_N[done[r] : done[r] + len(part)]
            rows.expect("token", part["token"].to_numpy(), expected_N)
            done[r] += len(part)
            yield r, rows, part
        before += len(group)
    for r, n in enumerate(done):
        if n != (tokens := int(sees_rP[r][phase_T].sum())):
            raise Violation(
                name,
                before,
                f"router {r} (layer {routers[r].layer}) has {n} decisions for the "
                f"{tokens} tokens that reach it",
            )


def _refuse_strange_routers(rows: Rows, table: pa.Table, routers: list[schema.Router]) -> None:
    """The routers are those of the manifest, of the layers that it states."""
    router_N = table["router"].to_numpy()
    strange_N = router_N >= len(routers)
    rows.refuse(strange_N, f"router is {{}}, the manifest lists {len(routers)}", router_N)
    layer_L = np.array([r.layer for r in routers])
    rows.expect("layer", table["layer"].to_numpy(), layer_L[router_N])


# --- counts: every expert of every router once, sums within what the tokens allow


def check_counts(shard: Shard, found: Verification) -> None:
    name, routers, tokens = shard.files.paths["counts"], shard.trace.routers, shard.files.tokens
    sums = {"weight_sum": -np.inf} if shard.trace.has_weights else {}
    sums |= {"energy": 0.0} if shard.trace.has_energy else {}
    rows, table = Rows(name), read_table(shard, "counts", shard.trace.columns_of("counts").names)
    labels: dict[str, int] = {}
    router_N, expert_N = table["router"].to_numpy(), table["expert"].to_numpy()
    rows.refuse_nulls(table, ["domain"])
    domain_N = codes_of(table["domain"], labels)
    _refuse_strange_routers(rows, table, routers)
    load_N, first_N = (
        table[column].fill_null(0).to_numpy() for column in ("assignments", "first_choice")
    )
    rows.refuse(load_N < 0, "assignments is {}", load_N)
    rows.refuse(first_N < 0, "first_choice is {}", first_N)
    rows.refuse_nulls(table, ["assignments"])
    said = "first_choice is {} of {} assignments"
    rows.refuse(first_N > load_N, said, first_N, load_N)
    experts_N = np.array([router.experts for router in routers])[router_N]
    said = "expert is {}, router {} has {} experts"
    rows.refuse(expert_N >= experts_N, said, expert_N, router_N, experts_N)
    for r, router in enumerate(routers):
        of_router = np.flatnonzero(router_N == r)
        times_DE = np.zeros((len(labels), router.experts), np.int64)
        np.add.at(times_DE, (domain_N[of_router], expert_N[of_router]), 1)
        times_DE = times_DE[np.unique(domain_N)]
        if (times_DE != 1).any():
            d, e = (int(i[0]) for i in np.nonzero(times_DE != 1))
            said = f"router {r} lists expert {e} {times_DE[d, e]} times in one domain"
            raise Violation(name, int(of_router[0]) if len(of_router) else 0, said)
        total, firsts = int(load_N[of_router].sum()), int(first_N[of_router].sum())
        most = tokens * router.top_k
        if total > most or firsts > tokens:
            said = (
                f"router {r} has {total} assignments and {firsts} first choices of {tokens} "
                f"tokens × {router.top_k}"
            )
            raise Violation(name, int(of_router[0]), said)
        found.assignments += total
        found.empty_slots += most - total
        found.decisions += tokens
    for column, least in sums.items():
        values_N = table[column].to_numpy()
        rows.refuse(_is_no_size(values_N, least), f"{column} is {{}}", values_N)
