"""Counts of one router: against a loop over the decisions, and the same for all ways to cut a trace
into shards; and what cannot be counted is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_inspect.analysis.counting import engine, kernels, token_ids
from moe_inspect.analysis.counting.count_shard import count_shard
from moe_inspect.analysis.counting.counts import CLUSTERS, Counts, merge
from moe_inspect.analysis.counting.engine import count_trace, windows_of
from moe_inspect.analysis.counting.router_counts import WANTS, ByTokenId, RouterCounts
from moe_inspect.analysis.counting.select import Selection, select
from moe_inspect.errors import MoeInspectError
from moe_inspect.public import Trace, report
from moe_inspect.trace.schema import Router, parse_layers
from tests.support.damage import edit_manifest
from tests.support.generated import Kind, decisions, written
from tests.support.sweep import WHOLE
from tests.support.synthetic import (
    a_pass,
    routers,
    uniform_ids,
    write_counts,
    write_passes,
    write_trace,
)

NOWHERE = np.iinfo(np.uint16).max
T, E, K = 1_200, 8, 3
IN_DOCUMENTS = {"document": np.arange(T) // 40, "domain_of_document": ["code", "law", "prose"]}


def counted(trace: Trace, wants: Iterable[str] = WANTS, **how: Any) -> Counts:
    return count_trace(trace, select(trace), wants, **how)


def ids_with_gaps(
    seed: int, tokens: int = T, E: int = E, k: int = K, null: float = 0.1
) -> np.ndarray:
    """int16 [T, K], −1 where a slot routed nowhere"""
    rng = np.random.default_rng(seed)
    ids_TK = uniform_ids(rng, tokens, E, k).astype(np.int16)
    ids_TK[rng.random(ids_TK.shape) < null] = -1
    return ids_TK


def slots_of(ids_TK: np.ndarray, E: int = E) -> kernels.Slots:
    return tuple(np.where(ids_TK < 0, E, ids_TK).astype(np.uint8).T.copy())


def made(root: Path, shard_tokens: int = 400, seed: int = 0, **more: Any) -> Trace:
    ids = [ids_with_gaps(n) for n in (seed, seed + 1)]
    weights_TK = np.random.default_rng(9).random((T, K)).astype(np.float16).astype(np.float32)
    usual: dict[str, Any] = {"weights": [weights_TK] * 2, "shard_tokens": shard_tokens}
    usual |= {"token_id": np.random.default_rng(8).zipf(1.5, T).clip(max=300), "batch_tokens": 200}
    listed = [np.where(i < 0, NOWHERE, i).astype(np.uint16) for i in ids]
    return write_trace(root, listed, E, **IN_DOCUMENTS | usual | more)


def same(a: Counts, b: Counts, shards: bool = True) -> None:
    """`shards`: whether both traces are cut into the same, within which token ids are shuffled."""
    assert a.by_token_id.keys() == b.by_token_id.keys()
    for r, by_id in a.by_token_id.items():
        for name, value in by_id.columns.items():
            if shards or not ("null" in name or name.endswith("_p")):
                assert b.by_token_id[r].columns[name] == pytest.approx(value, rel=1e-12), name
        mine, theirs = by_id.expected, b.by_token_id[r].expected
        assert (mine is None) == (theirs is None)
        if mine and theirs:
            assert (mine.assignments_UE == theirs.assignments_UE).all()
            np.testing.assert_allclose(mine.expected_UE, theirs.expected_UE, rtol=1e-12)
        for f in fields(ByTokenId)[2:]:
            x, y = getattr(by_id, f.name), getattr(b.by_token_id[r], f.name)
            assert x.tolist() == y.tolist(), f.name
    for name in ("domains", "units", "tokens", "documents"):
        assert getattr(a, name) == getattr(b, name), name
    assert a.first_token_W.tolist() == b.first_token_W.tolist()
    for r, mine in a.of.items():
        for name in (f.name for f in fields(RouterCounts)):
            x, y = getattr(mine, name), getattr(b.of[r], name)
            if x is None:
                assert y is None
            elif isinstance(x, dict):  # batches
                assert x.keys() == y.keys()
                assert all(np.array(x[of]) == pytest.approx(np.array(y[of])) for of in x)
            else:
                np.testing.assert_allclose(x, y, rtol=1e-12, err_msg=name)


def test_tokens_that_do_not_follow_each_other_are_no_pair():
    """Token 2 of the first sequence is missing; the second goes on where the first ends. Their
    tokens come in any order."""
    sequence, position = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 1, 3, 4, 5, 6])
    for order_T in (np.arange(6), np.array([4, 0, 1, 5, 2, 3])):
        order = kernels.order_of(np.zeros(6, int), sequence[order_T], position[order_T])
        assert order.follows_T.tolist() == [False, True, False, True, False, True]


def by_a_loop(
    slots: kernels.Slots,
    after: kernels.Slots,
    weights: kernels.Slots,
    rows: kernels.TokenRows,
    experts: int,
) -> dict[str, Counter[Any]]:
    """Every count, one assignment at a time: cell → count."""
    found = {name: Counter[Any]() for name in ("weights", "next", "pairs", *rows.divisions)}
    decisions = list(zip(*(slot_T.tolist() for slot_T in slots), strict=True))
    later = list(zip(*(slot_T.tolist() for slot_T in after), strict=True))
    for t, decision in enumerate(decisions):
        chosen = [(j, e) for j, e in enumerate(decision) if e < experts]
        for j, e in chosen:
            for name, (row_T, _) in rows.divisions.items():
                found[name][row_T[t], e] += 1
            found["weights"][rows.unit_T[t], e] += float(weights[j][t])
            found["pairs"].update((e, other) for i, other in chosen if i > j)
            found["next"].update((e, other) for other in later[t] if other < experts)
    return found


def cells(table_XE: np.ndarray) -> dict[Any, Any]:
    """The cells of a table that are not 0."""
    places = zip(*np.nonzero(table_XE), strict=True)
    return {(int(x), int(e)): table_XE[x, e].item() for x, e in places}


@given(
    st.integers(0, 10_000),
    st.sampled_from([(4, 1), (130, 3), (12, 11), *([(130, 6), (20, 8)] if WHOLE else [])]),
    st.integers(0, 300),
    st.sampled_from([0, 0.1]),
    st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_counts_are_those_of_a_loop(
    seed: int, shape: tuple[int, int], tokens: int, null: float, in_runs: bool
):
    """`in_runs`: documents are long. Else there are too many groups to add up."""
    rng, (experts, k), at_T = np.random.default_rng(seed), shape, np.arange(tokens)
    slots, after = (
        slots_of(ids_with_gaps(seed + i, tokens, experts, k, null), experts) for i in range(2)
    )
    weights = tuple(rng.random((k, tokens)).astype(np.float32))
    unit_T, id_unit_T = rng.integers(0, 3, tokens), rng.integers(-1, 2, tokens)
    if in_runs:
        unit_T, id_unit_T = at_T // 100, at_T // 150 - 1
    rows = kernels.TokenRows(
        *(unit_T, unit_T // 2, at_T // 150, 4, 2, 3),
        *(at_T // 50, 7, id_unit_T, 2),
    )
    expected = by_a_loop(slots, after, weights, rows, experts)
    loads = rows.loads(slots, experts)
    assert loads.keys() == {"unit", "batch", "window", "id_unit"}
    for name, load_XE in loads.items():
        row_T, X = rows.divisions[name]
        assert load_XE.shape == (X, experts)
        assert cells(load_XE) == {cell: n for cell, n in expected[name].items() if cell[0] >= 0}
        assert kernels.load(row_T, slots, X, experts).tolist() == load_XE.tolist()
    assert cells(kernels.by_slot(slots, experts)) == expected["pairs"]
    assert cells(kernels.transitions(slots, after, experts, experts)) == expected["next"]
    sums = cells(kernels.weight_sum(unit_T, slots, weights, 3, experts))
    assert sums == pytest.approx(expected["weights"], rel=1e-12)


@given(st.integers(0, 10_000), st.integers(0, 100), st.sampled_from([0, 0.1]))
@settings(max_examples=15, deadline=None)
def test_repeated_choices_are_those_of_a_loop(seed: int, tokens: int, null: float):
    rng = np.random.default_rng(seed)
    slots = slots_of(ids_with_gaps(seed, tokens, 8, 3, null))
    unit_T = rng.integers(0, 3, tokens)
    order = kernels.order_of(
        unit_T, unit_T + 3 * rng.integers(0, 2, tokens), np.arange(tokens) // 3
    )
    rows = kernels.TokenRows(*[unit_T] * 3, 3, 3, 3, order=order)
    expected = np.zeros((3, 3), np.int64)
    for before, t, follows in zip(order.by_T, order.by_T[1:], order.follows_T[1:], strict=False):
        if follows:
            one, other = ([int(slot_T[x]) for slot_T in slots] for x in (before, t))
            expected[0, unit_T[t]] += one[0] == other[0] < 8
            expected[1, unit_T[t]] += len({*one} & {*other} - {8})
            expected[2, unit_T[t]] += sum(e < 8 for e in one + other)
    assert np.array(kernels.repetition(slots, rows, 8)).tolist() == expected.tolist()


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(0, 100))
@settings(max_examples=15, deadline=None)
def test_confidence_is_that_of_a_loop(seed: int, k: int, tokens: int):
    """Also of weights in no order, of decisions without any weight, and of a single weight."""
    rng = np.random.default_rng(seed)
    weights_KT = rng.random((k, tokens)).astype(np.float32) * (rng.random((k, tokens)) < 0.7)
    expected = dict.fromkeys(("decisions", "entropy_sum", "margin_sum", "mass_sum"), 0.0)
    for weights in weights_KT.T.astype(float):
        if mass := weights.sum():
            share, highest = weights[weights > 0] / mass, np.sort(np.r_[0, weights])
            expected["decisions"] += 1
            expected["entropy_sum"] -= (share * np.log(share)).sum()
            expected["margin_sum"] += (highest[-1] - highest[-2]) / mass
            expected["mass_sum"] += mass
    sums = kernels.weight_confidence(tuple(weights_KT.astype(np.float32)))
    expected = {f"weight_{name}": value for name, value in expected.items()}
    assert sums == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_a_weight_below_0_has_no_entropy():
    """As an imported file may have."""
    sums = kernels.weight_confidence((np.float32([0.9, 0.5]), np.float32([-0.1, 0.5])))
    share = 0.9 / 0.8
    assert sums["weight_entropy_sum"] == pytest.approx(np.log(2) - share * np.log(share), rel=1e-6)


@pytest.mark.parametrize("tokens", [2**15, 2**16])
def test_a_pair_that_comes_up_more_often_than_a_narrow_table_holds(tokens: int):
    twice = (np.zeros(tokens, np.uint8),) * 2  # damaged: an expert named twice in a decision
    assert kernels.transitions(twice, twice, 1, 1).tolist() == [[4 * tokens]]
    assert kernels.by_slot((*twice, twice[0]), 1).tolist() == [[3 * tokens]]


def test_a_decision_that_names_an_expert_twice_spoils_no_other_unit():
    tokens, E = 40, 4
    unit_T = np.arange(tokens) // (tokens // 2)
    ids_TK = np.stack([np.arange(tokens) % E, (np.arange(tokens) + 1) % E], axis=1)
    ids_TK[unit_T == 0] = 1  # damaged
    order = kernels.order_of(unit_T, unit_T, np.arange(tokens))
    rows = kernels.TokenRows(*[unit_T] * 3, 2, 2, 2, order=order)
    first_U, shared_U, chosen_U = kernels.repetition(slots_of(ids_TK, E), rows, E)
    assert (first_U[1], shared_U[1]) == (0, tokens // 2 - 1)
    assert chosen_U[1] == 4 * (tokens // 2 - 1)


@given(st.integers(200, T), st.integers(0, 3))
@settings(max_examples=3, deadline=None)
def test_shards_and_threads_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, shard_tokens: int, seed: int
):
    root = tmp_path_factory.mktemp("traces")
    whole, split = made(root / "whole", T, seed), made(root / "split", shard_tokens, seed)
    expected, alone = counted(whole, window=100), counted(split, window=100, threads=1)
    assert all(len(of.columns) == 5 for of in expected.by_token_id.values())
    same(alone, expected, shards=False)
    same(counted(split, window=100, threads=3), alone)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "TABLE_BYTES", 1)  # a router at a time
        narrower = {np.uint32: 2**32, np.uint16: 250, np.uint8: 60}
        patch.setattr(token_ids, "WIDTHS", narrower)
        same(counted(split, window=100), alone)
        by_shard = counted(split, set(WANTS) - {"token_ids"}, window=100, threads=3)
        by_shard.by_token_id = counted(split, {"token_ids"}).by_token_id
        same(by_shard, alone)


def test_pairs_of_so_many_experts_that_routers_are_counted_in_groups(tmp_path: Path):
    E, L = 2_048, 5
    ids = [uniform_ids(np.random.default_rng(layer), 200, E, 2) for layer in range(L)]
    counts = counted(write_trace(tmp_path / "t", ids, E, shard_tokens=100), {"transitions"})
    assert sum(16 * E**2 for _ in range(L)) > engine.PAIR_BYTES
    for layer in range(L - 1):
        expected_EN = np.zeros((E, E), np.int64)
        for here_T in ids[layer].T:
            for next_T in ids[layer + 1].T:
                np.add.at(expected_EN, (here_T, next_T), 1)
        assert (counts.of[layer].next_EN == expected_EN).all()
    assert counts.of[L - 1].next_EN is None


def test_a_slot_that_routes_nowhere_among_256_experts(tmp_path: Path):
    """Of which 8 bits hold each, and none for nowhere."""
    ids_TK = uniform_ids(np.random.default_rng(0), 300, 256, 4).astype(np.int16)
    ids_TK[::7, 3] = -1
    ids = [np.where(ids_TK < 0, np.uint16(NOWHERE), ids_TK).astype(np.uint16)] * 2
    documents = {"document": np.arange(300) // 10, "domain_of_document": ["a", "b"]}
    trace = write_trace(tmp_path / "t", ids, 256, shard_tokens=100, **documents)
    assert (np.concatenate([shard.ids(1) for shard in trace.shards]) == ids_TK).all()
    load_E = np.bincount(ids_TK[ids_TK >= 0], minlength=256)
    assert counted(trace).load_E(0).tolist() == load_E.tolist()


def test_merging_is_associative_and_commutative_and_leaves_the_parts_alone(tmp_path: Path):
    trace = made(tmp_path / "t")
    windows = windows_of(trace, select(trace), 300)
    a, b, c = (
        count_shard(shard, select(trace), frozenset(WANTS), windows) for shard in trace.shards
    )
    before = deepcopy(a)
    left = merge([merge([a, b]), c])
    same(left, merge([a, merge([b, c])]))
    same(left, merge([c, b, a]))
    same(a, before)
    same(left, counted(trace, set(WANTS) - {"token_ids"}, window=300))
    with pytest.raises(AssertionError):
        same(left, merge([a, b]))


def test_windows_too_many_for_memory_are_refused():
    """Of 2²⁴ counts of the load: 2 routers of 8 experts, 1,200 million tokens."""
    files = SimpleNamespace(rank=0, index=0, tokens=1_200_000_000)
    trace: Any = SimpleNamespace(shards=[SimpleNamespace(files=files)], routers=routers(2, E, K))
    said = "window 5 cuts the trace into 240,000,000 windows, .* give 1145 or more"
    with pytest.raises(MoeInspectError, match=said):
        windows_of(trace, Selection((0, 1)), 5)
    assert windows_of(trace, Selection((0, 1)), 1145).count * 2 * E <= engine.WINDOW_CELLS


def test_an_encoder_and_a_decoder_have_tokens_of_their_own(tmp_path: Path):
    stacks = ("encoder", "encoder", "decoder", "decoder")
    routers = [
        Router(layer, "gate", f"layers.{layer}", 4, 2, stack=stack)
        for layer, stack in enumerate(stacks)
    ]
    rng, fed, passes = np.random.default_rng(0), {}, []
    for b, (phase, size) in enumerate((("encode", 60), ("prefill", 20))):
        ids = [uniform_ids(rng, size if r.sees(phase) else 0, 4, 2) for r in routers]
        fed[phase] = [i for i in ids if len(i)]
        passes.append(a_pass(b, ids, size, encoded=size if phase == "encode" else 0))
    trace = write_passes(tmp_path / "t", routers, passes)
    counts = counted(trace, {"pairs", "transitions", "repetition", "windows"})
    assert [counts.tokens_of(r) for r in range(4)] == [60, 60, 20, 20]
    assert (counts.tokens, counts.decisions) == (80, 160)
    assert [counts.next_router(r) for r in range(4)] == [1, None, 3, None]
    pairs = kernels.transitions(*(slots_of(ids, 4) for ids in fed["encode"]), 4, 4)
    assert counts.of[0].next_EN.tolist() == pairs.tolist()
    assert [int(counts.of[r].pairs_U.sum()) for r in range(4)] == [59, 59, 19, 19]
    assert counts.of[0].batches.keys() == {60}
    assert counts.of[2].batches.keys() == {20}


def test_logits_that_are_no_numbers_are_left_out():
    logits = np.array([[0, 0, 0, 0], [3, 1, 1, 0], [np.nan, 0, 0, 0]], np.float16)
    said = kernels.logit_confidence(logits, 2, "softmax")
    known = kernels.logit_confidence(logits[:2], 2, "softmax")
    assert (said["logit_decisions"], said["ties"], said["top1_margin_sum"]) == (2, 2, 2)
    assert said["probability_sum_E"].tolist() == known["probability_sum_E"].tolist()


def test_the_next_layer_is_the_next_whatever_is_selected(tmp_path: Path):
    trace = made(tmp_path / "t")
    whole = counted(trace)
    first = count_trace(trace, select(trace, layers=0), WANTS)
    assert first.of[0].next_EN.tolist() == whole.of[0].next_EN.tolist()
    last = report(trace, layers=1)
    assert last.tables["transitions"].empty
    assert "transitions" not in {path.stem for path in last.save_plots(tmp_path / "plots")}


def test_token_ids_are_counted_by_stack(tmp_path: Path):
    """An encoder fed token id 1 six times, a decoder fed it twice and id 2 twice."""
    listed = [Router(0, "gate", f"{x}.0", 2, 1, stack=x) for x in ("encoder", "decoder")]
    token_id, place = np.array([1] * 8 + [2] * 2, np.int32), np.r_[:6, :4].astype(np.int32)
    ids = [np.zeros((n, 1), np.uint8) for n in (6, 4)]
    one = a_pass(0, ids, 10, token_id=token_id, position=place, encoded=6)
    trace = write_passes(tmp_path / "t", listed, [one])
    counts = counted(trace, {"token_ids"}, top=0)
    assert [counts.token_ids_V_of(r).tolist() for r in range(2)] == [[0, 6], [0, 2, 2]]
    for r, listed_N, times in ((0, [1], [6]), (1, [2, 1], [2, 2])):
        of = counts.by_token_id[r]
        assert of.token_id_N.tolist() == listed_N
        assert of.expert_N.tolist() == [0] * len(listed_N)
        assert of.count_N.tolist() == of.occurrences_N.tolist() == of.first_N.tolist() == times


@pytest.mark.parametrize("shard_tokens", [8, 20, 50])
def test_a_generated_sequence_stays_in_one_shard(tmp_path: Path, shard_tokens: int):
    """Two prompts of 5 tokens and 29 passes of a generated token each, as a generation loop of
    one's own under `record` leaves them; twice."""
    rng, passes = np.random.default_rng(0), []
    for b in range(60):
        turn, step = divmod(b, 30)
        each = 1 if step else 5
        rows = np.repeat(np.arange(2, dtype=np.int32) + 2 * turn, each)
        place = np.tile(np.arange(each, dtype=np.int32) + (step + 4 if step else 0), 2)
        ids = [uniform_ids(rng, 2 * each, E, K) for _ in range(2)]
        phase = "decode" if step else "prefill"
        passes.append(a_pass(b, ids, token_id=rows, document=rows, position=place, phase=phase))
    both = [
        write_passes(tmp_path / str(n), routers(2, E, K), passes, shard_tokens=n)
        for n in (10_000, shard_tokens)
    ]
    assert [trace.n_shards for trace in both] == [1, 2 if shard_tokens > 8 else 4]
    counts = [counted(trace, {"repetition"}, window=10) for trace in both]
    assert counts[0].of[0].pairs_U.sum() == 4 * 33
    if shard_tokens > 8:
        same(*counts)
    else:
        # the whole of a turn is more than writer.CONTINUED such shards: two sequences, two pairs at
        # each of the two edges
        assert counts[1].of[0].pairs_U.sum() == 4 * 33 - 4


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_share_out_the_routers_of_the_last_shards(threads: int, tmp_path: Path):
    trace, wants = made(tmp_path / "t"), set(WANTS) - {"token_ids"}
    alone, opened = counted(trace, wants, threads=1), list[int]()
    trace.shard = lambda number: opened.append(number) or Trace.shard(trace, number)
    same(counted(trace, wants, threads=threads), alone)
    # by each thread, to count one of the two routers; and for its length and its windows
    assert opened.count(2) == 4


