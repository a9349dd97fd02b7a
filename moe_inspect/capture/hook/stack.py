"""The routers of one stack of a model: the hooks that read what each has chosen, and where it goes.
The first forward pass shows shapes and dtypes. An encoder-decoder has two stacks, which see
different tokens; every other model has one.

T rows a router sees (padding included), K slots, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from moe_inspect.capture.hook import kernels
from moe_inspect.capture.hook.kernels import Tape
from moe_inspect.capture.hook.numbering import CallInputs, Rows
from moe_inspect.capture.rows import Calls, CallsOfSite, RouterRows, ShownRouter, TakenPass, by_site
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.choices import called_with
from moe_inspect.model.routers import Site, logits_among, stacks_in, top_k_of
from moe_inspect.trace.schema import EXTRAS, Router

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moe_inspect.model.choices import Args, Choice, Kwargs


def not_pickled(self: object) -> NoReturn:
    """`__reduce__` of what a recorder attaches to a model."""
    raise MoeInspectError(
        "a model cannot be pickled while it is being recorded, nor a copy that was made meanwhile: "
        "save its state_dict(), or pickle it after the recording"
    )


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
    is_known     whether the code is of transformers, which is tested
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
    keeps_graph = False  # whether what is taken may be differentiated

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
            values = self._detached(values)
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
        values = self._detached(values)
        if (tape := self(ids, values)) is not None:
            kernels.record(tape, ids, values)

    def _detached(self, values: Tensor) -> Tensor:
        return values.detach() if values.requires_grad and not self.keeps_graph else values


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
    read = read if read is called_with or sink.keeps_graph else torch.no_grad()(read)

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
    returns is called. Recorders may end in any order. What somebody else has put there stays."""
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
    """`register_forward_pre_hook(hook, with_kwargs=True)` for any method; returns what removes it.
    A call of `forward` costs some 5 µs less: with a hook `Module.__call__` goes a long way."""
    own, inner = vars(module).get(name), getattr(type(module), name)
    if own is not None and hasattr(own, "over"):  # another recorder's
        inner = own.func
    elif own is not None:
        inner = lambda self, /, *args, **kwargs: own(*args, **kwargs)  # noqa: E731

    def run(self: Module, /, *args: Any, **kwargs: Any) -> Any:
        hook(self, args, kwargs)
        return inner(self, *args, **kwargs)

    # (a deep copy of it belongs to the copy of the module)
    return replaced(module, name, lambda _: partial(run, module))


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


