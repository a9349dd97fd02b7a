"""Slot 0 holds the first choice wherever anything says which expert that is; elsewhere what needs a
first choice is null."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_inspect.errors import MoeInspectError
from moe_inspect.exporters.run import export_trace
from moe_inspect.making import import_trace
from moe_inspect.public import Trace, open_trace, report
from moe_inspect.reporting.render.page import report_page
from moe_inspect.simulate.routing import simulate_routing
from moe_inspect.trace.schema import Router, descending_slots
from moe_inspect.trace.verify import verify
from moe_inspect.trace.writer import Document, ResumePoint, TraceWriter
from tests.support.damage import edit_manifest
from tests.support.planted import sentences
from tests.support.synthetic import a_pass, uniform_ids, write_counts, write_passes, write_trace

E, K, T = 8, 4, 600
Pair = tuple[Trace, Trace]  # first choices are known, and not
NOWHERE = 65_535


def drawn(seed: int = 0, null: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids, weights, logits of T decisions, slots in any order; some weights are equal."""
    rng = np.random.default_rng(seed)
    ids_TK = uniform_ids(rng, T, E, K)
    weights_TK = (rng.integers(1, 40, (T, K)) / 64).astype(np.float16)
    logits_TE = rng.normal(size=(T, E)).astype(np.float16)
    ids_TK[rng.random((T, K)) < null] = NOWHERE
    return ids_TK, weights_TK, logits_TE


def by_hand(ids_TK: np.ndarray, key_TK: np.ndarray) -> np.ndarray:
    """float [T, K]: each decision's experts by descending key; NaN, last, for routed nowhere."""
    key_TK = np.where(ids_TK == NOWHERE, -np.inf, key_TK)
    rows = [sorted(range(K), key=lambda j, key=key: -key[j]) for key in key_TK.tolist()]
    return np.where(ids_TK == NOWHERE, np.nan, ids_TK)[np.arange(len(ids_TK))[:, None], rows]


def written(
    root: Path, ids: np.ndarray, key: Any, keep: str = "weights", known: str = "", **options: Any
) -> Trace:
    """Two batches in two shards, of one router; `keep`: what the trace keeps."""
    passes, row = [], np.arange(300, dtype=np.int32)
    for b, part in enumerate((slice(300), slice(300, T))):
        given: Any = {"weights": [key[part]]}
        if keep == "logits":
            given = {"extras": {"logits": [key[part]]}}
        given |= {"documents": [Document(b, "text", "made", 300)], "document": row * 0 + b}
        passes.append(a_pass(b, [ids[part]], 300, token_id=row % 20, **given))
    listed = [Router(3, "gate", "layers.3", E, K, slot_order=known)]
    kept = {"weights": keep == "weights", "logits": keep == "logits"}
    return write_passes(root, listed, passes, shard_tokens=400, **kept, **options)


def experts_of(trace: Trace) -> np.ndarray:
    return trace.routing().filter(like="expert_").to_numpy(float)


@pytest.mark.parametrize("null", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["float16", "bfloat16", "weights not kept", "logits"])
def test_slots_are_written_in_descending_weight(kind: str, null: float, tmp_path: Path) -> None:
    ids, weights, logits = drawn(null=null)
    bits = (weights.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    kept: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
        "float16": (weights, {}),
        "bfloat16": (bits, {}),
        "weights not kept": (weights, {"keep": "nothing", "known": "weight"}),
        "logits": (logits, {"keep": "logits"}),
    }
    given, how = kept[kind]
    trace, key = written(tmp_path / "t", ids, given, **how), weights
    if kind == "logits":
        key = np.take_along_axis(logits, np.where(ids == NOWHERE, 0, ids).astype(int), 1)
    assert trace.manifest["routers"][0]["slot_order"] == "weight"
    assert np.array_equal(experts_of(trace), by_hand(ids, key), equal_nan=True)
    as_given = np.where(ids == NOWHERE, np.nan, ids)
    assert not np.array_equal(experts_of(trace), as_given, equal_nan=True)
    if trace.has_weights:
        for at in (0, 299, 300, T - 1):  # every expert keeps its own weight
            row = trace.routing().iloc[at]
            pairs = {(row[f"expert_{j}"], row[f"weight_{j}"]) for j in range(K)}
            mine = zip(ids[at].tolist(), weights[at].tolist(), strict=True)
            assert {p for p in pairs if p[0] == p[0]} == {p for p in mine if p[0] != NOWHERE}
    assert verify(trace.path).ok


def test_what_is_in_order_is_left_alone() -> None:
    weights_KT = -np.sort(-np.random.default_rng(0).random((K, T)), axis=0)
    assert descending_slots(weights_KT) is None
    weights_KT[[0, 1], 7] = weights_KT[[1, 0], 7]
    expected_KT = np.tile(np.arange(K)[:, None], T)
    expected_KT[:2, 7] = 1, 0
    assert (descending_slots(weights_KT) == expected_KT).all()


def without_slot_order(trace: Trace) -> Trace:
    """The trace as it was written before manifests stated the order of slots."""
    listed = trace.manifest["routers"]
    routers = [{k: v for k, v in router.items() if k != "slot_order"} for router in listed]
    edit_manifest(trace.path, routers=routers)
    return open_trace(trace.path)


