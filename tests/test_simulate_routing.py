"""Routing algorithms on logits: each against what defines it, and against what it says of
itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_inspect import Trace, open_trace
from moe_inspect.errors import MoeInspectError
from moe_inspect.simulate.kernels_numba import serve_in_turn
from moe_inspect.simulate.routing import simulate_routing
from moe_inspect.simulate.routing_algorithms import (
    ALGORITHMS,
    BIAS_RATE,
    BIAS_TOKENS,
    Algorithm,
    RouterScores,
    largest,
    ranked,
)
from tests.conftest import ROOT
from tests.support.synthetic import uniform_ids, write_trace

VALUES = {"": 0, "top_k": 2, "top_p": 0.7, "capacity_factor": 1.0}


def batch(logits_TE: np.ndarray, k: int = 2, scoring: str = "softmax") -> RouterScores:
    logits_TE = logits_TE.astype(np.float16)
    chosen_TE, token_id_T = largest(logits_TE, k), np.arange(len(logits_TE)) % 17
    return RouterScores(logits_TE, chosen_TE, token_id_T, k, scoring, 0)


def skewed(seed: int = 0, T: int = 200, E: int = 8) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(T, E)) + np.linspace(2, 0, E)


def choose(of: Algorithm, made: RouterScores) -> np.ndarray:
    return of.choose(made, VALUES[of.setting], of.prepare(made) if of.prepare else {})


@pytest.mark.parametrize("of", ALGORITHMS.values(), ids=ALGORITHMS)
def test_what_leaks_the_future_says_so_and_nothing_else_does(of: Algorithm):
    memory = of.prepare(batch(skewed(5))) if of.prepare else {}
    moved = 0
    for seed in range(5):
        logits_TE = skewed(seed)
        later_TE = logits_TE.copy()
        later_TE[100:] = skewed(seed + 50)[100:, ::-1]
        first, second = (
            of.choose(batch(x), VALUES[of.setting], {k: v.copy() for k, v in memory.items()})[:100]
            for x in (logits_TE, later_TE)
        )
        moved += int((first != second).sum())
    assert bool(moved) == bool(of.leaks)


@pytest.mark.parametrize("of", ALGORITHMS.values(), ids=ALGORITHMS)
def test_experts_a_token_and_types(of: Algorithm):
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
def test_the_largest_and_the_order_are_those_of_a_stable_sort(values: int):
    rng = np.random.default_rng(0)
    values_TE = rng.integers(0, values, (300, 20)).astype(np.float32) / np.float32(7)
    order_TE = np.argsort(-values_TE, axis=1, kind="stable")
    found_TE, sorted_TE = ranked(values_TE)
    assert (found_TE == order_TE).all()
    assert (sorted_TE == np.take_along_axis(values_TE, order_TE, 1)).all()
    for k in (1, 7, 20):
        expected = np.zeros((300, 20), bool)
        np.put_along_axis(expected, order_TE[:, :k], True, 1)
        assert (largest(values_TE, k) == expected).all()


def test_a_hash_is_of_the_token_id_alone():
    made = batch(skewed())
    token_id_T = np.where(np.arange(200) % 5, made.token_id_T, -1)
    chosen_TE = choose(ALGORITHMS["hash"], replace(made, token_id_T=token_id_T))
    for t in range(200):
        alone = replace(made, logits_TE=made.logits_TE[:1], token_id_T=token_id_T[t : t + 1])
        assert (choose(ALGORITHMS["hash"], alone) == chosen_TE[t]).all()
    assert not chosen_TE[token_id_T < 0].any()
    assert (chosen_TE[token_id_T >= 0].sum(1) == 2).all()


def test_top_p_by_hand():
    made = batch(np.log(np.array([[0.5, 0.25, 0.125, 0.125], [0.97, 0.01, 0.01, 0.01]])))
    found = [ALGORITHMS["top-p"].choose(made, p, {}).sum(1).tolist() for p in (0.4, 0.6, 0.8, 1.0)]
    assert found == [[1, 1], [2, 1], [3, 1], [4, 4]]


@settings(max_examples=100, deadline=None)
@given(*(st.integers(*ends) for ends in ((1, 40), (1, 6), (1, 3), (1, 12), (0, 2**32))))
def test_next_best_equals_a_naive_queue(T: int, E: int, k: int, room: int, seed: int):
    order_TE = np.argsort(np.random.default_rng(seed).random((T, E)), axis=1)
    expected = np.zeros((T, E), bool)
    for t in range(T):
        expected[t, [e for e in order_TE[t] if expected[:, e].sum() < room][:k]] = True
    assert (serve_in_turn(order_TE, k, room) == expected).all()


def test_expert_choice_gives_every_expert_the_same():
    made = batch(skewed())
    chosen_TE = choose(ALGORITHMS["expert choice"], made)
    assert chosen_TE.sum(0).tolist() == [50] * 8
    worst_taken = np.where(chosen_TE, made.scores_TE, 1).min(0)
    assert (worst_taken >= np.where(chosen_TE, 0, made.scores_TE).max(0)).all()


def test_sinkhorn_evens_out_what_top_k_does_not():
    logits_TE = skewed(T=4000)
    names = ("sinkhorn", "top-k")
    load_2E = [choose(ALGORITHMS[name], batch(logits_TE)).sum(0) for name in names]
    even, uneven = (load_E.max() / load_E.mean() - 1 for load_E in load_2E)
    assert even < 0.1 < 0.5 < uneven


def test_a_bias_moves_by_the_sign_of_the_load_error_after_as_many_tokens_as_a_step_of_training():
    state = {"bias_E": np.zeros(4, np.float32), "load_E": np.zeros(4, np.int64)}
    made = batch(np.array([[9.0, 5, 1, 0]]), k=2)
    for _ in range(BIAS_TOKENS - 1):  # decode steps
        ALGORITHMS["loss-free bias"].choose(made, 0, state)
    assert not state["bias_E"].any()
    ALGORITHMS["loss-free bias"].choose(made, 0, state)
    assert state["bias_E"].tolist() == pytest.approx([-BIAS_RATE] * 2 + [BIAS_RATE] * 2)
    assert not state["load_E"].any()


def test_a_bias_is_judged_on_documents_that_it_has_not_seen(tmp_path: Path):
    rng, document = np.random.default_rng(0), np.arange(8_000) // 50
    skew = np.linspace(2, 0, 8)
    # what evens out the one half makes the other worse
    turned = np.where(document[:, None] % 2 == 0, skew, skew[::-1])

    def vio(name: str, lean: np.ndarray, document: np.ndarray) -> tuple[float, int]:
        trace = with_logits(tmp_path / name, rng.normal(size=(8_000, 8)) + lean, 2, document)
        row = simulate_routing(trace, algorithms=["loss-free bias"]).tables["routing"].iloc[0]
        return row["max_vio"], row["tokens"]

    assert vio("alike", skew, document) == (pytest.approx(0.05, abs=0.05), 4_000)
    assert vio("turned", turned, document)[0] > 1.5
    assert vio("one document", skew, document * 0) == (pytest.approx(0.05, abs=0.05), 8_000)


def with_logits(root: Path, logits_TE: np.ndarray, k: int, document: np.ndarray) -> Trace:
    logits_TE = logits_TE.astype(np.float16)
    ids = np.argsort(-logits_TE, axis=1, kind="stable")[:, :k].astype(np.uint16)
    how = {"document": document, "batch_tokens": len(document)}
    return write_trace(root, [ids], logits_TE.shape[1], logits=[logits_TE], **how)


def test_more_compute_is_no_better_balance(tmp_path: Path):
    rng = np.random.default_rng(0)
    logits_TE = rng.normal(size=(2_000, 8)) + np.linspace(1, 0, 8)
    trace = with_logits(tmp_path / "t", logits_TE, 4, np.arange(2_000) // 50)
    made = simulate_routing(trace, capacity_factor=[0.5])
    advice = made.tables["routing_algorithms"].set_index("algorithm")
    assert advice.loc["top-k 8", ["max_vio_worst", "experts_per_token"]].tolist() == [0, 8]
    assert advice.loc["top-k 8", "use_when"].endswith("; computes 2x as many experts per token")
    half = advice.loc["next best 0.5", "use_when"]
    assert half.endswith("; computes 0.5x as many experts per token")
    assert advice.loc["top-k 4", "use_when"] == ALGORITHMS["top-k"].use_when
    assert any("loss-free bias keeps the most probability mass" in s for s in made.verdict)


def test_a_loss_free_bias_evens_the_collapsed_layer_and_keeps_four_fifths_of_the_mass():
    made = simulate_routing(ROOT / "sample_traces/collapsed", layers=3)
    table = made.tables["routing"].set_index("algorithm")
    assert table.loc["as recorded", "max_vio"] > 1.8
    assert table.loc["loss-free bias", "max_vio"] < 0.2
    assert table.loc["loss-free bias", "mass_retained"] >= 0.8
    own = table.loc["as recorded", ["mass_retained", "agreement"]]
    assert own.tolist() == pytest.approx([1, 1], abs=1e-6)
    # the logits are those that chose, but for ties in float16
    assert table.loc["top-k 2", "agreement"] > 0.99
    assert table.loc["random", "agreement"] == pytest.approx(2 / 8, abs=0.02)
    assert table.loc["random", "mass_retained"] < 0.5


def test_scoring_is_the_routers_own():
    trace = open_trace(ROOT / "sample_traces/balanced")
    own = simulate_routing(trace, algorithms=["top-k"], layers=0).tables["routing"]
    trace.routers[0] = replace(trace.routers[0], scoring="sigmoid")
    other = simulate_routing(trace, algorithms=["top-k"], layers=0).tables["routing"]
    assert (own["max_vio"] == other["max_vio"]).all()  # the order is the same
    assert (own["mass"] > other["mass"]).all()  # the sigmoid is flatter
    scores = batch(np.zeros((1, 4)), scoring="sigmoid").scores_TE
    assert scores.tolist() == [[0.5] * 4]


def test_what_cannot_be_simulated_is_a_one_line_error(tmp_path: Path):
    trace = write_trace(tmp_path / "t", [uniform_ids(np.random.default_rng(0), 50, 4, 2)], 4)
    why = "has no logits, which simulate routing needs: trace with --logits"
    with pytest.raises(MoeInspectError, match=why):
        simulate_routing(trace)
    with pytest.raises(MoeInspectError, match="no algorithm best: there are as recorded"):
        simulate_routing(ROOT / "sample_traces/balanced", algorithms=["best"])
