"""Receives the outputs of one router: the forward hooks that read a choice, and where it is
written.

T tokens, K slots, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_inspect.capture.hook import kernels
from moe_inspect.capture.hook.kernels import Tape
from moe_inspect.model.routers import Site, logits_among

if TYPE_CHECKING:
    from moe_inspect.model.families import Choice


class Scope:
    """Whether a stack's routers are being recorded: during a call of `module`. A recomputation
    outside it (gradient checkpointing) is not recorded a second time."""

    def __init__(self, stack: str, module: torch.nn.Module):
        self.stack, self.module = stack, module
        self.open = False


class Sink:
    """Receives one router's outputs while its scope is open: returns the tape that a kernel writes
    them to, or passes them to `take` while there is none."""

    def __init__(self, scope: Scope, take: Callable[..., None]):
        self.scope, self.take = scope, take
        self.tapes: list[Tape] = []  # one per run of its layer in a forward pass
        self.calls = 0  # in the current forward pass

    def __call__(self, *values: Tensor) -> Tape | None:
        if not self.scope.open:
            return None
        if not self.tapes:
            self.take(*(v.detach() for v in values))
            return None
        if len(self.tapes) == 1:
            return self.tapes[0]
        self.calls += 1
        return self.tapes[(self.calls - 1) % len(self.tapes)]


def choice_at_call(sink: Sink, choice_of: Callable[..., Choice | None]) -> Callable[..., None]:
    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _seen(sink, choice_of(module, [*args, *kwargs.values()], None))

    return hook


def choice_after_call(sink: Sink, choice_of: Callable[..., Choice | None]) -> Callable[..., None]:
    def hook(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        _seen(sink, choice_of(module, list(args), output))

    return hook


def _seen(sink: Sink, choice: Choice | None) -> None:
    if (
        choice is not None and (tape := sink(*choice)) is not None
    ):  # without a choice, the completeness check names the module
        kernels.record(tape, *choice)


def logits_after_call(sink: Sink, site: Site) -> Callable[..., None]:
    def hook(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        logits_TE = logits_among(output, site)
        if logits_TE is not None and (tape := sink(logits_TE)) is not None:
            kernels.record(tape, None, logits_TE)

    return hook
