"""Attaches a recorder to a model and detaches it: hooks around each forward pass, a sink per
router, or our experts implementation (see `experts`). Compiled code runs eagerly while any recorder
needs that; another thread, torch.func, torch.export and torch.jit.trace are refused.

T tokens, K slots, E experts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial, wraps
from threading import get_ident
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch._dynamo.utils import counters  # (torch.compiler.disable imports it anyhow)
from torch.nn import Module

from moe_inspect.capture.hook import stack
from moe_inspect.capture.hook.experts import Takeover, takes_implementation
from moe_inspect.capture.hook.probes import Probes, listen
from moe_inspect.capture.hook.stack import Scope, Sinks
from moe_inspect.errors import MoeInspectError
from moe_inspect.model import wrapped
from moe_inspect.model.choices import called_with
from moe_inspect.model.routers import Site, is_of_transformers

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from moe_inspect.capture.options import RecordOptions
    from moe_inspect.model.choices import Args, Choice, Kwargs


# they call a model with stand-ins for its tensors → whether one of them calls it now
TRANSFORMS: dict[str, Callable[[], bool]] = {
    "torch.func": torch._C._are_functorch_transforms_active,
    "torch.export": torch.compiler.is_exporting,
    "torch.jit.trace": torch._C._is_tracing,
}

NOT_COMPILED = (
    "to record it without a graph break, record what torch.compile returned; to export it, call "
    "torch.export before or after the recording; the stacks of an encoder-decoder are always told "
    "apart outside compiled code"
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

        @wraps(method)
        def run(*args: Any) -> None:
            (disabled if torch.compiler.is_compiling() else method)(*args)

        return run

    return made_of


class Attachment:
    """`sinks[r]` belong to `sites[r]` and receive its choices (""), and `extras`: what else is
    recorded, of `schema.EXTRAS`. A forward pass is a call of the model or, in an
    encoder-decoder, a call of one stack by itself, as `generate` calls the encoder."""

    def __init__(
        self,
        outer: Module,
        model: Module,
        sites: Sequence[Site],
        mode: str,
        extras: Sequence[str],
        records: stack.Records,
    ):
        self.model, self.sites, self.mode, self.records = model, sites, mode, records
        self.wrappers = wrapped.wrappers_of(outer, model)
        self.paused = self.over = False
        # without sites, probes will show them
        is_known = bool(sites) and all(map(is_of_transformers, [model, *(s.module for s in sites)]))
        stacks = {s.stack: model.get_submodule(s.stack_path) for s in sites} or {"": model}
        self.scopes = {name: Scope(name, module, is_known) for name, module in stacks.items()}
        self._whole = self.scopes.get("") or Scope("", model, is_known)  # of all stacks
        self._running: Scope | None = None  # the forward pass: of the model, or a stack by itself
        self._thread = 0  # in which the last forward pass began
        self.one_thread = True  # passes of several threads are refused
        self._handled: BaseException | None = None  # what was being handled when it began
        self.kinds, self.sinks = ("", *extras), list[Sinks]()
        for site in sites:
            self.add(site)
        self.compiled = self.in_compiled = wrapped.is_compiled(outer)
        self._bracketed = False
        self.probes: Probes | None = None
        both = zip(sites, self.sinks, strict=True)
        called = {site.module: sinks for site, sinks in both if site.adapter is None}
        self._experts = Takeover(self.model, called, self._watch_experts)
        self._cleanup, self._eager = ExitStack(), Eager()

    def __deepcopy__(self, memo: object) -> Attachment:
        return self  # what is copied is the model, and of the copy nothing is recorded

    __reduce__ = stack.not_pickled

    def take_probes(self, add: Callable[[Site], Sinks] | None, options: RecordOptions) -> None:
        """`add`: see `Probes`. Specs that a caller gave (`routers`) take the place of probes."""
        if not options.routers:
            self.probes = Probes(self.scopes, add, self.model, options.layers)

    def add(self, site: Site) -> Sinks:
        """The sinks of one more site."""
        scope = self.scopes[site.stack]
        if site.told is not None:
            site.told.scope = scope
        self.sinks.append({kind: stack.Sink(scope) for kind in self.kinds})
        return self.sinks[-1]

    def attach(self) -> None:
        with ExitStack() as undo:
            undo.callback(self.detach)
            self._attach()
            undo.pop_all()

    def detach(self) -> None:
        self._shut()
        self.over = True
        self._eager.release()
        self._cleanup.close()

    def _attach(self) -> None:
        compiled = self.compiled or has_compiled()
        if compiled:  # compiled code does not check for new hooks
            torch.compiler.reset()
            self._cleanup.callback(torch.compiler.reset)
        self._bracket()
        self._cleanup.callback(self._experts.release)
        if self.mode == "dispatch":
            self._experts.dispatch()
        elif self.mode == "tap" and not compiled and takes_implementation(self.model, self.sites):
            self._experts.tap()
        for r, site in enumerate(self.sites):
            self._watch(r, site, compiled)
        if self.probes is not None:
            self._cleanup.callback(listen(self.probes))

    def _remove_later(self, hook: RemovableHandle) -> None:
        self._cleanup.callback(hook.remove)

    def _replace(self, owner: Module, name: str, made_of: Callable[..., Any]) -> None:
        self._cleanup.callback(stack.replaced(owner, name, made_of))

    def _bracket(self) -> None:
        """Marks where a forward pass begins and ends."""
        stacks = [scope for name, scope in self.scopes.items() if name]
        hooked = list(stacks)
        if all(map(wrapped.is_compiled_wrapper, self.wrappers)):
            hooked.insert(0, self._whole)
        else:  # PEFT calls the model's forward, not the model
            self._replace(self.model, "forward", self._around_forward)
        for scope in hooked:
            before, after = partial(self._before, scope), partial(self._after, scope)
            self._remove_later(scope.module.register_forward_pre_hook(before, with_kwargs=True))
            # even if it raised: a later call of a stack, or of a probe, is not part of it
            always = scope is self._whole and (bool(stacks) or not self.sites)
            self._remove_later(scope.module.register_forward_hook(after, always_call=always))
        for n, module in enumerate([*self.wrappers, self.model]):
            around = partial(self._around, wrappers=self.wrappers[n:])
            if wrapped.is_compiled_wrapper(module):
                self._replace(module, "forward", around)
            if vars(module).get("_compiled_call_impl") is not None:
                self._replace(module, "_compiled_call_impl", around)
        if hasattr(self.model, "get_compiled_call"):  # what `generate` decodes with on a GPU
            around_got = lambda get: lambda *a, **k: self._around(get(*a, **k))  # noqa: E731
            self._replace(self.model, "get_compiled_call", around_got)

    def _watch(self, r: int, site: Site, compiled: bool) -> None:
        """Hooks that read the choice and the logits of the router at site r."""
        adapter, module = site.adapter, site.module
        if adapter is not None and not adapter.at_call:
            hook = stack.watching(self.sinks[r][""], adapter.choice)
            # (of the model itself, before the pass is over)
            first = module is self.model
            self._remove_later(module.register_forward_hook(hook, with_kwargs=True, prepend=first))
        elif adapter is not None:
            choice_of, router = adapter.choice, site.logits_module
            if router is not None and site.dropped is not None:
                hook, choice_of = stack.dropped_before_call(site, router, choice_of)
                self._remove_later(router.register_forward_hook(hook))
            self._watch_call(r, site, choice_of, compiled)
        elif self.mode == "tap" and not self._experts.taps:
            self._watch_call(r, site, called_with, compiled)
        if "logits" in self.kinds and site.logits_module is not None:
            hook = stack.watching(self.sinks[r]["logits"], stack.logits_read(site))
            self._remove_later(site.logits_module.register_forward_hook(hook, with_kwargs=True))

    def _watch_experts(self) -> None:
        for r, site in enumerate(self.sites):
            if site.adapter is None:
                self._watch_call(r, site, called_with, self.compiled or has_compiled())

    def _watch_call(
        self, r: int, site: Site, choice_of: Callable[..., Choice | None], compiled: bool
    ) -> None:
        """Reads the choice of site r before each call of its module."""
        module, hook = site.module, stack.watching(self.sinks[r][""], choice_of)
        # (whoever has put a forward there, as accelerate does, may look for it again)
        if not site.method and (compiled or "forward" in vars(module)):
            self._remove_later(module.register_forward_pre_hook(hook, with_kwargs=True))
        else:
            self._cleanup.callback(stack.before_method(module, site.method or "forward", hook))

    # --- around a forward pass

    def _around(self, call: Callable[..., Any], wrappers: Sequence[Any] = ()) -> Callable[..., Any]:
        """A compiled call, wrapped in what the hooks do. `wrappers`: from it down to the model."""

        @wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            given = None if self._bracketed else wrapped.call_of_model(wrappers, args, kwargs)
            if given is None:
                return call(*args, **kwargs)
            self._bracketed = True
            try:
                self._begin(self._whole, *given)
                output = call(*args, **kwargs)
                self._end(self._whole, output)
            except BaseException:
                self._shut()
                raise
            finally:
                self._bracketed = False
            return output

        return run

    def _around_forward(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The model's forward, wrapped like a compiled call; of a copy of the model its own."""
        around = self._around(call)

        @wraps(type(self.model).forward)
        def run(module: Any, *args: Any, **kwargs: Any) -> Any:
            if module is self.model:
                return around(*args, **kwargs)
            return type(module).forward(module, *args, **kwargs)

        return MethodType(run, self.model)

    def _before(self, scope: Scope, module: Module, args: Args, kwargs: Kwargs) -> None:
        if module is scope.module and not (scope is self._whole and self._bracketed):
            self._begin(scope, args, kwargs)

    def _after(self, scope: Scope, module: Module, args: Args, output: object) -> None:
        if module is scope.module and not (scope is self._whole and self._bracketed):
            self._end(scope, output)

    # A call compiled from outside (torch.compile(model) with record(model), a compiled training
    # step) has a graph break here; record(torch.compile(model)) has none.
    @not_compiled(NOT_COMPILED)
    def _begin(self, scope: Scope, args: Args, kwargs: Kwargs) -> None:
        """A call of the model or of a stack begins, and with the outer one the pass."""
        if self.paused or self.over:
            self._shut()  # a pass that failed may have left its scopes open
            return
        if self.one_thread:
            running = self._thread if self._running is not None else None
            self._thread = check_caller(self.model, running)
        if scope is self._whole or self._running is not self._whole:
            self._running, self._handled = scope, sys.exc_info()[1]
            self._experts.check()
            self._begin_pass()
        if scope.stack in self.scopes:
            self.records.feed(scope.stack, args, kwargs)
            scope.start()

    @not_compiled(NOT_COMPILED)
    def _end(self, scope: Scope, output: object) -> None:
        if self.paused or self.over or (self.one_thread and self._thread != get_ident()):
            return
        if scope is not self._whole and not scope.open:
            return
        if output is None and sys.exc_info()[1] is not self._handled:  # it raised
            self._shut()
            return
        is_over = scope is self._whole or scope is self._running
        if is_over:
            self._shut()
        scope.open = False
        self.records.returned(scope.stack, output)
        if is_over:
            self._end_pass()

    def _begin_pass(self) -> None:
        if self.in_compiled:  # (the pass before it failed)
            self._eager.release()
        # compiled code writes to the tapes, call by call
        self.in_compiled = self.compiled or has_compiled()
        if self.in_compiled and not (self.sinks and all(of[""].tapes for of in self.sinks)):
            self._eager.hold()  # until the first pass has shown the shapes, sinks are plain Python
        self.records.begin()

    def _end_pass(self) -> None:
        if self.in_compiled:
            self._eager.release()
        if self.probes is not None:
            self.probes.check_layers()
        self.records.end()

    def _shut(self) -> None:
        self._running = None
        for scope in self.scopes.values():
            scope.open = False


# --- callers of the model


def check_caller(model: Module, thread: int | None) -> int:
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
