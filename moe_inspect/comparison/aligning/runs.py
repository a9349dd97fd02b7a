"""Where each sequence of a trace is: runs of consecutive positions, read from the tokens tables.

T tokens of a shard, R runs, G sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moe_inspect.analysis.tasks import by_shard
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.runs import run_edges
from moe_inspect.trace.schema import PHASES
from moe_inspect.trace.shard import Shard, codes

PREFIX = 16  # tokens by whose ids a sequence is found that has another length in the other trace
COLUMNS = ["token_id", "document", "sequence", "position", "domain", "phase"]


@dataclass(frozen=True)
class Runs:
    """The runs of a trace, in the order of its shards. Arrays [R].

    A run lies in one shard, from row `row` on, and is `length` tokens of one sequence at positions
    `position`, `position` + 1, …. `group`: its sequence, an index into the arrays [G]. `content`
    and `prefix`: hashes of the token ids and positions of all of a sequence, and of its first
    PREFIX, which add up over runs. A sequence that is fed twice is two sequences.
    `known`: whether the trace knows token ids. `domains`: the labels of the trace."""

    position: np.ndarray
    length: np.ndarray
    shard: np.ndarray
    row: np.ndarray
    group: np.ndarray
    key_G: np.ndarray  # [G, 4]: document, sequence within it, encoder or not, repetition
    tokens_G: np.ndarray
    content_G: np.ndarray
    prefix_G: np.ndarray
    known: bool
    domains: tuple[str, ...]

    @cached_property
    def last_G(self) -> np.ndarray:
        """int64 [G]: the last position of each sequence."""
        last_G = np.zeros(len(self.key_G), np.int64)
        np.maximum.at(last_G, self.group, self.position + self.length - 1)
        return last_G

    @property
    def tokens(self) -> int:
        return int(self.length.sum())


def read_runs(trace: Trace) -> Runs:
    """Reads the tokens tables of a trace. Memory grows with its sequences, not with its
    decisions, unless tokens of many sequences follow each other in turn (decoding)."""
    if trace.counts_only:
        raise MoeInspectError(
            f"{trace.path} holds counts only, which cannot be compared token by token: "
            f"{trace.more_than_counts}"
        )
    parts, domains, known = list[np.ndarray](), dict[str, None](), False
    for number, (part, labels, has_ids) in enumerate(by_shard(trace, None, _runs_of)):
        part[5] = number
        parts.append(part)
        domains.update(dict.fromkeys(labels))
        known = known or has_ids
    if not sum(part.shape[1] for part in parts):
        raise MoeInspectError(f"{trace.path} holds no tokens: nothing to compare")
    document, sequence, encoder, position, length, shard, row, content, prefix = np.concatenate(
        parts, axis=1
    )
    key, tokens = _keys(document, sequence, encoder, position, length)
    key_G, group = _unique_rows(key)
    return Runs(
        position,
        length,
        shard,
        row,
        group,
        key_G,
        _sums(group, tokens, len(key_G)),
        _sums(group, content, len(key_G)),
        _sums(group, prefix, len(key_G)),
        known,
        tuple(sorted(domains)),
    )


def _runs_of(shard: Shard) -> tuple[np.ndarray, list[str], bool]:
    """int64 [9, R]: the runs of a shard, a row per field, whose number is left at 0; the domains;
    whether ids are known."""
    table = shard.tokens(COLUMNS)
    code_T, labels = codes(table["domain"])
    phase_T, phases = codes(table["phase"])
    document_T, sequence_T, position_T, id_T = (
        table[name].to_numpy().astype(np.int64)
        for name in ("document", "sequence", "position", "token_id")
    )
    encoder_T = np.array([phase == PHASES[2] for phase in phases], bool)[phase_T]
    place_T = position_T - np.arange(len(position_T))
    edges = run_edges(document_T, sequence_T, encoder_T, place_T)
    first = edges[:-1]
    hash_T = token_hash(id_T, position_T)
    early_T = np.where(position_T < PREFIX, hash_T, 0)
    content, prefix = (
        np.add.reduceat(values_T, first) if len(first) else first for values_T in (hash_T, early_T)
    )
    part = np.stack(
        [
            document_T[first],
            sequence_T[first],
            encoder_T[first].astype(np.int64),
            position_T[first],
            np.diff(edges),
            np.zeros(len(first), np.int64),
            first,
            content,
            prefix,
        ]
    )
    return part, [labels[d] for d in np.unique(code_T)], bool((id_T >= 0).any())


def token_hash(id_T: np.ndarray, position_T: np.ndarray) -> np.ndarray:
    """int64 [T]: a hash of each token id at its position, whose sum over a sequence is a hash of
    it (splitmix64)."""
    x_T = (id_T.astype(np.uint64) << np.uint64(32)) ^ position_T.astype(np.uint64)
    with np.errstate(over="ignore"):
        x_T += np.uint64(0x9E3779B97F4A7C15)
        x_T = (x_T ^ (x_T >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x_T = (x_T ^ (x_T >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x_T ^ (x_T >> np.uint64(31))).view(np.int64)


def _keys(
    document: np.ndarray,
    sequence: np.ndarray,
    encoder: np.ndarray,
    position: np.ndarray,
    length: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """What names the sequence of each run, int64 [R, 4]. Sequences are numbered within their
    document: how a program numbers them overall is its own affair. A run that begins no later than
    the one before it ended is of another repetition of the sequence."""
    pairs, of_run = _unique_rows(np.stack([document, sequence], axis=1))
    first_of_document = np.searchsorted(pairs[:, 0], pairs[:, 0])
    ordinal = (np.arange(len(pairs)) - first_of_document)[of_run]
    key = np.stack([document, ordinal, encoder], axis=1)
    _, group = _unique_rows(key)
    order = np.argsort(group, kind="stable")  # in execution order within a sequence
    end = position + length
    again = np.zeros(len(order), np.int64)
    same = group[order][1:] == group[order][:-1]
    again[1:] = same & (position[order][1:] < end[order][:-1])
    total = np.cumsum(again)
    begins = np.flatnonzero(np.r_[True, ~same])
    repetition = np.empty_like(again)
    repetition[order] = total - np.repeat(total[begins], np.diff(np.r_[begins, len(order)]))
    return np.column_stack([key, repetition]), length


def _unique_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows in ascending order, and which of them each row is."""
    order = np.lexsort(rows.T[::-1])
    edges = run_edges(rows[order])
    which = np.empty(len(rows), np.int64)
    which[order] = np.repeat(np.arange(len(edges) - 1), np.diff(edges))
    return rows[order[edges[:-1]]], which


def _sums(group: np.ndarray, values: np.ndarray, G: int) -> np.ndarray:
    """int64 [G], modulo 2⁶⁴."""
    order = np.argsort(group, kind="stable")
    edges = run_edges(group[order])
    assert len(edges) == G + 1
    return np.add.reduceat(values[order], edges[:-1])
