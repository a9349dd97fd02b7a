"""Every main family, recorded, against routing found in two ways that are not the hook: which
tokens change when an expert is disturbed, and what the experts' own function receives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import moe_inspect
from tests.families import (
    FAMILIES,
    NO_INTERFACE,
    build,
    causal_routing,
    handed_over,
    moe_layers,
)
from tests.zoo import token_batch

LENGTHS = [9, 5, 12]


def recorded(
    model: object, path: Path, inputs: dict[str, torch.Tensor], **options: object
) -> moe_inspect.Trace:
    with moe_inspect.record(model, path, **options), torch.no_grad():
        model(**inputs)
    return moe_inspect.open_trace(path)


def slots(trace: moe_inspect.Trace, layer: int, prefix: str) -> np.ndarray:
    table = trace.routing(layer=layer)
    return table[[c for c in table if c.startswith(prefix)]].to_numpy()


CASES = [
    (f, c)
    for f in FAMILIES
    for c in ("tap", "dispatch")
    if not (c == "dispatch" and f in NO_INTERFACE)
]


@pytest.mark.parametrize(("family", "capture"), CASES)
def test_recorded_is_what_executed(family: str, capture: str, tmp_path: Path) -> None:
    model, inputs = build(family), token_batch(LENGTHS)
    real = inputs["attention_mask"].flatten().bool().numpy()
    trace = recorded(model, tmp_path / "trace", inputs, capture=capture)
    assert [r.layer for r in trace.routers] == moe_layers(family)
    assert trace.n_tokens == sum(LENGTHS)
    for layer in moe_layers(family):
        ids, weights = slots(trace, layer, "expert_"), slots(trace, layer, "weight_")
        chosen = np.zeros((len(ids), 8), bool)
        np.put_along_axis(chosen, ids, True, 1)
        assert (chosen == causal_routing(model, layer, inputs)[real]).all()
        executed_ids, executed_weights = handed_over(model, layer, inputs)
        rounded = executed_weights[real].astype(np.float16).astype(np.float32)
        order = np.argsort(-rounded, axis=1, kind="stable")  # the first choice first
        assert (ids == np.take_along_axis(executed_ids[real], order, 1)).all()
        assert (weights == np.take_along_axis(rounded, order, 1)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_document_routes_alone_as_in_a_batch(family: str, tmp_path: Path) -> None:
    model, inputs = build(family), token_batch(LENGTHS)
    together = recorded(model, tmp_path / "together", inputs)
    alone = tmp_path / "alone"
    with moe_inspect.record(model, alone), torch.no_grad():
        for row, length in enumerate(LENGTHS):
            model(input_ids=inputs["input_ids"][row : row + 1, :length])
    alone_trace = moe_inspect.open_trace(alone)
    assert together.tokens()[["token_id", "document", "position"]].equals(
        alone_trace.tokens()[["token_id", "document", "position"]]
    )
    for layer in moe_layers(family):
        a, b = slots(together, layer, "expert_"), slots(alone_trace, layer, "expert_")
        # the products of another shape may round otherwise
        assert (np.sort(a, 1) == np.sort(b, 1)).mean() > 0.99


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - NO_INTERFACE))
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
def test_tapping_changes_nothing(family: str, tmp_path: Path) -> None:
    model, inputs = build(family), token_batch(LENGTHS)
    with torch.no_grad():
        bare = model(**inputs).logits
        with moe_inspect.record(model, tmp_path / "trace", capture="tap"):
            watched = model(**inputs).logits
        after = model(**inputs).logits
    assert torch.equal(bare, watched)
    assert torch.equal(bare, after)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


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
        expected = seen[0].reshape(-1, 32) @ weight.T + (
            gate.bias if getattr(gate, "bias", None) is not None else 0
        )
        got = next(trace.shards).logits(router)
        assert (
            np.abs(got - expected.detach().numpy()[real]).max()
            <= 2e-3 * expected.abs().max().item()
        )


def test_bf16_weights_are_kept_exactly(tmp_path: Path) -> None:
    # Mixtral hands over float32 in any case
    model, inputs = build("olmoe", torch.bfloat16), token_batch(LENGTHS)
    trace = recorded(model, tmp_path / "trace", inputs)
    assert trace.manifest["capture"]["weight_dtype"] == "bfloat16"
    _, executed = handed_over(model, 1, inputs)
    real = inputs["attention_mask"].flatten().bool().numpy()
    assert (slots(trace, 1, "weight_") == executed[real]).all()


def test_the_causal_way_can_disagree() -> None:
    """Positive control: another seed's routing is not this model's."""
    inputs = token_batch(LENGTHS)
    a, b = (causal_routing(build("mixtral", seed=s), 1, inputs) for s in (0, 1))
    assert (a.sum(1) == 2).all()
    assert (a != b).any()
