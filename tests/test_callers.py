"""What calls, copies or saves a model while it is recorded, and the recording goes on."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, func, nn

import moe_inspect
from moe_inspect.errors import MoeInspectError
from tests.support.families import build
from tests.test_own_use import Wrapper

IDS = torch.arange(2, 34).reshape(2, 16)


class Logits(nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


def gradient(model: Any) -> None:
    values = {name: p.detach() for name, p in model.named_parameters()}
    func.grad(lambda v: func.functional_call(model, v, (IDS,)).logits.sum())(values)


TRANSFORMS: dict[str, Callable[[Any], object]] = {
    "torch.func": gradient,
    "torch.export": lambda model: torch.export.export(Logits(model), (IDS,), strict=False),
    "torch.jit.trace": lambda model: torch.jit.trace(Logits(model), IDS, check_trace=False),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_what_computes_nothing_with_a_model_is_refused(tmp_path: Path, name: str) -> None:
    model, transform = build("mixtral"), TRANSFORMS[name]
    with moe_inspect.record(model, tmp_path / "t") as recorder:
        for _ in range(2):
            with pytest.raises(MoeInspectError, match=f"{name} cannot take a Mixtral.*paused"):
                transform(model)
            model(IDS)
        with recorder.paused():
            transform(model)
        model(IDS)
    assert recorder.tokens == 3 * 32
    assert moe_inspect.check(tmp_path / "t", quick=True).ok


def fail(model: Any) -> None:
    with pytest.raises(IndexError):
        model(IDS + 10**6)


def test_two_threads_are_told_that_they_share_a_model(tmp_path: Path) -> None:
    """A thread that comes after another is fine, also where its pass has failed."""
    model, inside, over = build("mixtral"), threading.Event(), threading.Event()
    waits = False

    def wait(*_: Any) -> None:
        if waits:
            inside.set()
            assert over.wait(60)

    model.model.layers[1].register_forward_pre_hook(wait)
    with moe_inspect.record(model, tmp_path / "t") as recorder:
        model(IDS)
        failing = threading.Thread(target=fail, args=(model,))
        failing.start()
        failing.join()
        model(IDS)
        waits = True
        other = threading.Thread(target=model, args=(IDS,))
        other.start()
        assert inside.wait(60)
        with pytest.raises(MoeInspectError, match="another thread is running this Mixtral"):
            model(IDS)
        waits = False
        over.set()
        other.join()
        model(IDS)
    assert recorder.tokens == 4 * 32
    assert moe_inspect.check(tmp_path / "t", quick=True).ok


@pytest.mark.parametrize("capture", ["tap", "dispatch"])
def test_a_copy_runs_the_models_own_experts_and_is_not_pickled(
    tmp_path: Path, capture: Any
) -> None:
    model = build("qwen3_moe")
    before, expected = model.get_experts_implementation(), model(IDS).logits
    with moe_inspect.record(model, tmp_path / "t", capture=capture):
        model(IDS)
        copied, layers = copy.deepcopy(model), copy.deepcopy(model.model.layers)
        assert copied.get_experts_implementation() == before
        assert layers[0].mlp.experts.config._experts_implementation == before[""]
        with pytest.raises(MoeInspectError, match="cannot be pickled while it is being recorded"):
            pickle.dumps(model)
        with pytest.raises(MoeInspectError, match=r"save its state_dict\(\)"):
            torch.save(model, io.BytesIO())
    assert model.get_experts_implementation() == before
    assert torch.equal(copied(IDS).logits, expected)
    with moe_inspect.record(copied, tmp_path / "u", capture="dispatch"):
        copied(IDS)  # as any other
    assert copied.get_experts_implementation() == before
    assert pickle.loads(pickle.dumps(model))(IDS).logits.equal(expected)


def test_a_script_is_not_recorded(tmp_path: Path) -> None:
    made = torch.jit.script(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4)))
    for model in (made, Wrapper(made)):
        with pytest.raises(MoeInspectError, match=r"Sequential is a ScriptModule, .* made from"):
            moe_inspect.record(model, tmp_path / "t")
