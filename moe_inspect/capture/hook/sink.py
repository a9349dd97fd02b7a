"""Receives the outputs of one router: the hooks that read a choice, and where it is written.

T tokens, K slots, E experts.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from threading import get_ident
from types import MethodType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module

from moe_inspect.capture.hook import kernels
from moe_inspect.capture.hook.kernels import Tape
from moe_inspect.capture.hook.pass_buffer import Call
from moe_inspect.model.choices.read import called_with
from moe_inspect.model.routers import Site, logits_among

if TYPE_CHECKING:
    from moe_inspect.capture.hook.inputs.rows import CallInputs, Rows
    from moe_inspect.model.choices.read import Choice


class Records(Protocol):
    """Receives the events of a forward pass: its begin; per stack ("" for a model without two) its
    inputs and output, and the whole model's output (""); per router its choice, and what else is
    recorded of it (`options.EXTRAS`), while it has no tape; its end."""

    def begin(self) -> None: ...
    def feed(self, stack: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None: ...
    def returned(self, stack: str, output: Any) -> None: ...
    def take(self, r: int, ids_TK: Tensor, weights_TK: Tensor) -> None: ...
    def take_extra(self, kind: str, r: int, values: Tensor) -> None: ...
    def end(self) -> None: ...


class Scope:
    """Whether a stack's routers are being recorded: during a call of `module`. A recomputation
    outside it (gradient checkpointing) is not recorded a second time.

    `kept`: the calls of the routers in the current pass, where they are kept until it ends; None
    where each is written when it comes. `copies`: whether what is kept are copies, because the
    model changes these tensors in place later in a pass, or uses them again as output buffers; or
    because nothing is known of the model's code (that of transformers is tested)."""

    def __init__(self, stack: str, module: torch.nn.Module, copies: bool):
        self.stack, self.module, self.copies = stack, module, copies
        self.open = False
        self.thread = 0  # in which it was opened
        self.fed: Rows | CallInputs | None = None  # in the current pass
        self.kept: list[Call | bytes] | None = None
        self.references: list[Call | bytes] | None = None  # `kept`, while `refer` adds to it
        # In a pass of one row `refer` keeps the numbers, packed. The model then takes the memory of
        # the tensors again while it is in the processor's caches, and Python's garbage collector
        # has nothing more to look through
        self.pack: Callable[..., bytes] | None = None
        self.passes = 0  # that have begun
        # writes what is kept of the passes and of the current one, of which no more is kept then
        self.write_kept: Callable[[], None] = lambda: None

    def __deepcopy__(self, memo: dict[int, Any]) -> Scope:
        return self  # what is copied is a module

    def start(self) -> None:
        """A call of the stack begins."""
        self.open, self.thread = True, get_ident()
        # (while a graph is made, a kernel is to be part of it)
        by_call = self.copies or torch.compiler.is_compiling()
        self.references = None if by_call else self.kept

    def refer(self, n: int, ids: Tensor | None, values: Tensor) -> None:
        """Keeps one call of the sink n in `references`, as what it was called with."""
        assert self.references is not None
        if self.pack is not None and ids is not None:
            try:
                (ids_K,), (values_K,) = ids.tolist(), values.tolist()
                self.references.append(self.pack(n, *ids_K, b"", *values_K))
                return
            # not what it was in the first pass
            except (ValueError, TypeError, struct.error):
                pass
        self.references.append((n, ids, values))

    @torch.compiler.assume_constant_result  # runs while a graph is made, and is no part of it
    def compiled(self) -> None:
        """A graph is made, and run, in a pass that is kept: it writes its calls itself."""
        if self.kept is not None:
            self.write_kept()

    def stop(self) -> None:
        self.open, self.references = False, None


class Sink:
    """Receives one router's outputs while its scope is open: keeps them until the pass ends, or
    returns the tape that a kernel writes them to, or passes them to `take` while there is neither.
    `n`: tells the sinks of a scope apart."""

    def __init__(self, scope: Scope, n: int, take: Callable[..., None]):
        self.scope, self.n, self.take = scope, n, take
        self.tapes: list[Tape] = []  # one per run of its layer in a forward pass
        self._calls = self._pass = 0  # in the current forward pass

    def __deepcopy__(self, memo: dict[int, Any]) -> Sink:
        return self  # what is copied is a module

    def __call__(self, ids: Tensor | None, values: Tensor) -> Tape | None:
        """`ids` is None for router logits."""
        scope = self.scope
        if torch.compiler.is_compiling():  # (a graph is guarded by what is read)
            scope.compiled()
            if not scope.open:
                return None
        elif scope.references is not None:
            scope.refer(self.n, ids, values)
            return None
        elif not scope.open:
            return None
        elif scope.kept is not None:
            copy = ids.clone() if ids is not None else None
            scope.kept.append((self.n, copy, values.detach().clone()))
            return None
        if not self.tapes:
            self.take(*(v.detach() for v in (ids, values) if v is not None))
            return None
        if len(self.tapes) == 1:
            return self.tapes[0]
        if self._pass != scope.passes:
            self._pass, self._calls = scope.passes, 0
        self._calls += 1
        return self.tapes[(self._calls - 1) % len(self.tapes)]


class CallReader:
    """Reads choices in the arguments of calls, for the sinks of a scope.

    All modules share what runs at a call: a decode step has nothing else in the processor's caches,
    so whatever there is one of per module is loaded from memory."""

    def __init__(self, scope: Scope, choice_of: Callable[..., Choice | None]):
        self._forwards: dict[type, Callable[..., Any]] = {}
        if choice_of is not called_with:
            choice_of = _aside(choice_of)
        by_place: set[int] = set()  # sinks whose last call was one of (hidden states, ids, weights)

        def read(sink: Sink, n: int, module: Module, args: Any, kwargs: Any) -> None:
            if (
                not torch.compiler.is_dynamo_compiling()
                and scope.references is not None
                and n in by_place
                and len(args) == 3
                and not kwargs
            ):
                scope.refer(n, args[1], args[2])
                return
            choice = choice_of(module, args, kwargs, None)
            is_by_place = (
                choice_of is called_with
                and choice is not None
                and len(args) == 3
                and choice[0] is args[1]
                and choice[1] is args[2]
            )
            (by_place.add if is_by_place else by_place.discard)(n)
            _seen(sink, choice)

        self._read = read

    def hook(self, sink: Sink) -> Callable[[Module, Any, Any], None]:
        """A forward pre-hook with kwargs."""
        return functools.partial(self._read, sink, sink.n)

    def replace_forward(self, module: Module, sink: Sink) -> Callable[[], None]:
        """Reads by a `forward` of the instance, until what this returns is called. It costs a call
        some 5 µs less than a hook: once there is one, `Module.__call__` goes a long way."""
        kind = type(module)
        if kind not in self._forwards:
            self._forwards[kind] = self._before(kind.forward)
        # (a deep copy of it belongs to the copy of the module)
        ours = module.forward = functools.partial(self._forwards[kind], module, sink, sink.n)

        def put_back() -> None:
            if vars(module).get("forward") is ours:  # else it is wrapped by now, and reads no more
                del module.forward

        return put_back

    def _before(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        read = self._read

        def forward(self: Module, sink: Sink, n: int, /, *args: Any, **kwargs: Any) -> Any:
            read(sink, n, self, args, kwargs)
            return inner(self, *args, **kwargs)

        return forward


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
