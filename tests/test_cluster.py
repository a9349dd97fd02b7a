"""A dask.distributed cluster gives the same tables as this process, to the bit."""

from __future__ import annotations

import operator
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

import moe_inspect
from moe_inspect.analysis import tasks
from moe_inspect.analysis.counting.engine import count_trace
from moe_inspect.analysis.counting.router_counts import narrowed
from moe_inspect.analysis.counting.select import select
from moe_inspect.errors import Damaged, MoeInspectError
from moe_inspect.public import Trace
from moe_inspect.trace.files.location import Remote
from moe_inspect.trace.shard import Shard
from tests.conftest import Cli, Put
from tests.support.generated import Kind, written

distributed = pytest.importorskip("distributed")
KIND = Kind(lengths=(40,) * 12, domains=3, logits=True, norms=True, answers=0.1, shard_tokens=170)


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
        ) as workers,
        distributed.Client(workers) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    root = tmp_path_factory.mktemp("traces") / "a"
    return moe_inspect.open_trace(shutil.copytree(written(KIND), root))


def same_tables(there: Any, here: Any) -> None:
    assert list(there.tables) == list(here.tables)
    for name, table in here.tables.items():
        pd.testing.assert_frame_equal(there.tables[name], table, check_exact=True, obj=name)


def test_a_report(trace: Trace, client: Any, monkeypatch: pytest.MonkeyPatch):
    here = moe_inspect.report(trace)
    # a worker is in a directory of its own
    monkeypatch.chdir(Path(str(trace.path)).parent)
    there = moe_inspect.report("a", scheduler=client)
    same_tables(there, here)
    assert [f.text for f in there.verdict()] == [f.text for f in here.verdict()]
    with pytest.raises(AssertionError):
        same_tables(there, moe_inspect.report(trace, domains="domain 1"))


def test_a_comparison(trace: Trace, client: Any):
    other = moe_inspect.open_trace(written(replace(KIND, run=1, shard_tokens=300)))
    there = moe_inspect.compare(trace.on(client), other.on(client))
    here = moe_inspect.compare(trace, other)
    same_tables(there, here)
    assert len(here.tables["worth"]) > 0


def _tokens_in(shard: Shard) -> int:
    return shard.files.tokens


def test_many_shards_are_added_up_in_runs(
    trace: Trace, client: Any, monkeypatch: pytest.MonkeyPatch
):
    assert tasks.runs_of(trace) == [range(1), range(1, 2), range(2, 3)]
    assert len(tasks.runs_of(trace, 100_000)) == 8
    long: Any = SimpleNamespace(n_shards=100_000, n_tokens=10**13, routers=trace.routers)
    assert len(tasks.runs_of(long)) == 513
    monkeypatch.setattr(tasks, "MOST_RUNS", 1)
    assert tasks.runs_of(trace) == [range(3)]
    url = "memory://of-a-cluster/a"  # the workers are threads of this process
    Remote(url).filesystem.put(str(trace.path), "of-a-cluster/a", recursive=True)
    by_url = moe_inspect.open_trace(url, scheduler=client)
    same_tables(by_url.report(), trace.report())
    asked = trace, None, operator.add, _tokens_in
    assert list(tasks.summed(*asked)) == [480]
    assert list(tasks.summed(by_url, *asked[1:])) == [480]
    here, there = (count_trace(of, select(of), {"load", "weights"}) for of in (trace, by_url))
    for r in here.of:
        assert (here.weight_sum_E(r) == there.weight_sum_E(r)).all()


ENDS = [(np.uint8, 0, 255), (np.int16, -1, 200), (np.uint32, 0, 2**32 - 1)]
ENDS += [(np.int64, 0, 2**32), (np.int64, -(2**31) - 1, 0)]


def test_what_is_sent_is_narrow_and_the_same():
    for kind, *values in ENDS:
        sent = narrowed(np.array(values))
        assert sent.dtype == kind
        assert sent.tolist() == values
    assert narrowed(np.array([0.5])).dtype == np.float64
    assert narrowed(None) is None


def test_the_commands(trace: Trace, client: Any, cli_here: Cli):
    address = ["--scheduler", client.scheduler.address]
    for command in (
        ["report", trace.path, "--table", "balance", "--format", "csv"],
        ["compare", trace.path, trace.path, "--table", "agreement", "--format", "csv"],
    ):
        assert cli_here(*command, *address).stdout == cli_here(*command).stdout
    refused = cli_here("report", trace.path, "--scheduler", "nonsense://nowhere:1", check=1)
    (line,) = refused.stderr.splitlines()
    assert "no dask scheduler answers at nonsense" in line


def test_what_goes_wrong_is_said_in_a_line(
    trace: Trace, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def counted(scheduler: Any, of: Trace = trace) -> None:
        count_trace(of.on(scheduler), select(of))

    with pytest.raises(MoeInspectError, match="no dask scheduler answers at nonsense"):
        counted("nonsense://nowhere:1")

    def replaced(path: Path) -> None:
        text = (path / "trace.json").read_text()
        (path / "trace.json").write_text(text.replace('"made"', '"another"'))

    for n, (harm, error, said) in enumerate(
        (
            (shutil.rmtree, MoeInspectError, r"the worker inproc://.* cannot read the trace"),
            (replaced, MoeInspectError, "has a different trace at"),
            (
                lambda path: (path / "routing" / "part-0-0.parquet").unlink(),
                Damaged,
                r"damaged trace: routing/part-0-0\.parquet",
            ),
        )
    ):
        # at a path of its own: tasks of the pass before may still come to look at that one
        shutil.copytree(str(trace.path), tmp_path / str(n))
        harmed = moe_inspect.open_trace(tmp_path / str(n))
        harm(tmp_path / str(n))
        with pytest.raises(error, match=said):
            counted(client, harmed)
    here = tasks.installed()
    tasks.check_versions({"tcp://w:1": here}, here)
    with pytest.raises(MoeInspectError, match=r"tcp://w:1 has moe-inspect 0\.0, this process"):
        tasks.check_versions({"tcp://w:1": here | {"moe-inspect": "0.0"}}, here)
    killed = SimpleNamespace(address="tcp://w:1")
    for error, said in (
        (distributed.scheduler.KilledWorker("part", killed, 3), "died repeatedly"),
        (distributed.client.FutureCancelledError("part", "lost"), "was lost"),
    ):
        with pytest.raises(MoeInspectError, match=said), tasks.cluster(client, [trace]):
            raise error
    monkeypatch.setattr(tasks, "WAIT_S", 0.1)
    with (
        distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=None) as empty,
        pytest.raises(MoeInspectError, match="has no workers"),
    ):
        counted(empty.scheduler_address)


@pytest.mark.parametrize("late", [2, 3])
def test_a_client_that_starts_late_is_tried_again(
    trace: Trace, client: Any, put: Put, late: int
) -> None:
    """As distributed's, whose thread is given ten seconds to start: twice more."""
    made, tried = distributed.Client, list[str]()

    def started(address: str, timeout: str) -> Any:
        tried.append(address)
        assert len(tried) > late
        return made(address, timeout=timeout)

    put(distributed, Client=started)
    on_it = trace.on(client.scheduler.address)
    with pytest.raises(AssertionError) if late == 3 else nullcontext():
        count_trace(on_it, select(on_it))
    assert len(tried) == 3