def test_a_token_id_that_comes_up_more_often_than_a_narrow_row_holds(tmp_path: Path):
    """One of two, 70,000 times, always to experts 0 and 1; the other every time to 2 and 3."""
    token_id = np.r_[np.full(70_000, 5), np.full(900, 3)]
    ids_TK = np.where(token_id[:, None] == 5, [[0, 1]], [[2, 3]]).astype(np.uint16)
    settings = {"document": np.arange(len(token_id)) // 1_000, "domain_of_document": ["a", "b"]}
    settings |= {"token_id": token_id, "shard_tokens": 30_000}
    of = counted(write_trace(tmp_path / "t", [ids_TK], 4, **settings), {"token_ids"}).by_token_id[0]
    assert of.expert_N.tolist() == [0, 1, 2, 3]
    assert of.token_id_N.tolist() == [5, 5, 3, 3]
    assert of.count_N.tolist() == of.occurrences_N.tolist() == [70_000, 70_000, 900, 900]
    assert of.columns["vocabulary_specialization"] == 1
    np.testing.assert_allclose(of.expected.assignments_UE, of.expected.expected_UE)


def test_weights_and_first_choices_are_summed_by_domain():
    root = written(Kind(empty=0.2))
    counts, rows = counted(Trace(root), {"load"}), decisions(root).query("routed")
    for r, of in counts.of.items():
        mine = rows[rows["router"] == r].groupby(["domain", "expert"])
        for found, column in ((of.weight_sum_DE, "weight"), (of.first_choice_DE, "first")):
            expected = mine[column].sum().unstack(fill_value=0)
            np.testing.assert_allclose(found[:, expected.columns], expected.to_numpy(float))


# --- what is selected, and what a trace lacks


def test_the_order_of_batches_changes_nothing(tmp_path: Path):
    orders = range(6), np.random.default_rng(0).permutation(6).tolist()
    both = [made(tmp_path / f"{n}", batch_order=order) for n, order in enumerate(orders)]
    wants = set(WANTS) - {"windows"}
    same(*(counted(trace, wants) for trace in both), shards=False)


NOT_THERE: list[tuple[dict[str, Any], str]] = [
    ({"layers": "7"}, "it has layers 0-1"),
    ({"layers": "a-b"}, "cannot read layers 'a-b': write them like 0-3,7"),
    ({"layers": "0,1-0"}, "cannot read layers '0,1-0': a range goes from low to high"),
    ({"layers": "²"}, "cannot read layers '²': write them like 0-3,7"),
    ({"layers": [0, -1]}, "cannot read layers '0,-1': write them like 0-3,7"),
    ({"domains": ["law", "opera"]}, "no domain opera in .*: it has code, law, prose"),
    ({"phase": "training"}, "prefill and decode"),
    ({"phase": "decode"}, "no tokens of phase decode"),
    ({"top": -1}, "top is -1"),
]


def test_asking_for_what_is_not_there(tmp_path: Path):
    trace = made(tmp_path / "t")
    for asked, says in NOT_THERE:
        with pytest.raises(MoeInspectError, match=says):
            report(trace, **asked).tables["balance"]
    none = {"document": np.zeros(1), "status": "interrupted"}
    empty = write_trace(tmp_path / "e", [np.zeros((0, 2), np.uint16)], 4, **none)
    with pytest.raises(MoeInspectError, match="nothing is committed"):
        report(empty).tables["load"]


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
    notes = report(write_passes(tmp_path / "t", routers(1, 8, 2), passes)).notes()
    assert any("max_vio_batch covers 2 of 5 batches" in note for note in notes)
    assert not any("max_vio_batch" in x for x in report(tmp_path / "t", phase="decode").notes())


def test_ranks_of_a_distributed_run_add_up(tmp_path: Path):
    rng, loads = np.random.default_rng(0), []
    for rank in range(2):
        ids = uniform_ids(rng, 300, 8, 2)
        loads.append(np.bincount(ids.reshape(-1), minlength=8))
        one = a_pass(0, [ids], document=np.arange(300) // 30 + 10 * rank)
        write_passes(tmp_path / "t", routers(1, 8, 2), [one], rank=rank)
    found = report(tmp_path / "t")
    assert found.tables["load"]["assignments"].tolist() == (loads[0] + loads[1]).tolist()
    # batch 0 of either rank is a forward pass of its own
    assert found.counts.of[0].batches[300][0] == 2
    assert len(found.counts.units) == 20


def test_tokens_without_ids_leave_the_rest_of_the_report_alone(tmp_path: Path):
    found = report(made(tmp_path / "t", token_id=np.full(T, -1)))
    assert found.tables["vocabulary"].empty
    special = found.tables["specialization"]
    unknown = ["token_mi_bits", "vocabulary_specialization", "domain_mi_given_token_bits"]
    assert special[unknown].isna().all(axis=None)
    assert special["domain_mi_bits"].notna().all()
    assert any("no token id occurs 8 times" in note for note in found.notes())
    assert found.verdict()


def test_counts_only_gives_what_it_can_and_says_what_it_cannot(tmp_path: Path):
    loads = [np.array([[40, 20, 20, 0], [20, 20, 20, 20]]), np.full((2, 4), 20)]
    found = report(write_counts(tmp_path / "t", loads, 2, ["code", "law"]))
    balance, special = (found.tables.complete(x) for x in ("balance", "specialization"))
    assert balance["max_over_mean"].tolist() == [60 * 4 / 160, 1]
    assert balance["tokens"].tolist() == [80, 80]
    unknown = ["max_over_mean_low", "max_over_mean_high", "max_vio_batch", "design_effect"]
    assert balance[unknown].isna().all(axis=None)
    activation = found.tables["domains"].groupby(["router", "domain"])["activation"]
    assert activation.sum().tolist() == [2] * 4
    assert special["domain_mi_bits"][0] > special["domain_mi_bits"][1] == pytest.approx(0)
    unknown = ["domain_mi_null_bits", "token_mi_bits", "domain_mi_given_token_bits"]
    assert special[unknown].isna().all(axis=None)
    assert any("counts only" in note for note in found.notes())
    assert found.verdict()
    for asked in (lambda: found.tables["vocabulary"], lambda: report(found.trace, phase="decode")):
        with pytest.raises(MoeInspectError, match="counts only"):
            asked()
    one = report(found.trace, domains="code").tables["balance"]
    assert one["assignments"].tolist() == [80, 80]
    assert found.tables["load"]["first_choice"].sum() == 160
    listed = [{**of, "slot_order": "unknown"} for of in found.trace.manifest["routers"]]
    edit_manifest(found.trace.path, routers=listed)
    assert report(found.trace.path).tables["load"]["first_choice"].isna().all()


def test_memory_does_not_grow_with_documents(tmp_path: Path):
    counts = counted(made(tmp_path / "t", document=np.arange(T), domain_of_document=["a"]))
    assert counts.documents == T
    assert len(counts.units) == CLUSTERS


def test_token_ids_beyond_the_budget_are_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trace = made(tmp_path / "t", token_id=np.arange(T) % 90)
    all_ids = report(trace).tables["specialization"]
    assert not any("most frequent" in note for note in report(trace).notes())
    monkeypatch.setattr(token_ids, "CELLS", 64 * 8)
    few = report(trace, top=10**6)
    assert any("the 10 most frequent token ids" in note for note in few.notes())
    fewer, given_bits = few.tables["specialization"], "domain_mi_given_token_bits"
    assert (fewer[given_bits] != all_ids[given_bits]).all()
    for top, listed in ((10**6, 64), (0, 90)):  # all are listed if that is asked for
        assert report(trace, top=top).tables["vocabulary"]["token_id"].nunique() == listed
