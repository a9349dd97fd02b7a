"""Rules of documents and tokens: documents are unique, tokens belong to them, positions are
consecutive.

T tokens.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from moe_inspect.trace import schema
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.runs import run_edges
from moe_inspect.trace.shard import Shard
from moe_inspect.trace.verify.verification import Violation, codes_of, expect_equal, read_table

NO_ID = -1


class Documents:
    """The documents of all shards: number → domain."""

    def __init__(self, trace: Trace):
        numbers, codes = [], []
        self.labels: dict[str, int] = {}
        for shard in trace.shards:
            name = shard.files.paths["documents"]
            table = read_table(shard, "documents", ["document", "domain"])
            document, code = (
                table["document"].to_numpy(),
                codes_of(table["domain"], name, "domain", self.labels),
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
                name, int(wrong[0]), f"document {document_T[wrong[0]]} is not declared in any shard"
            )
        if len(wrong := np.nonzero(self.code[at_T] != code_T)[0]):
            row = int(wrong[0])
            label = {code: label for label, code in self.labels.items()}
            said = (
                f"domain is {label[int(code_T[row])]!r}, document {document_T[row]} is of "
                f"{label[int(self.code[at_T[row]])]!r}"
            )
            raise Violation(name, row, said)


class Positions:
    """The last position of each sequence of the shard before: a sequence may continue in the next
    shard, and its positions with it."""

    def __init__(self, dropped: bool):
        self.strict = not dropped  # what was dropped leaves gaps
        self.last: dict[int, int] = {}

    def check(
        self, name: str, sequence_T: np.ndarray, encoded_T: np.ndarray, position_T: np.ndarray
    ) -> None:
        if not self.strict or not len(sequence_T):
            return
        # what an encoder reads has positions of its own
        key_T = sequence_T.astype(np.int64) * 2 + encoded_T
        order_T = np.argsort(key_T, kind="stable")
        key_T, position_T = key_T[order_T], position_T[order_T]
        wrong_T = np.zeros(len(key_T), bool)
        wrong_T[1:] = (key_T[1:] == key_T[:-1]) & (position_T[1:] != position_T[:-1] + 1)
        edges = run_edges(key_T)
        for i in edges[:-1]:
            if (before := self.last.get(int(key_T[i]))) is not None and position_T[i] != before + 1:
                wrong_T[i] = True
        if wrong_T.any():
            rows = order_T[wrong_T]
            row = int(rows.min())
            at = int(np.nonzero(order_T == row)[0][0])
            said = (
                f"position is {position_T[at]} in sequence {key_T[at] // 2}, not the position "
                "before + 1"
            )
            raise Violation(name, row, said)
        ends = edges[1:] - 1
        self.last = dict(zip(key_T[ends].tolist(), position_T[ends].tolist(), strict=True))


def check_tokens(
    shard: Shard, words: int | None, documents: Documents, positions: Positions
) -> np.ndarray:
    """The phase of each token, as an index into PHASES."""
    name = shard.files.paths["tokens"]
    columns = schema.TOKENS.names
    loss = schema.tokens_schema(shard.trace.has_loss).names[len(columns) :]
    table = read_table(shard, "tokens", [*columns, *loss])
    for column in columns:
        if table[column].null_count:
            raise Violation(
                name, int(table[column].is_null().to_numpy().argmax()), f"{column} is null"
            )
    token_T = table["token"].to_numpy()
    expect_equal(
        name, "token", token_T, np.arange(shard.files.first_token, shard.files.last_token + 1)
    )
    token_id_T = table["token_id"].to_numpy()
    wrong_T = (token_id_T < NO_ID) | (token_id_T >= (words if words is not None else 2**31))
    if wrong_T.any():
        row = int(wrong_T.argmax())
        raise Violation(name, row, f"token_id is {token_id_T[row]}, of a vocabulary of {words}")
    for column in ("document", "sequence", "position", "batch"):
        if len(token_T) and (values := table[column].to_numpy()).min() < 0:
            raise Violation(name, int((values < 0).argmax()), f"{column} is {values.min()}")
    labels = {label: code for code, label in enumerate(schema.PHASES)}
    phase_T = codes_of(table["phase"], name, "phase", labels)
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
        codes_of(table["domain"], name, "domain", documents.labels),
    )
    if loss:
        _check_loss(name, table.select(loss))
    encoded_T = phase_T == schema.PHASES.index("encode")
    positions.check(name, table["sequence"].to_numpy(), encoded_T, table["position"].to_numpy())
    return phase_T


def _check_loss(name: str, values: pa.Table) -> None:
    """A loss or an entropy is a number, at least 0 but for rounding, and there is one of each or
    none. (A loss is infinite where the model gave the token no probability.)"""
    null_T = values[0].is_null().to_numpy()
    other_T = values[1].is_null().to_numpy()
    if (null_T != other_T).any():
        row = int((null_T != other_T).argmax())
        has, lacks = (1, 0) if null_T[row] else (0, 1)
        said = f"{values.column_names[lacks]} is null where {values.column_names[has]} is not"
        raise Violation(name, row, said)
    for column in values.column_names:
        values_T = values[column].fill_null(0).to_numpy()
        wrong_T = np.isnan(values_T) | (values_T < -1e-3)
        if wrong_T.any():
            row = int(wrong_T.argmax())
            raise Violation(name, row, f"{column} is {values_T[row]}")
