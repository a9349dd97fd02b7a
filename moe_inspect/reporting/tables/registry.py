"""The report's tables by name: a table is a function of the report's data that returns a DataFrame,
decorated with @table. `Report.tables`, `--table`, its help and the gates take it from TABLES."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.later import pd
from moe_inspect.text import no_such

ROWS = 10  # of a table in a text that is no screen
# a table that can be written before pandas is imported; a missing whole number is masked
AsColumns = Mapping[str, np.ndarray]
Maker = Callable[[Any], "pd.DataFrame | AsColumns"]  # from the data of a report or a comparison
Made = TypeVar("Made", bound=Maker)


@dataclass(frozen=True)
class Table:
    """wants: what it needs counted beyond the load (names of `analysis.counting.counts.WANTS`).
    by_router: numeric columns of a table with one row per router: what a gate can be put on.
    unlisted: columns that findings and charts read, and that the table does not show."""

    make: Maker
    wants: frozenset[str]
    by_router: tuple[str, ...]
    unlisted: tuple[str, ...] = ()


TABLES: dict[str, Table] = {}


def table(
    *wants: str,
    by_router: tuple[str, ...] = (),
    unlisted: tuple[str, ...] = (),
    tables: dict[str, Table] = TABLES,
) -> Callable[[Made], Made]:
    """Registers a table under the function's name, which `TABLES` of cli/help.py lists too.
    `tables`: of what; by default of the report."""

    def register(function: Made) -> Made:
        tables[function.__name__] = Table(function, frozenset(wants), by_router, unlisted)
        return function

    return register


def check_table(name: str, tables: Mapping[str, Table] = TABLES) -> None:
    """Raises MoeInspectError where there is no table of that name."""
    if name not in tables:
        raise MoeInspectError(no_such("table", name, tables))


def as_frame(columns: AsColumns) -> pd.DataFrame:
    whole = {
        name: pd.arrays.IntegerArray(of.filled(0), np.ma.getmaskarray(of))
        for name, of in columns.items()
        if isinstance(of, np.ma.MaskedArray)
    }
    return pd.DataFrame({**columns, **whole}, copy=False)


class LazyTables(Mapping[str, "pd.DataFrame"]):
    """name → DataFrame of what `data` holds, made when first asked for. `why_not`: why it has no
    table of a name that others have."""

    def __init__(
        self,
        data: object,
        tables: Mapping[str, Table] = TABLES,
        why_not: Callable[[str], str | None] | None = None,
    ):
        self._data, self._tables, self._why_not = data, tables, why_not
        self._made: dict[str, pd.DataFrame | AsColumns] = {}
        self._complete: dict[str, pd.DataFrame | AsColumns] = {}

    def __getitem__(self, name: str) -> pd.DataFrame:
        if not isinstance(made := self.as_made(name), pd.DataFrame):
            made = self._made[name] = as_frame(made)
        return made

    def as_made(self, name: str) -> pd.DataFrame | AsColumns:
        """A table as it is when nothing but writing it is wanted."""
        if name not in self and self._why_not and (why := self._why_not(name)):
            raise MoeInspectError(why)
        check_table(name, self._tables)
        if name not in self._made:
            made, unlisted = self._tables[name].make(self._data), self._tables[name].unlisted
            self._complete[name] = made
            # without unlisted columns nothing is looked at: that would import pandas
            if not unlisted:
                self._made[name] = made
            elif isinstance(made, Mapping):
                self._made[name] = {n: of for n, of in made.items() if n not in unlisted}
            else:
                self._made[name] = made.drop(columns=[*unlisted])
        return self._made[name]

    def complete(self, name: str) -> pd.DataFrame:
        """A table with its unlisted columns."""
        self.as_made(name)
        if not isinstance(made := self._complete[name], pd.DataFrame):
            made = self._complete[name] = as_frame(made)
        return made

    def __contains__(self, name: object) -> bool:
        return name in self._tables

    def __iter__(self) -> Iterator[str]:
        return iter(self._tables)

    def __len__(self) -> int:
        return len(self._tables)


@dataclass(frozen=True)
class Excerpt:
    """What the text shows of a table. what, rows: those worth reading first, of the table and the
    number that there is room for. columns: on a terminal, as many as fit, the most informative
    first; by default all."""

    what: str
    rows: Callable[[pd.DataFrame, int], pd.DataFrame]
    columns: tuple[str, ...] = ()

    def title(self, name: str, rows: pd.DataFrame, whole: pd.DataFrame) -> str:
        """Above these rows of the table of that name."""
        if len(rows) == len(whole):
            return name
        return f"{name}: {self.what}, {len(rows):,} of {len(whole):,} rows"


def highest_rows(frame: pd.DataFrame, most: int, column: str) -> pd.DataFrame:
    """If not all rows fit: those where a column is highest, the highest first."""
    if len(frame) <= most:
        return frame
    if not frame[column].notna().any():
        return frame.head(most)
    return frame.nlargest(most, column)
