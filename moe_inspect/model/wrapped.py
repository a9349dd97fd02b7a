"""The model inside what wraps it: torch.compile, DistributedDataParallel, FSDP, PEFT, or any other
module."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence

from moe_inspect.errors import MoeInspectError
from moe_inspect.model.choices import Args, Called, Kwargs
from moe_inspect.model.families import ADAPTERS

INPUTS = {"input_ids", "inputs_embeds"}


def unwrapped(model: Called, by_path: bool = False) -> Called:
    """The transformers model with routers that `model` is or holds; else, and where routers are
    given `by_path` in what is called, the model inside torch's own wrappers. MoeInspectError where
    there are several, as in a trainer that holds a policy and its reference."""
    if not hasattr(model, "named_modules"):
        raise MoeInspectError(f"{type(model).__name__} is no model: give a torch.nn.Module")
    # nothing is one of transformers where it is not loaded
    kind: Called = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", ())
    found: dict[str, Called] = {}
    for path, module in () if by_path else model.named_modules():
        inside = any(not outer or path.startswith(f"{outer}.") for outer in found)
        if not inside and isinstance(module, kind):
            kinds = {type(inner).__name__ for inner in module.modules()}
            if any(kind.endswith("Experts") or kind in ADAPTERS for kind in kinds):
                found[path] = module
    if len(found) > 1:
        raise MoeInspectError(
            f"{type(model).__name__} holds {len(found)} models with routers: record one of "
            f"{', '.join(found)}"
        )
    for module in found.values():
        return module
    # inside wrappers of one child that hand on whatever they are called with
    while not _is_script(model) and len(list(model.children())) == 1 and not _arguments(model):
        (model,) = model.children()
    if _is_script(model):
        raise MoeInspectError(
            f"{model.original_name} is a ScriptModule, whose routers cannot be seen, as it runs "
            "without Python: record the model that it was made from"
        )
    return model


def wrappers_of(model: Called, inner: Called) -> list[Called]:
    """The modules from `model` down to `inner`, which they wrap: none where the two are one."""
    path = next(path for path, module in model.named_modules() if module is inner)
    parts = path.split(".") if path else []
    return [model.get_submodule(".".join(parts[:n])) for n in range(len(parts))]


def is_compiled_wrapper(module: Called) -> bool:
    """Whether torch.compile(model) returned it. (PEFT and FSDP hand on attributes of a model.)"""
    return "_orig_mod" in getattr(module, "_modules", {})


def is_compiled(model: Called) -> bool:
    """Whether torch.compile was applied to any part of `model`."""
    return any(
        hasattr(m, "_orig_mod")
        or getattr(m, "_compiled_call_impl", None) is not None
        or "_compiled_call" in vars(m)
        for m in model.modules()
    )


def call_of_model(
    wrappers: Sequence[Called], args: Args, kwargs: Kwargs
) -> tuple[Args, Kwargs] | None:
    """The arguments of the model's call in those of the first of its `wrappers`. None where that
    does not name what a model reads: its own call will."""
    names = next((names for wrapper in wrappers if (names := _arguments(wrapper))), None)
    if names is None:  # they hand on whatever they are called with
        return args, kwargs
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return ((), given) if any(given.get(name) is not None for name in INPUTS) else None


def _arguments(wrapper: Called) -> list[str]:
    """The names of its forward's arguments; none where it hands on any."""
    if is_compiled_wrapper(wrapper):
        return []
    parameters = inspect.signature(wrapper.forward).parameters.values()
    any_number = any(p.kind == p.VAR_POSITIONAL for p in parameters)
    return [] if any_number else [p.name for p in parameters if p.kind != p.VAR_KEYWORD]


def _is_script(model: Called) -> bool:
    """Whether torch.jit has made it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.jit.ScriptModule)
