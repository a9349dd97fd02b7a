"""Routers found by what they do: the calls of `torch.topk` in a model's forward.

T tokens of a forward pass, K slots, E experts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moe_inspect.capture.hook.probes import Probes
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.custom.candidates import NUMBER
from moe_inspect.model.routers import layer_of
from moe_inspect.text import print_stderr

# for the manifest
NOTE = (
    "weights are what torch.topk chose by, which the router may scale before it uses them; rows "
    "were taken for batch-first"
)


class Found(NamedTuple):
    """A call of topk over E values, in a module's forward, at a line of a file."""

    path: str
    layer: int
    E: int
    ids: Tensor
    values: Tensor
    line: str


class Discovery:
    """Shows `probes` the choices of topk in a model's forward. Of several calls in the forward of
    one module, that over the most values counts, and of these the last: grouped routers choose
    groups first. A layer that has a probe already is left to it."""

    def __init__(self, model: torch.nn.Module, probes: Probes):
        self.model, self.probes = model, probes
        self._path_of = {id(module): path for path, module in model.named_modules()}
        self._found: list[Found] = []
        self._probed: set[int] = set()  # layers with a probe of the model's own
        self._told = False
        self._watching = ExitStack()

    def begin(self) -> None:
        """A forward pass begins."""
        self._watching.close()
        self._found = []
        self._watching.enter_context(_Watch(self._seen))

    def close(self) -> None:
        """It is over, or has failed."""
        self._watching.close()

    def end(self) -> None:
        """The model's forward has returned."""
        self._watching.close()
        chosen: dict[str, Found] = {}
        for found in self._found:
            if found.path not in chosen or found.E >= chosen[found.path].E:
                chosen[found.path] = found
        self._found = []
        chosen = {path: f for path, f in chosen.items() if f.layer not in self._probed}
        self._refuse_two(list(chosen.values()))
        for found in chosen.values():
            self.probes(found.layer, found.ids, found.values, found.E, None)
        if not self._told:
            self._told = True
            self._tell(list(chosen.values()))

    def _refuse_two(self, chosen: list[Found]) -> None:
        """MoeInspectError where two modules of a layer choose, and of different numbers: one may be
        a sparse attention."""
        first: dict[int, Found] = {}
        for found in chosen:
            other = first.setdefault(found.layer, found)
            if other.E != found.E:
                raise MoeInspectError(
                    f"{other.path} and {found.path} both call torch.topk, over {other.E} and "
                    f"{found.E} values ({other.line}, {found.line}): discover=True cannot tell "
                    "which chooses experts. After the line that does, call moe_inspect.probe(ids, "
                    "weights, layer=…, experts=…)"
                )

    def probed(
        self,
        layer: int,
        ids: Tensor,
        weights: Tensor,
        experts: int | None,
        logits: Tensor | None,
    ) -> None:
        """A probe in the model's own code."""
        self._probed.add(layer)
        self.probes(layer, ids, weights, experts, logits)

    def _seen(self, ids: Tensor, values: Tensor, E: int) -> None:
        found = self._caller(sys._getframe())
        if found is None:
            return
        path, line = found
        try:
            layer = layer_of(path)
        except MoeInspectError:  # not in a block: the sampling of a token
            return
        self._found.append(Found(path, layer, E, ids.detach(), values.detach(), line))

    def _caller(self, frame: FrameType | None) -> tuple[str, str] | None:
        """Path of the module of this model whose method is running, and the line it is at."""
        while frame is not None:
            names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
            owner = frame.f_locals.get(names[0]) if names else None  # `self`, of a method
            if isinstance(owner, torch.nn.Module) and id(owner) in self._path_of:
                return self._path_of[id(owner)], f"{frame.f_code.co_filename}:{frame.f_lineno}"
            frame = frame.f_back
        return None

    def _tell(self, chosen: list[Found]) -> None:
        """The lines that make the discovery unnecessary."""
        lines: dict[tuple[str, str], Found] = {}
        for found in chosen:
            lines.setdefault((NUMBER.sub(".*", found.path), found.line), found)
        for (pattern, line), found in lines.items():
            print_stderr(
                f"found routers in {pattern}: {line} chooses {found.ids.shape[-1]} of {found.E}. "
                "To record them without looking for them, write after that line:"
            )
            print_stderr(f"    moe_inspect.probe(ids, weights, layer=…, experts={found.E})")


class _Watch(TorchFunctionMode):
    """Calls `seen` (ids, values, E) with every choice of K of E values by topk, E > K."""

    def __init__(self, seen: Callable[[Tensor, Tensor, int], None]):
        super().__init__()
        self.seen = seen

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "topk":
            given = args[0] if args else (kwargs or {})["input"]
            E, K = given.shape[-1], output[1].shape[-1]
            if output[1].dim() > 1 and E > K and given.shape[:-1] == output[1].shape[:-1]:
                self.seen(output[1], output[0], E)
        return output
