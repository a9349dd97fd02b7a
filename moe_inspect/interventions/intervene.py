"""Interventions: while a `with` block runs, the tokens of a model go to other experts.

T rows a router sees, K slots, E experts.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor

from moe_inspect.capture.hook.attach import Attachment
from moe_inspect.capture.hook.inputs.arguments import CallReader, InputsOf
from moe_inspect.capture.hook.inputs.pass_inputs import PassInputs
from moe_inspect.capture.hook.inputs.rows import Rows
from moe_inspect.capture.manifest import ALTERED
from moe_inspect.errors import MoeInspectError
from moe_inspect.interventions import rules
from moe_inspect.interventions.among import (
    SHARED_OUT,
    Among,
    beyond,
    how_dropped,
    logits_seen,
)
from moe_inspect.interventions.replay import Replay
from moe_inspect.interventions.substitute import replaced
from moe_inspect.model.choices.read import called_with
from moe_inspect.model.custom.find import candidates
from moe_inspect.model.find import no_routers, routers_in
from moe_inspect.model.routers import Site, is_of_transformers, top_k_of
from moe_inspect.model.wrapped import unwrapped
from moe_inspect.text import comma_list, plural, print_stderr
from moe_inspect.trace.reader import Trace, open_trace

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from moe_inspect.model.custom.spec import RouterSpec


# layer, or path of a router's module → experts
Layers = Mapping["int | str", "int | Iterable[int]"]


@dataclass(frozen=True)
class Plan:
    """By site: the experts dropped and the experts forced. `shuffle`: the seed, None where nothing
    is shuffled."""

    drop: Mapping[int, tuple[int, ...]]
    force: Mapping[int, tuple[int, ...]]
    shuffle: int | None = None
    replay: bool = False

    @property
    def needs_rows(self) -> bool:
        return self.replay or self.shuffle is not None

    def changes(self, r: int) -> bool:
        """Whether anything is changed at site r."""
        return self.needs_rows or r in self.drop or r in self.force

    def described(self, sites: Sequence[Site]) -> str:
        """For the manifest of a trace recorded meanwhile."""
        parts = [
            f"{verb} in {sites[r].path}: {comma_list(list(experts))}"
            for verb, of in (("dropped", self.drop), ("forced", self.force))
            for r, experts in of.items()
        ]
        parts += ["routing replayed from another trace"] if self.replay else []
        parts += [f"choices shuffled (seed {self.shuffle})"] if self.shuffle is not None else []
        return "intervention: " + "; ".join(parts)


def planned(
    model: object,
    sites: Sequence[Site],
    drop: Layers | None,
    force: Layers | None,
    shuffle: int | None,
    replay: bool,
) -> Plan:
    """MoeInspectError for a layer without a router or whose router's choice is fixed, an expert
    that it does not have, a layer with nothing left to choose, and for interventions that
    contradict each other."""
    asked = {"drop": drop, "force": force, "replay": replay or None, "shuffle": shuffle}
    given = [name for name, value in asked.items() if value is not None]
    if not given:
        raise MoeInspectError("intervene does nothing: give it drop, force, replay or shuffle")
    if len(given) > 1 and set(given) != {"drop", "force"}:
        raise MoeInspectError(f"{given[0]} and {given[1]} contradict each other: give one of them")
    dropped = _by_site(sites, drop or {}, "drop")
    made = Plan(dropped, _by_site(sites, force or {}, "force"), shuffle, replay)
    for r, site in enumerate(sites):
        if made.changes(r) and site.adapter is not None and site.adapter.fixed:
            raise MoeInspectError(f"{site.path}: {site.adapter.fixed}")
    for r, experts in made.drop.items():
        if len(experts) >= sites[r].experts:
            raise MoeInspectError(
                f"drop leaves no expert in layer {sites[r].layer}, which has {sites[r].experts}"
            )
    for r, experts in made.force.items():
        if r in dropped:
            raise MoeInspectError(f"layer {sites[r].layer} is in both drop and force: give one")
        if len(experts) > (K := top_k_of(sites[r], model)):
            raise MoeInspectError(
                f"force has {len(experts)} experts for layer {sites[r].layer}, whose tokens "
                f"choose {K}"
            )
    return made


def _by_site(sites: Sequence[Site], layers: Layers, name: str) -> dict[int, tuple[int, ...]]:
    found: dict[int, tuple[int, ...]] = {}
    for layer, of_layer in layers.items():
        experts = sorted({of_layer} if isinstance(of_layer, int) else set(of_layer))
        in_layer = [r for r, site in enumerate(sites) if layer in (site.layer, site.path)]
        if not in_layer:
            known = comma_list(sorted({site.layer for site in sites}))
            raise MoeInspectError(f"{name}: no router in layer {layer}: the MoE layers are {known}")
        if len(in_layer) > 1:
            raise MoeInspectError(
                f"{name}: layer {layer} has {len(in_layer)} routers, "
                f"{' and '.join(sites[r].path for r in in_layer)}: give one of these paths in "
                "place of the layer"
            )
        E = sites[in_layer[0]].experts
        if wrong := [e for e in experts if not 0 <= e < E]:
            raise MoeInspectError(
                f"{name}: no expert {wrong[0]} in layer {layer}, which has {E} (0 to {E - 1})"
            )
        if experts:
            found[in_layer[0]] = tuple(experts)
    return found


_TOLD: WeakSet[torch.nn.Module] = WeakSet()  # whose user knows that weights are shared out


@dataclass
class Done:
    """What was done at a router so far. `rows` counts padding where nothing tells it from
    tokens."""

    how: str = ""
    rows: int = 0
    decisions: int = 0
    assignments: int = 0
    weights: int = 0
    seen: int = field(default=0, repr=False)  # rows of the current forward pass


class Intervention:
    """The context manager of `moe_inspect.intervene`, which describes the arguments."""

    def __init__(
        self,
        model: Any,
        *,
        drop: Layers | None = None,
        force: Layers | None = None,
        replay: Trace | str | Path | None = None,
        shuffle: int | None = None,
        routers: Sequence[RouterSpec] | None = None,
        inputs: InputsOf | None = None,
    ):
        self.model = unwrapped(model, by_path=bool(routers))
        self.sites = routers_in(self.model, routers)
        if not self.sites:
            raise _nothing_to_change(self.model)
        self.plan = planned(self.model, self.sites, drop, force, shuffle, replay is not None)
        self.done = [Done() for _ in self.sites]
        self.replay = None
        if replay is not None:
            trace = open_trace(replay)
            self.replay = Replay(trace, self.sites)
        self._attachment = _Attachment(model, self)
        self._attachment.one_thread = self.plan.needs_rows
        self._inputs = PassInputs(CallReader(self.model, self.sites, inputs))
        self._passes = 0
        self._now = _Now()
        self._counting = threading.Lock()
        self._thread = 0  # that runs the current forward pass; 0: none does
        # by stack, of that pass, and afterwards of its backward pass: rows, and their tokens in the
        # trace
        self._rows: dict[str, Rows] = {}
        self._at: dict[str, Tensor] = {}
        self._entered = False
        self._dropped = {
            r: torch.isin(torch.arange(self.sites[r].experts), torch.tensor(experts))
            for r, experts in self.plan.drop.items()
        }

    def __enter__(self) -> Intervention:
        if self._entered:
            raise MoeInspectError("this intervention is over: call intervene again for another")
        if self.model in ALTERED:
            raise MoeInspectError(
                f"this {type(self.model).__name__} has an intervention already: end it first, or "
                "pass all changes to one intervene()"
            )
        self._entered = True
        ALTERED[self.model] = self.plan.described(self.sites)
        try:
            self._attachment.attach()
        except BaseException:
            del ALTERED[self.model]
            raise
        shared = [site for r, site in enumerate(self.sites) if self.done[r].how == SHARED_OUT]
        if shared and self.model not in _TOLD:  # (an ablation intervenes thousands of times)
            _TOLD.add(self.model)
            print_stderr(
                "the logits of "
                f"{shared[0].path}{f' and {len(shared) - 1} more' if len(shared) > 1 else ''} "
                "cannot be seen: its router chooses as before, and the gate weights of dropped "
                "experts are shared among the token's other experts"
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._attachment.detach()
        del ALTERED[self.model]
        if self.replay is not None and self.replay.beyond and kind is None:
            print_stderr(
                f"{plural(self.replay.beyond, 'token')} beyond the end of their sequence in "
                f"{self.replay.trace.path} kept the model's own choice"
            )

    def table(self) -> pd.DataFrame:
        """What was done so far, a row per router: `how`, and the numbers of `rows` it saw (padding
        included), of `decisions` that were changed, of `assignments` that went to another expert,
        and of `weights` that are not the router's own for that expert. Where a router itself chose
        among the rest, only what was changed afterwards is counted."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "layer": site.layer,
                    "router": r,
                    "name": site.path,
                    "how": done.how,
                    "rows": done.rows,
                    "decisions": done.decisions,
                    "assignments": done.assignments,
                    "weights": done.weights,
                }
                for r, (site, done) in enumerate(zip(self.sites, self.done, strict=True))
            ]
        )

    # --- called by the attachment around a forward pass

    def begin(self) -> None:
        self._now.stacks, self._now.called = set(), set()
        if not self.plan.needs_rows:
            return
        self._passes += 1
        for done in self.done:
            done.seen = 0
        self._rows, self._at = {}, {}
        self._thread = threading.get_ident()
        self._inputs.begin()

    def feed(self, stack: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._now.stacks.add(stack)
        if not self.plan.needs_rows:
            return
        rows = self._rows[stack] = self._inputs.rows(self._inputs.of_call(stack, args, kwargs))
        if self.replay is not None:
            self._at[stack] = self.replay.at(rows)

    def returned(self, stack: str, output: Any) -> None:
        if self.plan.needs_rows:
            self._inputs.returned(stack, output)

    def end(self) -> None:
        for r, site in enumerate(self.sites):
            wanted = self.plan.changes(r) and not site.told and site.stack in self._now.stacks
            if wanted and r not in self._now.called:
                raise MoeInspectError(
                    f"the choice of {site.path} was not seen in a forward pass, so it was not "
                    "changed: its experts ran in other code (fused kernels)"
                )
        if self.plan.needs_rows:
            self._thread = 0
            self._inputs.accept()
            self._inputs.end()

    # --- called at a router

    def changed(self, r: int, ids_TK: Tensor, weights_TK: Tensor) -> rules.Changed | None:
        """The choice to be made instead of this one at site r; None for this one."""
        self._now.called.add(r)
        made = self._made(r, ids_TK, weights_TK)
        if made is None:
            return None
        counts = torch.stack([made.moved_T > 0, made.moved_T, made.given_T]).sum(1).tolist()
        with self._counting:
            done = self.done[r]
            done.rows += len(ids_TK)
            done.decisions += counts[0]
            done.assignments += counts[1]
            done.weights += counts[2]
        return made if counts[1] or counts[2] else None

    def _made(self, r: int, ids_TK: Tensor, weights_TK: Tensor) -> rules.Changed | None:
        T, device = len(ids_TK), ids_TK.device
        if r in self._dropped:
            return rules.without(ids_TK, weights_TK, self._dropped[r].to(device))
        if r in self.plan.force:
            experts = torch.tensor(self.plan.force[r], device=device)
            return rules.forced(ids_TK, weights_TK, experts)
        if not self.plan.needs_rows:
            return None
        rows, done = self._rows.get(self.sites[r].stack), self.done[r]
        if rows is None or (threading.get_ident() != self._thread and not _in_backward()):
            raise MoeInspectError(
                "replay and shuffle need forward passes of the whole "
                f"{type(self.model).__name__}, one at a time: a part was called alone, or two "
                "threads call it"
            )
        start, done.seen = done.seen, done.seen + T
        # a layer may run several times, and again in the backward pass (gradient checkpointing)
        at = (torch.arange(start, start + T) % max(1, rows.T)).to(torch.int64)
        time = start // max(1, rows.T)
        if self.replay is None:
            row_T = self._exchange(rows, r, time, at).to(device)
            return rules.exchanged(ids_TK, weights_TK, row_T)
        return self._replayed(self.replay, r, time, at, ids_TK, weights_TK)

    def _replayed(
        self, replay: Replay, r: int, time: int, at: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> rules.Changed | None:
        token_T = self._at[self.sites[r].stack][at]
        found = replay.routes(r, time, token_T)
        if found is None:  # a layer the trace does not have; or the backward pass
            found = replay.routes(r, 0, token_T)
        if found is None:
            return None
        wanted_TK, given_TK = found
        if wanted_TK.shape[1] != ids_TK.shape[1]:
            raise MoeInspectError(
                f"{self.sites[r].path} chooses {ids_TK.shape[1]} experts, and "
                f"{wanted_TK.shape[1]} in {replay.trace.path}"
            )
        own_T1 = (token_T < 0).unsqueeze(1).to(ids_TK.device)
        wanted_TK = torch.where(own_T1, ids_TK, wanted_TK.to(ids_TK.device))
        given_TK = given_TK.to(ids_TK.device) if given_TK is not None else None
        return rules.replayed(ids_TK, weights_TK, wanted_TK, given_TK, self.sites[r].experts)

    def _exchange(self, rows: Rows, r: int, time: int, at: Tensor) -> Tensor:
        """For each row of a call the row whose choice it gets: tokens exchange theirs at random,
        padding keeps its own."""
        assert self.plan.shuffle is not None
        seed = hash((self.plan.shuffle, self._passes, r, time, int(at[0]) if len(at) else 0))
        generator = torch.Generator().manual_seed(seed & (2**63 - 1))
        real = torch.from_numpy(rows.real)[at].nonzero()[:, 0]
        row_T = torch.arange(len(at))
        row_T[real] = real[torch.randperm(len(real), generator=generator)]
        return row_T


class _Now(threading.local):
    """Of the forward pass that runs in this thread: the stacks that were fed, and the sites whose
    choice was seen."""

    def __init__(self) -> None:
        self.stacks: set[str] = set()
        self.called: set[int] = set()


class _Attachment(Attachment):
    """Puts an intervention where a recorder reads the choice, ahead of any recorder: what it
    records is what is executed."""

    def __init__(self, outer: Any, of: Intervention):
        super().__init__(outer, of.model, of.sites, "", (), of)
        self.of = of

    def _watch(self, r: int, site: Site, compiled: bool) -> None:
        plan, done = self.of.plan, self.of.done[r]
        if not plan.changes(r):
            return
        if r in plan.drop:
            done.how = how_dropped(site)
            if (router := logits_seen(site)) is not None:
                self._mask_logits(router, self.of._dropped[r])
        else:
            done.how = "forced" if r in plan.force else "replayed" if plan.replay else "shuffled"
        if site.adapter is not None and not site.adapter.at_call:
            hook = functools.partial(self._after_call, r)
            self._keep(site.module.register_forward_hook(hook, with_kwargs=True, prepend=True))
        else:
            hook = functools.partial(self._before_call, r)
            self._keep(site.module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))

    def _mask_logits(self, router: torch.nn.Module, dropped_E: Tensor) -> None:
        running = threading.local()

        def before(module: torch.nn.Module, args: Any) -> None:
            if module is router:
                running.among = ExitStack()
                running.among.enter_context(Among(dropped_E, beyond(router)))

        def after(module: torch.nn.Module, args: Any, output: Any) -> None:
            if module is router and hasattr(running, "among"):
                running.among.close()

        self._keep(router.register_forward_pre_hook(before))
        self._keep(router.register_forward_hook(after, prepend=True, always_call=True))

    def _before_call(self, r: int, module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        site = self.of.sites[r]
        if module is not site.module:  # a copy of it
            return None
        choice_of = site.adapter.choice if site.adapter is not None else called_with
        return self._instead(r, choice_of(module, args, kwargs, None), args, kwargs, None)

    def _after_call(
        self, r: int, module: torch.nn.Module, args: Any, kwargs: Any, output: Any
    ) -> Any:
        site = self.of.sites[r]
        if module is not site.module:
            return None
        assert site.adapter is not None
        choice = site.adapter.choice(module, args, kwargs, output)
        dropped_E = self.of._dropped.get(r)
        if choice is None or site.adapter.among is None or dropped_E is None:
            return self._instead(r, choice, args, kwargs, output)
        chosen = site.adapter.among(module, args, kwargs, output, dropped_E.to(choice[0].device))
        new = self.of.changed(r, *chosen)
        chosen = chosen if new is None else (new.ids_TK, new.weights_TK)
        return replaced(site, args, kwargs, output, choice, chosen)

    def _instead(self, r: int, choice: Any, args: Any, kwargs: Any, output: Any) -> Any:
        """What a hook returns: None leaves the call as it is."""
        if choice is None:
            return None
        new = self.of.changed(r, *choice)
        if new is None:
            return None
        return replaced(
            self.of.sites[r], args, kwargs, output, choice, (new.ids_TK, new.weights_TK)
        )


def _in_backward() -> bool:
    """Whether a backward pass runs: gradient checkpointing runs layers again then."""
    return torch._C._current_graph_task_id() != -1


def _nothing_to_change(model: Any) -> MoeInspectError:
    like = candidates(model)
    if is_of_transformers(model) or not like:
        return no_routers(model)
    return MoeInspectError(
        f"no known router was found in {type(model).__name__}, but {like.described()}: give "
        f"routers=[moe_inspect.RouterSpec(module={like.pattern!r}, choice=f)] (a probe shows a "
        "choice, and cannot replace it)"
    )
