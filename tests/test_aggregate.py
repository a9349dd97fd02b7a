"""The pass: every assignment counted once, whatever the shards, and what cannot be counted
refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from moe_inspect.analysis.counting import token_ids
from moe_inspect.analysis.counting.counts import CLUSTERS
from moe_inspect.analysis.counting.engine import count_trace as count
from moe_inspect.analysis.counting.select import select
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.report import report
from moe_inspect.reporting.tables.load import design_effects
from moe_inspect.trace.schema import Router, parse_layers
from tests.support.synthetic import (
    a_pass,
    routers,
    uniform_ids,
    write_counts,
    write_passes,
    write_trace,
)
from tests.test_counting import same

NOWHERE = np.iinfo(np.uint16).max
T, E, K = 3_000, 8, 2


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets for how many cells tables by token id have room."""
    return partial(monkeypatch.setattr, token_ids, "CELLS")


def arguments(seed: int = 0, L: int = 2, null: float = 0.0) -> dict:
    rng = np.random.default_rng(seed)
    ids = [uniform_ids(rng, T, E, K) for _ in range(L)]
    for ids_TK in ids:
        ids_TK[rng.random(ids_TK.shape) < null] = NOWHERE
    return {
        "ids": ids,
        "experts": E,
        "document": np.arange(T) // 75,
        "domain_of_document": [("code", "law", "prose")[d % 3] for d in range(40)],
        "token_id": rng.integers(0, 90, T),
        "weights": [rng.random((T, K)).astype(np.float32) for _ in range(L)],
        "batch_tokens": 250,
        "shard_tokens": 1_000,
    }


def test_the_order_of_batches_changes_nothing(tmp_path: Path):
    orders = range(12), np.random.default_rng(0).permutation(12).tolist()
    both = [
        write_trace(tmp_path / f"{n}", **arguments(null=0.05), batch_order=order)
        for n, order in enumerate(orders)
    ]
    same(*(count(trace, select(trace)) for trace in both))


def test_selecting_domains_layers_and_phase(tmp_path: Path):
    given_ = arguments(L=3)
    trace = write_trace(tmp_path / "t", **given_, phases=("prefill", "decode"), layers=[1, 4, 9])
    domain_T = np.array(given_["domain_of_document"])[given_["document"]]
    decode_T = (np.arange(T) // 250) % 2 == 1
    counts = count(trace, select(trace, "1-4", ["law", "code"], "decode"))
    keep_T = np.isin(domain_T, ["law", "code"]) & decode_T
    assert list(counts.of) == [0, 1]
    assert counts.tokens == keep_T.sum()
    expected_E = np.bincount(given_["ids"][1][keep_T].reshape(-1), minlength=E)
    assert counts.load_E(1).tolist() == expected_E.tolist()
    assert counts.domains == ["code", "law"]
    facts = dict(report(trace, layers=4, domains="law", phase="prefill").facts())
    assert facts["layers"] == "4"
    assert facts["domains_selected"] == "law"
    assert facts["phase_selected"] == "prefill"
    # the token id tables follow the same selection
    words = report(trace, domains="law", top=0).tables["vocabulary"]
    assert words[words["router"] == 0]["count"].sum() == (domain_T == "law").sum() * K


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"layers": "7"}, "it has layers 0-1"),
        ({"layers": "a-b"}, "cannot read layers 'a-b': write them like 0-3,7"),
        ({"layers": "0,1-0"}, "cannot read layers '0,1-0': a range goes from low to high"),
        ({"layers": "²"}, "cannot read layers '²': write them like 0-3,7"),
        ({"layers": [0, -1]}, "cannot read layers '0,-1': write them like 0-3,7"),
        ({"domains": ["law", "opera"]}, "no domain opera in .*: it has code, law, prose"),
        ({"phase": "training"}, "prefill and decode"),
        ({"phase": "decode"}, "no tokens of phase decode"),
        ({"top": -1}, "top is -1"),
    ],
)
def test_asking_for_what_is_not_there(tmp_path: Path, asked: dict, says: str):
    trace = write_trace(tmp_path / "t", **arguments())
    with pytest.raises(MoeInspectError, match=says):
        report(trace, **asked).tables["balance"]


def test_an_empty_trace_says_so(tmp_path: Path):
    none = {"document": np.zeros(1), "status": "interrupted"}
    trace = write_trace(tmp_path / "t", [np.zeros((0, 2), np.uint16)], 4, **none)
    with pytest.raises(MoeInspectError, match="nothing is committed"):
        report(trace).tables["load"]


def test_layers_as_written():
    listed = [Router(layer, "gate", "", 8, 2) for layer in (0, 1, 1, 5)]
    for layers, expected in (
        ("0-1, 5", [0, 1, 2, 3]),
        ("1", [1, 2]),  # a layer may have several routers
        ("2-9", [3]),  # a range takes what exists in it
        (5, [3]),
        ([0, 5], [0, 3]),
        (None, [0, 1, 2, 3]),
        ("5,2", []),
    ):
        assert parse_layers(layers, listed) == expected


