"""Rows of a table, each of one choice of a token, in any order → the decisions of each router.

N rows, T tokens, L layers, K slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.importers.batches import Numbering, Tokens, batch_of_decisions
from moe_inspect.importers.routed import checked_ids
from moe_inspect.importers.values import check_range
from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer import RoutedBatch

BATCH_TOKENS = 16_384
MOST_EMPTY = 2**20  # slots without a row, besides as many as there are rows


@dataclass(frozen=True)
class Choices:
    """The choices of a file. document, position: int64 [T], ascending; ids_LTK: −1 where there is
    no row; weights_LTK: float16, None where the file has none. decoded_T, token_id_T: None where
    it does not say. missing: decisions without a row."""

    document_T: np.ndarray
    position_T: np.ndarray
    layers: list[int]
    ids_LTK: np.ndarray
    weights_LTK: np.ndarray | None
    decoded_T: np.ndarray | None
    token_id_T: np.ndarray | None
    missing: int


def choices_of(
    where: str,
    columns: dict[str, np.ndarray],
    top_k: int,
    weights_N: np.ndarray | None = None,
) -> Choices:
    """`columns`: int64 [N] of document, position, layer, slot and expert (−1: nowhere), optionally
    of decoded (0 or 1) and token_id, which all rows of a token must agree on. MoeInspectError where
    two rows are of one slot, or most are missing."""
    slot_N, layer_N, expert_N = columns["slot"], columns["layer"], columns["expert"]
    for name in ("document", "position"):
        check_range(columns[name], f"{where}: {name}", 0, 2**31 - 1)
    check_range(slot_N, f"{where}: slot", 0, top_k - 1)
    key_N = columns["document"] << 32 | columns["position"]
    key_T, row_T, token_N = np.unique(key_N, return_index=True, return_inverse=True)
    layers, at_N = np.unique(layer_N, return_inverse=True)
    T, L = len(key_T), len(layers)
    if T * L * top_k > 2 * len(key_N) + MOST_EMPTY:
        raise MoeInspectError(
            f"{where}: {len(key_N):,} rows of {T:,} tokens × {L} layers × {top_k} slots: most are "
            "missing"
        )
    cell_N = (at_N * T + token_N) * top_k + slot_N
    if len(np.unique(cell_N)) != len(cell_N):
        cell, times = np.unique(cell_N, return_counts=True)
        t = int(cell[times.argmax()]) // top_k % T
        raise MoeInspectError(
            f"{where}: position {key_T[t] & 0xFFFFFFFF} of {key_T[t] >> 32} has two rows of one "
            "layer and slot"
        )

    def filled(values_N: np.ndarray, empty: int, dtype: type) -> np.ndarray:
        made = np.full(L * T * top_k, empty, dtype)
        made[cell_N] = values_N
        return made.reshape(L, T, top_k)

    def of_token(name: str) -> np.ndarray | None:
        if name not in columns:
            return None
        value_T = columns[name][row_T]
        if (value_T[token_N] != columns[name]).any():
            raise MoeInspectError(f"{where}: rows of one token with different {name}")
        return value_T

    return Choices(
        key_T >> 32,
        key_T & 0xFFFFFFFF,
        [int(layer) for layer in layers],
        filled(expert_N, -1, np.int32),
        None if weights_N is None else filled(weights_N, 0, np.float16),
        of_token("decoded"),
        of_token("token_id"),
        T * L - len(np.unique(cell_N // top_k)),
    )


def batches_of(
    where: str, found: Choices, routers: list[Router], labels: dict[int, str], numbers: Numbering
) -> Iterator[RoutedBatch]:
    """Batches of one document and phase, in the order of positions; a gap begins a new sequence.
    `labels`: document → domain."""
    T = len(found.document_T)
    decoded_T = np.zeros(T, bool) if found.decoded_T is None else found.decoded_T.astype(bool)
    new_T = np.diff(found.document_T, prepend=-1) != 0
    gap_T = new_T | (np.diff(found.position_T, prepend=-1) != 1)
    sequence_T = gap_T.cumsum() - 1 + numbers.sequence(int(gap_T.sum()))
    starts = np.flatnonzero(new_T | np.diff(decoded_T, prepend=False).astype(bool))
    number = -1
    for start, end in zip(starts, [*starts[1:], T], strict=True):
        label, documents = labels[int(found.document_T[start])], []
        if new_T[start]:
            tokens = int((found.document_T == found.document_T[start]).sum())
            number, documents = numbers.document(label, where, tokens)
        for first in range(int(start), int(end), BATCH_TOKENS):
            rows = slice(first, min(first + BATCH_TOKENS, int(end)))
            yield batch_of_decisions(
                numbers,
                Tokens(
                    number,
                    numbers.domain(label),
                    sequence_T[rows],
                    found.position_T[rows],
                    None if found.token_id_T is None else found.token_id_T[rows],
                ),
                [
                    checked_ids(found.ids_LTK[n, rows], router, f"{where}, layer {router.layer}")
                    for n, router in enumerate(routers)
                ],
                weights=None
                if found.weights_LTK is None
                else [np.ascontiguousarray(of_layer[rows]) for of_layer in found.weights_LTK],
                documents=documents,
                phase="decode" if decoded_T[start] else "prefill",
            )
            documents = []
