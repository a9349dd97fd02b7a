"""Compiled code, and what runs beside it: it runs eagerly while any recorder needs that."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch._dynamo.utils import counters  # (torch.compiler.disable imports it anyhow)


class Eager:
    """Two recorders of one model begin and end a pass in the same order, where the contexts of
    `torch.compiler.set_stance` would have to be nested: so there is one, held by both."""

    _held_by: ClassVar[set[Eager]] = set()
    _stance: ClassVar[ExitStack] = ExitStack()

    def hold(self) -> None:
        if not self._held_by:
            self._stance.enter_context(torch.compiler.set_stance("force_eager"))
        self._held_by.add(self)

    def release(self) -> None:
        if self in self._held_by:
            self._held_by.remove(self)
            if not self._held_by:
                self._stance.close()


def has_compiled() -> bool:
    """Whether torch.compile has compiled anything in this process."""
    return bool(counters["frames"])


def not_compiled(reason: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`torch.compiler.disable`, which costs an eager call some 10 µs, for a method."""

    def made_of(method: Callable[..., None]) -> Callable[..., None]:
        disabled = torch.compiler.disable(method, reason=reason)

        @functools.wraps(method)
        def run(*args: Any) -> None:
            (disabled if torch.compiler.is_compiling() else method)(*args)

        return run

    return made_of
