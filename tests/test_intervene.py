"""Interventions: what is executed is what was asked for, and afterwards the model is as it was."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import moe_inspect
from moe_inspect import MoeInspectError, intervene, open_trace, record
from moe_inspect.interventions import rules
from tests import families
from tests.sweep import sample
from tests.zoo import recorded


def batch(seed: int = 0, rows: int = 3, length: int = 13) -> dict[str, torch.Tensor]:
    """Rows of different lengths, padded on the right."""
    ids = torch.randint(2, 300, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for b in range(1, rows):
        mask[b, length - 4 * b :] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model: Any, **inputs: Any) -> torch.Tensor:
    return model(**inputs).logits


def mismatch(a: moe_inspect.Trace, b: moe_inspect.Trace) -> float:
    return moe_inspect.compare(a, b).tables["agreement"]["set_mismatch"].max()


def load(trace: moe_inspect.Trace, layer: int) -> np.ndarray:
    ids = trace.routing(layer=layer).filter(like="expert_").to_numpy().astype(int)
    return np.bincount(ids.flatten(), minlength=next(r.experts for r in trace.routers))


@pytest.mark.parametrize("family", sample(sorted(families.FAMILIES), 3))
def test_a_replayed_model_routes_as_the_trace_says(family: str, tmp_path: Path) -> None:
    model, inputs = families.build(family), batch()
    before = logits(model, **inputs)
    trace = recorded(model, tmp_path / "a", inputs)
    with intervene(model, replay=trace) as done:
        assert torch.equal(logits(model, **inputs), before)
    assert done.table()[["decisions", "assignments", "weights"]].to_numpy().sum() == 0

    other = families.build(family, seed=1)
    with intervene(other, replay=trace) as done:
        as_recorded = recorded(other, tmp_path / "b", inputs)
    assert mismatch(trace, as_recorded) == 0
    counted = done.table()
    assert 0 < counted.weights.sum() == counted.assignments.sum(), "control: it chose otherwise"

    layer = families.moe_layers(family)[-1]
    busiest = np.argsort(load(trace, layer))[-2:].tolist()
    assert load(trace, layer)[busiest].all(), "control"
    with intervene(model, drop={layer: busiest}) as done:
        assert not torch.equal(logits(model, **inputs), before)
        dropped = load(recorded(model, tmp_path / "d", inputs), layer)
    assert dropped[busiest].tolist() == [0, 0]
    assert done.table().set_index("layer").how[layer] == "chose among the rest"
    assert done.table().assignments.sum() == 0, "control: no dropped expert was chosen"
    assert torch.equal(logits(model, **inputs), before)


def test_text_is_recognised_in_any_order_and_in_generated_steps(tmp_path: Path) -> None:
    model, inputs = families.build("olmoe"), batch(rows=4, length=20)
    with record(model, tmp_path / "a"), torch.no_grad():
        model(**inputs)
        prompt = {"input_ids": batch(5, rows=2, length=4)["input_ids"]}
        generated = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    trace, other = open_trace(tmp_path / "a"), families.build("olmoe", seed=1)
    turned = {name: value.flip(0) for name, value in inputs.items()}
    with intervene(other, replay=trace) as done, record(other, tmp_path / "b"), torch.no_grad():
        cache = None
        for at in range(4, generated.shape[1]):  # the same tokens, forced, with a cache
            fed = generated[:, :4] if cache is None else generated[:, at - 1 : at]
            cache = other(input_ids=fed, past_key_values=cache, use_cache=True).past_key_values
        other(**turned)
    again = open_trace(tmp_path / "b")
    columns = ["token_id", "position"]
    order = [*columns, "set"]

    def decisions(of: moe_inspect.Trace) -> pd.DataFrame:
        routing = of.routing(layer=1).merge(of.tokens()[["token", *columns]], on="token")
        slots = routing.filter(like="expert_").to_numpy()
        return routing.assign(set=[str(sorted(s)) for s in slots])[order].sort_values(order)

    assert (decisions(trace).to_numpy() == decisions(again).to_numpy()).all()
    assert done.table().assignments.sum() > 0

    unknown = {"input_ids": inputs["input_ids"] + 1}
    with intervene(model, replay=trace), pytest.raises(MoeInspectError, match="no sequence of"):
        logits(model, **unknown)
    longer = torch.cat([inputs["input_ids"][:1], torch.full((1, 2), 7)], 1)
    with intervene(model, replay=trace) as done:
        logits(model, input_ids=longer)
    assert done.replay is not None
    assert done.replay.beyond == 2


def test_a_training_step_under_replay_has_the_gradient_of_its_own_weights(tmp_path: Path) -> None:
    model, inputs = families.build("qwen3_moe"), {"input_ids": batch()["input_ids"]}
    trace = recorded(model, tmp_path / "a", inputs)
    router = model.get_submodule("model.layers.0.mlp.gate").weight

    def gradient(checkpointed: bool = False) -> torch.Tensor:
        model.zero_grad()
        if checkpointed:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        if checkpointed:
            model.gradient_checkpointing_disable()
            model.eval()
        return router.grad.clone()

    before = gradient()
    with intervene(model, replay=trace):
        assert torch.equal(gradient(), before)
        assert torch.equal(gradient(checkpointed=True), before)
    with intervene(model, shuffle=0):
        assert not torch.equal(gradient(), before)  # control


def test_forced_experts_are_in_every_decision_and_a_shuffle_keeps_the_load(tmp_path: Path) -> None:
    model, inputs = families.build("olmoe"), batch()
    own = load(recorded(model, tmp_path / "a", inputs), 0)
    tokens = int(inputs["attention_mask"].sum())
    with intervene(model, force={0: [2, 5]}) as done:
        forced = load(recorded(model, tmp_path / "b", inputs), 0)
    assert forced[[2, 5]].tolist() == [tokens, tokens]
    assert forced.sum() == own.sum()
    assert done.table().how.tolist() == ["forced", ""]
    before = logits(model, **inputs)
    with intervene(model, shuffle=3):
        shuffled = recorded(model, tmp_path / "c", inputs)
        one = logits(model, **inputs)
    assert (load(shuffled, 0) == own).all()
    assert not torch.equal(one, before)


def test_the_model_is_as_it_was_also_after_an_exception_and_when_compiled(tmp_path: Path) -> None:
    model, inputs = families.build("mixtral"), batch()
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m))
        for m in model.modules()
    ]
    before = logits(model, **inputs)
    with pytest.raises(ZeroDivisionError), intervene(model, drop={0: 1}):
        raise ZeroDivisionError
    router = model.get_submodule("model.layers.0.mlp.gate")
    broken = router.register_forward_pre_hook(lambda m, a: 1 / 0)
    with intervene(model, drop={0: 1}):
        with pytest.raises(ZeroDivisionError):
            logits(model, **inputs)
        broken.remove()
        assert torch.zeros(2, 8).topk(8).values.isfinite().all(), "nothing is masked outside"
        dropped = logits(model, **inputs)
    assert torch.equal(logits(model, **inputs), before)
    assert hooks == [
        (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m))
        for m in model.modules()
    ]
    compiled = torch.compile(model, backend="eager")
    with intervene(compiled, drop={0: 1}):
        assert torch.equal(logits(compiled, **inputs), dropped)
    assert torch.equal(logits(compiled, **inputs), before)
    # a recording that is open already sees the intervention, and says so
    with record(model, tmp_path / "a"):
        with intervene(model, drop={0: 1}):
            logits(model, **inputs)
        with intervene(model, drop={0: 1}), pytest.raises(MoeInspectError, match="already"):
            intervene(model, drop={1: 1}).__enter__()
    assert load(open_trace(tmp_path / "a"), 0)[1] == 0
    assert "dropped in model.layers.0" in str(open_trace(tmp_path / "a").manifest["model"]["note"])


class Chooser(torch.nn.Module):
    """A router that is not transformers': ids and weights, or a bool map of them."""

    def __init__(self, as_map: bool):
        super().__init__()
        self.as_map, self.num_experts, self.top_k = as_map, 4, 2
        self.gate = torch.nn.Parameter(torch.randn(4, 8))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = (x @ self.gate.T).softmax(-1)
        weights, ids = scores.topk(2)
        if not self.as_map:
            return weights, ids
        zeros = torch.zeros_like(scores)
        return zeros.scatter(-1, ids, weights), zeros.scatter(-1, ids, 1).bool()


