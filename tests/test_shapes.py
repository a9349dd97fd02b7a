"""What is described without torch is what is described with it, or is left to torch."""

from __future__ import annotations

import os
import shutil
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_inspect
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.describe import describe_built
from moe_inspect.model.shapes import modules, tensors
from moe_inspect.model.shapes.ask import ask, describe_without_torch
from moe_inspect.model.shapes.tensors import Parameter, Tensor
from moe_inspect.model.shapes.unknown import Undetermined, Unknown
from tests import zoo
from tests.conftest import ROOT, Cli
from tests.sweep import sample

CONFIGS = sorted((ROOT / "docs" / "configs").glob("*.json"))


@pytest.mark.slow
def test_every_family_is_described_as_with_torch(tmp_path: Path) -> None:
    """Tiny and at the sizes of its config class, with embeddings tied and not, with its towers: a
    sample, in `make test-families` all."""
    configs: dict[str, Any] = {}
    families = sample(zoo.FAMILIES, 5)
    for family in families:
        if family not in zoo.WHY_NOT:
            configs[f"{family}-tiny"] = zoo.config(family)
            configs[f"{family}-default"] = (
                zoo.model_class(family).config_class or zoo.hf.PreTrainedConfig
            )()
    for family in sample(zoo.WITH_TOWERS, 3):
        configs[f"{family}-towers"] = zoo.build_with_towers(family).config
    expected = {}
    for name, config in configs.items():
        config.save_pretrained(tmp_path / name)
        try:
            expected[name] = describe_built(str(tmp_path / name))
        # the defaults of some classes do not fit each other
        except MoeInspectError:
            assert name.endswith("-default")
    assert len(expected) > 1.8 * len(families)
    answers = ask({"model": str(tmp_path / name)} for name in expected)
    assert len(answers) == len(expected)
    without = dict(zip(expected, answers, strict=True))
    assert {name: made for name, made in without.items() if made != expected[name]} == {}
    for made in expected.values():
        lines = str(made).splitlines()
        assert (len(lines) <= 20, max(map(len, lines)) <= 80) == (True, True), f"{made}"
    tied = [made.total["output head"] == 0 for made in expected.values()]
    assert any(tied)
    assert not all(tied)


def test_it_needs_no_torch(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('torch is imported')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    for config in CONFIGS[:1]:
        said = cli("describe", config, "--context", "1000", env=environment).stdout
        assert said == f"{moe_inspect.describe(str(config), context=1000)}\n"
        assert "1,000 tokens" in said
    # nor to say that there is no model
    for model, says in (("./none", "no model at ./none"), ("torch.py", "is not a model's config")):
        assert says in cli("describe", model, env=environment, check=1).stderr


def test_real_configs_and_traces() -> None:
    models = [*map(str, CONFIGS), "demo", str(ROOT / "sample_traces" / "balanced")]
    assert ask({"model": model} for model in models) == [describe_built(m) for m in models]


def test_what_takes_torch_is_left_to_it(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert ask([{"model": str(tmp_path)}, {"model": "demo"}]) == [None, describe_built("demo")]
    assert cli("describe", ".", check=1).stderr.startswith("error: cannot build a language model")
    # torch is loaded here
    assert describe_without_torch("demo") is None
    monkeypatch.delitem(sys.modules, "torch")
    assert describe_without_torch("demo") == moe_inspect.describe("demo")
    assert describe_without_torch("demo", trust_remote_code=True) is None
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    assert describe_without_torch("demo") is None


LAYERS: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "Linear": [((3, 5), {}), ((3, 5), {"bias": False})],
    "Embedding": [((7, 3), {}), ((7, 3, 1), {})],
    "LayerNorm": [((4,), {}), (((4, 2),), {"elementwise_affine": False}), ((4,), {"bias": False})],
    "RMSNorm": [((4,), {}), ((4, 1e-6), {"elementwise_affine": False})],
    "GroupNorm": [((2, 4), {}), ((2, 4), {"affine": False})],
    "BatchNorm1d": [((4,), {}), ((4,), {"affine": False})],
    "BatchNorm2d": [((4,), {})],
    "Conv1d": [((4, 6, 3), {"groups": 2}), ((4, 6, (3,)), {"bias": False})],
    "Conv2d": [((4, 6, 3), {}), ((4, 6, (3, 2)), {})],
    "Conv3d": [((4, 6, (1, 2, 3)), {}), ((4, 6, 2), {})],
    "MultiheadAttention": [((8, 2), {}), ((8, 2), {"bias": False, "batch_first": True})],
}


def parameters_of(module: Any) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(p.shape)) for name, p in module.named_parameters()]