def older(root: Path, ids: np.ndarray, weights: np.ndarray) -> Trace:
    """A trace of the format as it was: the manifest does not state the order of slots."""
    as_it_was = ResumePoint(slot_orders={0: ""})
    return without_slot_order(written(root, ids, weights, resume=as_it_was))


@pytest.mark.parametrize("null", [0.0, 0.2])
def test_older_traces_with_weights_are_put_in_order_while_read(null: float, tmp_path: Path) -> None:
    ids, weights, _ = drawn(null=null)
    old, new = older(tmp_path / "old", ids, weights), written(tmp_path / "new", ids, weights)
    raw = next(old.shards).table("routing", ["expert_0"])["expert_0"].to_numpy()
    # on disk they are not
    assert np.array_equal(raw, np.where(ids == NOWHERE, np.nan, ids)[:300, 0], equal_nan=True)
    assert old.routing().equals(new.routing())
    for a, b in zip(old.shards, new.shards, strict=True):
        assert np.array_equal(a.ids(0), b.ids(0))
        assert np.array_equal(a.weights(0), b.weights(0))
        assert a.routing(0, ["token", "expert_0"]).equals(b.routing(0, ["token", "expert_0"]))
    assert report(old).tables["load"].equals(report(new).tables["load"])
    assert verify(old.path).ok
    # resumed, its new shards are not said to be in an order that the old ones are not in
    resume = ResumePoint(slot_orders={0: ""})
    with TraceWriter(old.path, {"model": {"id": "made"}}, old.stated_routers, resume=resume):
        pass
    assert open_trace(old.path).manifest["routers"][0]["slot_order"] == ""


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The same decisions, which follow the token id, with first choices known and not."""
    rng = np.random.default_rng(1)
    token_id = rng.integers(0, 12, 2_000)
    of_token = token_id[:, None] + np.arange(K) * 2
    ids = [((of_token + r) % E).astype(np.uint16) for r in range(3)]
    options: dict[str, Any] = {"document": np.repeat(np.arange(40), 50), "words": 12}
    options |= {"domain_of_document": ("a", "b"), "token_id": token_id}
    known, unknown = (
        write_trace(tmp_path_factory.mktemp("t") / order, ids, E, slot_order=order, **options)
        for order in ("weight", "unknown")
    )
    return known, unknown


def test_the_verdict_is_silent_about_it_and_one_line_says_why(both: Pair, capsys: Any) -> None:
    known, unknown = (report(trace) for trace in both)
    assert [s for s in sentences(known) if "first choice" in s]
    assert not [s for s in sentences(unknown) if "first choice" in s]
    assert sum("first choices are unknown" in note for note in unknown.notes()) == 1
    assert not any("first choices" in note for note in known.notes())
    assert "repetition: first choices are unknown" in report_page(unknown)


def test_capacity_serves_first_choices_first_only_where_it_knows_them(both: Pair) -> None:
    known, unknown = both
    assert simulate_routing(known).settings["order"] == "arrival"
    found = simulate_routing(unknown)
    assert found.settings["order"] == "token"
    by_token = simulate_routing(known, order="token")
    assert found.tables["capacity"].equals(by_token.tables["capacity"])
    with pytest.raises(MoeInspectError, match="does not record: use order token"):
        simulate_routing(unknown, order="arrival")


def test_exported_counts_have_first_choices_only_where_known(both: Pair, tmp_path: Path) -> None:
    for trace, there in zip(both, (True, False), strict=True):
        path = export_trace(trace, "counts", tmp_path / f"{there}.csv")
        assert ("first_choice" in path.read_text().splitlines()[0]) == there
        back = import_trace("counts", [path], tmp_path / f"back-{there}")
        assert back.routers[0].first_choice_known == there
        assert report(back).tables["load"]["first_choice"].notna().all() == there


def test_counts_recorded_before_the_order_was_stated_have_no_first_choices(tmp_path: Path) -> None:
    trace = write_counts(tmp_path / "t", [np.full((1, E), 40)], 2)
    for of, firsts in ((trace, 160), (without_slot_order(trace), 0)):
        assert report(of).tables["load"]["first_choice"].sum() == firsts
    assert report(of).tables["load"]["first_choice"].isna().all()


def test_one_choice_is_the_first(tmp_path: Path) -> None:
    ids = np.arange(T, dtype=np.uint16)[:, None] % E
    trace = write_trace(tmp_path / "t", [ids], E, slot_order="unknown")
    assert trace.manifest["routers"][0]["slot_order"] == "weight"
    assert report(trace).tables["load"]["first_choice"].sum() == T


@pytest.mark.parametrize(
    ("family", "capture"),
    [("deepseek_v3", "tap"), ("deepseek_v3", "dispatch"), ("longcat_flash", "auto")],
)
def test_a_family_that_does_not_sort_is_counted_as_traced(
    family: str, capture: str, tmp_path: Path
) -> None:
    """By biased scores DeepSeek-V3 selects without sorting them, LongCat-Flash also nothing."""
    from tests.support import zoo

    model, inputs = zoo.build(family), zoo.inputs(family, [9, 5, 12])
    traced, counted = (
        zoo.recorded(model, tmp_path / name, inputs, capture=capture, counts_only=name == "counts")
        for name in ("t", "counts")
    )
    ids = experts_of(traced)
    assert np.isnan(ids[:, -1]).any() == (family == "longcat_flash")
    first = [report(trace).tables["load"]["first_choice"].tolist() for trace in (traced, counted)]
    assert first[0] == first[1]
