"""Receives the outputs of one router: the forward hooks that read a choice, and where it is
written.

These are hooks, although replacing `forward` on the instance would be a microsecond or two
cheaper: a copy of the model (`copy.deepcopy`, an averaged model) would still call the original's
`forward` with the original's weights, and accelerate, which replaces `forward` too, could put back
the wrong one.

T tokens, K slots, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_inspect.capture.hook import kernels
from moe_inspect.capture.hook.kernels import Tape
from moe_inspect.capture.hook.pass_buffer import Slot
from moe_inspect.model.families import called_with
from moe_inspect.model.routers import Site, logits_among

if TYPE_CHECKING:
    from moe_inspect.model.families import Choice


class Scope:
    """Whether a stack's routers are being recorded: during a call of `module`. A recomputation
    outside it (gradient checkpointing) is not recorded a second time. `buffered`: whether the
    slots of its sinks are open, which keep the choices until the pass ends."""

    def __init__(self, stack: str, module: torch.nn.Module):
        self.stack, self.module = stack, module
        self.open = self.buffered = False


class Sink:
    """Receives one router's outputs while its scope is open: keeps them in a slot, or returns the
    tape that a kernel writes them to, or passes them to `take` while there is neither."""

    def __init__(self, scope: Scope, take: Callable[..., None]):
        self.scope, self.take = scope, take
        # one per run of its layer in a forward pass
        self.tapes: list[Tape] = []
        self.slots: Sequence[Slot] = ()
        self.calls = 0  # in the current forward pass

    def __call__(self, ids: Tensor | None, values: Tensor) -> Tape | None:
        """`ids` is None for router logits."""
        scope = self.scope
        if scope.buffered and scope.open and not torch.compiler.is_compiling():
            self._of_this_run(self.slots).keep(ids, values)
            return None
        if not scope.open:
            return None
        if not self.tapes:
            self.take(*(v.detach() for v in (ids, values) if v is not None))
            return None
        return self._of_this_run(self.tapes)

    def keeps(self, ids: Any, values: Any) -> bool:
        """Keeps a choice whose ids and weights are what they are in nearly every call; False where
        they have to be looked for among the arguments."""
        scope = self.scope
        if not (scope.buffered and scope.open and len(self.slots) == 1):
            return False
        slot = self.slots[0]
        if (
            type(ids) is not Tensor
            or type(values) is not Tensor
            or ids.dtype is not torch.int64
            or values.shape != slot.shape
            or ids.shape != slot.shape
            or not values.dtype.is_floating_point
        ):
            return False
        slot.keep(ids, values)
        return True

    def _of_this_run(self, places: Sequence[Any]) -> Any:
        if len(places) == 1:
            return places[0]
        self.calls += 1
        return places[(self.calls - 1) % len(places)]


def choice_at_call(sink: Sink, choice_of: Callable[..., Choice | None]) -> Callable[..., None]:
    by_type = choice_of is called_with

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # (hidden states, ids, weights) can be nothing else
        if by_type and len(args) == 3 and not kwargs and sink.keeps(args[1], args[2]):
            return
        _seen(sink, choice_of(module, [*args, *kwargs.values()], None))

    return hook


def choice_after_call(sink: Sink, choice_of: Callable[..., Choice | None]) -> Callable[..., None]:
    def hook(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        _seen(sink, choice_of(module, list(args), output))

    return hook


def _seen(sink: Sink, choice: Choice | None) -> None:
    # without a choice, the completeness check names the module
    if choice is not None and (tape := sink(*choice)) is not None:
        kernels.record(tape, *choice)


def logits_after_call(sink: Sink, site: Site) -> Callable[..., None]:
    def hook(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        logits_TE = logits_among(output, site)
        if logits_TE is not None and (tape := sink(None, logits_TE)) is not None:
            kernels.record(tape, None, logits_TE)

    return hook
