"""The routers of one stack of a model, and the buffers of their choices: staged during the first
forward pass, which shows shapes and dtypes, then in rings. An encoder-decoder has two stacks, which
see different tokens; every other model has one.

T rows a router sees (padding included), K slots, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from moe_inspect.capture.hook import kernels
from moe_inspect.capture.hook.inputs.rows import CallInputs, Rows
from moe_inspect.capture.hook.pass_buffer import Call, PassBuffer, as_tensors
from moe_inspect.capture.hook.ring import Rings
from moe_inspect.capture.hook.sink import Scope, Sink
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.routers import Site, stacks_in, top_k_of
from moe_inspect.trace.schema import Router


class StackPass(NamedTuple):
    """The run of a stack in a forward pass, on its way to the writer: the first `kept` of its rows
    are in the rings, from position `start` on."""

    stack: Stack
    fed: Rows | CallInputs
    start: int
    kept: int
    cursors: list[Tensor] | None  # of each ring, after the forward pass; None: it is checked


class Stack:
    """`sites`: of the stack `name` ("" for a model without two), with their sinks."""

    def __init__(
        self,
        name: str,
        scope: Scope,
        sites: Sequence[Site],
        sinks: Sequence[Sink],
        extra_sinks: Mapping[str, Sequence[Sink]],
        model: Any,
    ):
        self.name, self.scope, self.model = name, scope, model
        self.sites, self.sinks = list(sites), list(sinks)
        self.extra_sinks = {kind: list(of_kind) for kind, of_kind in extra_sinks.items()}
        # grouped by site: a layer that runs twice has two. As declared, until the stack has run
        self.routers = (
            [] if not name else [_router(site, 0, top_k_of(site, model)) for site in sites]
        )
        self.routers_of = [[n] for n in range(len(sites))]  # of each site
        self.first_router = 0  # index of its first router among the model's
        self.fed: Rows | CallInputs | None = None  # in the current forward pass
        self.seen = [0] * len(sites)  # rows per site in this forward pass, where there is no tape
        # first forward pass: calls per site, later per router
        self.staged: list[list[tuple[Tensor, Tensor]]] | None = [[] for _ in sites]
        self.staged_extras: dict[str, list[list[Tensor]]] = self._no_extras()
        self.given: list[tuple[Tensor, Tensor]] = []  # meanwhile: a copy, and what was copied
        self.shape: list[tuple[torch.device, int, int]] = []  # device, K and E of each router
        self.rings: Rings | None = None
        self.dropped_rows = 0
        self.replayed = False  # a CUDA graph holds its launches

    def add(self, site: Site, sink: Sink, logit_sink: Sink | None) -> int:
        """One more site, which the first forward pass has shown. Returns its index."""
        assert self.staged is not None
        self.routers_of.append([len(self.sites)])
        self.sites.append(site)
        self.sinks.append(sink)
        if logit_sink is not None:
            self.extra_sinks["logits"].append(logit_sink)
        self.seen.append(0)
        self.staged.append([])
        for of_kind in self.staged_extras.values():
            of_kind.append([])
        return len(self.sites) - 1

    @property
    def times(self) -> list[int]:
        return [len(routers) for routers in self.routers_of]

    @property
    def router_range(self) -> range:
        """Its routers among the model's."""
        return range(self.first_router, self.first_router + len(self.routers))

    def devices(self) -> list[torch.device]:
        """The device of each router; until it has run, that of its experts."""
        return [device for device, _, _ in self.shape] or [
            next(site.module.parameters()).device for site in self.sites
        ]

    def begin(self) -> None:
        """Begins a forward pass. If the previous one failed, its rows are overwritten."""
        if self.fed is not None and self.rings is not None:
            self.rings.rewind(self.dropped_rows)
        self.fed = self.scope.kept = None
        self.scope.passes += 1
        if self.staged is not None:
            self.staged = [[] for _ in self.sites]
            self.staged_extras = self._no_extras()
            self.given = []
        if self.staged is not None or self.rings is None:
            self.seen = [0] * len(self.sites)

    def enable(self, on: bool) -> None:
        """Whether the rings take what kernels write."""
        if self.rings is not None:
            self.rings.enable(on)

    def stage(self, n: int, ids_TK: Tensor, weights_TK: Tensor) -> None:
        """One call of the router at site n, in the first forward pass."""
        assert self.staged is not None
        self.staged[n].append((self._copied(ids_TK), self._copied(weights_TK)))

    def stage_extra(self, kind: str, n: int, values: Tensor) -> None:
        self.staged_extras[kind][n].append(self._copied(values))

    def _no_extras(self) -> dict[str, list[list[Tensor]]]:
        return {kind: [[] for _ in self.sites] for kind in self.extra_sinks}

    def _copied(self, tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        if tensor.is_cpu and not self.scope.copies:
            self.given.append((copy, tensor))
        return copy

    def fix_shape(self) -> list[torch.dtype]:
        """Ends the first forward pass: top-k, dtypes and devices are as observed, not as declared
        in the config. Returns the dtype of each router's gate weights."""
        staged, extras, declared = self.staged, self.staged_extras, self.routers
        assert staged is not None
        if not all(torch.equal(copy, tensor) for copy, tensor in self.given):
            self.scope.copies = True
        self.given = []
        assert self.fed is not None
        T = self.fed.T
        times = [
            len(calls) if len(calls) > 1 and all(len(ids) == T for ids, _ in calls) else 1
            for calls in staged
        ]
        for site, t in zip(self.sites, times, strict=True):
            if t > 1 and site.told is not None and stacks_in(self.model):
                raise MoeInspectError(
                    f"{site.path} showed each token {t} times in a forward pass of a model with an "
                    "encoder and a decoder, which may see different tokens: record one of them at "
                    "a time"
                )
        for kind, calls_of in {"": staged, **extras}.items():
            for site, calls, t in zip(self.sites, calls_of, times, strict=True):
                if (n := _length(calls)) != t * T:
                    K = calls[0][0].shape[1] if calls and not kind else 1
                    self.refuse(site.path, n, T, kind, K)
        for site, calls in zip(self.sites, extras.get("logits", ()), strict=False):
            if calls:
                _refuse_probabilities(site.path, calls[0])
        runs = [
            (site, time) for site, t in zip(self.sites, times, strict=True) for time in range(t)
        ]
        self.staged = _by_run(staged, times)
        self.staged_extras = {kind: _by_run(calls, times) for kind, calls in extras.items()}
        first = [calls[0] for calls in self.staged]
        self.shape = [
            (ids.device, ids.shape[1], site.experts)
            for (site, _), (ids, _) in zip(runs, first, strict=True)
        ]
        self.routers_of = [[n for n, (s, _) in enumerate(runs) if s is site] for site in self.sites]
        self.routers = [
            _router(site, time, shape[1])
            for (site, time), shape in zip(runs, self.shape, strict=True)
        ]
        self._declared = declared
        return [weights.dtype for _, weights in first]

    def refuse_undeclared(self) -> None:
        """MoeInspectError where the routers, which were written before they had run, differ from
        what was declared."""
        for shown, declared in zip(self.routers, self._declared, strict=False):
            if shown != declared or len(self.routers) != len(self._declared):
                raise MoeInspectError(
                    f"{shown.path} does not route as declared ({declared}): record a forward "
                    "pass of the whole model first"
                )

    def make_rings(self, rows: int, weight_dtype: torch.dtype) -> None:
        """Makes rings for forward passes of `rows` rows. Earlier rings must be empty."""
        sites = self.sites_of_routers
        below = [self.sites[n].ids_below for n in sites]
        extras = tuple(self.extra_sinks)
        self.rings = Rings(self.shape, sites, weight_dtype, extras, rows, below)
        self.rings.rewind(self.dropped_rows)
        for sinks, tapes in (
            (self.sinks, self.rings.tapes),
            *((of_kind, self.rings.extra_tapes[k]) for k, of_kind in self.extra_sinks.items()),
        ):
            for sink, routers in zip(sinks, self.routers_of, strict=False):
                sink.tapes = [tapes[r] for r in routers]

    @property
    def sites_of_routers(self) -> list[int]:
        """The index of each router's site."""
        return [n for n, routers in enumerate(self.routers_of) for _ in routers]

    def keep_pass(self, buffer: PassBuffer | None) -> bool:
        """Has the sinks keep what the pass that begins shows, if it is small enough for the
        buffer."""
        assert self.fed is not None
        T = self.fed.T
        if buffer is None or not buffer.fits(T):
            return False
        self.scope.kept, self.scope.pack = [], buffer.pack if T == 1 else None
        return True

    def unstage(self) -> None:
        """Moves the staged choices into the rings."""
        assert self.rings is not None
        staged, self.staged = self.staged, None
        for tape, calls in zip(self.rings.tapes, staged or (), strict=True):
            for choice in calls:
                kernels.record(tape, *choice)
        for kind, tapes in self.rings.extra_tapes.items():
            for tape, calls in zip(tapes, self.staged_extras[kind], strict=True):
                for values in calls:
                    kernels.record(tape, None, values)
        self.staged_extras = {}

    def end(self) -> StackPass:
        """Ends a launched forward pass (on a GPU it may still be running)."""
        rings, fed, calls = self.rings, self.fed, self.scope.kept
        assert rings is not None
        assert fed is not None
        T = fed.T
        self.scope.kept = None
        if calls is not None:
            assert rings.buffer is not None
            if (stacked := rings.buffer.whole(calls, T)) is not None:
                rings.buffer.keep(stacked, T)
                if rings.buffer.is_full:
                    rings.write_kept()
                return StackPass(self, fed, rings.head, T, None)
            self.write_kept(calls)
        kept = min(T, max(0, rings.free_rows))
        return StackPass(self, fed, rings.head, kept, rings.read_cursors())

    def write_kept(self, calls: Sequence[Call | bytes]) -> None:
        """Writes the passes that are kept, and the calls of the current one. One by one, which
        tells rows that are missing or too many, and those there is no room for."""
        assert self.rings is not None
        self.rings.write_kept()
        sinks = [*self.sinks, *(sink for of in self.extra_sinks.values() for sink in of)]
        made = [0] * len(sinks)
        for n, ids, values in map(as_tensors, calls):
            tapes = sinks[n].tapes
            kernels.record(tapes[made[n] % len(tapes)], ids, values)
            made[n] += 1

    def check(self, done: StackPass) -> None:
        """MoeInspectError unless every router has seen every token exactly once: the trace would be
        silently wrong."""
        assert self.rings is not None
        if done.cursors is None or self.rings.all_have_seen(done.cursors, done.start + done.fed.T):
            return
        self.check_seen(done.fed.T, self.rings.rows_seen(done.cursors, done.start))

    def check_seen(self, T: int, seen: Mapping[str, Sequence[int]]) -> None:
        """`seen`: rows of each router, by what was recorded of them ("": its choices)."""
        for kind, rows_of in seen.items():
            for router, n in zip(self.routers, rows_of, strict=True):
                if n != T:
                    self.refuse(router.path, n, T, kind)

    def check_counted(self) -> None:
        """The same, where choices are counted."""
        assert self.fed is not None
        T = self.fed.T
        runs = zip(self.seen, self.times, strict=True)
        self.check_seen(T, {"": [share for n, t in runs for share in shares(n, t, T)]})

    def refuse(self, path: str, n: int, T: int, kind: str, K: int = 1) -> NoReturn:
        """`kind`: of what was seen, one of `options.EXTRAS`, or "" for a choice."""
        if kind:
            option = "--logits" if kind == "logits" else f"--output-{kind}"
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
        if self.model.training and any(
            "layerdrop" in key and value for key, value in vars(self.model.config).items()
        ):
            why = (
                "LayerDrop skips layers in training: set encoder_layerdrop and decoder_layerdrop "
                "of the config to 0"
            )
        why += ", or a CUDA graph replayed without step()" if self.replayed else ""
        raise MoeInspectError(
            f"{path} routed {n} rows in a forward pass of {T}: this model's routing cannot be "
            f"recorded ({why})"
        )


def stacks_of(
    model: Any,
    scopes: Mapping[str, Scope],
    sites: Sequence[Site],
    sinks: Sequence[Sink],
    extra_sinks: Mapping[str, Sequence[Sink]],
) -> dict[str, Stack]:
    """The stacks of the model, by name, with the sinks of their routers."""

    def of(name: str, scope: Scope) -> Stack:
        mine = [r for r, site in enumerate(sites) if site.stack == name]
        extras = {kind: [of_kind[r] for r in mine] for kind, of_kind in extra_sinks.items()}
        return Stack(name, scope, [sites[r] for r in mine], [sinks[r] for r in mine], extras, model)

    return {name: of(name, scope) for name, scope in scopes.items()}


def places_of(stacks: Mapping[str, Stack], sites: Sequence[Site]) -> list[tuple[Stack, int]]:
    """Of each site its stack, and its index there."""
    return [(stacks[site.stack], stacks[site.stack].sites.index(site)) for site in sites]


def shares(n: int, times: int, T: int) -> list[int]:
    """Splits n rows seen at a site over the `times` runs of its layer; surplus rows count for the
    last."""
    return [
        min(T, max(0, n - time * T)) if time < times - 1 else max(0, n - time * T)
        for time in range(times)
    ]


def _router(site: Site, time: int, top_k: int) -> Router:
    again = f" (run {time + 1})" if time else ""
    name, path = site.name + again, site.path + again
    return Router(
        site.layer, name, path, site.experts, top_k, site.scoring, site.shared_experts, site.stack
    )


def _refuse_probabilities(path: str, logits_TE: Tensor) -> None:
    values = logits_TE.float()
    if bool((values >= 0).all()) and torch.allclose(
        values.sum(1), torch.ones(len(values), device=values.device), atol=1e-2
    ):
        raise MoeInspectError(
            f"{path} returns probabilities where its family declares logits: trace without --logits"
        )


def _by_run(calls_of: list[list[Any]], times: list[int]) -> list[list[Any]]:
    """Calls per site → calls per run of its layer."""
    return [
        run
        for calls, t in zip(calls_of, times, strict=True)
        for run in ([[c] for c in calls] if t > 1 else [calls])
    ]


def _length(calls: Sequence[Any]) -> int:
    """Total rows in the calls of one router; a choice is (ids, weights)."""
    return sum(len(call[0]) if isinstance(call, tuple) else len(call) for call in calls)