class Own(torch.nn.Module):
    def __init__(self, as_map: bool):
        super().__init__()
        self.embed = torch.nn.Embedding(300, 8)
        self.layers = torch.nn.ModuleList([Chooser(as_map)])
        self.experts = torch.nn.Parameter(torch.randn(4, 8))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.layers[0](self.embed(input_ids))
        if chosen.dtype == torch.bool:
            return (weights * chosen) @ self.experts
        return (weights.unsqueeze(-1) * self.experts[chosen]).sum(-2)


@pytest.mark.parametrize("as_map", [False, True])
def test_routers_given_by_a_spec(as_map: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = Own(as_map), batch()["input_ids"]
    spec = moe_inspect.RouterSpec(module="layers.*", choice=lambda m, a, k, out: (out[1], out[0]))
    changed = intervene(model, drop={0: 3}, routers=[spec])
    with changed as done, record(model, tmp_path / "a", routers=[spec]), torch.no_grad():
        y = model(ids)
    scores = (model.embed(ids) @ model.layers[0].gate.T)[..., :3].softmax(-1).topk(2)
    expected = (scores.values.unsqueeze(-1) * model.experts[scores.indices]).sum(-2)
    assert torch.allclose(y, expected, atol=1e-5)
    assert done.table().how.tolist() == ["chose among the rest"]
    assert load(open_trace(tmp_path / "a"), 0)[3] == 0
    if as_map:
        return
    copied = moe_inspect.RouterSpec(
        module="layers.*", choice=lambda m, a, k, out: (out[1].clone(), out[0].clone())
    )
    refused = pytest.raises(MoeInspectError, match="replace=")
    with intervene(model, force={0: 1}, routers=[copied]), refused:
        model(ids)
    told = dataclasses.replace(copied, replace=lambda m, a, k, out, ids, weights: (weights, ids))
    with intervene(model, force={0: 1}, routers=[told]) as done:
        assert not torch.equal(model(ids), y)
    assert done.table().assignments.sum() > 0


def test_weights_are_shared_out_where_no_logits_are_seen() -> None:
    ids = torch.tensor([[0, 1, 2], [3, 4, 5], [1, 2, 5], [7, -1, 1]])
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.6, 0.0, 0.4]])
    dropped = torch.zeros(8, dtype=torch.bool)
    dropped[[1, 2]] = True
    made = rules.without(ids, weights, dropped)
    assert made.ids_TK.tolist() == [[0, 3, 4], [3, 4, 5], [0, 3, 5], [7, -1, 0]]
    assert torch.allclose(
        made.weights_TK,
        torch.tensor([[1.0, 0, 0], [0.6, 0.3, 0.1], [0, 0, 1.0], [1.0, 0, 0]]),
    )
    assert made.moved_T.tolist() == [2, 0, 2, 1]


