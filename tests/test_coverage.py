"""Tokens that a text gives each expert: the table, the gate, and counts of each document."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moe_inspect
from moe_inspect.capture.options import TraceOptions
from moe_inspect.capture.run import trace_model
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.report import report
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.verify import verify
from tests.conftest import Cli
from tests.support.damage import edit_manifest
from tests.support.synthetic import write_counts, write_trace

# 2 of 4 experts: of code 0 and 1 five times, of prose 1 and 2 three times, 0 and 2 once
IDS = np.array([[0, 1]] * 5 + [[1, 2]] * 3 + [[0, 2]])
DOCUMENTS = {"document": np.repeat([0, 1], [5, 4]), "domain_of_document": ("code", "prose")}


def test_the_tokens_of_each_expert_by_hand(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t", [IDS], 4, **DOCUMENTS)
    table = report(trace).tables["coverage"]
    assert table[["layer", "router", "expert"]].to_numpy().tolist() == [[0, 0, e] for e in range(4)]
    assert table["tokens"].tolist() == [6, 8, 4, 0]
    assert table["main_domain"].tolist()[:3] == ["code", "code", "prose"]
    assert table["main_domain"].isna().tolist() == [False, False, False, True]
    assert table["main_domain_share"].tolist()[:3] == [5 / 6, 5 / 8, 1]
    assert np.isnan(table["main_domain_share"][3])
    assert table["minimum"].tolist() == [512] * 4
    assert not table["enough"].any()
    assert table[["tokens_low", "tokens_high"]].isna().all(axis=None), "two documents are too few"
    assert report(trace).tables["balance"]["min_tokens"].tolist() == [0]
    prose = report(trace, domains="prose").tables["coverage"]
    assert prose["tokens"].tolist() == [1, 3, 4, 0]


def test_the_minimum_is_four_tokens_per_input_of_an_expert(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t", [IDS], 4, **DOCUMENTS)
    config = {"hidden_size": 2, "intermediate_size": 3}
    edit_manifest(trace.path, model={**trace.manifest["model"], "config": config})
    table = moe_inspect.open_trace(trace.path).report().tables["coverage"]
    assert table["minimum"].tolist() == [8] * 4
    assert table["enough"].tolist() == [False, True, False, False]


def test_counts_alone_have_tokens_and_no_interval(tmp_path: Path) -> None:
    loads = np.array([[5, 5, 0, 0], [1, 3, 4, 0]])
    trace = write_counts(tmp_path / "t", [loads, loads[:, ::-1]], 2, ("code", "prose"))
    table = report(trace).tables["coverage"]
    assert table["tokens"].tolist() == [6, 8, 4, 0, 0, 4, 8, 6]
    assert table["main_domain"].tolist()[:3] == ["code", "code", "prose"]
    assert table[["tokens_low", "tokens_high"]].isna().all(axis=None)
    assert report(trace).tables["balance"]["min_tokens"].tolist() == [0, 0]


def test_a_gate_on_the_fewest_tokens_of_any_expert(tmp_path: Path, cli_here: Cli) -> None:
    loads = np.array([[5, 5, 2, 2]]), np.array([[3, 3, 4, 4]])
    write_counts(tmp_path / "t", [load.reshape(1, 4) for load in loads], 2)
    cli_here("report", "t", "--fail-below", "min_tokens=2")
    failed = cli_here("report", "t", "--fail-below", "min_tokens=3", check=3)
    assert "failed: layer 0: min_tokens is 2, below 3" in failed.stderr
    assert "layer 1" not in failed.stderr
    both = cli_here("report", "t", "--fail-below", "min_tokens=4", check=3)
    assert both.stderr.count("failed: ") == 2
    cli_here("report", "t", "--layers", 1, "--fail-below", "min_tokens=3")
    table = cli_here("report", "t", "--table", "coverage", "--format", "csv").stdout
    head = "layer,router,expert,tokens,tokens_low,tokens_high,main_domain,main_domain_share,minimum"
    assert table.splitlines()[0] == f"{head},enough"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return moe_inspect.trace_model("demo", tmp_path_factory.mktemp("demo") / "t")


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """The same, as counts by document."""
    out = tmp_path_factory.mktemp("counted") / "t"
    return moe_inspect.trace_model("demo", out, counts_only=True, by_document=True)


def loads(trace: Trace) -> list[np.ndarray]:
    """Of each router [documents, E], by pandas alone."""
    documents = trace.documents()
    numbers = trace.tokens()[["token", "document"]]
    found = list[np.ndarray]()
    for r, router in enumerate(trace.routers):
        table = trace.routing(router=r).merge(numbers, on="token")
        load_SE = np.zeros((len(documents), router.experts), np.int64)
        for k in range(router.top_k):
            np.add.at(load_SE, (table["document"].to_numpy(), table[f"expert_{k}"].to_numpy()), 1)
        found.append(load_SE)
    return found


def test_intervals_hold_the_tokens_and_are_those_of_counts_by_document(
    demo: Trace, counted: Trace
) -> None:
    table = report(demo).tables["coverage"]
    whole = np.concatenate([of.sum(0) for of in loads(demo)])
    assert table["tokens"].tolist() == whole.tolist()
    assert (table["tokens_low"] < whole).all()
    assert (whole < table["tokens_high"]).all()
    assert table["enough"].tolist() == (whole >= 512).tolist()
    assert verify(counted).ok
    same = report(counted).tables["coverage"].select_dtypes("number")
    np.testing.assert_allclose(table.select_dtypes("number"), same)


# --- counts of each document


def test_documents_that_are_split_over_passes_are_counted_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Sums are taken after every pass, when most of the long documents have begun."""
    from moe_inspect.capture.hook import counts

    monkeypatch.setattr(counts, "MOST_BYTES", 1)
    monkeypatch.setattr(counts, "MOST_WAITING_SLOTS", 1)
    how: dict[str, Any] = {"max_length": 60, "batch_tokens": 128, "max_tokens": 1_500}
    told = moe_inspect.trace_model("demo", tmp_path / "d", **how)
    made = moe_inspect.trace_model(
        "demo", tmp_path / "c", counts_only=True, by_document=True, **how
    )
    assert verify(made).ok
    assert made.n_shards > 3
    passes = [(of.files.first_batch, of.files.last_batch) for of in made.shards]
    assert passes[0][0] == 0
    assert all(first == last + 1 for (_, last), (first, _) in pairwise(passes))
    table = made.counts().set_index(["router", "document", "expert"])["assignments"].sort_index()
    expected = np.stack(loads(told))
    assert np.array_equal(table.to_numpy().reshape(expected.shape), expected)
    for wrong in ({"generate": 2}, {"resume": True}):
        with pytest.raises(MoeInspectError, match="one process feeds whole"):
            moe_inspect.trace_model(
                "demo", tmp_path / "n", counts_only=True, by_document=True, **wrong
            )
    with pytest.raises(MoeInspectError, match="counts_only=True with it"):
        moe_inspect.trace_model("demo", tmp_path / "n", by_document=True)


def test_a_document_that_is_not_whole_at_the_end_is_dropped_and_counted(tmp_path: Path):
    fed = list[int]()

    def stop(done: int, _: int | None) -> None:
        fed.append(done)
        if len(fed) == 2:
            raise KeyboardInterrupt

    how: dict[str, Any] = {"max_length": 60, "batch_tokens": 128, "max_tokens": 1_500}
    options = TraceOptions(**how, counts_only=True, by_document=True)
    with pytest.raises(KeyboardInterrupt):
        trace_model("demo", tmp_path / "t", options, stop)
    trace = moe_inspect.open_trace(tmp_path / "t")
    counts = trace.manifest["counts"]
    assert counts["dropped"] > 0
    assert trace.n_tokens + counts["dropped"] // len(trace.routers) == fed[-1]
