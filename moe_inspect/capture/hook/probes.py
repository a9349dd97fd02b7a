"""Probes as the routers of a recorder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from moe_inspect.capture.hook import kernels
from moe_inspect.capture.hook.sink import Scope, Sink
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.custom.find import as_choice
from moe_inspect.model.routers import Site

Sinks = tuple[Sink, "Sink | None"]


class Probes:
    """The probes in a model's forward as the routers of a recorder, which is recording while one of
    `scopes` is open. `add`: makes the sinks of a new router; None where the recorder knows the
    model's routers without probes. `layers`: to be recorded; None: all."""

    def __init__(
        self,
        scopes: Mapping[str, Scope],
        add: Callable[[Site], Sinks] | None,
        model: Any,
        layers: Sequence[int] | None,
    ):
        self.scopes, self.add, self.model, self.layers = list(scopes.values()), add, model, layers
        self.sinks: dict[int, Sinks | None] = {}  # by layer; None: not recorded

    def __call__(
        self,
        layer: int,
        ids: Tensor,
        weights: Tensor,
        experts: int | None,
        logits: Tensor | None,
    ) -> None:
        if not any(scope.open for scope in self.scopes):
            return
        if layer not in self.sinks:
            self.sinks[layer] = self._new(layer, experts, logits)
        if (sinks := self.sinks[layer]) is None:
            return
        path = name_of(layer)
        ids, weights = as_choice(ids, weights, path)
        if (tape := sinks[0](ids, weights)) is not None:
            kernels.record(tape, ids, weights)
        if sinks[1] is None:
            return
        if logits is None:
            raise MoeInspectError(
                f"{path} shows no router logits: give it logits=, or record without logits=True"
            )
        logits = logits.detach().reshape(-1, logits.shape[-1])
        if (tape := sinks[1](None, logits)) is not None:
            kernels.record(tape, None, logits)

    def _new(self, layer: int, experts: int | None, logits: Tensor | None) -> Sinks | None:
        name = name_of(layer)
        if self.add is None:
            raise MoeInspectError(
                f"{name} was called in {type(self.model).__name__}, whose routers record finds "
                "without it: remove it, or give record(routers=[]) to record the probes alone"
            )
        if self.layers is not None and layer not in self.layers:
            return None
        experts = logits.shape[-1] if experts is None and logits is not None else experts
        if experts is None:
            raise MoeInspectError(
                f"{name} does not say how many experts there are: give it experts= or logits="
            )
        return self.add(Site(self.model, name, layer, experts, "", 0, told=True))


def name_of(layer: int) -> str:
    return f"probe(layer={layer})"
