"""`moe-inspect sql`: the rows are those of the trace, read as they are needed, and nothing else is
read or changed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import moe_inspect
from moe_inspect import query
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.reader import Trace
from tests.conftest import Cli
from tests.support.damage import edit_lines, last_byte, with_a_bit_less
from tests.support.synthetic import assigned, encoder_decoder, thirty_documents, write_counts

duckdb = pytest.importorskip("duckdb")

T, K = 300, 2


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Labels are in an order of their own in each shard."""
    how: dict[str, Any] = {"L": 2, "layers": [1, 3], "domain_of_document": ("a", "b", "c")}
    return thirty_documents(tmp_path_factory.mktemp("sql") / "t", **how)


def test_routing_is_a_row_per_assignment(trace: Trace) -> None:
    found = trace.sql("select * from routing order by router, token, slot")
    expected = assigned(trace)
    assert len(found) == 2 * T * K - 1
    assert len([*trace.shards]) == 3
    for name in found:
        assert found[name].astype(str).tolist() == (
            expected[name].astype(found[name].dtype).astype(str).tolist()
        ), name


@pytest.mark.parametrize("view", ["tokens", "documents", "vocabulary", "load"])
def test_the_other_views_are_the_tables(view: str, trace: Trace) -> None:
    if view == "load":
        expected = moe_inspect.report(trace).tables["load"]
    else:
        expected = getattr(trace, view)()
    found = moe_inspect.open_trace(trace.path).sql(f"from {view.upper()}")
    found = found.sort_values([*expected.columns[:3]])
    assert len(found) == len(expected) > 0
    for name in expected:
        np.testing.assert_array_equal(found[name].to_numpy(), expected[name].to_numpy(), name)


def test_a_view_is_read_as_often_as_it_is_named(trace: Trace) -> None:
    pairs = trace.sql(
        "select count(*) n from routing a join routing b using (router, token) "
        "where a.slot = 0 and b.slot = 1",
    )
    assert pairs["n"].tolist() == [2 * T - 1]


def test_only_the_routers_asked_for_are_read(trace: Trace, tmp_path: Path) -> None:
    """The decisions of the other one are damaged; and none are read before they are asked for."""
    shutil.copytree(trace.path, tmp_path / "t")
    for path in (tmp_path / "t" / "routing").iterdir():
        column = pq.read_metadata(path).row_group(0).column(3)
        with_a_bit_less(path, last_byte(column))
    edit_lines(tmp_path / "t", [line for line in edit_lines(tmp_path / "t") if line.pop("sha256")])
    damaged = moe_inspect.open_trace(tmp_path / "t")
    found = damaged.sql("select distinct layer from routing where layer = 3")
    assert found["layer"].tolist() == [3]
    assert damaged.sql("select count(*) n from tokens")["n"].tolist() == [T]
    with pytest.raises(MoeInspectError, match="CRC"):  # control
        damaged.sql("select count(*) from routing")


def test_each_stack_has_its_own_tokens(tmp_path: Path) -> None:
    found = encoder_decoder(tmp_path / "t").sql(
        "select router, phase = 'encode' as encode, count(*) n from routing group by all",
    )
    assert found.groupby("router")["encode"].nunique().tolist() == [1] * found["router"].nunique()
    assert found["encode"].nunique() == 2


CHANGE = """copy (select 1) to '{file}.new'
attach '{file}.new'
install httpfs
load httpfs
set threads = 1
set enable_external_access = true
create table mine as select 1
drop view routing
export database '{file}.new'"""
SEVERAL = ["select 1; select 2", "select 1; copy (select 1) to '{file}.new'", "", "/* nothing */"]
ELSEWHERE = """select * from read_csv('{file}')
select * from read_text('{file}')
select * from glob('{folder}/*')
select * from '{file}'
select * from '{folder}/*.csv'
select * from query('from read_text(''{file}'')')
select * from nothing
select nothing from routing
select
select 1 / 'a'"""


@pytest.mark.parametrize("asked", [*CHANGE.splitlines(), *SEVERAL, *ELSEWHERE.splitlines()])
def test_a_query_reads_the_trace_alone(
    asked: str, trace: Trace, tmp_path: Path, cli_here: Cli
) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_text("a,b\n1,2\n")
    asked = asked.format(file=secret, folder=tmp_path)
    with pytest.raises(MoeInspectError, match=r"^(the query fails: |give one select statement)"):
        trace.sql(asked)
    done = cli_here("sql", trace.path, asked, check=1)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["secret.csv"]


