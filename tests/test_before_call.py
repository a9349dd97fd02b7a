"""Whoever copies, wraps, hooks or compiles the experts that a tap reads sees no difference."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import moe_inspect
from moe_inspect.capture.hook.experts import NAME, TAKEN
from tests.support.families import build
from tests.support.zoo import token_batch

BATCHES = [token_batch(lengths, n) for n, lengths in enumerate([[9, 5], [3], [7, 7, 2]])]


@pytest.fixture(params=["eager", "grouped_mm"])
def model(request: pytest.FixtureRequest) -> Any:
    """Of the implementations, eager is not in transformers' registry."""
    model = build("olmoe")
    model.set_experts_implementation(request.param)
    return model


# (else the tap would be a forward hook)
pytestmark = pytest.mark.usefixtures("nothing_is_compiled")


def experts_of(model: Any) -> list[Any]:
    return [layer.mlp.experts for layer in model.model.layers]


@pytest.fixture
def expected(model: Any, tmp_path: Path) -> pd.DataFrame:
    return routing(model, tmp_path / "expected")


def routing(model: Any, path: Path, call: Any = None, batches: Any = BATCHES) -> pd.DataFrame:
    before = model.config._experts_implementation
    with moe_inspect.record(model, path, capture="tap"), torch.no_grad():
        by_forward = before == "eager"
        assert all(("forward" in vars(m)) == by_forward for m in experts_of(model))
        assert (model.config._experts_implementation == NAME) != by_forward
        for batch in batches:
            (call or model)(**batch)
    assert not any("forward" in vars(m) for m in experts_of(model))
    assert model.config._experts_implementation == before
    return moe_inspect.open_trace(path).routing()


def recorded(model: Any, path: Path, *within: Callable[[], object]) -> pd.DataFrame:
    """`within`: what is done after the first batch, and after the second."""
    with moe_inspect.record(model, path, capture="tap"), torch.no_grad():
        for batch, do in itertools.zip_longest(BATCHES, within, fillvalue=list):
            model(**batch)
            do()
    return moe_inspect.open_trace(path).routing()


def test_a_copy_computes_with_its_own_weights(model: Any, tmp_path: Path) -> None:
    experts = model.model.layers[0].mlp.experts
    given = torch.rand(3, 32), torch.zeros((3, 4), dtype=torch.long), torch.ones(3, 4)
    with moe_inspect.record(model, tmp_path / "t", capture="tap"), torch.no_grad():
        model(**BATCHES[0])
        copied = copy.deepcopy(experts)
        for parameter in copied.parameters():
            parameter.zero_()
        assert not copied(*given).any()
        assert experts(*given).any()
    assert not copied(*given).any()
    assert moe_inspect.open_trace(tmp_path / "t").n_tokens == 14


@pytest.mark.parametrize("when", ["before", "within", "within, and taken off"])
def test_accelerate_may_wrap_the_same_forward(
    when: str, model: Any, expected: pd.DataFrame, tmp_path: Path
) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    wrap = lambda: [hooks.add_hook_to_module(m, hooks.ModelHook()) for m in experts_of(model)]  # noqa: E731
    take_off = lambda: list(map(hooks.remove_hook_from_module, experts_of(model)))  # noqa: E731
    if when == "before":
        wrap()
    within = {"before": (), "within": (wrap,)}.get(when, (wrap, take_off))
    assert recorded(model, tmp_path / "t", *within).equals(expected)
    # (accelerate leaves a forward, which may have been the recorder's)
    was_ours = when == "within, and taken off" and model.config._experts_implementation == "eager"
    assert ("forward" in vars(experts_of(model)[0])) != was_ours
    with torch.no_grad():  # what it has wrapped reads no more
        model(**BATCHES[0])


