"""Caches of experts: hits against naive implementations. Distinct experts of a decode step: the
baselines' known values, and a brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_inspect.errors import MoeInspectError
from moe_inspect.simulate.cache import POLICIES, Cache, simulate_cache
from moe_inspect.simulate.decode import DecodeSteps, before, independent, simulate_decode
from tests.conftest import ROOT
from tests.support.foreign import gguf_file
from tests.support.sweep import WHOLE
from tests.support.synthetic import uniform_ids, write_trace

Stream = tuple[np.ndarray, int, int]  # ids_KT, E, slots


@st.composite
def streams(draw: st.DrawFn, most_experts: int, most_tokens: int) -> Stream:
    E = draw(st.integers(1, most_experts))
    K, T = draw(st.integers(1, min(E, 3))), draw(st.integers(1, most_tokens))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    taste_E = np.log(rng.random(E) ** draw(st.sampled_from([0, 3])) + 1e-9)
    order_TE = np.argsort(-(taste_E + rng.gumbel(size=(T, E))), axis=1).astype(np.int16)
    ids_KT = np.ascontiguousarray(order_TE[:, :K].T)
    ids_KT[rng.random((K, T)) < draw(st.sampled_from([0, 0.2]))] = -1
    return ids_KT, E, draw(st.integers(K, E))


def naive(name: str, ids_KT: np.ndarray, slots: int) -> int:
    """Hits; of the experts that a decision does not want the one with the least key goes first."""
    rows = [[e for e in row if e >= 0] for row in ids_KT.T.tolist()]
    held, past, hits = set[int](), list[int](), 0
    for t, wanted in enumerate(rows):
        hits += len(held.intersection(wanted))
        past += wanted
        held.update(wanted)
        used = {e: past[::-1].index(e) for e in held}  # how long ago
        again = {e: next((n for n, r in enumerate(rows[t + 1 :]) if e in r), 2**62) for e in held}
        first_out = {
            e: {"lru": [-used[e]], "lfu": [past.count(e), -used[e]], "belady": [-again[e]]}[name]
            for e in held.difference(wanted)
        }
        out = sorted(first_out, key=first_out.__getitem__)
        held.difference_update(out[: max(0, len(held) - slots)])
    return hits


def hits_so_far(ids_KT: np.ndarray, E: int, slots: int, name: str, cuts: int = 0) -> np.ndarray:
    """After each of so many parts of the stream, by default each decision."""
    cache, found = Cache(E, [slots], [name]), []
    for part in np.array_split(ids_KT, cuts or ids_KT.shape[1], axis=1):  # carried on
        cache.feed(np.ascontiguousarray(part), np.zeros(part.shape[1], np.uint8))
        found.append(cache.hits()[name, slots].sum())
    return np.array(found)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=120 if WHOLE else 60, deadline=None)
@given(case=streams(most_experts=6, most_tokens=40))
def test_hits_equal_a_naive_implementation(name: str, case: Stream):
    ids_KT, E, slots = case
    assert hits_so_far(ids_KT, E, slots, name, cuts=3)[-1] == naive(name, ids_KT, slots)


@settings(max_examples=100 if WHOLE else 40, deadline=None)
@given(case=streams(most_experts=30, most_tokens=200))
def test_belady_hits_at_least_as_often_as_any_policy(case: Stream):
    ids_KT, E, slots = case
    hits = {name: hits_so_far(ids_KT, E, slots, name) for name in POLICIES}
    for name in POLICIES:
        # at every moment, not only in the end
        assert (hits["belady"] >= hits[name]).all()
        assert hits_so_far(ids_KT, E, slots, name, cuts=3)[-1] == hits[name][-1]


@pytest.mark.parametrize("name", POLICIES)
def test_an_expert_named_twice_is_requested_once_and_over_256_are_told_apart(name: str):
    """The loops go by lists of distinct experts: they must not write beyond them."""
    ids_KT = np.random.default_rng(0).integers(0, 8, (4, 2_000)).astype(np.int16)
    again_KT = np.array([(ids_KT[:k] == ids_KT[k]).any(0) for k in range(4)])
    once_KT = np.where(again_KT, np.int16(-1), ids_KT)
    assert again_KT.sum() > 1_000
    hits, expected = (hits_so_far(ids, 8, 5, name) for ids in (ids_KT, once_KT))
    assert hits.tolist() == expected.tolist()
    ids_KT = uniform_ids(np.random.default_rng(1), 400, 300, 4).astype(np.int16).T.copy()
    assert hits_so_far(ids_KT, 300, 200, name, cuts=3)[-1] == naive(name, ids_KT, 200) > 0


def test_uniform_routing_hits_as_often_as_slots_are_of_experts(tmp_path: Path):
    ids, document = uniform_ids(np.random.default_rng(0), 6_000, 16, 2), np.arange(6_000) // 100
    trace = write_trace(tmp_path / "t", [ids], 16, document=document)
    table = simulate_cache(trace, slots=[4, 8, 16], policies=["lru"]).tables["cache"]
    assert table["hit_rate"].tolist() == pytest.approx([0.25, 0.5, 1 - 16 / 12_000], abs=0.015)
    assert table["even_share"].tolist() == [0.25, 0.5, 1.0]
    assert table["hit_rate_warm"].iloc[2] == 1.0
    assert simulate_cache(trace, slots=[4]).verdict[0].startswith("A hot set worth caching? No")
    assert simulate_cache(trace, slots=[16]).verdict[0].endswith("simulate fewer slots.")
    collapsed = simulate_cache(ROOT / "sample_traces/collapsed", slots=[4])
    assert collapsed.verdict[0].startswith("A hot set worth caching? Yes: in 4 of 4")


def test_sequences_run_one_after_the_other_and_phases_are_told_apart(tmp_path: Path):
    # two sequences decoded side by side: 0 1 | 0 1 | 0 1; alone, each asks for its own expert time
    # and again
    ids = np.array([[0], [1], [0], [1], [0], [1]], np.uint16)
    phases, document = ("prefill", "decode", "decode"), np.array([0, 1] * 3)
    trace = write_trace(tmp_path / "t", [ids], 4, batch_tokens=2, document=document, phases=phases)
    made = simulate_cache(trace, slots=[1], policies=["lru"])
    row = made.tables["cache"].iloc[0]
    columns = ["hits", "accesses", "cold_misses", "hit_rate_warm"]
    assert row[columns].tolist() == [4, 6, 2, 1.0]
    rates = made.tables["cache_by_phase"].set_index("phase")["hit_rate"]
    assert rates.to_dict() == {"prefill": 0.0, "decode": 1.0}


def test_tokens_a_second_are_what_the_link_allows(tmp_path: Path):
    ids = np.array([0, 1] * 500, np.uint16)[:, None]
    trace = write_trace(tmp_path / "t", [ids, ids], 2)
    speed = simulate_cache(trace, slots=[1], policies=["lru"], expert_mb=100, gb_per_s=10)
    row = speed.tables["cache_speed"].iloc[0]
    assert row["transfers_per_token"] == 2  # one a layer, each time
    assert (row["mb_per_token"], row["tokens_per_s"], row["held_gb"]) == (200, 50, 0.2)


def test_experts_are_of_the_size_that_a_gguf_has_them_in(tmp_path: Path):
    """Layer 0 in Q4_K (144 bytes for 256 weights), layer 1 in Q8_0 (34 for 32) with a bias."""
    first = {
        "blk.0.ffn_up_exps.weight": (12, (256, 4, 2), bytes(8 * 144)),
        "blk.0.ffn_gate_exps.weight": (12, (256, 4, 2), bytes(8 * 144)),
    }
    second = {
        "blk.1.ffn_down_exps.weight": (8, (32, 10, 2), bytes(20 * 34)),
        "blk.1.ffn_down_exps.bias": (0, (10, 2), bytes(80)),
        "blk.1.attn_q.weight": (0, (4, 4), bytes(64)),
    }
    fields = {"general.architecture": "qwen3moe"}
    for n, tensors in ((1, first), (2, second)):
        gguf_file(tmp_path / f"m-0000{n}-of-00002.gguf", fields, tensors)
    ids = np.array([0, 1] * 500, np.uint16)[:, None]
    trace = write_trace(tmp_path / "t", [ids, ids], 2)
    options = {"slots": [1], "policies": ["lru"], "gb_per_s": 1}
    part = tmp_path / "m-00001-of-00002.gguf"
    row = simulate_cache(trace, gguf=part, **options).tables["cache_speed"].iloc[0]
    size = 2 * 4 * 144 + 10 * 34 + 40
    assert row[["mb_per_token", "held_gb"]].tolist() == pytest.approx([size / 1e6, size / 1e9])
    gguf_file(part, fields, {"blk.0.ffn_up_exps.weight": (12, (256, 4, 3), bytes(12 * 144))})
    with pytest.raises(MoeInspectError, match=r"3 experts in layer 0, the trace 2 \(router 0\)"):
        simulate_cache(trace, gguf=part, **options)
    part.with_name("m-00002-of-00002.gguf").unlink()
    with pytest.raises(MoeInspectError, match=r"no m-00002-of-00002\.gguf"):
        simulate_cache(trace, gguf=part, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"slots": [1, 4]}, "1 slot holds less than one decision of layer 0: give at least 2"),
        ({"slots": 0}, "0 slots hold less than one decision of layer 0"),
        ({"slots": []}, "slots is empty"),
        ({"policies": ["fifo"]}, "no policy fifo: there are lru, lfu, belady"),
        ({"expert_mb": 10}, r"give --expert-mb \(or --gguf\) and --gb-per-s"),
        ({"expert_mb": 10, "gguf": "a.gguf", "gb_per_s": 1}, "--gguf exclude each other: give one"),
        ({"gguf": "a.gguf", "gb_per_s": 1}, r"no file a\.gguf"),
    ],
)
def test_what_cannot_be_simulated_is_a_one_line_error(options: dict[str, Any], said: str):
    with pytest.raises(MoeInspectError, match=said):
        simulate_cache(ROOT / "sample_traces/balanced", **options)


UNIFORM = [(8, 2, 7.20, 8.00), (64, 8, 42.0, 63.1), (128, 8, 51.6, 111.8), (256, 8, 57.4, 163.3)]


@pytest.mark.parametrize(("E", "k", "of_8", "of_32"), UNIFORM)
def test_uniform_routing_formula(E: int, k: int, of_8: float, of_32: float, tmp_path: Path) -> None:
    assert independent(E, k, 8) == pytest.approx(of_8, abs=0.06)
    assert independent(E, k, 32) == pytest.approx(of_32, abs=0.06)
    ids = uniform_ids(np.random.default_rng(0), 64 * 240, E, k)
    document = np.repeat(np.arange(64), 240)
    trace = write_trace(tmp_path / "t", [ids], E, document=document, batch_tokens=240)
    table = simulate_decode(trace, batches=[8, 32]).tables["decode"]
    found = table.set_index("batch")["distinct_experts"]
    assert found[8] == pytest.approx(of_8, rel=0.01)
    assert found[32] == pytest.approx(of_32, rel=0.01)


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 4), st.sampled_from([6, 70]))
@settings(max_examples=60 if WHOLE else 30, deadline=None)
def test_steps_equal_a_brute_force_in_any_parts(seed: int, batch: int, parts: int, E: int) -> None:
    """Four sequences in random turns, with gaps. Tokens in a row are those of one part."""
    rng = np.random.default_rng(seed)
    sequence_T = rng.integers(0, 4, rng.integers(10, 90))
    position_T = np.array([(sequence_T[:t] == s).sum() for t, s in enumerate(sequence_T)])
    kept_T = rng.random(len(sequence_T)) < 0.9
    sequence_T, position_T, T, k = sequence_T[kept_T], position_T[kept_T], int(kept_T.sum()), 2
    ids_KT = uniform_ids(rng, T, E, k).astype(np.int16).T.copy()
    ids_KT[rng.random((k, T)) < 0.1] = -1
    of, part_T = DecodeSteps(E, [1, batch], [1, 3]), np.zeros(T, int)
    for n, part in enumerate(np.array_split(np.arange(T), parts)):
        part_T[part] = n
        before_T = before(sequence_T[part], position_T[part])
        of.add(np.ascontiguousarray(ids_KT[:, part]), position_T[part], before_T)
    place = {of_t: t for t, of_t in enumerate(zip(part_T, sequence_T, position_T, strict=True))}

    def brute_force(draft: int, least: int) -> tuple[int, int]:
        steps = distinct = 0
        for p in range(least, 90):
            windows = [
                {int(e) for at in window for e in ids_KT[:, at]} - {-1}
                for (n, s, q) in place
                if q == p
                and None not in (window := [place.get((n, s, p - i)) for i in range(draft + 1)])
            ]
            for start in range(0, len(windows) - batch + 1, batch):
                steps += 1
                distinct += len(set.union(*windows[start : start + batch]))
        return steps, distinct

    for n, draft in enumerate((0, 1, 3)):
        found = (
            sum_2NBG[:, n, 1].sum(1).tolist() for sum_2NBG in (of.steps_2NBG, of.distinct_2NBG)
        )
        without = brute_force(0, draft) if draft else (0, 0)
        assert list(zip(*found, strict=True)) == [without, brute_force(draft, 0)]


@pytest.mark.parametrize(
    ("kind", "cost", "pays", "said"),
    [
        ("same", 1.0, 0.0, "1.00x the weights of one without drafts, which pays from an acc"),
        ("disjoint", 4.0, np.nan, "4.00x the weights of one without drafts, which pays at no acc"),
        ("random", None, None, "(mean of 2,440 steps; if tokens chose independently: 5.5), 2.7"),
    ],
    ids=["same", "disjoint", "random"],
)
def test_drafts_of_tokens_that_choose_alike_cost_nothing_and_of_others_never_pay(
    kind: str, cost: float | None, pays: float | None, said: str, tmp_path: Path
) -> None:
    S, length, E, k = 40, 64, 8, 2
    ids = {
        "same": np.tile(np.array([[0, 5]]), (S * length, 1)),
        "disjoint": np.arange(S * length * k).reshape(-1, k) % E,  # of 4 tokens in a row
        "random": uniform_ids(np.random.default_rng(0), S * length, E, k),
    }[kind].astype(np.uint16)
    document = np.repeat(np.arange(S), length)
    trace = write_trace(tmp_path / "t", [ids], E, document=document, batch_tokens=length)
    made = simulate_decode(trace, batches=[1], drafts=[3])
    table = made.tables["speculation"].query("draft == 3")
    gained = [1 + a + a**2 + a**3 for a in (0.5, 0.7, 0.9)]
    assert table["tokens_per_step"].tolist() == pytest.approx(gained)
    assert (table["steps"] == S * (length - 3)).all()
    if cost is None:  # as many as independent tokens read
        cost = E * (1 - 0.75**4) / k
        assert table["relative_cost"].tolist() == pytest.approx([cost] * 3, rel=0.01)
        (least,) = table["break_even"].unique()
        measured = table["relative_cost"].iloc[0]
        assert (1 - least**4) / (1 - least) == pytest.approx(measured, abs=1e-4)
    else:
        assert table["relative_cost"].tolist() == pytest.approx([cost] * 3)
        assert table["break_even"].tolist() == pytest.approx([pays] * 3, nan_ok=True)
    assert table["speedup"].tolist() == pytest.approx(np.array(gained) / cost, rel=0.01)
    for _, of in made.tables["speculation"].groupby("acceptance"):
        assert of["draft"][of["best"]].tolist() == [of["draft"][of["speedup"].idxmax()]]
    assert said in " ".join(made.verdict)


def test_a_step_with_drafts_is_compared_with_one_at_the_same_positions(tmp_path: Path) -> None:
    """All sequences begin with the same token, whose experts say nothing of the other steps."""
    S, length, E = 16, 4, 64
    ids = uniform_ids(np.random.default_rng(0), S * length, E, 8).astype(np.uint16)
    ids[::length] = ids[0]
    document = np.repeat(np.arange(S), length)
    trace = write_trace(tmp_path / "t", [ids], E, document=document, batch_tokens=length)
    made = simulate_decode(trace, batches=[S, 4 * S], drafts=[1, 2, 4])
    of = made.tables["speculation"].query("acceptance == 0.5 and batch == @S").set_index("draft")
    sets = [[set(ids[length * s + p].tolist()) for s in range(S)] for p in range(length)]
    reads = [len(set.union(*of_p)) for of_p in sets]
    both = [len(set.union(*sets[p], *sets[p - 1])) for p in range(1, length)]
    assert of["relative_cost"][1] == pytest.approx(sum(both) / sum(reads[1:]))
    assert of["steps"].tolist() == [4, 3, 2, 0]
    for name in ("distinct_experts", "relative_cost", "speedup"):
        assert of[name].isna().tolist() == [False, False, False, True]
    assert of["break_even"].isna().tolist() == [True, False, False, True]
    assert not of["best"][4]
    text = " ".join(made.verdict)
    assert f"No step of {S} sequences with drafts of 4 tokens: too few" in text
    assert f"No step of {4 * S} sequences: the trace has too few" in text
    assert f"{4 * S} sequences with drafts" not in text
    assert "x the weights of one without drafts. " in text  # no advice: 64 tokens are too few
    assert "Best draft" not in text


@pytest.mark.parametrize("alike", [False, True])
def test_the_interval_of_a_step_covers_other_documents(alike: bool, tmp_path: Path) -> None:
    """Of 100 samples of documents that prefer experts of their own, and of tokens all alike."""
    rng, samples, document = np.random.default_rng(0), [], np.repeat(np.arange(40), 10)
    for _ in range(100):
        preferred_SE = rng.normal(0, 0 if alike else 1, (40, 16))
        score_TE = preferred_SE[document] + rng.gumbel(size=(400, 16))
        samples.append(np.argsort(-score_TE, 1)[:, :2].astype(np.uint16))
    trace = write_trace(tmp_path / "t", samples, 16, document=document, batch_tokens=10)
    table = simulate_decode(trace, batches=[4, 16]).tables["decode"]
    of_4, of_16 = (rows for _, rows in table.groupby("batch"))
    mean = of_4["distinct_experts"].mean()
    covered = of_4["distinct_experts_low"].le(mean) & of_4["distinct_experts_high"].ge(mean)
    width = (of_4["distinct_experts_high"] - of_4["distinct_experts_low"]).mean()
    assert 0.88 <= covered.mean() <= 0.99
    assert 3 < width / of_4["distinct_experts"].std() < 6
    assert of_16["distinct_experts_low"].isna().all(), "of 2 groups of sequences"


def test_bytes_a_token(tmp_path: Path) -> None:
    config = {"hidden_size": 10, "moe_intermediate_size": 4}
    manifest = {"model": {"config": config}, "capture": {"weights": False, "dtype": "bfloat16"}}
    ids = uniform_ids(np.random.default_rng(0), 50, 4, 2)
    trace = write_trace(tmp_path / "t", [ids], 4, manifest=manifest)
    for expert_mb, expected in ((None, 2 * 3 * 10 * 4 * 2), (1.5, 3e6)):
        table = simulate_decode(trace, batches=[1], expert_mb=expert_mb).tables["decode"]
        assert table["bytes_per_token"].item() == expected