def test_decode_steps_beside_prompts_are_left_out_of_the_batches_and_that_is_said(tmp_path: Path):
    rng = np.random.default_rng(0)
    passes = [
        a_pass(b, [uniform_ids(rng, T, 8, 2)], phase="prefill" if T == 200 else "decode")
        for b, T in enumerate([200, 200, 4, 4, 4])
    ]
    made = report(write_passes(tmp_path / "t", routers(1, 8, 2), passes))
    assert any("max_vio_batch covers 2 of 5 batches" in note for note in made.notes())
    assert not any("max_vio_batch" in x for x in report(tmp_path / "t", phase="decode").notes())


def test_ranks_of_a_distributed_run_add_up(tmp_path: Path):
    rng = np.random.default_rng(0)
    loads = []
    for rank in range(2):
        ids = uniform_ids(rng, 300, 8, 2)
        loads.append(np.bincount(ids.reshape(-1), minlength=8))
        one = a_pass(0, [ids], document=np.arange(300) // 30 + 10 * rank)
        write_passes(tmp_path / "t", routers(1, 8, 2), [one], rank=rank)
    made = report(tmp_path / "t")
    assert made.tables["load"]["assignments"].tolist() == (loads[0] + loads[1]).tolist()
    # batch 0 of either rank is a forward pass of its own
    assert made.counts.of[0].batches[300][0] == 2
    assert len(made.counts.units) == 20


def test_tokens_without_ids_leave_the_rest_of_the_report_alone(tmp_path: Path):
    given_ = arguments() | {"token_id": np.full(T, -1)}
    made = report(write_trace(tmp_path / "t", **given_))
    assert made.tables["vocabulary"].empty
    special = made.tables["specialization"]
    unknown = ["token_mi_bits", "vocabulary_specialization", "domain_mi_given_token_bits"]
    assert special[unknown].isna().all(axis=None)
    assert special["domain_mi_bits"].notna().all()
    assert any("no token id occurs 8 times" in note for note in made.notes())
    assert made.verdict()


def test_counts_only_gives_what_it_can_and_says_what_it_cannot(tmp_path: Path):
    loads = [np.array([[40, 20, 20, 0], [20, 20, 20, 20]]), np.full((2, 4), 20)]
    made = report(write_counts(tmp_path / "t", loads, 2, ["code", "law"]))
    balance = made.tables.complete("balance")
    assert balance["max_over_mean"].tolist() == [60 * 4 / 160, 1]
    assert balance["tokens"].tolist() == [80, 80]
    unknown = ["max_over_mean_low", "max_over_mean_high", "max_vio_batch", "design_effect"]
    assert balance[unknown].isna().all(axis=None)
    assert made.tables["load"]["assignments"].tolist() == [60, 40, 40, 20, 40, 40, 40, 40]
    activation = made.tables["domains"].groupby(["router", "domain"])["activation"]
    assert activation.sum().tolist() == [2] * 4
    special = made.tables["specialization"]
    some, none = special["domain_mi_bits"]
    assert some > none == pytest.approx(0)
    unknown = ["domain_mi_null_bits", "token_mi_bits", "domain_mi_given_token_bits"]
    assert special[unknown].isna().all(axis=None)
    assert any("counts only" in note for note in made.notes())
    assert made.verdict()
    for asked in (lambda: made.tables["vocabulary"], lambda: report(made.trace, phase="decode")):
        with pytest.raises(MoeInspectError, match="counts only"):
            asked()
    one = report(made.trace, domains="code").tables["balance"]
    assert one["assignments"].tolist() == [80, 80]


def test_domains_of_counts_are_no_documents(tmp_path: Path):
    rng = np.random.default_rng(0)
    loads = [rng.integers(100, 1_000, (6, 8)) for _ in range(2)]
    data = report(write_counts(tmp_path / "t", loads, 1, [f"d{d}" for d in range(6)]))
    assert [bool(np.isnan(effect)) for effect in design_effects(data).values()] == [True, True]


def test_memory_does_not_grow_with_documents(tmp_path: Path):
    rng = np.random.default_rng(0)
    trace = write_trace(tmp_path / "t", [uniform_ids(rng, T, E, K)], E, document=np.arange(T))
    counts = count(trace, select(trace))
    assert counts.documents == T
    assert len(counts.units) == CLUSTERS
    assert design_effects(report(trace))[0] == pytest.approx(1, abs=0.3)


def test_token_ids_beyond_the_budget_are_left_out_and_said(
    tmp_path: Path, room: Callable[[int], None]
):
    trace = write_trace(tmp_path / "t", **arguments())
    whole = report(trace).tables["specialization"]
    assert not any("most frequent" in note for note in report(trace).notes())
    room(30 * 3 * 17)
    made = report(trace)
    assert any("the 30 most frequent token ids" in note for note in made.notes())
    fewer, given_bits = made.tables["specialization"], "domain_mi_given_token_bits"
    assert (fewer[given_bits] != whole[given_bits]).all()
    pd.testing.assert_series_equal(fewer["token_mi_bits"], whole["token_mi_bits"])


def test_all_token_ids_are_all(tmp_path: Path, room: Callable[[int], None]):
    """More than those that have room by default."""
    rng, V = np.random.default_rng(0), 700
    ids = [uniform_ids(rng, 10 * V, 8, 2)]
    trace = write_trace(tmp_path / "t", ids, 8, token_id=np.arange(10 * V) % V)
    room(64 * 8)
    assert report(trace, top=10**6).tables["vocabulary"]["token_id"].nunique() == 64
    assert report(trace, top=0).tables["vocabulary"]["token_id"].nunique() == V
