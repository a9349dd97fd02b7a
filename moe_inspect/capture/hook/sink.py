"""Receives the outputs of one router: the hooks that read a choice, and where it is written.

T tokens, K slots, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from threading import get_ident
from types import MethodType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module

from moe_inspect.capture.hook import kernels
from moe_inspect.capture.hook.kernels import Tape
from moe_inspect.model.choices.read import called_with
from moe_inspect.model.routers import Site, logits_among

if TYPE_CHECKING:
    from moe_inspect.capture.hook.inputs.rows import CallInputs, Rows
    from moe_inspect.model.choices.read import Choice


class Records(Protocol):
    """Receives the events of a forward pass: its begin; per stack ("" for a model without two) its
    inputs and output, and the whole model's output (""); its end."""

    def begin(self) -> None: ...
    def feed(self, stack: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None: ...
    def returned(self, stack: str, output: Any) -> None: ...
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

    def __init__(self, stack: str, module: torch.nn.Module, is_known: bool):
        self.stack, self.module, self.is_known = stack, module, is_known
        self.open = self.to_tapes = False
        self.in_graph = True
        self.thread = 0  # in which it was opened
        self.fed: Rows | CallInputs | None = None  # in the current pass
        self.passes = 0  # that have begun
        self.begin_graph: Callable[[], None] = lambda: None

    def __deepcopy__(self, memo: dict[int, Any]) -> Scope:
        return self  # what is copied is a module

    def start(self) -> None:
        """A call of the stack begins."""
        self.open, self.thread = True, get_ident()

    def stop(self) -> None:
        self.open = False

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

    def __deepcopy__(self, memo: dict[int, Any]) -> Sink:
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


@torch.compiler.disable(reason="what a router has chosen is kept outside compiled code")
def _take_copies(take: Callable[..., None], *call: Tensor) -> None:
    """(The graph may use its memory again.)"""
    take(*(tensor.clone() for tensor in call))


def choice_before_call(sink: Sink, choice_of: Callable[..., Choice | None]) -> Callable[..., None]:
    """A forward pre-hook with kwargs."""
    choice_of = choice_of if choice_of is called_with else _aside(choice_of)

    def hook(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _seen(sink, choice_of(module, args, kwargs, None))

    return hook


def before_forward(module: Module, hook: Callable[..., None]) -> Callable[[], None]:
    """Calls `hook` by a `forward` of the instance, until what this returns is called. It costs a
    call some 5 µs less than a hook: once there is one, `Module.__call__` goes a long way."""
    inner = type(module).forward

    def forward(self: Module, /, *args: Any, **kwargs: Any) -> Any:
        hook(self, args, kwargs)
        return inner(self, *args, **kwargs)

    # (a deep copy of it belongs to the copy of the module)
    ours = module.forward = functools.partial(forward, module)

    def put_back() -> None:
        if vars(module).get("forward") is ours:  # else it is wrapped by now, and reads no more
            del module.forward

    return put_back


def before_method(
    module: torch.nn.Module, name: str, hook: Callable[..., None]
) -> Callable[[], None]:
    """`register_forward_pre_hook(hook, with_kwargs=True)` for another method of `module`. Returns
    what removes the hook."""
    hooks = getattr(vars(module).get(name), "hooks", None)
    if hooks is None:
        hooks, own, of_class = [], vars(module).get(name), getattr(type(module), name)

        def run(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            for before in hooks:
                before(self, args, kwargs)
            return own(*args, **kwargs) if own is not None else of_class(self, *args, **kwargs)

        run.__dict__.update(hooks=hooks, own=own)
        # bound, so that a copy of the module runs the copy
        setattr(module, name, MethodType(run, module))
    hooks.append(hook)

    def remove() -> None:
        hooks.remove(hook)
        if hooks or getattr(vars(module).get(name), "hooks", None) is not hooks:
            return  # another recorder's hook is left, or somebody has replaced the method since
        if (own := getattr(module, name).own) is not None:
            setattr(module, name, own)
        else:
            delattr(module, name)

    return remove


def _aside(read: Callable[..., Any]) -> Callable[..., Any]:
    """`read` with nothing saved for the backward pass: under activation checkpointing a block may
    be recomputed without it, or with it alone."""
    return torch.no_grad()(read)


def choice_after_call(sink: Sink, choice_of: Callable[..., Choice | None]) -> Callable[..., None]:
    choice_of = _aside(choice_of)

    def hook(
        module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        _seen(sink, choice_of(module, args, kwargs, output))

    return hook


def dropped_before_call(
    site: Site, router: Module, choice_of: Callable[..., Choice | None]
) -> tuple[Callable[..., None], Callable[..., Choice | None]]:
    """A hook for the `router` of a site, which is called before its experts, and `choice_of` with
    what that call says was dropped: id + E."""
    assert site.dropped is not None
    dropped_of, last = _aside(site.dropped), list[Tensor]()

    def hook(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module is router:  # not a copy of it
            last[:] = [dropped_of(module, output)]

    def choice(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> Choice | None:
        found, dropped = choice_of(module, args, kwargs, output), last.pop() if last else None
        if found is None or dropped is None:
            return found
        ids_TK, weights_TK = found
        dropped_TK = dropped.to(ids_TK.device)
        is_dropped = (ids_TK < 0) & (dropped_TK >= 0)
        return torch.where(is_dropped, dropped_TK + site.experts, ids_TK), weights_TK

    return hook, choice


def _seen(sink: Sink, choice: Choice | None) -> None:
    # without a choice, the completeness check names the module
    if choice is not None and (tape := sink(*choice)) is not None:
        kernels.record(tape, *choice)


def logits_after_call(sink: Sink, site: Site) -> Callable[..., None]:
    logits_of = _aside(site.logits_of) if site.logits_of is not None else None

    def hook(
        module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if logits_of is not None:
            logits_TE = logits_of(module, args, kwargs, output)
        else:
            logits_TE = logits_among(output, site)
        if logits_TE is not None and (tape := sink(None, logits_TE)) is not None:
            kernels.record(tape, None, logits_TE)

    return hook