class Stack:
    """The routers of the stack `name` ("" for a model without two): see `add`. `kinds`: what is
    recorded of each, "" for choices, else one of `schema.EXTRAS`.

    calls   what its routers were called with in the current pass, unless kernels write it to tapes
    copies  whether these are copies, because the model changes or reuses these tensors later in a
            pass, or nothing is known of its code. Of code that is known the first pass tells."""

    def __init__(self, name: str, scope: Scope, kinds: Sequence[str], model: PreTrainedModel):
        self.name, self.scope, self.kinds, self.model = name, scope, kinds, model
        self.sites: list[Site] = []
        self.sinks: list[Sinks] = []  # of each site
        self.routers_of: list[list[int]] = []  # of each site
        # grouped by site: a layer that runs twice has two. From the config until the first pass
        self.routers: list[Router] = []
        self.is_new = True  # it has not run yet, or runs for the first time
        self.calls: Calls = {}
        self.copies = True
        self._copied: list[tuple[Tensor, Tensor]] = []  # in the first pass: a copy, and of what
        self._shown: list[ShownRouter] = []  # once it has run
        self._sites_of: list[int] = []  # the site of each router
        self.rows: RouterRows | None = None  # once it has run
        self.replayed = False  # a CUDA graph holds its launches, and the buffers' addresses
        self.fixed_rows: int | None = None  # rows of the buffers, where an option says it
        self.skips = False  # nothing of the current pass is recorded
        self.is_summed = False  # of its calls only sums are recorded: they are kept on any device
        scope.begin_graph, scope.in_graph = self.write_calls, False

    def add(self, site: Site, sinks: Sinks) -> None:
        """One more site, and where its outputs go."""
        n = len(self.sites)
        self.sites.append(site)
        self.sinks.append(sinks)
        self.routers_of.append([n])
        if self.name:
            self.routers.append(router_at(site, top_k_of(site, self.model)))
        for kind, sink in sinks.items():
            sink.take = partial(self._take, kind, n)

    @property
    def is_fixed(self) -> bool:
        """Whether the buffers keep their size."""
        return self.replayed or self.fixed_rows is not None

    def devices(self) -> list[torch.device]:
        """The device of each router; until it has run, that of its experts."""
        if not self._shown:
            return [next(site.module.parameters()).device for site in self.sites]
        return [shown.device for shown in self._shown]

    def begin(self) -> None:
        """Begins a forward pass. If the previous one failed, its rows are overwritten."""
        if self.scope.fed is not None and self.rows is not None:
            self.rows.rewind()
        self.scope.fed = None
        self.scope.passes += 1
        self.clear()

    def clear(self) -> None:
        self.calls = {kind: [] for kind in self.kinds}
        self._copied = []

    def calls_of(self, kind: str) -> list[CallsOfSite]:
        """What was recorded of the calls of each site."""
        return by_site(self.calls[kind], len(self.sites))

    def _take(self, kind: str, n: int, *values: Tensor) -> None:
        """One call of the router at site n."""
        if self.skips:
            return
        if self.copies:
            copies = tuple(value.clone() for value in values)
            if self.is_new and self.scope.is_known:
                self._copied += zip(copies, values, strict=True)
            values = copies
        self.calls[kind].append((n, values))

    def fix_shape(self, is_declared: bool) -> list[torch.dtype]:
        """Ends the first forward pass: top-k, dtypes and devices are as observed. Returns the dtype
        of each router's gate weights. `is_declared`: routers were written before they had run, as
        the config declares them: MoeInspectError where they differ."""
        assert self.scope.fed is not None
        T, declared = self.scope.fed.T, self.routers
        if self.scope.is_known:
            self.copies = not all(torch.equal(copy, tensor) for copy, tensor in self._copied)
            self._copied = []
        times = [
            len(calls) if calls and all(len(ids) == T for ids, _ in calls) else 1
            for calls in self.calls_of("")
        ]
        self.check_calls(T, times)
        runs = [
            (site, time, calls[time])
            for site, t, calls in zip(self.sites, times, self.calls_of(""), strict=True)
            for time in range(t)
        ]
        self.routers = [router_at(site, ids.shape[1], time) for site, time, (ids, _) in runs]
        ends = np.cumsum(times).tolist()
        self.routers_of = [list(range(end - t, end)) for end, t in zip(ends, times, strict=True)]
        self._shown = [
            ShownRouter(ids.device, ids.shape[1], site.experts, site.ids_below)
            for site, _, (ids, _) in runs
        ]
        self._sites_of = np.repeat(range(len(times)), times).tolist()
        self.is_new = False
        for shown, told in zip(self.routers, declared if is_declared else (), strict=False):
            if shown != told or len(self.routers) != len(declared):
                raise MoeInspectError(
                    f"{shown.path} does not route as declared ({told}): record a forward pass of "
                    "the whole model first"
                )
        return [weights.dtype for *_, (_, weights) in runs]

    def check_calls(self, T: int, times: Sequence[int] | None = None) -> None:
        """MoeInspectError unless each site was called for every row of the current pass, as many
        `times` as its layer runs."""
        times = times or [len(routers) for routers in self.routers_of]
        for site, t in zip(self.sites, times, strict=True):
            if t > 1 and site.told is not None and stacks_in(self.model):
                raise MoeInspectError(
                    f"{site.path} showed each token {t} times in a forward pass of a model with an "
                    "encoder and a decoder, which may see different tokens: record one of them at "
                    "a time"
                )
        for kind in self.calls:
            for site, calls, t in zip(self.sites, self.calls_of(kind), times, strict=True):
                if (seen := sum(len(values[0]) for values in calls)) != t * T:
                    K = calls[0][0].shape[1] if calls and not kind else 1
                    self.refuse(site.path, seen, T, kind, K)
                if kind == "logits" and calls and are_probabilities(calls[0][0]):
                    raise MoeInspectError(
                        f"{site.path} returns probabilities where its family declares logits: "
                        "trace without --logits"
                    )

    def lay_out(self, weight_dtype: torch.dtype) -> None:
        """Ends the first forward pass: `weight_dtype` is that of the gate weights in the trace."""
        self.rows = RouterRows(self._shown, self._sites_of, self.kinds, weight_dtype)

    def grow(self, rows: int) -> None:
        """Has kernels write passes of so many rows to buffers. MoeInspectError where these have
        another size that is fixed."""
        assert self.rows is not None
        room = self.rows.P or self.fixed_rows
        if self.is_fixed and room and rows > room:
            raise MoeInspectError(
                f"a forward pass of {rows:,} rows exceeds the room on the device ({room:,}): "
                f"record with ring_tokens={rows}"
            )
        if self.rows.grow(max(rows, self.fixed_rows or 0)):
            for sinks, routers in zip(self.sinks, self.routers_of, strict=True):
                for kind, sink in sinks.items():
                    sink.tapes = [self.rows.tapes[kind][r] for r in routers]

    def take(self, fed: Rows | CallInputs) -> TakenPass:
        """Ends a launched forward pass (on a GPU it may still be running). MoeInspectError unless
        every router has seen every token once: on a GPU `check` tells when the rows arrive."""
        assert self.rows is not None
        if not self.is_summed and not self.rows.keeps_calls:
            self.write_calls()  # those of the first pass, which has shown what the buffers hold
        if self.scope.to_tapes:
            return self.rows.take(fed.T)
        if (taken := self.rows.whole(self.calls, fed.T)) is None:
            self.check_calls(fed.T)
            raise MoeInspectError(
                f"a router of {type(self.model).__name__} chose another number of experts than in "
                "the first forward pass"
            )
        self.clear()
        return taken

    def write_calls(self) -> None:
        """Writes the calls of the current pass so far to buffers. Those that follow go there."""
        if self.rows is None or self.scope.fed is None or self.is_summed or self.scope.to_tapes:
            return
        self.grow(self.scope.fed.T)
        for kind in self.calls:
            for sinks, of_site in zip(self.sinks, self.calls_of(kind), strict=True):
                tapes = sinks[kind].tapes
                for made, values in enumerate(of_site):
                    tape = tapes[made % len(tapes)]
                    kernels.record(tape, *(values if not kind else (None, *values)))
        self.scope.to_tapes = True
        self.clear()

    def check(self, taken: TakenPass, T: int) -> None:
        """MoeInspectError unless every router has seen every token of the pass exactly once."""
        if self.rows is None or taken.cursors is None:
            return
        if not all((cursor.numpy() == T).all() for cursor in taken.cursors):
            self.check_seen(T, self.rows.seen(taken.cursors))

    def check_seen(self, T: int, seen: Mapping[str, Sequence[int]]) -> None:
        """`seen`: rows of each router, by what was recorded of them ("": its choices)."""
        for kind, rows_of in seen.items():
            for router, n in zip(self.routers, rows_of, strict=True):
                if n != T:
                    self.refuse(router.path, n, T, kind)

    def refuse(self, path: str, n: int, T: int, kind: str, K: int = 1) -> NoReturn:
        """`kind`: of what was seen, one of `schema.EXTRAS`, or "" for a choice."""
        if kind:
            option = "--" + EXTRAS[kind].option.replace("_", "-")
            raise MoeInspectError(
                f"{path} returned {kind} of {n} rows in a forward pass of {T}: "
                f"trace without {option}"
            )
        site = next(s for s in self.sites if path.startswith(s.path))
        one_each = n == 1 or site.experts < K  # else it may have seen a part of the tokens
        if site.told and K > 1 and n * K == T and one_each:
            raise MoeInspectError(
                f"{path} showed {n} rows of {K} experts in a forward pass of {T} tokens: where "
                "each token goes to one expert, ids and weights are [..., 1] (ids.unsqueeze(-1))"
            )
        if site.told:
            raise MoeInspectError(
                f"{path} showed the choices of {n} rows in a forward pass of {T} tokens: it must "
                "show each token once (where a router sees a part of them, RouterSpec(rows=…) says "
                "which; what a forward pass is fed, inputs=… says)"
            )
        why = (
            "fused experts, or hub kernels that bypass their call: load the model with "
            "use_kernels=False"
        )
        training = self.model.training
        if training and any("layerdrop" in k and v for k, v in vars(self.model.config).items()):
            why = (
                "LayerDrop skips layers in training: set encoder_layerdrop and decoder_layerdrop "
                "of the config to 0"
            )
        why += ", or a CUDA graph replayed without step()" if self.replayed else ""
        raise MoeInspectError(
            f"{path} routed {n} rows in a forward pass of {T}: this model's routing cannot be "
            f"recorded ({why})"
        )


def router_at(site: Site, top_k: int, time: int = 0) -> Router:
    """The router of a site, in the run number `time` of its layer."""
    again = f" (run {time + 1})" if time else ""
    name, path = site.name + again, site.path + again
    return Router(
        site.layer, name, path, site.experts, top_k, site.scoring, site.shared_experts, site.stack
    )


def are_probabilities(logits_TE: Tensor, within: float = 1e-2) -> bool:
    """Whether no value is negative, and each row sums to 1 `within` so much."""
    sums = logits_TE.float().sum(1)
    return bool((logits_TE >= 0).all()) and bool(((sums - 1).abs() < within).all())
