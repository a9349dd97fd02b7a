"""Receives the outputs of one router: the hooks that read a choice, and where it is written.

T tokens, K slots, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from threading import get_ident
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module

from moe_inspect.capture.hook import kernels
from moe_inspect.capture.hook.kernels import Tape
from moe_inspect.model.choices import called_with
from moe_inspect.model.routers import Site, logits_among

if TYPE_CHECKING:
    from moe_inspect.capture.hook.inputs.rows import CallInputs, Rows
    from moe_inspect.model.choices import Args, Choice, Kwargs


class Records(Protocol):
    """Receives the events of a forward pass: its begin; per stack ("" for a model without two) its
    inputs and output, and the whole model's output (""); its end."""

    def begin(self) -> None: ...
    def feed(self, stack: str, args: Args, kwargs: Kwargs) -> None: ...
    def returned(self, stack: str, output: object) -> None: ...
    def end(self) -> None: ...


class Scope:
    """Whether a stack's routers are being recorded: during a call of `module`. A recomputation
    outside it (gradient checkpointing) is not recorded a second time.

    to_tapes     whether kernels write the calls of the current pass to tapes, where there are any
    in_graph     whether what takes the other calls may be part of a graph of torch.compile
    is_known     whether the code is of transformers, which is tested; of other code nothing is
                 known
    begin_graph  called where torch.compile makes a graph in the middle of a pass: from then on the
                 pass goes to tapes, as the graph writes to them"""

    def __init__(self, stack: str, module: Module, is_known: bool):
        self.stack, self.module, self.is_known = stack, module, is_known
        self.open = self.to_tapes = False
        self.in_graph = True
        self.thread = 0  # in which it was opened
        self.fed: Rows | CallInputs | None = None  # in the current pass
        self.passes = 0  # that have begun
        self.begin_graph: Callable[[], None] = lambda: None

    def __deepcopy__(self, memo: object) -> Scope:
        return self  # what is copied is a module

    def start(self) -> None:
        """A call of the stack begins."""
        self.open, self.thread = True, get_ident()

    @torch.compiler.assume_constant_result  # runs while a graph is made, and is no part of it
    def compiled(self) -> None:
        if not self.to_tapes:
            self.begin_graph()


class Sink:
    """Receives one router's outputs while its scope is open: returns the tape that a kernel is to
    write them to, or passes them to `take`."""

    take: Callable[..., None]  # (ids, weights), or of one of `schema.EXTRAS` (values)

    def __init__(self, scope: Scope):
        self.scope = scope
        self.tapes: list[Tape] = []  # one per run of its layer in a forward pass
        self._calls = self._pass = 0  # in the current forward pass

    def __deepcopy__(self, memo: object) -> Sink:
        return self  # what is copied is a module

    def __call__(self, ids: Tensor | None, values: Tensor) -> Tape | None:
        """`ids` is None for router logits."""
        scope = self.scope
        if is_compiling := torch.compiler.is_compiling():
            scope.compiled()
        if not scope.open:
            return None
        # (`to_tapes` is not read while a graph is made: the graph would be guarded by it)
        if not self.tapes or not (is_compiling or scope.to_tapes):
            values = values.detach() if values.requires_grad else values
            call = (values,) if ids is None else (ids, values)
            if is_compiling and not scope.in_graph:
                _take_copies(self.take, *call)
            else:
                self.take(*call)
            return None
        if len(self.tapes) == 1:
            return self.tapes[0]
        if self._pass != scope.passes:
            self._pass, self._calls = scope.passes, 0
        self._calls += 1
        return self.tapes[(self._calls - 1) % len(self.tapes)]

    def record(self, ids: Tensor | None, values: Tensor) -> None:
        """As a call of it, and writes to the tape."""
        if (tape := self(ids, values)) is not None:
            kernels.record(tape, ids, values)