def test_replayed_choices_keep_the_slots_and_the_weights_that_agree() -> None:
    ids = torch.tensor([[4, 1, 2], [0, 1, 2], [0, 9, 2]])
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3]])
    wanted = torch.tensor([[2, 7, 4], [0, -1, 2], [2, -1, 5]])
    given = torch.tensor([[0.9, 0.8, 0.7], [0.9, 0.0, 0.7], [0.9, 0.0, 0.7]])
    made = rules.replayed(ids, weights, wanted, given, experts=8)
    assert made.ids_TK.tolist() == [[4, 7, 2], [0, -1, 2], [5, 9, 2]]
    assert torch.equal(
        made.weights_TK,
        torch.tensor([[0.5, 0.8, 0.2], [0.6, 0.0, 0.1], [0.7, 0.5, 0.3]]),
    )
    assert made.given_T.tolist() == [1, 1, 1]
    without = rules.replayed(ids, weights, wanted, None, experts=8)
    assert without.weights_TK[0].tolist() == weights[0].tolist()
    assert without.given_T.sum() == 0


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "give it drop"),
        ({"drop": {0: 1}, "shuffle": 1}, "contradict"),
        ({"drop": {9: 1}}, "no router in layer 9"),
        ({"drop": {0: 8}}, "no expert 8 in layer 0"),
        ({"drop": {0: range(8)}}, "leaves no expert"),
        ({"force": {0: [1, 2, 3]}}, "whose tokens choose 2"),
        ({"drop": {0: 1}, "force": {0: 2}}, "in both drop and force"),
    ],
)
def test_what_cannot_be_done_is_said(given: dict[str, Any], says: str) -> None:
    with pytest.raises(MoeInspectError, match=says):
        intervene(families.build("mixtral"), **given)