@pytest.mark.parametrize("name", sorted(modules.NAMES.keys() - {"Module", "Parameter", "Buffer"}))
def test_a_module_has_the_parameters_of_torchs(name: str) -> None:
    if name in modules.WITHOUT_PARAMETERS:
        made = {"Softmax": (1,), "Unfold": (2,), "ZeroPad2d": (1,)}.get(name, ())
        needs = "Pool" in name or "Pixel" in name
        assert not [*getattr(torch.nn, name)(*((2,) if needs else made)).parameters()]
        assert not [*modules.NAMES[name](2).parameters()]
    elif "Module" in name or name == "Sequential":
        parts = [("a", "Linear", (2, 3)), ("b", "LayerNorm", (3,))]
        both = []
        for nn in (modules.NAMES, vars(torch.nn)):
            named = OrderedDict((key, nn[kind](*sizes)) for key, kind, sizes in parts)
            given = [[named], named.values()] if name == "Sequential" else [[named]]
            given = [[named.values()]] if name == "ModuleList" else given
            both.append([parameters_of(nn[name](*values)) for values in given])
        assert both[0] == both[1]
    else:
        for args, options in LAYERS[name]:
            own, real = (nn[name](*args, **options) for nn in (modules.NAMES, vars(torch.nn)))
            assert parameters_of(own) == parameters_of(real)


def test_shapes_are_torchs() -> None:
    own, real = tensors.FUNCTIONS, vars(torch)
    for name, args in (
        *((name, (2, 3)) for name in ("empty", "zeros", "ones", "rand", "randn")),
        *(("zeros", ((2, 3),)), ("zeros", ((),)), ("full", ((2, 3), 1.0)), ("tensor", ([[1, 2]],))),
        *(("tensor", (0.5,)), ("arange", (7,)), ("arange", (1, 8, 2)), ("linspace", (0, 1, 5))),
    ):
        assert own[name](*args).shape == tuple(real[name](*args).shape), (name, args)
    for name in ("zeros_like", "ones_like", "empty_like", "log", "exp"):
        assert own[name](Tensor(2, 3)).shape == real[name](torch.ones(2, 3)).shape
    for a, b in (((2, 3), (3,)), ((2, 1), (4,)), ((), (2,)), ((5, 1, 3), (2, 3))):
        assert (Tensor(*a) * Tensor(*b)).shape == tuple((torch.ones(a) * torch.ones(b)).shape)
    made = 1 / 10.0 ** (tensors.FUNCTIONS["arange"](0, 8, 2) / 8)
    assert made[None, :].expand(6, -1).contiguous().log().shape == (6, 4)
    assert (made.numel(), made.dim(), made.size(0)) == (4, 1, 4)


def test_nothing_is_guessed() -> None:
    value: Any = Unknown("torch.f")
    module = modules.Module()
    assert isinstance((value + 1)[0].a(2) > 3, Unknown)
    for guess in (
        *(bool, int, float, list, len, Parameter, Tensor, lambda v: 3 in v, lambda v: v == 1 or 2),
        *(lambda v: Tensor(2, v * 4), lambda v: bool(Tensor(1)), lambda v: v(modules.Module())),
        lambda v: modules.NAMES["Sequential"](v),
        lambda v: modules.NAMES["ModuleDict"]({"a": v}),
        lambda v: setattr(module, "part", Unknown("transformers.kernels").Norm(3)),
        lambda v: Unknown("torch.nn").LSTM(3, 4),
        lambda v: type(Unknown("torch.nn").LSTM)("torch.nn.LSTM")(2),
    ):
        with pytest.raises(Undetermined):
            guess(value)

    class Derived(Unknown("torch.nn.LSTM")):  # type: ignore[misc]
        pass

    class Mixed(Unknown("transformers.generation.Mixin"), modules.Module):  # type: ignore[misc]
        pass

    with pytest.raises(Undetermined):
        Derived(2)
    assert parameters_of(Mixed()) == []
    # as a decorator it changes nothing
    assert value(Derived) is Derived
    assert value(parameters_of) is parameters_of
