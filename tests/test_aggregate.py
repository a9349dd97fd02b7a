"""The pass: every assignment counted once, whatever the shards, and what cannot be counted
refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_inspect.analysis.counting import token_ids
from moe_inspect.analysis.counting.counts import CLUSTERS
from moe_inspect.analysis.counting.engine import count_trace as count
from moe_inspect.analysis.counting.select import parse_layers, select
from moe_inspect.analysis.metrics.uncertainty import noise_floor
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.report import report
from moe_inspect.reporting.tables.load import design_effects
from moe_inspect.trace.schema import Router
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


def test_counts_are_those_of_counting_by_hand(tmp_path: Path):
    given_ = arguments(null=0.1)
    trace = write_trace(tmp_path / "t", **given_)
    counts = count(trace, select(trace))
    domain_T = np.array(given_["domain_of_document"])[given_["document"]]
    for r, ids_TK in enumerate(given_["ids"]):
        there = ids_TK != NOWHERE
        assert counts.load_E(r).tolist() == np.bincount(ids_TK[there], minlength=E).tolist()
        assert counts.of[r].null_slots == (~there).sum()
        assert counts.load_E(r).sum() == T * K - (~there).sum()
        sums_DE = counts.of[r].weight_sum_DE
        assert sums_DE is not None
        for d, domain in enumerate(counts.domains):
            mine = (domain_T == domain)[:, None] & there
            expected_E = np.bincount(ids_TK[mine], minlength=E)
            assert counts.assignments_DE(r)[d].tolist() == expected_E.tolist()
            # the writer keeps weights to fp16 precision
            expected_E = np.bincount(ids_TK[mine], given_["weights"][r][mine], E)
            np.testing.assert_allclose(sums_DE[d], expected_E, rtol=1e-3)
        heaviest = np.where(there, given_["weights"][r].astype(np.float16), -1).argmax(1)[:, None]
        first = np.take_along_axis(ids_TK, heaviest, 1)[there.any(1)]
        assert counts.first_choice_E(r).tolist() == np.bincount(first[:, 0], minlength=E).tolist()
        assert counts.weight_sum_E(r).tolist() == sums_DE.sum(0).tolist()
    assert counts.tokens_D.tolist() == [int((domain_T == d).sum()) for d in counts.domains]
    assert counts.token_ids_V.tolist() == np.bincount(given_["token_id"]).tolist()
    assert counts.documents == 40


def test_dead_experts_count_although_no_id_speaks_of_them(tmp_path: Path):
    trace = write_trace(tmp_path / "t", [np.array([[0, 1]] * 50, np.uint16)], 16)
    balance = report(trace).tables["balance"].iloc[0]
    assert balance["experts"] == 16
    assert balance["dead_experts"] == 14
    assert balance["max_over_mean"] == 8


def test_a_router_with_fewer_experts_and_slots_than_the_widest(tmp_path: Path):
    rng = np.random.default_rng(0)
    ids = [uniform_ids(rng, 400, 16, 4), uniform_ids(rng, 400, 4, 1)]
    trace = write_trace(tmp_path / "t", ids, [16, 4], layers=[3, 3])
    balance = report(trace).tables["balance"]
    assert balance["assignments"].tolist() == [1_600, 400]
    assert balance["layer"].tolist() == [3, 3]
    assert balance["router"].tolist() == [0, 1]
    assert len(report(trace).tables["load"]) == 20


@given(st.integers(250, 3_000), st.permutations(range(12)))
@settings(max_examples=6, deadline=None)
def test_shards_and_their_order_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, shard_tokens: int, order: list[int]
):
    root = tmp_path_factory.mktemp("traces")
    given_ = arguments(null=0.05)
    whole = write_trace(root / "whole", **given_ | {"shard_tokens": T})
    cut = {"shard_tokens": shard_tokens, "batch_order": order}
    split = write_trace(root / "split", **given_ | cut)
    same(count(whole, select(whole)), count(split, select(split)))
    a, b = report(whole).tables, report(split).tables
    for name in ("load", "domains", "balance", "vocabulary"):
        pd.testing.assert_frame_equal(a[name], b[name], check_exact=False, rtol=1e-6)
    by_chance = ("token_null_bits", "token_mi_null_bits", "specialization_null", "_p")
    known = [name for name in a["specialization"] if not name.endswith(by_chance)]
    mine, other = (of["specialization"][known] for of in (a, b))
    pd.testing.assert_frame_equal(mine, other, check_exact=False, rtol=0.3)


def test_renumbering_experts_renumbers_the_load_and_nothing_else(tmp_path: Path):
    given_ = arguments()
    order = np.random.default_rng(1).permutation(E)
    plain = report(write_trace(tmp_path / "a", **given_)).tables
    given_ |= {"ids": [order[i].astype(np.uint16) for i in given_["ids"]]}
    turned = report(write_trace(tmp_path / "b", **given_)).tables
    metrics = plain["balance"].drop(columns=["busiest_expert"])
    pd.testing.assert_frame_equal(metrics, turned["balance"].drop(columns=["busiest_expert"]))
    pd.testing.assert_frame_equal(plain["specialization"], turned["specialization"])
    before, after = (
        of["load"].pivot(index="router", columns="expert", values="assignments").to_numpy()
        for of in (plain, turned)
    )
    assert (after[:, order] == before).all()


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


def test_batches_have_a_floor_of_their_own_and_a_remnant_is_left_out(tmp_path: Path):
    rng = np.random.default_rng(0)
    ids = uniform_ids(rng, 4_100, 16, 2)
    ids[4_000:] = [0, 1]  # a last batch of 100: max_vio 7 in it
    trace = write_trace(tmp_path / "t", [ids], 16, batch_tokens=400)
    row = report(trace).tables["balance"].iloc[0]
    load_BE = [np.bincount(of.ravel(), minlength=16) for of in ids[:4_000].reshape(10, 400, 2)]
    by_hand = [load_E.max() * 16 / 800 - 1 for load_E in load_BE]
    assert row["max_vio_batch"] == pytest.approx(np.mean(by_hand))
    assert row["noise_floor_batch"] == pytest.approx(noise_floor(400, 16, 2), rel=0.05)
    assert row["max_vio_batch"] == pytest.approx(row["noise_floor_batch"], rel=0.15)
    ids[:400] = [0, 1]  # positive control: a whole batch is not left out
    control = report(write_trace(tmp_path / "c", [ids], 16, batch_tokens=400)).tables["balance"]
    assert control["max_vio_batch"].iloc[0] > row["max_vio_batch"] + 0.5


def test_decode_steps_beside_prompts_are_left_out_of_the_batches_and_that_is_said(tmp_path: Path):
    rng = np.random.default_rng(0)
    passes = [
        a_pass(b, [uniform_ids(rng, T, 8, 2)], phase="prefill" if T == 200 else "decode")
        for b, T in enumerate([200, 200, 4, 4, 4])
    ]
    made = report(write_passes(tmp_path / "t", routers(1, 8, 2), passes))
    assert any("max_vio_batch covers 2 of 5 batches" in note for note in made.notes())
    decode = report(tmp_path / "t", phase="decode")
    for of, T in ((made, 200), (decode, 4)):
        floor = of.tables["balance"]["noise_floor_batch"].iloc[0]
        assert floor == pytest.approx(noise_floor(T, 8, 2), rel=0.05)
    assert not any("max_vio_batch" in note for note in decode.notes())


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


def test_disjoint_domains_hide_from_the_pooled_load(tmp_path: Path):
    rng = np.random.default_rng(6)
    domain_T = (np.arange(T) // 75) % 2
    ids = (uniform_ids(rng, T, 4, 2) + 4 * domain_T[:, None]).astype(np.uint16)
    of = {"document": np.arange(T) // 75, "domain_of_document": ["a", "b"]}
    tables = report(write_trace(tmp_path / "t", [ids], 8, **of)).tables
    assert tables["balance"]["max_over_mean"].iloc[0] < 1.1
    bits = tables["specialization"][["domain_mi_bits", "jsd_bits"]].iloc[0]
    assert bits.tolist() == pytest.approx([1, 1])
    rows = tables["domains"]
    assert rows.groupby("domain")["assignments"].apply(lambda a: a.max() / a.mean()).min() >= 2
    assert rows.groupby("domain")["activation"].sum().tolist() == [2, 2]  # sums to k
    assert rows["lift"].max() == pytest.approx(2)


def test_counts_only_gives_what_it_can_and_says_what_it_cannot(tmp_path: Path):
    loads = [np.array([[40, 20, 20, 0], [20, 20, 20, 20]]), np.full((2, 4), 20)]
    made = report(write_counts(tmp_path / "t", loads, 2, ["code", "law"]))
    balance = made.tables["balance"]
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


def test_an_interval_ends_where_every_token_goes_to_the_expert(tmp_path: Path):
    rng = np.random.default_rng(1)
    ids = uniform_ids(rng, 200, 8, 2)
    ids[:150] = [0, 1]
    trace = write_trace(tmp_path / "t", [ids], 8, document=np.arange(200) // 25)
    row = report(trace).tables["balance"].iloc[0]
    assert row["max_over_mean"] < row["max_over_mean_high"] == 4


def test_domains_of_counts_are_no_documents(tmp_path: Path):
    rng = np.random.default_rng(0)
    loads = [rng.integers(100, 1_000, (6, 8)) for _ in range(2)]
    data = report(write_counts(tmp_path / "t", loads, 1, [f"d{d}" for d in range(6)]))
    assert [bool(np.isnan(effect)) for effect in design_effects(data).values()] == [True, True]


def test_counts_only_and_decisions_agree(tmp_path: Path):
    given_ = arguments()
    routed = report(write_trace(tmp_path / "a", **given_))
    loads = [routed.counts.assignments_DE(r) for r in range(2)]
    counted = report(write_counts(tmp_path / "b", loads, K, routed.counts.domains))
    columns = ["layer", "router", "domain", "expert", "assignments"]
    a, b = (made.tables["domains"][columns] for made in (routed, counted))
    pd.testing.assert_frame_equal(a, b)


def test_memory_does_not_grow_with_documents(tmp_path: Path):
    rng = np.random.default_rng(0)
    trace = write_trace(tmp_path / "t", [uniform_ids(rng, T, E, K)], E, document=np.arange(T))
    counts = count(trace, select(trace))
    assert counts.documents == T
    assert len(counts.units) == CLUSTERS
    assert report(trace).tables["balance"]["design_effect"].iloc[0] == pytest.approx(1, abs=0.3)


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


def test_slots_that_routed_nowhere_raise_the_floor_of_windows_and_leave_no_pass_behind(
    tmp_path: Path,
):
    rng = np.random.default_rng(3)
    ids = uniform_ids(rng, 20_000, 16, 2)
    ids[rng.random(ids.shape) < 0.8] = NOWHERE
    ids[:500] = NOWHERE  # a whole forward pass
    of = {"document": np.arange(20_000) // 400, "batch_tokens": 500}
    made = report(write_trace(tmp_path / "t", [ids], 16, **of), window=500)
    mean, row = made.tables["windows"].mean(numeric_only=True), made.tables["balance"].iloc[0]
    by_chance = mean["expected_by_chance"] - 1
    assert mean["max_over_mean"] - 1 == pytest.approx(by_chance, rel=0.1)
    assert mean["total_variation"] == pytest.approx(mean["total_variation_floor"], rel=0.15)
    assert made.counts.of[0].batches == {500: (39, pytest.approx(39 * row["max_vio_batch"]))}


def test_all_token_ids_are_all(tmp_path: Path, room: Callable[[int], None]):
    """More than those that have room by default."""
    rng, V = np.random.default_rng(0), 700
    ids = [uniform_ids(rng, 10 * V, 8, 2)]
    trace = write_trace(tmp_path / "t", ids, 8, token_id=np.arange(10 * V) % V)
    room(64 * 8)
    assert report(trace, top=10**6).tables["vocabulary"]["token_id"].nunique() == 64
    assert report(trace, top=0).tables["vocabulary"]["token_id"].nunique() == V
