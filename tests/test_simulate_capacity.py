"""What a capacity drops, against a brute force that serves assignment after assignment."""

from __future__ import annotations

from collections import Counter
from math import ceil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_inspect.errors import MoeInspectError
from moe_inspect.simulate import kernels_numba
from moe_inspect.simulate.capacity import (
    ORDERS,
    Groups,
    document_deciles,
    dropped,
    levels,
    simulate_capacity,
)
from moe_inspect.simulate.shards import expert_capacity
from tests.conftest import ROOT
from tests.support.synthetic import uniform_ids, write_trace

COLLAPSED = ROOT / "sample_traces/collapsed"
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
@settings(max_examples=60, deadline=None)
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
    how = levels(room_GF, size), visit_N, order == "token"
    kernels_numba.queue(ids_KT, start_G, of_G, *how, *made)
    groups = Groups(slice(None), start_G, domain_T, decile_PT, ["a", "b"])
    last_FD, last_FPN, worst_T, best_T = dropped(level_KT, groups, len(FACTORS))
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


def test_capacity_is_exact_where_a_float_is_not():
    assert ceil(1.1 * 100) == 111
    assert expert_capacity(1.1, 100, 1, 1) == 110
    assert expert_capacity(1.25, 7, 2, 8) == 3


def test_a_trace_of_two_batches_by_hand(tmp_path: Path):
    # capacity 1.0 · 4 · 1 / 2 = 2 a batch: expert 0 has 4 and 3 of them, so 2 and 1 are dropped,
    # the last to come
    ids = np.array([0, 0, 0, 0, 0, 1, 0, 0], np.uint16)[:, None]
    cut = {"batch_tokens": 4, "shard_tokens": 4, "document": np.arange(8) // 4}
    trace = write_trace(tmp_path / "t", [ids], 2, domain_of_document=("a", "b"), **cut)
    made = simulate_capacity(trace, capacity_factors=[1.0], target_drop=0.0)
    columns = ["simulated_drop_rate", "tokens_hit", "tokens_lost", "unused_capacity"]
    assert made.tables["capacity"].iloc[0][columns].tolist() == [3 / 8] * 4
    assert made.tables["capacity_by_domain"]["simulated_drop_rate"].tolist() == [2 / 4, 1 / 4]
    ends = made.tables["capacity_by_position"].query("position_in == 'document'").dropna()
    ends = ends.set_index("tenth")["simulated_drop_rate"]
    assert ends.to_dict() == {1: 0.0, 3: 0.0, 6: 0.5, 8: 1.0}
    columns = ["capacity_factor", "simulated_drop_rate", "unused_capacity"]
    assert made.tables["capacity_needed"].iloc[0][columns].tolist() == [1.51, 0.0, 0.5]
    assert expert_capacity(1.5, 4, 1, 2) == 3  # one hundredth less is too little
    assert all(sentence.startswith("Simulated") for sentence in made.verdict)


@pytest.mark.parametrize("group", ["batch", "sequence", 100])
def test_what_a_factor_needs_is_what_it_then_drops(group: str | int):
    how = {"group_tokens": group, "layers": 3}
    made = simulate_capacity(COLLAPSED, target_drop=0.05, **how)
    row = made.tables["capacity_needed"].iloc[0]
    factors = [round(row["capacity_factor"] + step, 2) for step in (-0.01, 0)]
    made = simulate_capacity(COLLAPSED, capacity_factors=factors, **how)
    too_little, enough = made.tables["capacity"].to_dict("records")
    assert too_little["simulated_drop_rate"] > 0.05
    for column in ("simulated_drop_rate", "unused_capacity"):
        assert enough[column] == row[column]


def test_a_document_that_was_cut_is_its_sequences_one_after_the_other():
    document_T, sequence_T = np.repeat([7, 3, 7], 10), np.repeat([5, 2, 4], 10)
    assert document_deciles(document_T, sequence_T).tolist() == [
        *np.repeat(range(5, 10), 2),
        *range(10),
        *np.repeat(range(5), 2),
    ]


def test_a_group_may_be_larger_than_any_pass():
    usual, made = (simulate_capacity(COLLAPSED, group_tokens=of) for of in ("batch", 10**30))
    assert made.tables["capacity"].equals(usual.tables["capacity"])


def test_order_moves_drops_and_does_not_change_how_many():
    made = [simulate_capacity(COLLAPSED, order=order, group_tokens=200) for order in ORDERS]
    dropped, hit = (
        [of.tables["capacity"][column].tolist() for of in made]
        for column in ("dropped", "tokens_hit")
    )
    assert dropped[0] == dropped[1] == dropped[2]
    assert hit[0] != hit[1] != hit[2]


def test_what_cannot_be_simulated_is_a_one_line_error(tmp_path: Path):
    trace = write_trace(tmp_path / "t", [uniform_ids(np.random.default_rng(0), 50, 4, 2)], 4)
    with pytest.raises(MoeInspectError, match="holds no gate weights"):
        simulate_capacity(trace, order="weight")
    with pytest.raises(MoeInspectError, match="capacity factors"):
        simulate_capacity(trace, capacity_factors=[0.0])
