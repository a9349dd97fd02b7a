"""Routing under other rules. Algorithms on logits: each against what defines it, and against what
it says of itself. What a capacity drops, against a brute force that serves one after another."""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_inspect import Trace
from moe_inspect.errors import MoeInspectError
from moe_inspect.simulate.routing import simulate_routing
from moe_inspect.simulate.routing_algorithms import ALGORITHMS, Algorithm, RouterScores, largest
from moe_inspect.simulate.shards import expert_capacity
from tests.conftest import ROOT
from tests.support.synthetic import uniform_ids, write_trace

CAPACITY = ["capacity", "capacity_needed", "capacity_tokens"]
CAPACITY += ["capacity_by_domain", "capacity_by_position"]
VALUES = {"": 0, "top_k": 2, "top_p": 0.7, "capacity_factors": 1.0}


def batch(logits_TE: np.ndarray, k: int = 2, scoring: str = "softmax") -> RouterScores:
    logits_TE = logits_TE.astype(np.float16)
    chosen_TE = largest(logits_TE.astype(np.float32), k)
    return RouterScores(logits_TE, chosen_TE, k, scoring)


def skewed(seed: int = 0, T: int = 200, E: int = 8) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(T, E)) + np.linspace(2, 0, E)


def choose(of: Algorithm, made: RouterScores) -> np.ndarray:
    return of.choose(made, VALUES[of.setting])


@pytest.mark.parametrize("of", ALGORITHMS.values(), ids=ALGORITHMS)
def test_experts_a_token_and_what_leaks_the_future_says_so(of: Algorithm):
    moved = 0
    for seed in range(5):
        logits_TE = skewed(seed)
        later_TE = logits_TE.copy()
        later_TE[100:] = skewed(seed + 50)[100:, ::-1]
        first, second = (choose(of, batch(x))[:100] for x in (logits_TE, later_TE))
        moved += int((first != second).sum())
    assert bool(moved) == bool(of.leaks)
    chosen_TE = choose(of, batch(skewed()))
    assert chosen_TE.shape == (200, 8)
    assert chosen_TE.dtype == bool
    if of.name not in ("top-p", "expert choice", "next best"):
        assert (chosen_TE.sum(1) == 2).all()
    one = choose(of, batch(skewed(T=1)))
    assert one.shape == (1, 8)
    assert one.any()
    assert of.use_when


@pytest.mark.parametrize("values", [1, 3, 1000])  # few of them: ties in every row
def test_the_largest_are_those_of_a_stable_sort_whatever_is_guessed(values: int):
    rng = np.random.default_rng(0)
    values_TE = rng.integers(0, values, (300, 20)).astype(np.float32) / np.float32(7)
    order_TE = np.argsort(-values_TE, axis=1, kind="stable")
    for k in (1, 7, 20):
        expected = np.zeros((300, 20), bool)
        np.put_along_axis(expected, order_TE[:, :k], True, 1)
        for guess in (np.nan, 0.5, np.sort(values_TE, axis=1)[:, -k]):
            assert (largest(values_TE, k, guess=guess) == expected).all()


def test_top_p_sums_in_double_precision():
    made = batch(skewed(T=20, E=256), scoring="sigmoid")
    sum_TE = np.cumsum(np.sort(made.share_TE, axis=1)[:, ::-1], axis=1, dtype=np.float64)
    for t, sum_E in enumerate(sum_TE):
        for p, k in ((sum_E[99] - 2e-9, 100), (sum_E[99] + 2e-9, 101)):
            assert ALGORITHMS["top-p"].choose(made, p + 1e-6)[t].sum() == k


def with_logits(root: Path, logits_TE: np.ndarray, k: int, document: np.ndarray) -> Trace:
    logits_TE = logits_TE.astype(np.float16)
    ids = np.argsort(-logits_TE, axis=1, kind="stable")[:, :k].astype(np.uint16)
    how = {"document": document, "batch_tokens": len(document)}
    return write_trace(root, [ids], logits_TE.shape[1], logits=[logits_TE], **how)


