"""The experts that dropped assignments were meant for: recorded, kept in what is made of the trace,
verified, and the load before drops judged."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import moe_inspect
from moe_inspect.capture.hook.ring import Rings
from moe_inspect.model.custom.choice import ChoiceReader
from moe_inspect.reporting.report import report
from moe_inspect.trace.derived.merge import merge
from moe_inspect.trace.derived.sample import sample
from moe_inspect.trace.reader import Trace, open_trace
from moe_inspect.trace.schema import DROPPED
from moe_inspect.training import RoutingMonitor
from tests.support.damage import edit_manifest
from tests.test_dropped import of
from tests.test_verify import copy_of, put, rewrite

E, K, B, S, PASSES = 8, 2, 4, 60, 8
MASKED, EMPTY = 1, 2  # layers: of capacity, and one whose router chooses fewer than K now and then


class Capacity(torch.nn.Module):
    """Three routers of random choices. That of layer 1 prefers expert 3 (of more than 8, the last)
    by `skew`, and each of its experts takes so much of a pass. `seen`: ids [B·S, K] of each call,
    and which are dropped."""

    def __init__(self, skew: float, experts: int = E, factor: float = 1.15):
        super().__init__()
        self.skew, self.E, self.factor = skew, experts, factor
        self.random = torch.Generator().manual_seed(0)
        self.seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        for layer in range(3):
            logits = torch.randn(*input_ids.shape, self.E, generator=self.random)
            logits[..., 3 if self.E == E else -1] += self.skew * (layer == MASKED)
            weights, ids = logits.softmax(-1).topk(K, sorted=False)
            if layer == EMPTY:
                ids = ids.masked_fill(ids == self.E - 1, -1)
            order = torch.zeros_like(ids).view(-1)
            for e in range(self.E):
                at = ids.view(-1) == e
                order[at] = torch.arange(int(at.sum()))
            room = round(self.factor * ids.numel() / self.E)
            dropped = (order >= room).view_as(ids) & (ids >= 0) & (layer == MASKED)
            self.seen.append((layer, ids.view(-1, K), dropped.view(-1, K)))
            mask = dropped if layer == MASKED else None
            moe_inspect.probe(
                ids, weights, layer=layer, experts=self.E, logits=logits, dropped=mask
            )
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


BEFORE = ["dropped", "drop_rate", "max_over_mean_before_drops", "busiest_expert_before_drops"]


def check(trace: Trace, model: Capacity, experts: int = E) -> None:
    """Each decision, each count, and Σ load + Σ dropped + other empty slots = tokens × k."""
    found, table = moe_inspect.verify(trace.path), report(trace).tables
    assert found.ok, found
    for layer in range(3):
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
        before_E = load_E + lost_E
        assert rows["dropped"].tolist() == lost_E.tolist()
        ratio = before_E.max() / before_E.mean()
        expected = [lost_E.sum(), lost_E.sum() / ids_TK.size, ratio, before_E.argmax()]
        assert row[BEFORE].tolist() == pytest.approx(expected)
    assert found.dropped == model.of_layer(MASKED)[1].sum() > 100
    assert found.empty_slots == found.dropped + (model.of_layer(EMPTY)[0] < 0).sum()


@pytest.mark.parametrize("batch", [B, 1])
def test_what_was_dropped_is_kept_and_counted(batch: int, tmp_path: Path) -> None:
    model = Capacity(1.5)
    check(traced(tmp_path / "t", model, batch, logits=batch == 1), model)


def test_decode_steps_keep_it_too(tmp_path: Path) -> None:
    model = Capacity(1.5, factor=0.5)
    check(traced(tmp_path / "t", model, 0, weights=False), model)


@pytest.mark.parametrize("experts", [127, 128, 200, 256, 300])
def test_ids_of_wider_types(experts: int, tmp_path: Path) -> None:
    model = Capacity(4.0, experts)
    trace = traced(tmp_path / "t", model)
    check(trace, model, experts)


def test_an_empty_slot_beside_wider_ids_is_no_dropped_one(tmp_path: Path) -> None:
    """Two routers of one ring: 255 is an empty slot of either, and 200 + 55 of neither."""

    class Two(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            for layer, experts in enumerate((100, 200)):
                weights, ids = torch.rand(*input_ids.shape, experts).topk(K)
                mask = ids < 50 if not layer else None
                ids = ids.masked_fill(ids >= 150, -1)
                moe_inspect.probe(ids, weights, layer=layer, experts=experts, dropped=mask)
            return input_ids

    model = Two()
    with moe_inspect.record(model, tmp_path / "t"):
        model(torch.zeros(B, S, dtype=torch.long))
    found, routing = moe_inspect.verify(tmp_path / "t"), open_trace(tmp_path / "t").routing()
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
    sizes = [(torch.device("cpu"), K, E)] * 2
    rings = Rings(sizes, [0, 1], torch.float16, ("logits",), 16, below=[E, 2 * E])
    assert [tape.experts for tape in rings.tapes[""]] == [E, 2 * E]
    assert [tape.K for tape in rings.tapes["logits"]] == [E, E]
    assert [group.E for group in rings.shape.groups][:2] == [E, 2 * E]


# --- what is made of it


def test_samples_and_their_merger_keep_it(tmp_path: Path) -> None:
    model = Capacity(1.5)
    whole = traced(tmp_path / "t", model)
    parts = [
        sample(whole.path, tmp_path / f"{rest}", share=0.5, rest=rest) for rest in (False, True)
    ]
    merged = merge([part.path for part in parts], tmp_path / "merged")
    sums = sum(report(part).tables["load"]["dropped"] for part in parts)
    assert sums.sum() > 0
    for trace in (merged, whole):
        assert moe_inspect.verify(trace.path).ok
        assert sums.equals(report(trace).tables["load"]["dropped"])


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
        found = moe_inspect.verify(root)
        assert not found.ok
        assert said in str(found.violation)


# --- what is said


def texts(trace: Trace) -> tuple[str, str, str]:
    """Severity and text of the headline, and what `dropped` says."""
    headline, lost = of(trace, "balance"), of(trace, "dropped")
    assert headline is not None
    return headline.severity, headline.text, lost.text if lost else ""


def ratios(model: Capacity, expert: int) -> tuple[float, float]:
    """Its load before and after drops, ÷ mean."""
    ids_TK, dropped_TK = model.of_layer(MASKED)
    loads = (load_of(ids_TK, keep) for keep in (ids_TK >= 0, ~dropped_TK))
    return tuple(load_E[expert] / load_E.mean() for load_E in loads)  # type: ignore[return-value]


def test_a_preference_that_capacity_hides_is_said(tmp_path: Path) -> None:
    model = Capacity(1.5)
    trace = traced(tmp_path / "t", model)
    before, after = ratios(model, 3)
    assert before > 1.4 * after > 1.4
    said = f"expert 3 gets {before:.2f}x the mean load before drops, {after:.2f}x after"
    severity, headline, lost = texts(trace)
    assert severity == "critical"
    assert said in headline
    assert "1 of 3 routers is uneven" in headline
    assert f"before drops expert 3 of layer 1 got {before:.2f}x the mean load, " in lost
    assert f"{after:.2f}x after." in lost
    assert f"{before:.2f}×" in report(trace).page()


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


def test_counts_say_that_they_are_of_the_load_after(tmp_path: Path) -> None:
    model, ids = Capacity(1.5).train(), torch.zeros(B, S, dtype=torch.long)
    with RoutingMonitor(model, tmp_path / "h", log_steps=2, on_alarm=lambda a: None) as monitor:
        for _ in range(PASSES):
            model(ids)
            monitor.step()
    made = report(open_trace(tmp_path / "h"))
    assert made.tables["load"]["dropped"].isna().all()
    assert made.tables["balance"]["max_over_mean_before_drops"].isna().all()
    ids_TK, dropped_TK = model.of_layer(MASKED)
    load = made.tables["load"]
    got = load[load["layer"] == MASKED]["assignments"].tolist()
    assert got == load_of(ids_TK, ~dropped_TK).tolist()
