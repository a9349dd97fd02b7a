"""Replaces torch, and what of transformers is not needed to build a model, in this process."""

# pyright: strict, reportPrivateImportUsage=false, reportUnusedImport=false

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from moe_inspect.model.shapes import modules, tensors
from moe_inspect.model.shapes.modules import Module
from moe_inspect.model.shapes.tensors import Tensor
from moe_inspect.model.shapes.unknown import Unknown

# What models are built with, and can take seconds to import
REPLACED = {"torch", "torchvision", "safetensors", "accelerate", "triton", "scipy", "sympy"}
# What of transformers builds models; the rest, if it is not loaded with the configs, only runs
# them
BUILDS = re.compile(
    r"transformers\.(activations|backbone_utils|pytorch_utils|modeling_(utils|layers)|utils(\.\w+)*"
    r"|models(\.\w+)?(\.(modeling|configuration)_\w+)?|models\.auto\.\w+)"
)


class Device:
    def __init__(self, *args: object) -> None:
        self.type = "meta"

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *error: object) -> None: ...


def _unchanged(decorated: Any) -> Any:
    return decorated


def _decorator(function: object) -> Any:
    return _unchanged


TENSOR_TYPES = ("LongTensor", "FloatTensor", "IntTensor", "BoolTensor", "HalfTensor")
KNOWN: dict[str, dict[str, Any]] = {
    "torch": {
        **tensors.FUNCTIONS,
        **{name: type(name, (Tensor,), {}) for name in TENSOR_TYPES},
        "Tensor": Tensor,
        "device": Device,
        "dtype": type("dtype", (), {}),
        # transformers asks for it where torch is not installed
        "__version__": "2.11",
        "Size": type("Size", (tuple,), {}),
    },
    "torch.nn": modules.NAMES,
    "torch.nn.parameter": {"Parameter": tensors.Parameter},
    "torch.autograd": {"Function": type("Function", (), {})},
    "torch.compiler": {"is_compiling": lambda: False},
    "torch.accelerator": {"current_accelerator": lambda: None},
    "transformers.integrations.hub_kernels": {"use_kernelized_func": _decorator},
}


class StandIn(ModuleType):
    """A module whose names are those of `KNOWN`; all others are of unknown value."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        path = f"{self.__name__}.{name}"
        return import_module(path) if path in KNOWN else sys.modules.get(path, Unknown(path))


class Finder(MetaPathFinder, Loader):
    configs_loaded = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package = fullname.partition(".")[0]
        idle = package == "transformers" and self.configs_loaded and not BUILDS.fullmatch(fullname)
        return ModuleSpec(fullname, self, is_package=True) if idle or package in REPLACED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(KNOWN.get(module.__name__, {}))


def install() -> None:
    """From here on this process has no torch, and transformers can only read configs and build
    models."""
    finder = Finder()
    sys.meta_path.insert(0, finder)
    from transformers import AutoConfig, GenerationConfig, utils  # noqa: F401

    # documentation, most of the time that a model's file takes to import
    utils.auto_docstring = _documented
    finder.configs_loaded = True
    from transformers.modeling_utils import PreTrainedModel

    made: Any = PreTrainedModel
    made.__init__ = _init
    made.init_weights = lambda self: self.tie_weights(recompute_mapping=False)  # pyright: ignore
    made._from_config = classmethod(lambda kind, config, **options: kind(config))  # pyright: ignore
    for name in (
        "init_parallel_plans",
        "_adjust_bias",
        "_backward_compatibility_gradient_checkpointing",
    ):
        setattr(made, name, _nothing)


def _documented(decorated: Any = None, **options: object) -> Any:
    return decorated if decorated is not None else _unchanged


def _nothing(*args: object) -> None: ...


def _init(self: Any, config: Any, *args: object, **options: object) -> None:
    """As transformers', without a look at the machine: what it would choose has the same
    parameters."""
    Module.__init__(self)
    self.config = config
    config._attn_implementation_internal = "sdpa" if self._supports_sdpa else "eager"
    config._experts_implementation_internal = "grouped_mm"