LOCKED = """copy (select 1) to '{folder}/new'
attach '{folder}/new'
select * from read_text('{folder}/secret')
install httpfs
load httpfs
set enable_external_access = true
set temp_directory = '{folder}'
from frame"""


@pytest.mark.parametrize("statement", LOCKED.splitlines())
def test_the_lock_holds_by_itself(statement: str, tmp_path: Path) -> None:
    """Whatever the check of the statement let through; no variable of the program is seen."""
    frame = pd.DataFrame({"a": [1]})
    (tmp_path / "secret").write_text("x")
    (tmp_path / "spill").mkdir()
    with duckdb.connect() as connection:
        assert connection.sql("from frame").fetchall() == [(frame["a"][0],)], "control"
        query._lock(connection, str(tmp_path / "spill"))
        with pytest.raises(duckdb.Error, match=r"disabled|locked|frame does not exist"):
            connection.execute(statement.format(folder=tmp_path))
    assert not (tmp_path / "new").exists()


def test_what_does_not_fit_in_memory_goes_to_the_directory_given(tmp_path: Path) -> None:
    spill = tmp_path / "it's"
    spill.mkdir()
    with duckdb.connect(config={"memory_limit": "60MB", "threads": 1}) as connection:
        query._lock(connection, str(spill))
        connection.execute("select hash(i) h, i from range(4_000_000) t(i) order by h")
        assert len(connection.fetchmany(10)) == 10
        assert any(spill.iterdir())


def test_values_keep_their_types(trace: Trace) -> None:
    found = trace.sql(
        "select sum(slot) s, count(*) n, 1.5 d, null x, true b, 'ü' t, any_value(domain) g, "
        "2::hugeint ** 100 h from routing",
    )
    assert found.dtypes.astype(str).tolist()[:3] == ["int64", "int64", "float64"]
    assert found["s"].tolist() == [int(assigned(trace)["slot"].sum())]
    assert found["b"].tolist() == [True]
    assert found["t"].tolist() == ["ü"]
    assert found["h"].tolist() == [2.0**100]
    gaps = trace.sql("select * from (values (1), (9007199254740993), (null)) t(x)")
    assert gaps["x"].tolist() == [1, 9007199254740993, pd.NA]
    assert str(gaps["x"].dtype) == "Int64"
    assert trace.sql("select layer from routing where false")["layer"].tolist() == []
    with pytest.raises(MoeInspectError, match=r"column x is of type list.*cast it to varchar"):
        trace.sql("select list(token) x from tokens")
    with pytest.raises(MoeInspectError, match="two columns are called a: rename one"):
        trace.sql("select * from (select 1 a) cross join (select 2 a)")


def test_a_trace_of_counts_has_the_views_that_it_can(tmp_path: Path) -> None:
    trace = write_counts(tmp_path / "t", [np.arange(8)[None] + 10] * 2, 2)
    assert trace.sql("select sum(assignments) n from load")["n"].tolist() == [216]
    for view in ("routing", "tokens"):
        with pytest.raises(MoeInspectError, match=f"Table with name {view} .* holds counts only: "):
            trace.sql(f"select * from {view}")


def test_the_command_writes_what_it_finds(trace: Trace, tmp_path: Path, cli_here: Cli) -> None:
    asked = "select layer, count(*) n from routing group by all order by layer"
    cli_here("sql", Path(trace.path).resolve().as_uri(), asked, "-o", tmp_path / "o.csv")
    assert (tmp_path / "o.csv").read_text() == f"layer,n\n1,{2 * T}\n3,{2 * T - 1}\n"


def test_without_duckdb_it_says_what_to_install(trace: Trace) -> None:
    program = (
        "import sys; sys.modules['duckdb'] = None; import moe_inspect; "
        f"moe_inspect.open_trace({str(trace.path)!r}).sql('select 1')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "MoeInspectError: sql needs duckdb: pip install 'moe-inspect[sql]'" in done.stderr


def test_json_has_null_for_what_it_cannot_say(trace: Trace, tmp_path: Path, cli_here: Cli) -> None:
    asked = "select * from (values (1.5::double), ('inf'), ('-inf'), ('nan'), (null)) t(loss)"
    done = cli_here("sql", trace.path, asked, "-o", tmp_path / "o.json")
    lines = (tmp_path / "o.json").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [1.5, None, None, None, None]
    assert "loss: 2 infinite values written as null" in done.stderr
    cli_here("sql", trace.path, asked, "-o", tmp_path / "o.csv")
    assert (tmp_path / "o.csv").read_text().split()[2:4] == ["inf", "-inf"]
