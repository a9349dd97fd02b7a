"""A trace is plain Parquet: pandas, Polars, DuckDB and Arrow read the same rows from it as
moe-inspect does."""

from __future__ import annotations

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.dataset as ds
import pytest

from moe_inspect.trace.reader import Trace
from tests.synthetic import uniform_ids, write_trace

NOWHERE = np.iinfo(np.uint16).max


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    rng = np.random.default_rng(0)
    ids = [uniform_ids(rng, 3_000, 8, 2) for _ in range(3)]
    ids[1][::7, 1] = NOWHERE
    weights = [rng.random((3_000, 2)).astype(np.float16).astype(np.float32) for _ in range(3)]
    return write_trace(
        tmp_path_factory.mktemp("t") / "t", ids, 8, weights=weights, document=np.arange(3_000) // 50
    )


READERS = {
    "pandas": lambda pattern: pd.concat(
        [pd.read_parquet(p) for p in sorted(pattern.parent.glob(pattern.name))]
    ),
    "polars": lambda pattern: pd.DataFrame(pl.read_parquet(pattern).to_dict(as_series=False)),
    "duckdb": lambda pattern: duckdb.sql(f"select * from '{pattern}'").df(),
    "arrow": lambda pattern: (
        ds.dataset(sorted(map(str, pattern.parent.glob(pattern.name)))).to_table().to_pandas()
    ),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("table", ["routing", "tokens", "documents"])
def test_the_same_rows_from_every_reader(trace: Trace, name: str, table: str):
    key = (
        ["router", "token"]
        if table == "routing"
        else ["token"]
        if table == "tokens"
        else ["document"]
    )
    expected = getattr(trace, table)().sort_values(key).reset_index(drop=True)
    got = READERS[name](trace.path / table / "*.parquet").sort_values(key).reset_index(drop=True)
    assert list(got.columns) == list(expected.columns)
    assert len(expected) == (9_000 if table == "routing" else 3_000 if table == "tokens" else 60)
    for column in expected.columns:
        if expected[column].dtype.kind in "iuf":
            np.testing.assert_array_equal(
                got[column].to_numpy(float, na_value=np.nan),
                expected[column].to_numpy(float, na_value=np.nan),
            )
        else:
            assert got[column].astype(str).tolist() == expected[column].astype(str).tolist()


def test_a_reader_that_lost_a_row_would_be_noticed(trace: Trace):
    got = READERS["duckdb"](trace.path / "routing" / "*.parquet")
    assert len(got) == 9_000
    assert got["expert_1"].isna().sum() == len(range(0, 3_000, 7))
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(got["token"].iloc[1:], trace.routing()["token"])


def test_loads_in_sql_are_those_of_the_report(trace: Trace):
    from moe_inspect.reporting.report import report

    rows = duckdb.sql(
        "select router, e as expert, count(*) as n from (select router, unnest([expert_0, "
        f"expert_1]) as e from '{trace.path}/routing/*.parquet') "
        "where e is not null group by all order by all"
    ).df()
    assert rows["n"].tolist() == report(trace).tables["load"]["assignments"].tolist()
