"""Violation, and how files are read so that whatever is wrong with one becomes a Violation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_inspect.errors import Damaged, MoeInspectError
from moe_inspect.trace import parts
from moe_inspect.trace.shard import Shard


class Violation(Exception):
    """The first rule that is violated; caught by `verify` only."""

    def __init__(self, file: str, row: int | None, what: str):
        super().__init__(what)
        self.file, self.row, self.what = file, row, what


def violation_of(error: MoeInspectError, name: str) -> Violation:
    return (
        Violation(error.file, None, error.what)
        if isinstance(error, Damaged)
        else Violation(name, None, str(error))
    )


def open_table(shard: Shard, table: str) -> pq.ParquetFile:
    return or_violation(lambda: shard.file(table))


def read_table(shard: Shard, table: str, columns: list[str]) -> pa.Table:
    return or_violation(
        lambda: parts.read(shard.file(table), shard.files.paths[table], columns, nulls=True)
    )


def or_violation(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Damaged as error:
        raise violation_of(error, error.file) from None


def expect_equal(
    name: str, column: str, found_N: np.ndarray, expected_N: np.ndarray, start: int = 0
) -> None:
    if (wrong_N := found_N != expected_N).any():
        n = int(wrong_N.argmax())
        raise Violation(name, start + n, f"{column} is {found_N[n]}, not {expected_N[n]}")


def ids_of(column: pa.ChunkedArray) -> np.ndarray:
    """int64 or narrower, −1 where null."""
    return (
        column.cast(pa.int32()).fill_null(-1).to_numpy() if column.null_count else column.to_numpy()
    )


def codes_of(column: pa.ChunkedArray, name: str, title: str, known: dict[str, int]) -> np.ndarray:
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
