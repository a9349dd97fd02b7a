"""Compiled code runs eagerly while any recorder needs that."""

from __future__ import annotations

from contextlib import ExitStack
from typing import ClassVar

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
