"""A dask.distributed cluster gives the same tables as this process, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import moe_inspect
from moe_inspect.trace.reader import Trace
from tests.synthetic import uniform_ids, write_trace

distributed = pytest.importorskip("distributed")
T, E, K = 1_200, 8, 2


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


def made(root: Path, seed: int = 0, shard_tokens: int = 400) -> Trace:
    rng = np.random.default_rng(seed)
    logits = [rng.normal(size=(T, E)).astype(np.float16) for _ in range(3)]
    ids = [np.argsort(-of, axis=1, kind="stable")[:, :K].astype(np.uint16) for of in logits]
    ids[2] = uniform_ids(rng, T, E, K)
    return write_trace(
        root,
        ids,
        E,
        weights=[rng.random((T, K)).astype(np.float16).astype(np.float32) for _ in ids],
        logits=logits,
        batch_tokens=200,
        shard_tokens=shard_tokens,
        document=np.arange(T) // 40,
        domain_of_document=["code", "law", "prose"],
        phases=["prefill", "decode"],
        token_id=np.random.default_rng(8).zipf(1.5, T).clip(max=60),
    )


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return made(tmp_path_factory.mktemp("traces") / "a")


def same_tables(there: Any, here: Any) -> None:
    assert list(there.tables) == list(here.tables)
    for name in here.tables:
        pd.testing.assert_frame_equal(
            there.tables[name], here.tables[name], check_exact=True, obj=name
        )


def test_a_report(trace: Trace, client: Any, monkeypatch: pytest.MonkeyPatch):
    here = moe_inspect.report(trace)
    with monkeypatch.context() as patch:
        patch.chdir(trace.path.parent)  # a worker is in a directory of its own
        there = moe_inspect.report("a", scheduler=client)
        same_tables(there, here)
        assert [f.text for f in there.verdict()] == [f.text for f in here.verdict()]


@pytest.mark.parametrize("name", ["capacity", "placement", "decode", "cache", "routing"])
def test_a_simulation(name: str, trace: Trace, client: Any):
    simulate = getattr(moe_inspect, f"simulate_{name}")
    same_tables(simulate(trace.on(client)), simulate(trace))
