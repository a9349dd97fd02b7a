"""Caches of experts and decode steps beside their tables: what is said, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_inspect.errors import MoeInspectError
from moe_inspect.simulate.cache import POLICIES, Cache, simulate_cache
from moe_inspect.simulate.decode import before, simulate_decode
from moe_inspect.simulate.routing import simulate_routing
from tests.conftest import ROOT
from tests.support.foreign import gguf_file
from tests.support.synthetic import routers, uniform_ids, write_passes, write_trace


def hits_so_far(ids_KT: np.ndarray, E: int, slots: int, name: str, cuts: int = 0) -> np.ndarray:
    """After each of so many parts of the stream, by default each decision."""
    cache, found = Cache(E, [slots], [name]), []
    for part in np.array_split(ids_KT, cuts or ids_KT.shape[1], axis=1):  # carried on
        cache.feed(np.ascontiguousarray(part), np.zeros(part.shape[1], np.uint8))
        found.append(cache.hits()[name, slots].sum())
    return np.array(found)


@pytest.mark.parametrize("name", POLICIES)
def test_an_expert_named_twice_is_requested_once(name: str):
    """The loops go by lists of distinct experts: they must not write beyond them."""
    ids_KT = np.random.default_rng(0).integers(0, 8, (4, 2_000)).astype(np.int16)
    again_KT = np.array([(ids_KT[:k] == ids_KT[k]).any(0) for k in range(4)])
    once_KT = np.where(again_KT, np.int16(-1), ids_KT)
    assert again_KT.sum() > 1_000
    hits, expected = (hits_so_far(ids, 8, 5, name, cuts=40) for ids in (ids_KT, once_KT))
    assert hits.tolist() == expected.tolist()


def test_a_hot_set_is_worth_caching_where_there_is_one(tmp_path: Path):
    ids, document = uniform_ids(np.random.default_rng(0), 6_000, 16, 2), np.arange(6_000) // 100
    trace = write_trace(tmp_path / "t", [ids], 16, document=document)
    assert simulate_cache(trace, slots=[4]).verdict[0].startswith("A hot set worth caching? No")
    assert simulate_cache(trace, slots=[16]).verdict[0].endswith("simulate fewer slots.")
    collapsed = simulate_cache(ROOT / "sample_traces/collapsed", slots=[4])
    assert collapsed.verdict[0].startswith("A hot set worth caching? Yes: in 4 of 4")


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


def test_a_trace_that_routes_nothing_is_told_so_and_one_without_tokens_is_refused(tmp_path: Path):
    nowhere = np.full((40, 2), np.iinfo(np.uint16).max, np.uint16)
    trace = write_trace(tmp_path / "nowhere", [nowhere], 8, document=np.arange(40) // 4)
    cached = simulate_cache(trace, slots=[4])
    said = "Simulated: no router made an assignment, so nothing could be cached."
    assert cached.verdict[1:] == [said]
    decoded = simulate_decode(trace, batches=[2])
    assert decoded.tables["decode"]["distinct_experts"].isna().all()
    assert decoded.chart is None
    assert simulate_routing(trace).tables["capacity_needed"].empty
    with pytest.raises(MoeInspectError, match="simulate decode makes no plan"):
        decoded.write_plan(tmp_path / "plan.json")
    empty = write_passes(tmp_path / "empty", routers(1, 8, 2), [])
    with pytest.raises(MoeInspectError, match="holds no tokens yet: nothing is committed"):
        simulate_decode(empty)


def test_decode_steps_are_of_the_phase_that_is_asked_for(tmp_path: Path):
    """By default of generated tokens, where there are any."""
    prompts, generated = np.zeros((40, 1), np.uint16), np.arange(40, dtype=np.uint16)[:, None] % 8
    document = np.concatenate([np.arange(40) // 10, np.arange(40) % 4])
    ids = np.concatenate([prompts, generated])
    how = {"batch_tokens": 40, "phases": ("prefill", "decode")}
    trace = write_trace(tmp_path / "t", [ids], 8, document=document, **how)
    steps = {p: simulate_decode(trace, batches=[4], phase=p) for p in (None, "decode")}
    read = {p: made.tables["decode"]["distinct_experts"].item() for p, made in steps.items()}
    assert read == {None: 4, "decode": 4}
    of_prompts = write_trace(tmp_path / "p", [prompts], 8)
    with pytest.raises(MoeInspectError, match="has no tokens in this selection"):
        simulate_decode(of_prompts, phase="decode")


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


def test_a_token_follows_the_one_at_the_position_before_it() -> None:
    sequence_T, position_T = np.array([0, 1, 0, 1, 0]), np.array([0, 0, 1, 2, 2])
    assert before(sequence_T, position_T).tolist() == [-1, -1, 0, -1, 2]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("same", "1.00x the weights of one without drafts, which pays from an acc"),
        ("disjoint", "4.00x the weights of one without drafts, which pays at no acc"),
        ("random", "(mean of 2,440 steps; if tokens chose independently: 5.5), 2.7"),
    ],
    ids=["same", "disjoint", "random"],
)
def test_drafts_of_tokens_that_choose_alike_cost_nothing_and_of_others_never_pay(
    kind: str, said: str, tmp_path: Path
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
    assert said in " ".join(made.verdict)


def test_steps_that_a_trace_has_too_few_tokens_for_are_named(tmp_path: Path) -> None:
    S, length, E = 16, 4, 64
    ids = uniform_ids(np.random.default_rng(0), S * length, E, 8).astype(np.uint16)
    document = np.repeat(np.arange(S), length)
    trace = write_trace(tmp_path / "t", [ids], E, document=document, batch_tokens=length)
    made = simulate_decode(trace, batches=[S, 4 * S], drafts=[1, 2, 4])
    text = " ".join(made.verdict)
    assert f"No step of {S} sequences with drafts of 4 tokens: too few" in text
    assert f"No step of {4 * S} sequences: the trace has too few" in text
    assert f"{4 * S} sequences with drafts" not in text
    assert "x the weights of one without drafts. " in text  # no advice: 64 tokens are too few
    assert "Best draft" not in text


def test_bytes_a_token(tmp_path: Path) -> None:
    config = {"hidden_size": 10, "moe_intermediate_size": 4}
    manifest = {"model": {"config": config}, "capture": {"weights": False, "dtype": "bfloat16"}}
    ids = uniform_ids(np.random.default_rng(0), 50, 4, 2)
    trace = write_trace(tmp_path / "t", [ids], 4, manifest=manifest)
    for expert_mb, expected in ((None, 2 * 3 * 10 * 4 * 2), (1.5, 3e6)):
        table = simulate_decode(trace, batches=[1], expert_mb=expert_mb).tables["decode"]
        assert table["bytes_per_token"].item() == expected
