"""A trace asked in SQL, by DuckDB. It gets the rows from the trace's reader, as it scans them: it
needs no file, and every check of the reader holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa

from moe_inspect.errors import MoeInspectError
from moe_inspect.exporters.long_parquet import long_schema, long_tables
from moe_inspect.reporting.report import report
from moe_inspect.text import first_line
from moe_inspect.trace import schema
from moe_inspect.trace.reader import Trace, open_trace

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

# of columns with nulls, whose integers would become floats, exact up to 2⁵³ alone
NULLABLE = {
    pa.type_for_alias(name.lower()): pd.api.types.pandas_dtype(name)
    for name in ("Int8", "Int16", "Int32", "Int64", "UInt8", "UInt16", "UInt32", "UInt64")
}


@dataclass
class _Rows:
    """Rows that DuckDB reads as often as a query scans them, a shard at a time. An exception while
    they are read is kept in `failures`: DuckDB makes text of it."""

    schema: pa.Schema
    tables: Callable[[], Iterator[pa.Table]]
    failures: list[Exception] = field(default_factory=list[Exception])

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return pa.RecordBatchReader.from_batches(self.schema, self._batches()).__arrow_c_stream__()

    def _batches(self) -> Iterator[pa.RecordBatch]:
        try:
            for table in self.tables():
                # other programs' traces may hold plain text or wider integers
                yield from table.select(self.schema.names).cast(self.schema).to_batches()
        except Exception as error:
            self.failures.append(error)
            raise


def sql(trace: Trace | str | Path, query: str) -> pd.DataFrame:
    """What a `select` finds in a trace, by DuckDB (`pip install 'moe-inspect[sql]'`).

    Views: `routing` (a row per assignment: token, layer, router, slot, expert, weight …, and the
    facts of the token), `tokens`, `documents`, `vocabulary` (token_id, token), and `load`, which is
    the report's table. They are read as they are scanned, a shard and a router at a time, and of
    `routing` only the routers that `layer` and `router` leave. The query reads nothing else, no
    file either, and changes nothing. Integers with nulls are of pandas' nullable types. Raises
    MoeInspectError for a query that fails or is none, a view that the trace does not have, and a
    column that is neither number, truth value nor text."""
    try:
        import duckdb
    except ImportError:
        raise MoeInspectError("sql needs duckdb: pip install 'moe-inspect[sql]'") from None

    trace = open_trace(trace)
    with TemporaryDirectory(prefix="moe-inspect-") as spill, duckdb.connect() as connection:
        failures: list[Exception] = []
        try:
            kinds = [statement.type for statement in connection.extract_statements(query)]
            if kinds != [duckdb.StatementType.SELECT]:
                raise MoeInspectError(
                    "give one select statement: a query reads the trace and changes nothing"
                )
            _create_views(connection, trace, failures)
            if re.search(r"\bload\b", query, re.IGNORECASE):  # it takes a pass over the trace
                load = report(trace).tables["load"]
                connection.register("load", pa.Table.from_pandas(load, preserve_index=False))
            _lock(connection, spill)
            found = connection.sql(query).to_arrow_table()
        except duckdb.Error as error:
            if failures:
                raise failures[0] from None
            counts = trace.counts_only and isinstance(error, duckdb.CatalogException)
            raise MoeInspectError(
                f"the query fails: {first_line(error)}"
                + f" ({trace.path} holds counts only: {trace.more_than_counts})" * counts
            ) from None
    return _frame(found)


def _lock(connection: DuckDBPyConnection, spill: str) -> None:
    """From here on the connection opens no file but its own in `spill`, where it puts what memory
    does not hold, sees no variable of this program, and cannot be told otherwise."""
    connection.execute(f"set temp_directory = '{spill.replace(chr(39), chr(39) * 2)}'")
    connection.execute("set enable_external_access = false")
    connection.execute("set lock_configuration = true")


def _create_views(connection: DuckDBPyConnection, trace: Trace, failures: list[Exception]) -> None:
    def rows(columns: pa.Schema, tables: Callable[[], Iterator[pa.Table]]) -> Any:
        return _Rows(columns, tables, failures)

    if not trace.counts_only:
        for r in range(len(trace.routers)):
            connection.register(f"router_{r}", rows(long_schema(trace), _router(trace, r)))
        # the constants let DuckDB leave out the routers that a query does not ask for
        connection.execute(
            "create view routing as "
            + " union all ".join(
                f"select * replace ({router.layer}::usmallint as layer, {r}::usmallint as router) "
                f"from router_{r}"
                for r, router in enumerate(trace.routers)
            )
        )
        tokens = rows(
            schema.tokens_schema(trace.has_loss), lambda: (s.tokens() for s in trace.shards)
        )
        connection.register("tokens", tokens)
    if "documents" in trace.tables:
        documents = rows(schema.DOCUMENTS, lambda: (s.table("documents") for s in trace.shards))
        connection.register("documents", documents)
    connection.register("vocabulary", trace.vocabulary_table)


def _router(trace: Trace, router: int) -> Callable[[], Iterator[pa.Table]]:
    return lambda: (t for shard in trace.shards for t in long_tables(trace, shard, [router]))


def _frame(found: pa.Table) -> pd.DataFrame:
    names = found.column_names
    if twice := [name for name in names if names.count(name) > 1]:
        raise MoeInspectError(f"two columns are called {twice[0]}: rename one with `as`")
    columns = {name: _plain(found[name], name) for name in names}
    return pd.DataFrame(
        {
            name: column.to_pandas(types_mapper=NULLABLE.get if column.null_count else None)
            for name, column in columns.items()
        },
        columns=pd.Index(names),
    )


def _plain(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    kind = column.type
    if pa.types.is_decimal(kind):  # sums of integers are decimals of 38 digits
        try:
            return column.cast(pa.int64() if kind.scale == 0 else pa.float64())
        except pa.ArrowInvalid:
            return column.cast(pa.float64())
    if pa.types.is_dictionary(kind):
        return column.cast(kind.value_type)
    known = ("boolean", "integer", "floating", "string", "large_string", "null")
    if not any(getattr(pa.types, f"is_{one}")(kind) for one in known):
        raise MoeInspectError(
            f"column {name} is of type {kind}, which a table cannot hold: cast it to varchar"
        )
    return column
