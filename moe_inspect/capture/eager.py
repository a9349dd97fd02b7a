"""Callers of a model that is being recorded. Compiled code runs eagerly while any recorder needs
that; another thread, torch.func, torch.export and torch.jit.trace are refused."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import ExitStack
from threading import get_ident
from typing import Any, ClassVar, NoReturn

import torch
from torch._dynamo.utils import counters  # (torch.compiler.disable imports it anyhow)

from moe_inspect.errors import MoeInspectError

# they call a model with stand-ins for its tensors → whether one of them calls it now
TRANSFORMS: dict[str, Callable[[], bool]] = {
    "torch.func": torch._C._are_functorch_transforms_active,
    "torch.export": torch.compiler.is_exporting,
    "torch.jit.trace": torch._C._is_tracing,
}

NOT_COMPILED = (
    "to record it without a graph break, record what torch.compile returned; to export it, call "
    "torch.export before or after the recording"
)


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


def check_caller(model: torch.nn.Module, thread: int | None) -> int:
    """The id of the thread that begins a forward pass. MoeInspectError where the pass cannot be
    recorded. `thread`: id of the thread of the pass before, where that may still be running."""
    name, here = type(model).__name__, get_ident()
    if thread not in (None, here) and _runs(thread, model):
        raise MoeInspectError(
            f"another thread is running this {name}, and forward passes are recorded one at a "
            "time: hold a lock around each call"
        )
    for transform, is_on in TRANSFORMS.items():
        if is_on():
            raise MoeInspectError(
                f"{transform} cannot take a {name} that is being recorded: call it before or "
                "after, or within recorder.paused()"
            )
    return here


def _runs(thread: int, model: torch.nn.Module) -> bool:
    """Whether a thread is in a call of a module of the model."""
    frame, modules = sys._current_frames().get(thread), {id(m) for m in model.modules()}
    while frame is not None:
        if id(frame.f_locals.get("self")) in modules:
            return True
        frame = frame.f_back
    return False


def not_pickled(self: object) -> NoReturn:
    """`__reduce__` of what a recorder attaches to a model."""
    raise MoeInspectError(
        "a model cannot be pickled while it is being recorded, nor a copy that was made meanwhile: "
        "save its state_dict(), or pickle it after the recording"
    )
