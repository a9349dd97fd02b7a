"""Tables of measured times of MoE layers, as a user gives them: a csv or a DataFrame.

S rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moe_inspect.errors import MoeInspectError, first_line, reading
from moe_inspect.text import cut

BYTES = {
    "bfloat16": 2.0,
    "fp8": 1.0,
    "fp8_block": 1.0,
    "int4_wo": 0.53,  # 4-bit kinds with their scales
    "nvfp4": 0.5625,
    "w4a16_mxfp4": 0.53,
    "w4a8_mxfp4_mxfp8": 0.53,
}
KERNEL = ["gpu", "engine", "version", "kernel", "dtype"]
OF_RANK = ["hidden", "inter", "top_k", "experts"]
CONFIGURATION = ["hidden", "inter", "tp", "experts", "top_k", "ep", "tokens"]
FEWEST_ROWS = 100  # to fit a kernel
MOST = 1e9  # of any number in a table of times: sums and products of larger ones overflow
# least number of a column, and what it is; other columns have whole numbers from 1
LEAST = {"ms": (1 / MOST, "a number from 10^-9"), "handed": (0, "a number from 0")}


@dataclass(frozen=True)
class TimesTable:
    """A table of times. Cells of a file are text, or NaN. `name`, and of each row in `row_names`:
    what errors call it; `columns`: those that are read."""

    name: str
    cells: Any
    row_names: list[str]
    columns: list[str]

    def refuse(self, is_bad_S: Any, message: str) -> None:
        """MoeInspectError for the first bad row, if there is one. The message has columns in braces
        in place of their cells."""
        if (bad := np.flatnonzero(is_bad_S)).size:
            cells = {name: shown(self.cells[name].iloc[bad[0]]) for name in self.columns}
            raise MoeInspectError(
                f"{self.name}: {self.row_names[bad[0]]}: {message.format(**cells)}"
            )

    def texts(self, column: str) -> pd.Series:
        self.refuse(self.cells[column].isna(), f"{column} is empty")
        return self.cells[column].astype(str)

    def numbers(self, column: str) -> np.ndarray:
        value_S = np.array([number(cell) for cell in self.cells[column]])
        least, kind = LEAST.get(column, (1, "a whole number from 1"))
        is_whole = "whole" in kind
        is_bad_S = (value_S < least) | (is_whole & (value_S % 1 > 0))
        self.refuse(is_bad_S, f"{column} is {{{column}}}, not {kind} to 10^9")
        return value_S.astype(int) if is_whole else value_S


def own_times(table: str | Path | pd.DataFrame) -> Any:
    """Rows of `LatencyModel.fit` in the columns that `measured` takes. The most even of the loads
    with the same shape and sum of tokens is the balanced one."""
    times = opened(table)
    frame: Any = pd.DataFrame({column: times.texts(column) for column in KERNEL})
    is_known = frame["dtype"].isin(list(BYTES))
    times.refuse(~is_known, f"dtype is {{dtype}}, not one of {', '.join(BYTES)}")
    for column in times.columns:
        if column not in (*KERNEL, "tokens_per_expert"):
            frame[column] = times.numbers(column)
    times.refuse(frame["top_k"] > frame["experts"], "top_k is {top_k}, above experts, {experts}")
    loads = own_loads(times, frame["experts"])
    rows = pd.Series([load.sum() for load in loads])
    frame["ep"] = frame["experts"] // [len(load) for load in loads]
    frame["tp"], frame["handed"] = frame.get("tp", 1), frame.get("handed", rows / frame["top_k"])
    times.refuse(
        (rows == 0) & (frame["handed"] == 0),
        "the rank has no tokens: give a load with some, or in the column handed how many tokens "
        "of other ranks it was handed",
    )
    frame["tokens"] = rows * frame["ep"] / frame["top_k"]
    busiest = pd.Series([load.max() for load in loads])
    same_sum = [frame[column] for column in [*KERNEL, *CONFIGURATION]]
    is_even = busiest == busiest.groupby(same_sum).transform("min")
    frame["law"] = np.where(is_even, "balanced", "given")
    frame["load"] = [load[None] for load in loads]
    frame["handed"] = [np.array([handed]) for handed in frame["handed"]]
    loaded = (rows > 0).groupby([frame[column] for column in KERNEL]).sum()
    if len(few := loaded[loaded < FEWEST_ROWS]):
        raise MoeInspectError(
            f"{times.name} has {few.iloc[0]} rows of {shown('/'.join(few.index[0]))} with tokens: "
            f"{FEWEST_ROWS} are needed to fit a kernel"
        )
    return frame


def own_loads(times: TimesTable, experts_S: pd.Series) -> list[np.ndarray]:
    """Tokens per expert of the rank, by row. float64 [experts of the rank]"""
    loads = [counts_of(cell) for cell in times.cells["tokens_per_expert"]]
    times.refuse(
        [not len(load) or load.min() < 0 for load in loads],
        "tokens_per_expert is {tokens_per_expert}, not the tokens of each expert of the rank, "
        "with blanks between",
    )
    times.refuse(
        experts_S % [len(load) for load in loads] > 0,
        "experts, {experts}, is no multiple of the number of counts in tokens_per_expert",
    )
    return loads


def opened(table: str | Path | pd.DataFrame) -> TimesTable:
    """A table of times. MoeInspectError unless it has rows, and each column once."""
    if isinstance(table, pd.DataFrame):
        name, cells = "the table", table.reset_index(drop=True)
        row_names = [f"row {n + 1}" for n in range(len(table))]
    else:
        name, cells = str(table), read_cells(table)
        row_names = [f"line {n + 2}" for n in cells.index]
        cells = cells.reset_index(drop=True)
    needed = [*KERNEL, *OF_RANK, "tokens_per_expert", "ms"]
    if missing := [column for column in needed if column not in cells]:
        raise MoeInspectError(f"{name} has no column {', '.join(missing)}")
    columns = [*needed, *(column for column in ("handed", "tp") if column in cells)]
    if twice := [column for column in columns if list(cells.columns).count(column) > 1]:
        raise MoeInspectError(f"{name} has two columns {twice[0]}")
    if not len(cells):
        raise MoeInspectError(f"{name} has no rows")
    return TimesTable(name, cells, row_names, columns)


def read_cells(path: str | Path) -> pd.DataFrame:
    """The rows of a csv that are not blank, numbered from 0 with the blank ones."""
    try:
        with reading(path):
            frame = pd.read_csv(
                path, dtype=str, keep_default_na=False, na_values=[""], skip_blank_lines=False
            )
    except ValueError as error:
        raise MoeInspectError(f"cannot read {path}: {first_line(error)}") from error
    if not isinstance(frame.index, pd.RangeIndex):
        raise MoeInspectError(f"{path}: line 2 has more cells than the header")
    return frame.dropna(how="all")


def number(cell: Any) -> float:
    """−1 for what is not a number up to MOST."""
    try:
        value = float(cell)
    except (TypeError, ValueError, OverflowError):
        return -1.0
    return value if abs(value) <= MOST else -1.0


def counts_of(cell: Any) -> np.ndarray:
    """`number` of each count of a cell, which may be a single one. float64 [experts]"""
    parts = cell.split() if isinstance(cell, str | bytes) else cell if np.iterable(cell) else [cell]
    return np.array([number(part) for part in parts])


def shown(cell: Any) -> str:
    """The cell in one short line."""
    text = " ".join((repr(cell) if isinstance(cell, str) else str(cell)).split())
    return "empty" if text in ("nan", "None", "<NA>", "''", "[]") else cut(text, 80)
