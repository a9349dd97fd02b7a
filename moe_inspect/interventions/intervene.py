"""Interventions: while a `with` block runs, the tokens of a model go to other experts.

T rows a router sees, K slots, E experts.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from weakref import WeakSet

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from moe_inspect.capture.hook.arguments import CallReader
from moe_inspect.capture.hook.attach import Attachment
from moe_inspect.capture.hook.inputs import PassInputs
from moe_inspect.capture.hook.numbering import Rows
from moe_inspect.capture.open_trace import ALTERED
from moe_inspect.capture.options import InputsOf
from moe_inspect.errors import MoeInspectError
from moe_inspect.interventions import rules
from moe_inspect.interventions.replay import DecisionReplay
from moe_inspect.model.choices import Args, Called, Kwargs, called_with
from moe_inspect.model.custom.spec import RouterSpec
from moe_inspect.model.find import no_routers, routers_in
from moe_inspect.model.routers import Site, top_k_of
from moe_inspect.model.wrapped import unwrapped
from moe_inspect.text import join_first, plural, print_stderr
from moe_inspect.trace.reader import Trace, open_trace

# layer, or path of a router's module → experts
Layers = Mapping["int | str", "int | Iterable[int]"]


def _by_site(sites: Sequence[Site], layers: Layers, name: str) -> dict[int, list[int]]:
    """Site → its experts. MoeInspectError for a layer without one router, or that expert."""
    found: dict[int, list[int]] = {}
    for layer, of_layer in layers.items():
        experts = sorted({of_layer} if isinstance(of_layer, int) else set(of_layer))
        in_layer = [r for r, site in enumerate(sites) if layer in (site.layer, site.path)]
        if not in_layer:
            known = join_first(sorted({site.layer for site in sites}))
            raise MoeInspectError(f"{name}: no router in layer {layer}: the MoE layers are {known}")
        if len(in_layer) > 1:
            raise MoeInspectError(
                f"{name}: layer {layer} has {len(in_layer)} routers, "
                f"{' and '.join(sites[r].path for r in in_layer)}: give one of these paths in "
                "place of the layer"
            )
        E = sites[in_layer[0]].experts
        if wrong := [e for e in experts if not 0 <= e < E]:
            said = f"{name}: no expert {wrong[0]} in layer {layer}"
            raise MoeInspectError(f"{said}, which has {E} (0 to {E - 1})")
        if experts:
            found[in_layer[0]] = experts
    return found


_TOLD: WeakSet[torch.nn.Module] = WeakSet()  # whose user knows that weights are shared out


# what is counted at a router; `rows` counts padding where nothing tells it from tokens
COUNTED = ["rows", "decisions", "assignments", "weights"]


class Intervention:
    """The context manager of `moe_inspect.intervene`, which describes the arguments."""

    def __init__(
        self,
        model: torch.nn.Module,
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
            raise no_routers(self.model, to_change=True)
        given = {"drop": drop, "force": force, "replay": replay, "shuffle": shuffle}
        names = [name for name, value in given.items() if value is not None]
        if not names:
            raise MoeInspectError("intervene does nothing: give it drop, force, replay or shuffle")
        if len(names) > 1 and names != ["drop", "force"]:
            both = f"{names[0]} and {names[1]}"
            raise MoeInspectError(f"{both} contradict each other: give one of them")
        self.drop = _by_site(self.sites, drop or {}, "drop")
        self.force = _by_site(self.sites, force or {}, "force")
        self.shuffle, self._of_rows = shuffle, replay is not None or shuffle is not None
        self._check()
        self.replay = DecisionReplay(open_trace(replay), self.sites) if replay is not None else None
        self.how, self._done_R4 = [""] * len(self.sites), np.zeros((len(self.sites), 4), np.int64)
        self._attachment = _Attachment(model, self)
        self._attachment.one_thread = self._of_rows
        self._inputs = PassInputs(CallReader(self.model, self.sites, inputs))
        self._passes = 0
        self._now = _Now()
        self._counting = threading.Lock()
        self._thread = 0  # that runs the current forward pass; 0: none does
        # of that pass, and afterwards of its backward pass. By stack: rows, and their tokens in the
        # trace; by site: rows that it saw
        self._rows: dict[str, Rows] = {}
        self._at: dict[str, Tensor] = {}
        self._seen: list[int] = []
        self._entered = False
        self.dropped = {
            r: torch.isin(torch.arange(self.sites[r].experts), torch.tensor(experts))
            for r, experts in self.drop.items()
        }

    def _check(self) -> None:
        for r, site in enumerate(self.sites):
            dropped, forced = len(self.drop.get(r, ())), len(self.force.get(r, ()))
            if self.changes(r) and site.adapter is not None and site.adapter.fixed:
                raise MoeInspectError(f"{site.path}: {site.adapter.fixed}")
            layer, E = f"layer {site.layer}", site.experts
            if dropped >= E:
                raise MoeInspectError(f"drop leaves no expert in {layer}, which has {E}")
            if dropped and forced:
                raise MoeInspectError(f"{layer} is in both drop and force: give one")
            if forced and forced > (K := top_k_of(site, self.model)):
                raise MoeInspectError(
                    f"force has {forced} experts for {layer}, whose tokens choose {K}"
                )

    def changes(self, r: int) -> bool:
        return self._of_rows or r in self.drop or r in self.force

    def __enter__(self) -> Intervention:
        if self._entered:
            raise MoeInspectError("this intervention is over: call intervene again for another")
        if self.model in ALTERED:
            raise MoeInspectError(
                f"this {type(self.model).__name__} has an intervention already: end it first, or "
                "pass all changes to one intervene()"
            )
        self._entered = True
        done = [
            f"{verb} in {self.sites[r].path}: {join_first(experts)}"
            for verb, of in (("dropped", self.drop), ("forced", self.force))
            for r, experts in of.items()
        ]
        done += ["routing replayed from another trace"] if self.replay is not None else []
        done += [f"choices shuffled (seed {self.shuffle})"] if self.shuffle is not None else []
        ALTERED[self.model] = "intervention: " + "; ".join(done)
        try:
            self._attachment.attach()
        except BaseException:
            del ALTERED[self.model]
            raise
        shared = [site for r, site in enumerate(self.sites) if self.how[r] == rules.SHARED_OUT]
        if shared and self.model not in _TOLD:  # (an ablation intervenes thousands of times)
            _TOLD.add(self.model)
            more = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
            print_stderr(
                f"the logits of {shared[0].path}{more} cannot be seen: its router chooses as "
                "before, and the gate weights of dropped experts are shared among the token's "
                "other experts"
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
        rows = [(s.layer, r, s.path, self.how[r]) for r, s in enumerate(self.sites)]
        frame = pd.DataFrame(rows, columns=["layer", "router", "name", "how"])
        return frame.join(pd.DataFrame(self._done_R4, columns=COUNTED))

    # --- called by the attachment around a forward pass

    def begin(self) -> None:
        self._now.stacks, self._now.called = set(), set()
        if not self._of_rows:
            return
        self._passes += 1
        self._rows, self._at, self._seen = {}, {}, [0] * len(self.sites)
        self._thread = threading.get_ident()
        self._inputs.begin()

    def feed(self, stack: str, args: Args, kwargs: Kwargs) -> None:
        self._now.stacks.add(stack)
        if not self._of_rows:
            return
        rows = self._rows[stack] = self._inputs.rows(self._inputs.of_call(stack, args, kwargs))
        if self.replay is not None:
            self._at[stack] = self.replay.at(rows)

    def returned(self, stack: str, output: Called) -> None:
        if self._of_rows:
            self._inputs.returned(stack, output)

    def end(self) -> None:
        for r, site in enumerate(self.sites):
            wanted = self.changes(r) and not site.told and site.stack in self._now.stacks
            if wanted and r not in self._now.called:
                raise MoeInspectError(
                    f"the choice of {site.path} was not seen in a forward pass, so it was not "
                    "changed: its experts ran in other code (fused kernels)"
                )
        if self._of_rows:
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
            self._done_R4[r] += [len(ids_TK), *counts]
        return made if any(counts) else None

    def _made(self, r: int, ids_TK: Tensor, weights_TK: Tensor) -> rules.Changed | None:
        T, device, site = len(ids_TK), ids_TK.device, self.sites[r]
        if r in self.dropped:
            return rules.without(ids_TK, weights_TK, self.dropped[r].to(device))
        if r in self.force:
            return rules.forced(ids_TK, weights_TK, torch.tensor(self.force[r], device=device))
        if not self._of_rows:
            return None
        rows, stray = self._rows.get(site.stack), threading.get_ident() != self._thread
        # (gradient checkpointing runs layers again in a backward pass, in a thread of its own)
        if rows is None or (stray and torch._C._current_graph_task_id() == -1):
            raise MoeInspectError(
                "replay and shuffle need forward passes of the whole "
                f"{type(self.model).__name__}, one at a time: a part was called alone, or two "
                "threads call it"
            )
        start, self._seen[r] = self._seen[r], self._seen[r] + T
        # a layer may run several times, and again in the backward pass
        at = (torch.arange(start, start + T) % max(1, rows.T)).to(torch.int64)
        time = start // max(1, rows.T)
        if self.replay is None:
            # tokens exchange their choices at random, padding keeps its own
            seed = hash((self.shuffle, self._passes, r, time, int(at[0]) if T else 0))
            generator = torch.Generator().manual_seed(seed & (2**63 - 1))
            real, row_T = torch.from_numpy(rows.real)[at].nonzero()[:, 0], torch.arange(T)
            row_T[real] = real[torch.randperm(len(real), generator=generator)]
            return rules.exchanged(ids_TK, weights_TK, row_T.to(device))
        token_T = self._at[site.stack][at]
        # the trace may not have a layer's second run; nor does it have the backward pass
        found = self.replay.routes(r, time, token_T) or self.replay.routes(r, 0, token_T)
        if found is None:
            return None
        wanted_TK, given_TK = found
        if wanted_TK.shape[1] != ids_TK.shape[1]:
            raise MoeInspectError(
                f"{site.path} chooses {ids_TK.shape[1]} experts, and {wanted_TK.shape[1]} in "
                f"{self.replay.trace.path}"
            )
        own_T1 = (token_T < 0).unsqueeze(1).to(device)
        wanted_TK = torch.where(own_T1, ids_TK, wanted_TK.to(device))
        return rules.replayed(ids_TK, weights_TK, wanted_TK, given_TK, site.experts)


class _Now(threading.local):
    """Of the pass that runs in this thread: the stacks fed, and the sites whose choice was seen."""

    def __init__(self) -> None:
        self.stacks: set[str] = set()
        self.called: set[int] = set()


class _Attachment(Attachment):
    """Changes the choice ahead of any recorder: what that records is what is executed."""

    def __init__(self, outer: torch.nn.Module, of: Intervention):
        super().__init__(outer, of.model, of.sites, "", (), of)
        self.of = of

    def _watch(self, r: int, site: Site, compiled: bool) -> None:
        of = self.of
        if not of.changes(r):
            return
        if r in of.drop:
            of.how[r] = rules.how_dropped(site)
            if (router := rules.logits_seen(site)) is not None:
                self._mask_logits(router, of.dropped[r])
        else:
            of.how[r] = "forced" if r in of.force else "replayed" if of.replay else "shuffled"
        at_call, module = site.adapter is None or site.adapter.at_call, site.module
        register = module.register_forward_pre_hook if at_call else module.register_forward_hook
        self._remove_later(
            register(functools.partial(self._instead, r), with_kwargs=True, prepend=True)
        )

    def _mask_logits(self, router: torch.nn.Module, dropped_E: Tensor) -> None:
        running = threading.local()

        def before(module: torch.nn.Module, args: Args) -> None:
            if module is router:
                running.among = rules.Among(dropped_E, rules.beyond(router))
                running.among.__enter__()

        def after(module: torch.nn.Module, args: Args, output: object) -> None:
            if module is router and hasattr(running, "among"):
                running.among.__exit__(None, None, None)
                del running.among

        self._remove_later(router.register_forward_pre_hook(before))
        self._remove_later(router.register_forward_hook(after, prepend=True, always_call=True))

    def _instead(
        self, r: int, module: torch.nn.Module, args: Args, kwargs: Kwargs, output: Called = None
    ) -> Called:
        """A hook, before the module runs or after: None leaves its call as it is."""
        of, site = self.of, self.of.sites[r]
        if module is not site.module:  # a copy of it
            return None
        adapter = site.adapter
        own = (adapter.choice if adapter else called_with)(module, args, kwargs, output)
        if own is None:
            return None
        chosen = own
        if r in of.dropped and adapter is not None and adapter.among is not None:
            dropped_E = of.dropped[r].to(own[0].device)
            chosen = adapter.among(module, args, kwargs, output, dropped_E)
        if (new := of.changed(r, *chosen)) is not None:
            chosen = new.ids_TK, new.weights_TK
        if chosen is own:
            return None
        return rules.replaced(site, args, kwargs, output, own, chosen)
