"""`moe_inspect.probe`, a line in a model's own forward that shows a router's choice; and probes as
the routers of a recorder.

K slots, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from threading import get_ident

import torch
from torch import Tensor
from torch.nn import Module

from moe_inspect.capture.hook.stack import Scope, Sinks
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.custom.choice import ChoiceReader
from moe_inspect.model.routers import Site

# (layer, ids, weights, E or None, logits or None, dropped or None), of each recorder that is open
Seen = Callable[[int, Tensor, Tensor, "int | None", "Tensor | None", "Tensor | None"], None]
_recorders: list[Seen] = []


def probe(
    ids: Tensor,
    weights: Tensor,
    *,
    layer: int,
    experts: int | None = None,
    logits: Tensor | None = None,
    dropped: Tensor | None = None,
) -> None:
    """Shows the choice of one router to an open recorder. Does nothing while there is none, and
    breaks no graph of torch.compile.

        weights, ids = scores.topk(2)
        moe_inspect.probe(ids, weights, layer=self.layer, experts=8)

    ids      expert ids, int [..., K], rows batch-first; -1 in a slot that went to no expert
    weights  gate weights, float, of the same shape
    layer    block index
    experts  E, the number of experts; may be left out where there are `logits`
    logits   router logits, float [..., E], recorded with `logits=True`
    dropped  bool, of the shape of ids: chosen, but dropped by the capacity of the expert. The slot
             is empty then, as one of -1 is, and the trace says that its empty slots are drops, and
             of which expert. To be shown from the first pass on

    Raises MoeInspectError for shapes or dtypes that are not a choice, and for a layer that the
    first forward pass did not show."""
    for seen in _recorders:
        seen(layer, ids, weights, experts, logits, dropped)


def listen(seen: Seen) -> Callable[[], None]:
    """Passes the probes to `seen` until the function returned is called."""
    _recorders.append(seen)
    return lambda: _recorders.remove(seen)


class Probes:
    """The probes in a model's forward as the routers of a recorder, while one of `scopes` is open.
    `add`: makes the sinks of a new router; None where a recorder knows them without probes.
    `layers`: to be recorded; None: all. `need_logits`: each must show logits that are recorded."""

    def __init__(
        self,
        scopes: Mapping[str, Scope],
        add: Callable[[Site], Sinks] | None,
        model: Module,
        layers: Sequence[int] | None,
        need_logits: bool = True,
    ):
        self.need_logits = need_logits
        self.scopes, self.add, self.model, self.layers = list(scopes.values()), add, model, layers
        # by layer; None: not recorded
        self.sinks: dict[int, tuple[ChoiceReader, Sinks] | None] = {}
        self._checked = add is None or layers is None

    def __call__(
        self,
        layer: int,
        ids: Tensor,
        weights: Tensor,
        experts: int | None,
        logits: Tensor | None,
        dropped: Tensor | None,
    ) -> None:
        if not any(scope.open for scope in self.scopes):
            return
        # another model may run in another thread meanwhile
        if not torch.compiler.is_compiling() and self.scopes[0].thread != get_ident():
            return
        if layer not in self.sinks:
            self.sinks[layer] = self._new(layer, experts, logits, dropped is not None)
        if (found := self.sinks[layer]) is None:
            return
        reader, sinks = found
        if experts is not None and experts != reader.experts:
            raise MoeInspectError(
                f"{reader.path} was called with experts={experts} and with {reader.experts}"
            )
        sinks[""].record(*reader.choice((ids, weights), dropped))
        if "logits" not in sinks:
            return
        if logits is not None:
            sinks["logits"].record(None, reader.logits(logits))
        elif self.need_logits:
            what = f"{reader.path} shows no router logits"
            raise MoeInspectError(f"{what}: give it logits=, or record without logits=True")

    def check_layers(self) -> None:
        """MoeInspectError where the first pass has shown no probe in a layer to be recorded."""
        if self._checked or not self.sinks:
            return
        self._checked = True
        if missing := sorted(set(self.layers or ()) - set(self.sinks)):
            called = ", ".join(map(str, sorted(self.sinks)))
            raise MoeInspectError(
                f"no probe in layer {missing[0]}: those called have the layers {called}"
            )

    def _new(
        self, layer: int, experts: int | None, logits: Tensor | None, drops: bool
    ) -> tuple[ChoiceReader, Sinks] | None:
        name = f"probe(layer={layer})"
        if self.add is None:
            raise MoeInspectError(
                f"{name} was called in {type(self.model).__name__}, whose routers record finds "
                "without it: remove it, or give routers=[] to record the probes alone"
            )
        if not isinstance(layer, Integral) or layer < 0:
            raise MoeInspectError(f"{name}: the layer is a number of 0 or more")
        if self.layers is not None and layer not in self.layers:
            return None
        experts = logits.shape[-1] if experts is None and logits is not None else experts
        if experts is None:
            raise MoeInspectError(
                f"{name} does not say how many experts there are: give it experts= or logits="
            )
        if not isinstance(experts, Integral) or experts < 1:
            raise MoeInspectError(f"{name} has experts={experts!r}: give it a number of 1 or more")
        reader = ChoiceReader(name, int(experts), None, "give it ids", drops=drops)
        reader.below = (1 + (drops and experts < 2**15)) * int(experts)
        site = Site(self.model, name, int(layer), int(experts), "", 0, told=reader)
        return reader, self.add(site)
