"""The report's tables by name: a table is a function of the report's data that returns a DataFrame,
decorated with @table. `Report.tables`, `--table`, its help and the gates take it from TABLES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import pandas as pd

from moe_inspect.errors import MoeInspectError

Maker = TypeVar("Maker", bound=Callable[[Any], pd.DataFrame])


@dataclass(frozen=True)
class Table:
    """wants: what it needs counted beyond the load (names of `analysis.counting.counts.WANTS`).
    by_router: numeric columns of a table with one row per router: what a gate can be put on."""

    make: Callable[[Any], pd.DataFrame]
    wants: frozenset[str]
    by_router: tuple[str, ...]


TABLES: dict[str, Table] = {}


def table(*wants: str, by_router: tuple[str, ...] = ()) -> Callable[[Maker], Maker]:
    """Registers a table under the function's name."""

    def register(function: Maker) -> Maker:
        TABLES[function.__name__] = Table(function, frozenset(wants), by_router)
        return function

    return register


def check_table(name: str) -> None:
    """Raises MoeInspectError where there is no table of that name."""
    if name not in TABLES:
        raise MoeInspectError(f"no table {name!r}: there are {', '.join(TABLES)}")