@torch.compiler.disable(reason="what a router has chosen is kept outside compiled code")
def _take_copies(take: Callable[..., None], *call: Tensor) -> None:
    """(The graph may use its memory again.)"""
    take(*(tensor.clone() for tensor in call))


Sinks = Mapping[str, Sink]  # of a router, by what they receive: choices (""), or `schema.EXTRAS`


def watching(
    sink: Sink, read: Callable[..., tuple[Tensor | None, Tensor] | None]
) -> Callable[..., None]:
    """A hook before or after a module's call, with kwargs, that passes on what `read` finds in it:
    (ids, weights), or (None, values); None where there is nothing: the completeness check names the
    module then. Nothing is saved for the backward pass: under activation checkpointing a block may
    be recomputed without `read`, or with it alone."""
    read = read if read is called_with else torch.no_grad()(read)

    def hook(module: Module, args: Args, kwargs: Kwargs, out: object = None) -> None:
        if (found := read(module, args, kwargs, out)) is not None:
            sink.record(*found)

    return hook


def logits_read(site: Site) -> Callable[..., tuple[None, Tensor] | None]:
    def read(module: Module, *call: Any) -> tuple[None, Tensor] | None:
        of = site.logits_of
        logits_TE = of(module, *call) if of is not None else logits_among(call[-1], site)
        return (None, logits_TE) if logits_TE is not None else None

    return read


def replaced(owner: Any, name: str, made_of: Callable[[Any], Any]) -> Callable[[], None]:
    """Puts `made_of` the attribute `name` into its place, on this object alone, until what this
    returns is called. Recorders may end in any order: the last one puts the original back. What
    somebody else has put there since then stays."""
    before, made = vars(owner).get(name), made_of(getattr(owner, name))
    state = vars(getattr(made, "__func__", made))
    state.update(before=before, over=False)
    setattr(owner, name, made)

    def put_back() -> None:
        state["over"] = True
        if vars(owner).get(name) is not made:
            return
        original = before
        while getattr(original, "over", False):
            original = original.before
        if original is not None:
            setattr(owner, name, original)
        else:
            delattr(owner, name)

    return put_back


def before_method(module: Module, name: str, hook: Callable[..., None]) -> Callable[[], None]:
    """`register_forward_pre_hook(hook, with_kwargs=True)` for any method of `module`. Returns what
    removes it. It costs a call of `forward` some 5 µs less than a hook: once there is one,
    `Module.__call__` goes a long way."""
    own, inner = vars(module).get(name), getattr(type(module), name)
    if own is not None and hasattr(own, "over"):  # another recorder's
        inner = own.func
    elif own is not None:
        inner = lambda self, /, *args, **kwargs: own(*args, **kwargs)  # noqa: E731

    def run(self: Module, /, *args: Any, **kwargs: Any) -> Any:
        hook(self, args, kwargs)
        return inner(self, *args, **kwargs)

    # (a deep copy of it belongs to the copy of the module)
    return replaced(module, name, lambda _: functools.partial(run, module))


def dropped_before_call(
    site: Site, router: Module, choice_of: Callable[..., Choice | None]
) -> tuple[Callable[..., None], Callable[..., Choice | None]]:
    """A hook for the `router` of a site, which is called before its experts, and `choice_of` with
    what that call says was dropped: id + E."""
    assert site.dropped is not None
    dropped_of, last = torch.no_grad()(site.dropped), list[Tensor]()

    def hook(module: Module, args: Args, output: object) -> None:
        if module is router:  # not a copy of it
            last[:] = [dropped_of(module, output)]

    def choice(*call: Any) -> Choice | None:
        found, dropped = choice_of(*call), last.pop() if last else None
        if found is None or dropped is None:
            return found
        ids_TK, weights_TK = found
        dropped_TK = dropped.to(ids_TK.device)
        is_dropped = (ids_TK < 0) & (dropped_TK >= 0)
        return torch.where(is_dropped, dropped_TK + site.experts, ids_TK), weights_TK

    return hook, choice
