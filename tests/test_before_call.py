"""The tap reads a choice by a `forward` of the experts module's instance. Whoever else copies,
wraps, hooks or compiles that module sees no difference."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import moe_inspect
from moe_inspect.capture.hook import attach
from tests.families import build
from tests.zoo import token_batch

BATCHES = [token_batch(lengths, n) for n, lengths in enumerate([[9, 5], [3], [7, 7, 2]])]


@pytest.fixture
def model() -> Any:
    return build("olmoe")


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever other tests have compiled in this process: the tap would be a forward hook."""
    monkeypatch.setattr(attach, "has_compiled", lambda: False)


def experts_of(model: Any) -> list[Any]:
    return [layer.mlp.experts for layer in model.model.layers]


def routing(model: Any, path: Path, call: Any = None) -> pd.DataFrame:
    with moe_inspect.record(model, path, capture="tap"), torch.no_grad():
        assert all("forward" in vars(m) for m in experts_of(model))
        for batch in BATCHES:
            (call or model)(**batch)
    assert not any("forward" in vars(m) for m in experts_of(model))
    return moe_inspect.open_trace(path).routing()


def test_a_copy_computes_with_its_own_weights(model: Any, tmp_path: Path) -> None:
    experts = model.model.layers[0].mlp.experts
    hidden, ids, weights = (
        torch.rand(3, 32),
        torch.zeros((3, 4), dtype=torch.long),
        torch.ones(3, 4),
    )
    with moe_inspect.record(model, tmp_path / "t", capture="tap"), torch.no_grad():
        model(**BATCHES[0])
        copied = copy.deepcopy(experts)
        for parameter in copied.parameters():
            parameter.zero_()
        assert not copied(hidden, ids, weights).any()
        assert experts(hidden, ids, weights).any()
    assert not copied(hidden, ids, weights).any()
    assert moe_inspect.open_trace(tmp_path / "t").n_tokens == 14


@pytest.mark.parametrize("when", ["before", "within", "within, and taken off"])
def test_accelerate_may_wrap_the_same_forward(when: str, model: Any, tmp_path: Path) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    expected = routing(model, tmp_path / "expected")

    def wrap() -> None:
        for module in experts_of(model):
            hooks.add_hook_to_module(module, hooks.ModelHook())

    if when == "before":
        wrap()
    with moe_inspect.record(model, tmp_path / "t", capture="tap"), torch.no_grad():
        for n, batch in enumerate(BATCHES):
            if when != "before" and n == 1:
                wrap()
            if when == "within, and taken off" and n == 2:
                for module in experts_of(model):
                    hooks.remove_hook_from_module(module)
            model(**batch)
    assert moe_inspect.open_trace(tmp_path / "t").routing().equals(expected)
    assert ("forward" in vars(experts_of(model)[0])) == (when != "within, and taken off")
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


@pytest.mark.slow
def test_compiled_for_the_first_time_while_it_is_recorded(
    model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The recording has begun with nothing compiled, and so has put a `forward` there."""
    expected = routing(model, tmp_path / "expected")
    monkeypatch.undo()
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="aot_eager")
    found = routing(model, tmp_path / "t", lambda **batch: compiled(**batch))
    assert torch._dynamo.utils.counters["frames"]["ok"]
    assert found.equals(expected)
