"""Every main family, recorded, against what the experts' own function receives, to the bit; that
the tokens are those which change when an expert is disturbed is in test_zoo.py, of all families."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import moe_inspect
from tests.support.families import FAMILIES, NO_INTERFACE, build, handed_over, moe_layers
from tests.support.zoo import recorded, token_batch

LENGTHS = [9, 5, 12]


def slots(trace: moe_inspect.Trace, layer: int, prefix: str) -> np.ndarray:
    table = trace.routing(layer=layer)
    return table[[c for c in table if c.startswith(prefix)]].to_numpy()


DISPATCHED = sorted(set(FAMILIES) - NO_INTERFACE)
CASES = [*((f, "tap") for f in FAMILIES), *((f, "dispatch") for f in DISPATCHED)]


@pytest.mark.parametrize(("family", "capture"), CASES)
def test_recorded_is_what_executed(family: str, capture: str, tmp_path: Path) -> None:
    model, inputs = build(family), token_batch(LENGTHS)
    real = inputs["attention_mask"].flatten().bool().numpy()
    trace = recorded(model, tmp_path / "trace", inputs, capture=capture)
    assert [r.layer for r in trace.routers] == moe_layers(family)
    assert trace.n_tokens == sum(LENGTHS)
    for layer in moe_layers(family):
        ids, weights = slots(trace, layer, "expert_"), slots(trace, layer, "weight_")
        executed_ids, executed_weights = handed_over(model, layer, inputs)
        rounded = executed_weights[real].astype(np.float16).astype(np.float32)
        order = np.argsort(-rounded, axis=1, kind="stable")  # the first choice first
        assert (ids == np.take_along_axis(executed_ids[real], order, 1)).all()
        assert (weights == np.take_along_axis(rounded, order, 1)).all()


@pytest.mark.parametrize("family", DISPATCHED)
def test_dispatch_computes_what_stock_computes(family: str, tmp_path: Path) -> None:
    model, inputs = build(family), token_batch(LENGTHS)
    with torch.no_grad():
        model.set_experts_implementation("grouped_mm")
        stock = model(**inputs).logits
        before = model.get_experts_implementation()
        with moe_inspect.record(model, tmp_path / "trace", capture="dispatch"):
            ours = model(**inputs).logits
        assert model.get_experts_implementation() == before
        after = model(**inputs).logits
    assert torch.equal(ours, stock)
    assert torch.equal(after, stock)
    assert not torch.equal(ours, stock + 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_before_the_activation(family: str, tmp_path: Path) -> None:
    """Against the product of the router's weight with its input, taken at the linear layer's own
    call."""
    model, inputs = build(family), token_batch(LENGTHS)
    trace = recorded(model, tmp_path / "trace", inputs, logits=True)
    real = inputs["attention_mask"].flatten().bool().numpy()
    for router, layer in enumerate(moe_layers(family)):
        block = model.model.layers[layer]
        weight_of = {n: p for n, p in block.named_parameters() if p.shape == (8, 32)}
        name, weight = next((n, p) for n, p in weight_of.items() if "shared_expert_gate" not in n)
        gate = block.get_submodule(name.rpartition(".")[0])
        seen: list[torch.Tensor] = []
        hook = gate.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0]))
        with torch.no_grad():
            model(**inputs)
        hook.remove()
        expected = torch.nn.functional.linear(seen[0], weight, getattr(gate, "bias", None))
        expected = expected.reshape(-1, 8).detach().numpy()
        got = next(trace.shards).logits(router)
        assert np.abs(got - expected[real]).max() <= 2e-3 * np.abs(expected).max()


def test_bf16_weights_are_kept_exactly(tmp_path: Path) -> None:
    # Mixtral hands over float32 in any case
    model, inputs = build("olmoe", torch.bfloat16), token_batch(LENGTHS)
    trace = recorded(model, tmp_path / "trace", inputs)
    assert trace.manifest["capture"]["weight_dtype"] == "bfloat16"
    _, executed = handed_over(model, 1, inputs)
    real = inputs["attention_mask"].flatten().bool().numpy()
    assert (slots(trace, 1, "weight_") == executed[real]).all()
