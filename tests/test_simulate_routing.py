"""Routing under other rules. Algorithms on logits: each against what defines it, and against what
it says of itself. What a capacity drops, against a brute force that serves one after another."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_inspect import Trace, open_trace
from moe_inspect.errors import MoeInspectError
from moe_inspect.simulate import capacity, kernels_numba
from moe_inspect.simulate.capacity import ORDERS
from moe_inspect.simulate.routing import simulate_routing
from moe_inspect.simulate.routing_algorithms import ALGORITHMS, Algorithm, RouterScores, largest
from moe_inspect.simulate.shards import expert_capacity
from tests.conftest import ROOT
from tests.support.sweep import WHOLE
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


def test_top_p_by_hand():
    made = batch(np.log(np.array([[0.5, 0.25, 0.125, 0.125], [0.97, 0.01, 0.01, 0.01]])))
    found = [ALGORITHMS["top-p"].choose(made, p).sum(1).tolist() for p in (0.4, 0.6, 0.8, 1.0)]
    assert found == [[1, 1], [2, 1], [3, 1], [4, 4]]


def test_top_p_sums_in_double_precision():
    made = batch(skewed(T=20, E=256), scoring="sigmoid")
    sum_TE = np.cumsum(np.sort(made.share_TE, axis=1)[:, ::-1], axis=1, dtype=np.float64)
    for t, sum_E in enumerate(sum_TE):
        for p, k in ((sum_E[99] - 2e-9, 100), (sum_E[99] + 2e-9, 101)):
            assert ALGORITHMS["top-p"].choose(made, p + 1e-6)[t].sum() == k


@settings(max_examples=100 if WHOLE else 50, deadline=None)
@given(*(st.integers(*ends) for ends in ((1, 40), (1, 6), (1, 3), (1, 12), (0, 2**32))))
def test_next_best_equals_a_naive_queue(T: int, E: int, k: int, room: int, seed: int):
    scores_TE = np.random.default_rng(seed).random((T, E))
    order_TE, expected = np.argsort(-scores_TE, axis=1), np.zeros((T, E), bool)
    for t in range(T):
        expected[t, [e for e in order_TE[t] if expected[:, e].sum() < room][:k]] = True
    assert (largest(scores_TE, k, room=room) == expected).all()


def test_expert_choice_gives_every_expert_the_same():
    made = batch(skewed())
    chosen_TE = choose(ALGORITHMS["expert choice"], made)
    assert chosen_TE.sum(0).tolist() == [50] * 8
    worst_taken = np.where(chosen_TE, made.scores_TE, 1).min(0)
    assert (worst_taken >= np.where(chosen_TE, 0, made.scores_TE).max(0)).all()


def test_expert_choice_gives_ties_to_the_first_tokens():
    made = batch(np.random.default_rng(0).integers(0, 3, (200, 8)))
    best_TE = np.argsort(-made.scores_TE, axis=0, kind="stable")[:50]
    expected = np.zeros((200, 8), bool)
    np.put_along_axis(expected, best_TE, True, 0)
    assert (choose(ALGORITHMS["expert choice"], made) == expected).all()


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


def test_expert_choice_evens_the_collapsed_layer_and_keeps_four_fifths_of_the_mass():
    made = simulate_routing(ROOT / "sample_traces/collapsed", layers=3)
    table = made.tables["routing"].set_index("algorithm")
    assert table.loc["as recorded", "max_vio"] > 1.8
    assert table.loc["expert choice", "max_vio"] < 0.2
    assert table.loc["expert choice", "mass_retained"] >= 0.8
    own = table.loc["as recorded", ["mass_retained", "agreement"]]
    assert own.tolist() == pytest.approx([1, 1], abs=1e-6)
    # the logits are those that chose, but for ties in float16
    assert table.loc["top-k 2", "agreement"] > 0.99


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


def test_scoring_is_the_routers_own():
    trace = open_trace(ROOT / "sample_traces/balanced")
    own = simulate_routing(trace, algorithms=["top-k"], layers=0).tables["routing"]
    trace.routers[0] = replace(trace.routers[0], scoring="sigmoid")
    other = simulate_routing(trace, algorithms=["top-k"], layers=0).tables["routing"]
    assert (own["max_vio"] == other["max_vio"]).all()  # the order is the same
    assert (own["mass"] > other["mass"]).all()  # the sigmoid is flatter
    scores = batch(np.zeros((1, 4)), scoring="sigmoid").scores_TE
    assert scores.tolist() == [[0.5] * 4]


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


COLLAPSED = ROOT / "sample_traces/collapsed"
RECORDED: dict[str, Any] = {"algorithms": ["as recorded"]}
FACTORS = (0.5, 1.0, 1.25, 2.0)


def brute_force(
    ids_TK: np.ndarray, weight_TK: np.ndarray, room: int, order: str
) -> set[tuple[int, int]]:
    """The (token, slot) dropped of one group."""
    queue = [(int(t), int(k)) for t, k in np.argwhere(ids_TK >= 0)]
    if order != "token":
        weight = {at: -weight_TK[at] if order == "weight" else 0 for at in queue}
        queue.sort(key=lambda at: (weight[at], at[1], at[0]))
    taken, dropped = Counter[int](), set[tuple[int, int]]()
    for at in queue:
        taken[ids_TK[at]] += 1
        if taken[ids_TK[at]] > room:
            dropped.add(at)
    return dropped


@st.composite
def routing(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    E = draw(st.integers(1, 6))
    K, T = draw(st.integers(1, min(E, 3))), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ids_TK = uniform_ids(rng, T, E, K).astype(np.int16)
    ids_TK[rng.random((T, K)) < draw(st.sampled_from([0, 0.2]))] = -1
    return ids_TK, rng.integers(1, 5, (T, K)).astype(np.float32), E


@pytest.mark.parametrize("order", ORDERS)
@settings(max_examples=60 if WHOLE else 30, deadline=None)
@given(case=routing(), size=st.integers(1, 15))
def test_drops_equal_a_brute_force(order: str, case: tuple[np.ndarray, np.ndarray, int], size: int):
    ids_TK, weight_TK, E = case
    T, K = ids_TK.shape
    start_G = np.append(np.arange(0, T, size), T)
    size_G = np.diff(start_G)
    room_GF = np.array([[expert_capacity(f, int(n), K, E) for f in FACTORS] for n in size_G])
    group_T = np.repeat(np.arange(len(size_G)), size_G)
    domain_T = np.arange(T) % 2
    decile_PT = np.stack([np.arange(T) % 10, np.arange(T) // 7]).astype(np.uint8)
    visit_N = np.zeros(0, np.int64)
    if order == "weight":
        visit_N = np.lexsort((-weight_TK.T.ravel(), np.tile(group_T, K)))
    made = load_GE, level_KT = np.zeros((len(size_G), E), np.int32), np.empty((K, T), np.uint8)
    of_G, ids_KT = np.arange(len(room_GF)), np.ascontiguousarray(ids_TK.T)
    how = capacity.levels(room_GF, size), visit_N, order == "token"
    kernels_numba.queue(ids_KT, start_G, of_G, *how, *made)
    groups = capacity.Groups(slice(None), start_G, domain_T, decile_PT, ["a", "b"])
    last_FD, last_FPN, worst_T, best_T = capacity.dropped(level_KT, groups, len(FACTORS))
    for f in range(len(FACTORS)):
        of_group = [
            brute_force(ids_TK[group_T == g], weight_TK[group_T == g], room_F[f], order)
            for g, room_F in enumerate(room_GF)
        ]
        lost = {(int(start_G[g]) + t, k) for g, of in enumerate(of_group) for t, k in of}
        assert last_FD[f:].sum() == len(lost)
        assert last_FD[f:, 1].sum() == sum(t % 2 for t, _ in lost)
        assert last_FPN[f:, 1, 0].sum() == sum(t // 7 == 0 for t, _ in lost)
        of_token = Counter(t for t, _ in lost)
        made_T = (ids_TK >= 0).sum(1)
        assert (worst_T > f).tolist() == [t in of_token for t in range(T)]
        assert (best_T > f).tolist() == [0 < made_T[t] == of_token[t] for t in range(T)]
    assert load_GE.sum() == (ids_TK >= 0).sum()


def test_a_trace_of_two_batches_by_hand(tmp_path: Path):
    # capacity 1.0 · 4 · 1 / 2 = 2 a batch: expert 0 has 4 and 3 of them, so 2 and 1 are dropped,
    # the last to come
    ids = np.array([0, 0, 0, 0, 0, 1, 0, 0], np.uint16)[:, None]
    cut = {"batch_tokens": 4, "shard_tokens": 4, "document": np.arange(8) // 4}
    trace = write_trace(tmp_path / "t", [ids], 2, domain_of_document=("a", "b"), **cut)
    made = simulate_routing(trace, capacity_factors=[1.0], target_drop=0.0)
    columns = ["simulated_drop_rate", "tokens_hit", "tokens_lost", "unused_capacity"]
    assert made.tables["capacity"].iloc[0][columns].tolist() == [3 / 8] * 4
    assert made.tables["capacity_by_domain"]["simulated_drop_rate"].tolist() == [2 / 4, 1 / 4]
    ends = made.tables["capacity_by_position"].query("position_in == 'document'").dropna()
    ends = ends.set_index("tenth")["simulated_drop_rate"]
    assert ends.to_dict() == {1: 0.0, 3: 0.0, 6: 0.5, 8: 1.0}
    columns = ["capacity_factor", "simulated_drop_rate", "unused_capacity"]
    assert made.tables["capacity_needed"].iloc[0][columns].tolist() == [1.51, 0.0, 0.5]
    assert expert_capacity(1.5, 4, 1, 2) == 3  # one hundredth less is too little
    assert ceil(1.1 * 100) == 111
    assert expert_capacity(1.1, 100, 1, 1) == 110
    assert expert_capacity(1.25, 7, 2, 8) == 3
    few, *said, rest = made.verdict
    assert rest.startswith("For top-k")
    assert few.startswith("Too little data to advise: with fewer than 8 documents")
    assert all(sentence.startswith("Simulated") for sentence in said)


@pytest.mark.parametrize("group", ["batch", "sequence", 100])
def test_what_a_factor_needs_is_what_it_then_drops(group: str | int):
    how = {"group_tokens": group, "layers": 3, **RECORDED}
    made = simulate_routing(COLLAPSED, target_drop=0.05, **how)
    row = made.tables["capacity_needed"].iloc[0]
    factors = [round(row["capacity_factor"] + step, 2) for step in (-0.01, 0)]
    made = simulate_routing(COLLAPSED, capacity_factors=factors, **how)
    too_little, enough = made.tables["capacity"].to_dict("records")
    assert too_little["simulated_drop_rate"] > 0.05
    for column in ("simulated_drop_rate", "unused_capacity"):
        assert enough[column] == row[column]


def test_a_document_that_was_cut_is_its_sequences_one_after_the_other():
    document_T, sequence_T = np.repeat([7, 3, 7], 10), np.repeat([5, 2, 4], 10)
    expected = [*np.repeat(range(5, 10), 2), *range(10), *np.repeat(range(5), 2)]
    assert capacity.document_deciles(document_T, sequence_T).tolist() == expected


def test_order_moves_drops_and_a_group_may_be_larger_than_any_pass():
    usual, made = (
        simulate_routing(COLLAPSED, group_tokens=of, **RECORDED) for of in ("batch", 10**30)
    )
    assert made.tables["capacity"].equals(usual.tables["capacity"])
    made = [
        simulate_routing(COLLAPSED, order=order, group_tokens=200, **RECORDED) for order in ORDERS
    ]
    tables = [of.tables["capacity"] for of in made]
    dropped, hit = ([of[name].tolist() for of in tables] for name in ("dropped", "tokens_hit"))
    assert dropped[0] == dropped[1] == dropped[2]
    assert hit[0] != hit[1] != hit[2]


def test_an_algorithm_that_needs_logits_is_refused_without_them(tmp_path: Path) -> None:
    ids = uniform_ids(np.random.default_rng(0), 60, 8, 2)
    simulate = write_trace(tmp_path / "t", [ids], 8).simulate.routing
    for asked in ({"algorithms": ["as recorded", "expert choice"]}, {"top_k": [1]}):
        with pytest.raises(MoeInspectError, match=r"no logits for (expert choice|top-k): trace wi"):
            simulate(**asked)
    for asked in ({}, {"algorithms": ["as recorded"]}):
        assert "capacity" in simulate(**asked).tables
