"""Slots that routed nowhere: dropped by capacity where the trace says so, else empty; the tokens
that only they tell of; and the experts that dropped assignments were meant for: recorded, kept in
what is made of the trace, verified, and the load before drops judged."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moe_inspect
from moe_inspect.analysis.counting.engine import count_trace
from moe_inspect.analysis.counting.select import select
from moe_inspect.capture.rows import RouterRows, ShownRouter
from moe_inspect.errors import MoeInspectError
from moe_inspect.making import merge
from moe_inspect.model.custom.choice import ChoiceReader
from moe_inspect.public import Trace, open_trace, report
from moe_inspect.reporting.verdict.findings import Finding
from moe_inspect.trace.schema import DROPPED
from moe_inspect.trace.verify import verify
from moe_inspect.trace.writer import CountedBatches, TraceWriter
from moe_inspect.training import RoutingMonitor
from moe_inspect.watch.follow import Follower
from moe_inspect.watch.rules import parse_rule, refuse_rules
from moe_inspect.watch.state import Watched
from tests.support.damage import edit_manifest
from tests.support.synthetic import routers, uniform_ids, write_passes, write_trace
from tests.test_own_probes import Probing
from tests.test_verify import copy_of, put, rewrite

T, E, K, NOWHERE = 2_000, 8, 2, np.iinfo(np.uint16).max


def trace_of(root: Path, shares: list[float], drops: bool = True) -> Trace:
    """Router r drops that share of its assignments."""
    rng, ids = np.random.default_rng(0), list[np.ndarray]()
    for share in shares:
        lost_TK = rng.permutation(T * K).reshape(T, K) < share * T * K
        of_TK = np.where(lost_TK, NOWHERE, uniform_ids(rng, T, E, K))
        ids.append(np.where(of_TK[:, :1] == NOWHERE, of_TK[:, ::-1], of_TK).astype(np.uint16))
    manifest = {"capture": {"weights": False, "mode": "tap"} | ({"drops": True} if drops else {})}
    return write_trace(root, ids, E, document=np.arange(T) // 40, manifest=manifest)


def of(trace: Trace, kind: str, layers: list[int] | None = None) -> Finding | None:
    return next((f for f in report(trace, layers=layers).verdict() if f.kind == kind), None)


@pytest.mark.parametrize(
    ("shares", "severity"),
    [([0.0, 0.005], "note"), ([0.0, 0.03], "warning"), ([0.01, 0.29], "critical")],
)
def test_what_was_dropped_is_said(tmp_path: Path, shares: list[float], severity: str) -> None:
    trace = trace_of(tmp_path / "t", shares)
    found, empty = of(trace, "dropped"), round(sum(shares) * T * K)
    assert found is not None
    assert (found.severity, found.router) == (severity, 1)
    assert found.text.startswith(f"{empty:,} of 8,000 assignments were dropped by capacity (")
    assert f"most in layer 1: {shares[1]:.1%})" in found.text
    headline = of(trace, "balance")
    assert headline is not None
    assert ("x the mean load after drops" in headline.text) == (shares[headline.router or 0] > 0)
    table = report(trace).tables["balance"]
    assert table["empty_slots"].tolist() == [round(s * T * K) for s in shares]
    assert table["drop_rate"].tolist() == pytest.approx(shares)
    assert (table["assignments"] + table["empty_slots"] == table["tokens"] * K).all()
    assert of(trace, "empty_slots") is None


def test_what_is_not_said_to_be_dropped_is_empty(tmp_path: Path) -> None:
    trace = trace_of(tmp_path / "t", [0.0, 0.29], drops=False)
    found = of(trace, "empty_slots")
    assert found is not None
    assert found.severity == "note"
    assert found.text.startswith("1,160 of 8,000 slots are empty (14.5%, most in layer 1: 29.0%)")
    assert of(trace, "dropped") is None
    assert report(trace).tables["balance"]["drop_rate"].isna().all()
    with pytest.raises(MoeInspectError, match="does not state that its empty slots are drops"):
        refuse_rules([parse_rule("drop_rate > 0.1")], trace)


@pytest.mark.parametrize("lacking", [{}, {(1, 1): 40}, {(1, 1): 40, (2, 1): 9, (2, 0): 8}])
def test_of_counts_domains_and_layers_with_unequal_sums_are_named(
    tmp_path: Path, lacking: dict[tuple[int, int], int]
) -> None:
    load_LDE = np.full((3, 2, 4), 100)
    for at, lost in lacking.items():
        load_LDE[at][0] -= lost
    counted = CountedBatches(0, 400, ["a", "b"], list(load_LDE), None)
    found = of(
        write_passes(tmp_path / "t", routers(3, 4, 2), [counted], counts_only=True), "empty_slots"
    )
    if not lacking:
        assert found is None
        return
    assert found is not None
    within, layers = {1: ('"b":', " 1"), 3: ('"a", "b"; most in "b", where', "s 1-2")}[len(lacking)]
    assert found.text.endswith(
        f"tell apart. Layers have unequal sums in {within} 360 (layer 1) to 400 (layer 0) "
        f"assignments, fewer than the most in layer{layers}."
    )
    alone = of(open_trace(tmp_path / "t"), "empty_slots", layers=[1])
    assert alone is not None
    assert alone.text.endswith("tell apart.")


def test_counts_hold_the_tokens_that_their_shards_state(tmp_path: Path) -> None:
    """512 tokens per shard, of which the counts of either router lack some."""
    rng, manifest = np.random.default_rng(1), {"capture": {"drops": True}, "training": {}}
    listed, even = routers(2, E, K), np.full(2 * E, 1 / (2 * E))
    with TraceWriter(tmp_path / "t", manifest, listed, weights=False, counts_only=True) as writer:
        for n in range(4):
            loads = [rng.multinomial(K * 512 - lost, even).reshape(2, E) for lost in (25, 60)]
            writer.write(CountedBatches(n, 512, ["a", "b"], loads, None))
    trace = open_trace(tmp_path / "t")
    assert trace.n_tokens == 4 * 512
    made = report(trace)
    assert made.tables["balance"]["tokens"].tolist() == [2048, 2048]
    assert made.tables["balance"]["empty_slots"].tolist() == [100, 240]
    counts = count_trace(trace, select(trace))
    assert counts.tokens_D.sum() == 2048
    assert abs(counts.tokens_D[0] - 1024) < 100
    found = of(trace, "dropped")
    assert found is not None
    assert found.text.startswith("340 of 8,192 assignments were dropped")
    follower, watched = Follower(tmp_path / "t"), Watched(rules=[parse_rule("drop_rate > 0.05")])
    watched.take(follower.poll(), follower.header)
    assert watched.tokens == 2048
    assert [a.router for a in watched.raised] == [1]
    one = count_trace(trace, replace(select(trace), domains=frozenset({"a"})))
    assert one.tokens_of(0) == one.tokens_of(1) == counts.tokens_D[0]


# --- the load before drops


B, S, PASSES = 4, 60, 8
MASKED, EMPTY = 1, 2  # layers: of capacity, and one whose router chooses fewer than K now and then


class Capacity(torch.nn.Module):
    """Routers of random choices. That of layer 1 prefers expert 3 (of more than 8, the last) by
    `skew`, and each of its experts takes so much of a pass. `seen`: ids [B·S, K] of each call, and
    which are dropped."""

    def __init__(self, skew: float, experts: int = E, factor: float = 1.15, layers: int = 3):
        super().__init__()
        self.skew, self.E, self.factor, self.layers = skew, experts, factor, layers
        self.random = torch.Generator().manual_seed(0)
        self.seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        for layer in range(self.layers):
            logits = torch.randn(*input_ids.shape, self.E, generator=self.random)
            logits[..., 3 if self.E == E else -1] += self.skew * (layer == MASKED)
            weights, ids = logits.softmax(-1).topk(K, sorted=False)
            if layer == EMPTY:
                ids = ids.masked_fill(ids == self.E - 1, -1)
            of_E = ids.view(-1, 1) == torch.arange(self.E)
            order = (of_E.cumsum(0) * of_E).sum(1) - 1
            room = round(self.factor * ids.numel() / self.E)
            dropped = (order >= room).view_as(ids) & (ids >= 0) & (layer == MASKED)
            self.seen.append((layer, ids.view(-1, K), dropped.view(-1, K)))
            shown = {"logits": logits, "dropped": dropped if layer != EMPTY else None}
            moe_inspect.probe(ids, weights, layer=layer, experts=self.E, **shown)
        return input_ids

    def of_layer(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """ids [T, K], dropped [T, K]"""
        parts = [(i, d) for at, i, d in self.seen if at == layer]
        return tuple(torch.cat(list(part)).numpy() for part in zip(*parts, strict=True))  # type: ignore[return-value]


def traced(root: Path, model: Capacity, batch: int = B, passes: int = PASSES, **options) -> Trace:
    """`batch`: 0 for a prompt, and decode steps."""
    shapes = [(batch, S)] * passes if batch else [(1, 40), *[(1, 1)] * 300]
    with moe_inspect.record(model, root, **options):
        for shape in shapes:
            model(torch.zeros(shape, dtype=torch.long))
    return open_trace(root)


def load_of(ids_TK: np.ndarray, keep_TK: np.ndarray, experts: int = E) -> np.ndarray:
    return np.bincount(ids_TK[keep_TK & (ids_TK >= 0)], minlength=experts)


BEFORE = ["dropped", "drop_rate"]


def check(trace: Trace, model: Capacity, experts: int = E) -> None:
    """Each decision, each count, and Σ load + Σ dropped + other empty slots = tokens × k."""
    found, table = verify(trace.path), report(trace).tables
    assert found.ok, found
    assert trace.drops == (model.layers <= EMPTY), "all that is empty"
    for layer in range(model.layers):
        ids_TK, dropped_TK = model.of_layer(layer)
        routing = trace.routing()
        routing = routing[routing["layer"] == layer].sort_values("token")
        for kind, there_TK in (("expert", ~dropped_TK & (ids_TK >= 0)), (DROPPED, dropped_TK)):
            got = routing[[f"{kind}_{j}" for j in range(K)]].to_numpy(float)
            want = [set(i[t].tolist()) for i, t in zip(ids_TK, there_TK, strict=True)]
            assert [set(g[~np.isnan(g)].astype(int).tolist()) for g in got] == want
        rows = table["load"][table["load"]["layer"] == layer]
        row = table["balance"].iloc[layer]
        load_E, lost_E = (load_of(ids_TK, d, experts) for d in (~dropped_TK, dropped_TK))
        assert rows["assignments"].tolist() == load_E.tolist()
        empty = int((ids_TK < 0).sum())
        assert row["empty_slots"] == lost_E.sum() + empty
        assert load_E.sum() + lost_E.sum() + empty == row["tokens"] * K
        if layer == EMPTY:
            assert empty
            assert rows["dropped"].isna().all()
            assert row[BEFORE].isna().all()
            continue
        assert rows["dropped"].tolist() == lost_E.tolist()
        expected = [lost_E.sum(), lost_E.sum() / ids_TK.size]
        assert row[BEFORE].tolist() == pytest.approx(expected)
    assert found.dropped == model.of_layer(MASKED)[1].sum() > 100
    assert found.empty_slots == table["balance"]["empty_slots"].sum()


@pytest.mark.parametrize(
    ("batch", "of", "options"),
    [
        (B, {}, {}),
        (B, {"layers": 2}, {}),
        (1, {}, {"logits": True}),
        (0, {"factor": 0.5}, {"weights": False}),
    ],
)
def test_what_was_dropped_is_kept_and_counted(
    batch: int, of: Any, options: Any, tmp_path: Path
) -> None:
    model = Capacity(1.5, **of)
    check(traced(tmp_path / "t", model, batch, **options), model)


@pytest.mark.parametrize("experts", [127, 128, 200, 256, 300])
def test_ids_of_wider_types(experts: int, tmp_path: Path) -> None:
    model = Capacity(4.0, experts)
    check(traced(tmp_path / "t", model), model, experts)


def test_an_empty_slot_beside_wider_ids_is_no_dropped_one(tmp_path: Path) -> None:
    """Two routers of one pass: 255 is an empty slot of either, and 200 + 55 of neither."""

    def two(n: int) -> None:
        for layer, experts in enumerate((100, 200)):
            weights, ids = torch.rand(B, S, experts).topk(K)
            mask = ids < 50 if not layer else None
            ids = ids.masked_fill(ids >= 150, -1)
            moe_inspect.probe(ids, weights, layer=layer, experts=experts, dropped=mask)

    model = Probing(two)
    with moe_inspect.record(model, tmp_path / "t"):
        model(torch.zeros(B, S, dtype=torch.long))
    found, routing = verify(tmp_path / "t"), open_trace(tmp_path / "t").routing()
    assert found.ok, found
    there = routing.groupby("layer")[["dropped_expert_0", "dropped_expert_1"]].count().sum(axis=1)
    assert there[0] > 100
    assert there[1] == 0 < routing[routing["layer"] == 1]["expert_1"].isna().sum()


def test_an_id_beyond_the_experts_is_no_dropped_one() -> None:
    """On a GPU ids are looked at once: what comes later must not be read as expert + E."""
    reader = ChoiceReader("probe", E, None, "")
    reader.below, reader._may_look = 2 * E, lambda tensor: False
    ids, none = torch.tensor([[1, E + 1, -1]]), torch.tensor([[False, False, False]])
    for dropped, found in ((none, [1, -1, -1]), (~none, [E + 1, -1, -1]), (None, [1, -1, -1])):
        got, _ = reader.choice((ids, torch.ones(1, 3)), dropped)
        assert got[0].tolist() == found


def test_each_router_has_its_own_ids() -> None:
    shown = [ShownRouter(torch.device("cpu"), K, E, below) for below in (E, 2 * E)]
    rows = RouterRows(shown, [0, 1], ("", "logits"), torch.float16)
    assert rows.grow(16)
    assert [tape.experts for tape in rows.tapes[""]] == [E, 2 * E]
    assert [tape.K for tape in rows.tapes["logits"]] == [E, E]


# --- what is made of it


def test_merged_traces_keep_it(tmp_path: Path) -> None:
    parts = [
        traced(tmp_path / name, Capacity(capacity)) for name, capacity in (("a", 1.5), ("b", 1.2))
    ]
    merged = merge([part.path for part in parts], tmp_path / "merged")
    sums = sum(report(part).tables["load"]["dropped"] for part in parts)
    assert sums.sum() > 0
    assert moe_inspect.check(merged.path, quick=True).ok
    assert sums.equals(report(merged).tables["load"]["dropped"])


def test_slots_are_put_in_order_with_it(tmp_path: Path) -> None:
    """A manifest that states no order of slots: they are sorted as they are read."""
    model = Capacity(1.5)
    trace = traced(tmp_path / "t", model)
    before = trace.routing()
    columns = [f"{kind}_{j}" for kind in ("expert", "weight", DROPPED) for j in range(K)]

    def turned(table: dict[str, list]) -> None:
        for kind in ("expert", "weight", DROPPED):
            table[f"{kind}_0"], table[f"{kind}_1"] = table[f"{kind}_1"], table[f"{kind}_0"]

    rewrite(tmp_path / "t", "routing", 0, turned)
    unordered = [{**router, "slot_order": ""} for router in trace.manifest["routers"]]
    edit_manifest(tmp_path / "t", routers=unordered)
    after = open_trace(tmp_path / "t").routing()
    both = before["weight_0"] > before["weight_1"]
    assert both.sum() > 4000
    assert after[both][columns].equals(before[both][columns])
    check(open_trace(tmp_path / "t"), model)


def test_a_wrong_dropped_expert_is_found(tmp_path: Path) -> None:
    whole = traced(tmp_path / "t", Capacity(1.5))
    table = whole.routing().reset_index(drop=True)
    at = int((table["dropped_expert_1"].notna() & table["expert_0"].notna()).to_numpy().argmax())
    full = int(table["expert_1"].notna().to_numpy().argmax())
    cases = {
        "dropped_expert_1 is 8, router 1 has 8 experts": put("dropped_expert_1", at, E),
        "a slot is dropped or not": put("dropped_expert_1", full, 0),
        "is in slots 0 and 1 of one decision": copy_of("dropped_expert_1", at, "expert_0"),
    }
    for n, (said, change) in enumerate(cases.items()):
        root = tmp_path / f"{n}"
        shutil.copytree(whole.path, root)
        rewrite(root, "routing", 0, change)
        found = verify(root)
        assert not found.ok
        assert said in str(found.violation)


# --- what is said


def texts(trace: Trace) -> tuple[str, str, str]:
    """Severity and text of the headline, and what `dropped` says."""
    headline, lost = of(trace, "balance"), of(trace, "dropped")
    assert headline is not None
    return headline.severity, headline.text, lost.text if lost else ""


def test_a_preference_that_capacity_hides_is_said(tmp_path: Path) -> None:
    model = Capacity(1.5)
    trace = traced(tmp_path / "t", model)
    ids_TK, dropped_TK = model.of_layer(MASKED)
    loads = (load_of(ids_TK, keep) for keep in (ids_TK >= 0, ~dropped_TK))
    before, after = (load_E[3] / load_E.mean() for load_E in loads)
    assert before > 1.4 * after > 1.4
    said = f"expert 3 gets {before:.2f}x the mean load before drops, {after:.2f}x after"
    severity, headline, lost = texts(trace)
    assert severity == "critical"
    assert said in headline
    assert "1 of 3 routers is uneven" in headline
    assert f"before drops expert 3 of layer 1 got {before:.2f}x the mean load, " in lost
    assert f"{after:.2f}x after." in lost
    assert f"{before:.2f}x" in report(trace).page()


def test_where_routers_choose_evenly_no_preference_is_said(tmp_path: Path) -> None:
    severity, headline, lost = texts(traced(tmp_path / "t", Capacity(0.0, factor=0.9)))
    assert severity != "warning"
    assert "uneven" not in headline
    assert "assignments were dropped" in lost
    assert "only the balance is judged before drops" in lost
    assert re.search(r" Another [\d,]+ slots are empty\.$", lost)


def test_with_few_documents_nothing_is_claimed(tmp_path: Path) -> None:
    severity, headline, lost = texts(traced(tmp_path / "t", Capacity(1.5), passes=1))
    assert severity == "note"
    assert headline.startswith("Too little data to judge balance")
    assert "before drops" in headline
    assert "before drops expert" not in lost


def test_the_monitor_logs_what_is_dropped(tmp_path: Path) -> None:
    """Its counts are of the load after drops."""
    model, ids = Capacity(1.5, factor=0.5, layers=2).train(), torch.zeros(B, S).long()
    rules = ["drop_rate > 0.1"]
    how: Any = {"log_steps": 2, "rules": rules, "on_alarm": lambda alarm: None}
    with RoutingMonitor(model, tmp_path / "h", **how) as monitor:
        for _ in range(PASSES):
            model(ids)
            metrics = monitor.step() or None
    ids_TK, dropped_TK = model.of_layer(MASKED)
    lost = dropped_TK[-2 * B * S :].mean()
    assert metrics is not None
    assert metrics["routing/drop_rate/worst"] == pytest.approx(lost)
    assert metrics["routing/drop_rate/median"] == pytest.approx(lost / 2)
    assert [(a.layer, a.metric) for a in monitor.raised] == [(MASKED, "drop_rate")]
    trace = open_trace(tmp_path / "h")
    assert trace.drops
    assert of(trace, "dropped") is not None
    tables = report(trace).tables
    assert tables["load"]["dropped"].isna().all()
    load = tables["load"]
    got = load[load["layer"] == MASKED]["assignments"].tolist()
    assert got == load_of(ids_TK, ~dropped_TK).tolist()
