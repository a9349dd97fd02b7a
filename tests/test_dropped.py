"""Slots that routed nowhere: dropped by capacity where the trace says so, else empty; and the
tokens that only they tell of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moe_inspect
from moe_inspect.alarms.of_trace import alarms_of
from moe_inspect.alarms.rules import parse_rule
from moe_inspect.analysis.counting.engine import count_trace
from moe_inspect.analysis.counting.select import select
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.report import report
from moe_inspect.reporting.verdict.findings import Finding
from moe_inspect.trace.reader import Trace, open_trace
from moe_inspect.trace.writer import CountedBatches, TraceWriter
from moe_inspect.training import RoutingMonitor
from moe_inspect.watch.follow import Follower
from moe_inspect.watch.state import Watched
from tests.support.synthetic import routers, uniform_ids, write_trace

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


def of(trace: Trace, kind: str) -> Finding | None:
    return next((f for f in report(trace).verdict() if f.kind == kind), None)


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
        alarms_of(trace, [parse_rule("drop_rate > 0.1")])


def test_a_rule_on_drops(tmp_path: Path) -> None:
    trace = trace_of(tmp_path / "t", [0.01, 0.29])
    for limit, found in ((0.1, [1]), (0.5, [])):
        alarms = alarms_of(trace, [parse_rule(f"drop_rate > {limit}")])
        assert [a.router for a in alarms] == found


def test_counts_hold_the_tokens_that_their_shards_state(tmp_path: Path) -> None:
    """512 tokens per shard, of which the counts of either router lack some: `watch`, the report and
    the windows of a history all know them."""
    rng, manifest = np.random.default_rng(1), {"capture": {"drops": True}, "training": {}}
    listed, even = routers(2, E, K), np.full(2 * E, 1 / (2 * E))
    with TraceWriter(tmp_path / "t", manifest, listed, weights=False, counts_only=True) as writer:
        for n in range(4):
            loads = [rng.multinomial(K * 512 - lost, even).reshape(2, E) for lost in (25, 60)]
            writer.write(CountedBatches(n, 512, ["a", "b"], loads, None, None))
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


class Dropping(torch.nn.Module):
    """Its second router drops every choice of expert 3."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        B, S = input_ids.shape
        for layer in range(2):
            weights, ids = torch.rand(B, S, E, generator=self.random).softmax(-1).topk(K)
            dropped = (ids == 3) & (layer == 1)
            self.seen.append((ids, dropped))
            moe_inspect.probe(ids, weights, layer=layer, experts=E, dropped=dropped)
        return input_ids

    def __init__(self) -> None:
        super().__init__()
        self.random, self.seen = torch.Generator().manual_seed(0), list[Any]()


def test_a_probe_shows_what_is_dropped(tmp_path: Path) -> None:
    model, ids = Dropping(), torch.zeros(2, 50, dtype=torch.long)
    with moe_inspect.record(model, tmp_path / "t"):
        for _ in range(8):
            model(ids)
    trace = open_trace(tmp_path / "t")
    lost = sum(int(dropped.sum()) for _, dropped in model.seen)
    assert lost > 100
    assert trace.drops
    assert report(trace).tables["balance"]["empty_slots"].tolist() == [0, lost]
    found = of(trace, "dropped")
    assert found is not None
    assert found.text.startswith(f"{lost:,} of 3,200 assignments were dropped")
    assert moe_inspect.verify(tmp_path / "t").empty_slots == lost


def test_the_monitor_logs_what_is_dropped(tmp_path: Path) -> None:
    model, ids = Dropping().train(), torch.zeros(2, 50, dtype=torch.long)
    rules = ["drop_rate > 0.1"]
    how: Any = {"log_steps": 2, "rules": rules, "on_alarm": lambda alarm: None}
    with RoutingMonitor(model, tmp_path / "h", **how) as monitor:
        for _ in range(4):
            model(ids)
            metrics = monitor.step() or None
    lost = sum(int(dropped.sum()) for _, dropped in model.seen[4:]) / (4 * 50 * K)
    assert metrics is not None
    assert metrics["routing/drop_rate/worst"] == pytest.approx(lost)
    assert metrics["routing/drop_rate/median"] == pytest.approx(lost / 2)
    assert [(a.layer, a.metric) for a in monitor.raised] == [(1, "drop_rate")]
    trace = open_trace(tmp_path / "h")
    assert trace.drops
    # as text: what chance gives is unknown, and NaN is not equal to itself
    assert list(map(str, alarms_of(trace, [parse_rule(rules[0])]))) == [*map(str, monitor.raised)]
    assert of(trace, "dropped") is not None


def test_a_mask_of_another_shape_is_refused(tmp_path: Path) -> None:
    class Wrong(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            weights, ids = torch.rand(2, 5, E).topk(K)
            moe_inspect.probe(ids, weights, layer=0, experts=E, dropped=torch.zeros(2, 5) > 0)
            return input_ids

    model = Wrong()
    with (
        pytest.raises(MoeInspectError, match=r"shows dropped \[2, 5\]"),
        moe_inspect.record(model, tmp_path / "t"),
    ):
        model(torch.zeros(2, 5, dtype=torch.long))