@pytest.mark.parametrize("when", ["before", "within"])
def test_what_is_recorded_is_what_a_users_hook_makes_of_it(
    when: str, model: Any, tmp_path: Path
) -> None:
    """Even if the hook is registered after the recording has begun."""

    def to_the_first(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, ids, weights = args
        return hidden, torch.arange(ids.shape[1]).expand_as(ids).clone(), weights

    def register() -> None:
        for module in experts_of(model):
            module.register_forward_pre_hook(to_the_first)

    if when == "before":
        register()
    with moe_inspect.record(model, tmp_path / "t", capture="tap"), torch.no_grad():
        if when == "within":
            register()
        for batch in BATCHES:
            model(**batch)
    found = moe_inspect.open_trace(tmp_path / "t").routing().filter(like="expert_")
    assert set(found.to_numpy().ravel()) == set(range(4))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_the_model_may_be_given_another_implementation_within(
    implementation: str, model: Any, expected: pd.DataFrame, tmp_path: Path
) -> None:
    change = lambda: model.set_experts_implementation(implementation)  # noqa: E731
    assert recorded(model, tmp_path / "t", change).equals(expected)
    assert model.config._experts_implementation == implementation


@pytest.mark.parametrize("second", ["tap", "dispatch"])
def test_layers_that_a_tap_leaves_out_compute_what_they_did(
    second: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also while another recorder records them."""
    model, ran = build("olmoe"), []
    expected = routing(model, tmp_path / "expected")
    stock = ALL_EXPERTS_FUNCTIONS["grouped_mm"]

    def counting(module: Any, *args: Any) -> Any:
        ran.append(module)
        return stock(module, *args)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "grouped_mm", counting)
    with moe_inspect.record(model, tmp_path / "0", capture="tap", layers=[0]), torch.no_grad():
        model(**BATCHES[0])
        assert ran == experts_of(model)
        with moe_inspect.record(model, tmp_path / "1", capture=second, layers=[1]):
            for batch in BATCHES:
                model(**batch)
    assert model.config._experts_implementation == "grouped_mm"
    found = moe_inspect.open_trace(tmp_path / "1").routing()
    of_layer = expected[expected.layer == 1].reset_index(drop=True)
    assert found.drop(columns="router").equals(of_layer.drop(columns="router"))
    assert moe_inspect.open_trace(tmp_path / "0").n_tokens == 2 * (9 + 5) + 3 + (7 + 7 + 2)


@pytest.mark.parametrize("ends_first", [0, 1])
@pytest.mark.parametrize("captures", [("tap", "dispatch"), ("dispatch", "tap"), ("tap", "tap")])
def test_two_recorders(
    captures: tuple[str, str], ends_first: int, model: Any, expected: pd.DataFrame, tmp_path: Path
) -> None:
    before = model.config._experts_implementation
    recorders = [
        moe_inspect.record(model, tmp_path / str(n), capture=c) for n, c in enumerate(captures)
    ]
    with torch.no_grad():
        for recorder in recorders:
            recorder.__enter__()
        for batch in BATCHES:
            model(**batch)
        recorders[ends_first].__exit__(None, None, None)
        model(**BATCHES[0])
        recorders[1 - ends_first].__exit__(None, None, None)
    found = [moe_inspect.open_trace(tmp_path / str(n)).routing() for n in (0, 1)]
    assert found.pop(ends_first).equals(expected)
    (longer,) = found
    of_both = longer[longer.token <= expected.token.max()].reset_index(drop=True)
    assert of_both.equals(expected)
    assert len(longer) > len(expected)
    assert model.config._experts_implementation == before
    assert not any("forward" in vars(m) or hasattr(m, TAKEN) for m in experts_of(model))


def test_compiled_for_the_first_time_while_it_is_recorded(
    model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The recording has begun with nothing compiled, and so has put a `forward` there."""
    batches = [BATCHES[0]] * 2
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    expected = routing(model, tmp_path / "expected", batches=batches)
    monkeypatch.undo()
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="eager")
    found = routing(model, tmp_path / "t", lambda **batch: compiled(**batch), batches)
    assert torch._dynamo.utils.counters["frames"]["ok"]
    assert found.equals(expected)