def test_more_compute_is_no_better_balance(tmp_path: Path):
    rng = np.random.default_rng(0)
    logits_TE = rng.normal(size=(2_000, 8)) + np.linspace(1, 0, 8)
    trace = with_logits(tmp_path / "t", logits_TE, 4, np.arange(2_000) // 50)
    made = simulate_routing(trace, capacity_factors=[0.5])
    advice = made.tables["routing_algorithms"].set_index("algorithm")
    assert advice.loc["top-k 8", ["max_vio_worst", "experts_per_token"]].tolist() == [0, 8]
    assert advice.loc["top-k 8", "use_when"].endswith("; computes 2x as many experts per token")
    half = advice.loc["next best 0.5", "use_when"]
    assert half.endswith("; computes 0.5x as many experts per token")
    assert advice.loc["top-k 4", "use_when"] == ALGORITHMS["top-k"].use_when
    assert any("no causal algorithm with the same compute balances" in s for s in made.verdict)


def test_the_chart_says_which_algorithms_are_not_causal():
    chart = simulate_routing(ROOT / "sample_traces/collapsed", layers=3).chart
    assert chart is not None
    labels = chart.panels[-1].y.labels
    assert [name for name in labels if "not causal" in name] == ["expert choice (not causal)"]


def test_without_logits_the_drops_remain_and_a_line_says_what_the_rest_needs(tmp_path: Path):
    logits_TE, document = skewed(), np.arange(200) // 20
    whole = with_logits(tmp_path / "a", logits_TE, 2, document)
    ids = np.argsort(-logits_TE.astype(np.float16), axis=1, kind="stable")[:, :2].astype(np.uint16)
    how = {"document": document, "batch_tokens": 200}
    made = simulate_routing(write_trace(tmp_path / "b", [ids], 8, **how))
    assert [*made.tables] == CAPACITY
    assert made.verdict[-1] == "For top-k, top-p, expert choice, next best: trace with --logits."
    among = simulate_routing(whole)
    assert [*among.tables][:2] == ["routing", "routing_algorithms"]
    assert made.verdict[:-1] == among.verdict[: len(made.verdict) - 1]
    for name, table in made.tables.items():
        pd.testing.assert_frame_equal(table, among.tables[name])


@pytest.mark.parametrize("wrong", [np.inf, np.nan])
def test_logits_that_no_softmax_takes_are_refused(wrong: float, tmp_path: Path):
    """−inf is a mask."""
    logits_TE, document = skewed(T=50), np.repeat(np.arange(5), 10)
    logits_TE[7, 3] = -np.inf
    simulate_routing(with_logits(tmp_path / "masked", logits_TE, 2, document))
    logits_TE[7, 4] = wrong
    with pytest.raises(MoeInspectError, match="router 0 has logits that are NaN or"):
        simulate_routing(with_logits(tmp_path / "t", logits_TE, 2, document))


def test_what_cannot_be_simulated_is_a_one_line_error(tmp_path: Path):
    trace = write_trace(tmp_path / "t", [uniform_ids(np.random.default_rng(0), 50, 4, 2)], 4)
    with pytest.raises(MoeInspectError, match="no algorithm best: there are as recorded"):
        simulate_routing(ROOT / "sample_traces/balanced", algorithms=["best"])
    with pytest.raises(MoeInspectError, match="holds no gate weights"):
        simulate_routing(trace, order="weight")
    with pytest.raises(MoeInspectError, match="capacity factors"):
        simulate_routing(trace, capacity_factors=[0.0])
    with pytest.raises(MoeInspectError, match="group tokens 0: give a number of tokens, batch"):
        simulate_routing(trace, group_tokens=0)
    with pytest.raises(MoeInspectError, match="no order 'best': there are arrival, token, weight"):
        simulate_routing(trace, order="best")
    with pytest.raises(MoeInspectError, match="target drop 1: give a share from 0 to below 1"):
        simulate_routing(trace, target_drop=1)


COLLAPSED = ROOT / "sample_traces/collapsed"
RECORDED: dict[str, Any] = {"algorithms": ["as recorded"]}


def test_few_documents_are_said_to_be_too_few_and_capacities_are_rounded_up(tmp_path: Path):
    ids = np.array([0, 0, 0, 0, 0, 1, 0, 0], np.uint16)[:, None]
    cut = {"batch_tokens": 4, "shard_tokens": 4, "document": np.arange(8) // 4}
    trace = write_trace(tmp_path / "t", [ids], 2, domain_of_document=("a", "b"), **cut)
    made = simulate_routing(trace, capacity_factors=[1.0], target_drop=0.0)
    assert expert_capacity(1.5, 4, 1, 2) == 3  # one hundredth less is too little
    assert ceil(1.1 * 100) == 111
    assert expert_capacity(1.1, 100, 1, 1) == 110
    assert expert_capacity(1.25, 7, 2, 8) == 3
    few, *said, rest = made.verdict
    assert rest.startswith("For top-k")
    assert few.startswith("Too little data to advise: with fewer than 8 documents")
    assert all(sentence.startswith("Simulated") for sentence in said)


def test_a_group_may_be_larger_than_any_pass():
    usual, made = (
        simulate_routing(COLLAPSED, group_tokens=of, **RECORDED) for of in ("batch", 10**30)
    )
    assert made.tables["capacity"].equals(usual.tables["capacity"])


def test_an_algorithm_that_needs_logits_is_refused_without_them(tmp_path: Path) -> None:
    ids = uniform_ids(np.random.default_rng(0), 60, 8, 2)
    simulate = write_trace(tmp_path / "t", [ids], 8).simulate.routing
    for asked in ({"algorithms": ["as recorded", "expert choice"]}, {"top_k": [1]}):
        with pytest.raises(MoeInspectError, match=r"no logits for (expert choice|top-k): trace wi"):
            simulate(**asked)
    for asked in ({}, {"algorithms": ["as recorded"]}):
        assert "capacity" in simulate(**asked).tables
