"""Sums over the routing of forward passes, kept on the devices of the routers. Nothing waits for a
device before `read`.

T rows a router sees (padding included), K slots, E experts, R routers, S steps. The routers of a
device lie side by side, E + 1 columns (C in all) each: the last takes padding and slots that routed
nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_inspect.capture.hook.inputs.arguments import CallReader, InputsOf
from moe_inspect.capture.hook.inputs.call_arguments import mask_of
from moe_inspect.capture.hook.sink import Sinks
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.find import no_routers
from moe_inspect.model.routers import Site, selection_bias
from moe_inspect.trace.schema import Router

RECENT = 32  # steps whose loads are kept apart, for the max_vio of a step


class DeviceSums:
    """The sums of the routers of one device."""

    def __init__(self, device: torch.device, experts: Sequence[int]):
        self.device, self.R = device, len(experts)
        first = torch.tensor([0, *(E + 1 for E in experts)]).cumsum(0).tolist()
        self.first, self.C = first[:-1], first[-1]
        with torch.inference_mode(False), torch.device(device):
            self.router_C = torch.repeat_interleave(
                torch.arange(self.R), torch.tensor([E + 1 for E in experts])
            )
            self.is_expert_C = torch.ones(self.C, dtype=torch.bool)
            self.is_expert_C[[f + E for f, E in zip(self.first, experts, strict=True)]] = False
            self.experts_R = torch.tensor(experts, dtype=torch.float32)
            # of the pass
            self.load_C = torch.zeros(self.C, dtype=torch.int64)
            self.probability_C = torch.zeros(self.C)
            self.z_R = torch.zeros(self.R)
            # of the step, of the steps before, and since `read`: evaluation, training
            self.step_C = torch.zeros(self.C, dtype=torch.int64)
            self.recent_SC = torch.zeros(RECENT, self.C, dtype=torch.int32)
            self.total_C = [torch.zeros(self.C, dtype=torch.int64) for _ in range(2)]
            self.losses_2R = [torch.zeros(2, self.R) for _ in range(2)]

    def begin(self) -> None:
        self.load_C.zero_()
        self.probability_C.zero_()
        self.z_R.zero_()

    def end(self, training: bool, logits: bool) -> None:
        """Adds the pass. Its auxiliary loss is E · Σ f · P of each router: f the share of the
        assignments, P the mean probability of an expert; 1 for a uniform router
        (arXiv:2101.03961)."""
        (self.step_C if training else self.total_C[False]).add_(self.load_C)
        if not logits:
            return
        sums_R = [
            torch.zeros(self.R, device=self.device).index_add_(0, self.router_C, values_C)
            for values_C in (
                self.load_C * self.is_expert_C * 1.0,
                self.probability_C,
                self.load_C * self.probability_C,
            )
        ]
        load_R, tokens_R, product_R = sums_R
        self.losses_2R[training][0] += (
            self.experts_R * product_R / (load_R * tokens_R).clamp(min=1e-20)
        )
        self.losses_2R[training][1] += self.z_R / tokens_R.clamp(min=1)

    def end_step(self, n: int) -> None:
        self.total_C[True] += self.step_C
        self.recent_SC[n % RECENT] = self.step_C
        self.step_C.zero_()

    def parts(self, training: bool, steps: int) -> list[Tensor]:
        recent = self.recent_SC[:steps]
        return [self.total_C[training], recent.reshape(-1), self.losses_2R[training].reshape(-1)]

    def clear(self, training: bool) -> None:
        self.total_C[training].zero_()
        self.losses_2R[training].zero_()


@dataclass(frozen=True)
class Taken:
    """What was summed, on the host. `load`: assignments, int64 [E] of each router. `recent`: those
    of each of the last steps, at most RECENT, int64 [S, E] of each router. `tokens_R`; `passes`:
    forward passes, of all ranks; `aux_loss_R`, `z_loss_R`: means over passes, NaN where the model
    shows no logits."""

    load: list[Any]
    recent: list[Any]
    tokens_R: Any
    passes: int
    aux_loss_R: Any
    z_loss_R: Any


class Sums:
    """Receives the events of an Attachment (its `Records`). A pass in which the model is in
    training mode and gradients are on is training; every other is evaluation. `is_counted`:
    whether training passes are, until it is changed. `sites`: without any, probes show them in the
    first pass (`add_router`). `inputs`: how to read the arguments of the model's calls."""

    def __init__(self, model: Any, sites: list[Site], inputs: InputsOf | None = None):
        self.model, self.sites = model, sites
        self._reader = CallReader(model, sites, inputs)
        self.routers: list[Router] = []  # once a pass has shown their top-k
        self.is_counted = True
        stacks = dict.fromkeys([s.stack for s in sites] or [""])
        self._on: dict[torch.device, DeviceSums] = {}
        self._place: list[tuple[DeviceSums, int]] = []  # of each router
        # of the first pass: kind, router, first row, and ids or logits of each call
        self._early: list[tuple[str, int, int, Tensor]] = []
        self._steps = 0  # since the last `read`
        self._passes = [0, 0]  # in evaluation, in training
        self._tokens: list[dict[str, Any]] = [dict.fromkeys(stacks, 0) for _ in range(2)]
        self._step_tokens: dict[str, Any] = dict.fromkeys(stacks, 0)
        self._step_passes = 0
        self._counting = False
        self._seen = self._nothing_seen()  # rows, by kind and router
        self._shows_logits: set[int] = set()  # routers that do

    def add_router(self, site: Site) -> None:
        """One more router, which a probe shows in the first pass."""
        if self._place:
            raise MoeInspectError(
                f"{site.path} was not called in the first forward pass: begin with one that calls "
                "every probe"
            )
        self.sites.append(site)
        for of_kind in self._seen.values():
            of_kind.append(0)

    def receive(self, r: int, sinks: Sinks) -> None:
        """Has the sinks of router r pass on what they receive."""
        for kind, sink in sinks.items():
            sink.take = partial(self.take, kind, r)

    def _nothing_seen(self) -> dict[str, list[int]]:
        return {kind: [0] * len(self.sites) for kind in ("", "logits")}

    # --- a forward pass

    def begin(self) -> None:
        self.training = self.model.training and torch.is_grad_enabled()
        self._counting = self.is_counted or not self.training
        self._rows: dict[str, int] = {}
        self._real: dict[str, Tensor | None] = {}
        self._masks: dict[tuple[str, torch.device], Tensor] = {}
        self._seen = self._nothing_seen()
        self._early = []
        for on in self._on.values() if self._counting else ():
            on.begin()

    def feed(self, stack: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._counting:
            return
        given, fed = self._reader.read(stack, args, kwargs)
        B, S = fed.shape[:2]
        mask_BS = mask_of(given.get("attention_mask"), B, S, 0)
        order_T = self._reader.row_order(B, S)
        real_T = None if mask_BS is None else mask_BS.reshape(-1) != 0
        if real_T is not None and order_T is not None:
            real_T = real_T[torch.from_numpy(order_T).to(real_T.device)]
        self._rows[stack], self._real[stack] = B * S if order_T is None else len(order_T), real_T

    def returned(self, stack: str, output: Any) -> None:
        pass

    def take(self, kind: str, r: int, values: Tensor, *_: Tensor) -> None:
        """One call of router r, for the rows after those it has seen in this pass: of its choices
        (""; `values` are the ids) or its logits."""
        if not self._counting:
            return
        row = self._seen[kind][r]
        self._seen[kind][r] += len(values)
        if self._place:
            self._add(kind, r, row, values)
        else:
            self._early.append((kind, r, row, values.clone()))

    def _add(self, kind: str, r: int, row: int, values: Tensor) -> None:
        (self._add_logits if kind else self._add_ids)(r, row, values)

    @torch.no_grad()
    def _add_ids(self, r: int, row: int, ids_TK: Tensor) -> None:
        on, n = self._place[r]
        E = self.sites[r].experts
        outside_TK = (ids_TK < 0) | (ids_TK >= E)
        if (real_T := self._mask(r, on.device)) is not None:
            outside_TK |= ~real_T[row : row + len(ids_TK), None]
        slot_N = (ids_TK.long().masked_fill(outside_TK, E) + on.first[n]).reshape(-1)
        on.load_C.scatter_add_(0, slot_N, torch.ones_like(slot_N))

    @torch.no_grad()
    def _add_logits(self, r: int, row: int, logits_TE: Tensor) -> None:
        self._shows_logits.add(r)
        on, n = self._place[r]
        site, logits_TE = self.sites[r], logits_TE.float()
        log_sum_T1 = logits_TE.logsumexp(1, keepdim=True)
        if site.scoring == "sigmoid":
            score_TE = logits_TE.sigmoid()
            score_TE = score_TE / score_TE.sum(1, keepdim=True)
        else:
            score_TE = (logits_TE - log_sum_T1).exp()
        z_T = log_sum_T1[:, 0] ** 2
        if (real_T := self._mask(r, on.device)) is not None:
            real_T = real_T[row : row + len(logits_TE)]
            score_TE, z_T = score_TE * real_T[:, None], z_T * real_T
        first = on.first[n]
        on.probability_C[first : first + site.experts] += score_TE.sum(0)
        on.z_R[n] += z_T.sum()

    def _mask(self, r: int, device: torch.device) -> Tensor | None:
        """Which rows are no padding, bool [T] on the router's device; None: all."""
        stack = self.sites[r].stack
        real_T = self._real[stack]
        if real_T is None or real_T.device == device:
            return real_T
        if (stack, device) not in self._masks:
            self._masks[stack, device] = real_T.to(device, non_blocking=True)
        return self._masks[stack, device]

    @torch.no_grad()
    def end(self) -> None:
        """The pass is over. MoeInspectError unless every router saw every row once."""
        if not self._counting:
            return
        self._counting = False
        for r, site in enumerate(self.sites):
            seen, T = self._seen[""][r], self._rows.get(site.stack)
            if T is not None and seen != T:
                raise MoeInspectError(
                    f"{site.path} routed {seen} rows in a forward pass of {T}: this model's "
                    "routing cannot be watched in training"
                )
        if not self._place:
            self._lay_out()
        for on in self._on.values():
            on.end(self.training, bool(self._shows_logits))
        tokens = self._step_tokens if self.training else self._tokens[False]
        for stack, T in self._rows.items():
            real_T = self._real[stack]
            tokens[stack] = tokens[stack] + (T if real_T is None else real_T.sum())
        if self.training:
            self._step_passes += 1
        else:
            self._passes[False] += 1

    def _lay_out(self) -> None:
        """The first pass has shown the devices and the top-k: makes the sums, and counts it."""
        if not self.sites:
            raise no_routers(self.model)
        early = {r: ids for kind, r, _, ids in self._early if not kind}
        if missing := [s.path for r, s in enumerate(self.sites) if r not in early]:
            raise MoeInspectError(
                f"{missing[0]} did not run in the first forward pass: begin with one of the whole "
                "model"
            )
        devices = [early[r].device for r in range(len(self.sites))]
        for device in dict.fromkeys(devices):
            mine = [r for r, d in enumerate(devices) if d == device]
            self._on[device] = DeviceSums(device, [self.sites[r].experts for r in mine])
        order = dict.fromkeys(self._on, 0)
        for device in devices:
            self._place.append((self._on[device], order[device]))
            order[device] += 1
        self.routers = [
            Router(
                site.layer,
                site.path.split(".", 1)[-1],
                site.path,
                site.experts,
                early[r].shape[1],
                site.scoring,
                site.shared_experts,
                site.stack,
                "unknown",
            )
            for r, site in enumerate(self.sites)
        ]
        for call in self._early:
            self._add(*call)
        self._early = []

    # --- steps

    @torch.no_grad()
    def end_step(self) -> None:
        """The training passes since the last call are one step."""
        if not self.is_counted or not self._step_passes:
            return
        for on in self._on.values():
            on.end_step(self._steps)
        self._steps += 1
        self._passes[True] += self._step_passes
        for stack, n in self._step_tokens.items():
            self._tokens[True][stack] = self._tokens[True][stack] + n
        self._step_tokens, self._step_passes = dict.fromkeys(self._step_tokens, 0), 0

    @torch.no_grad()
    def read(self, training: bool = True, group: Any = None) -> Taken | None:
        """What was summed since the last `read`, of training or of evaluation; summed over the
        processes of torch.distributed in one all-reduce. Waits for the devices. None before the
        first pass."""
        if not self._place:
            return None
        S = min(self._steps, RECENT) if training else 0
        device = self._place[0][0].device
        tokens = [torch.as_tensor(n, device=device) for n in self._tokens[training].values()]
        parts = [
            *(part for on in self._on.values() for part in on.parts(training, S)),
            *tokens,
            torch.tensor(self._passes[training], device=device),
        ]
        flat = torch.cat([part.reshape(-1).to(device, torch.float64) for part in parts])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(flat, group=group)
        taken = self._unpacked(flat.cpu(), S)
        for on in self._on.values():
            on.clear(training)
        self._passes[training] = 0
        self._tokens[training] = dict.fromkeys(self._tokens[training], 0)
        if training:
            self._steps = 0
        return taken

    def _unpacked(self, flat: Tensor, S: int) -> Taken:
        at = 0

        def next_part(size: int) -> Tensor:
            nonlocal at
            at += size
            return flat[at - size : at]

        by_device = {
            on: (
                next_part(on.C),
                next_part(S * on.C).reshape(S, on.C),
                next_part(2 * on.R).reshape(2, on.R),
            )
            for on in self._on.values()
        }
        stacks = list(self._step_tokens)
        tokens = dict(zip(stacks, next_part(len(stacks)).tolist(), strict=True))
        passes = int(next_part(1))
        load, recent, losses = [], [], []
        for n_site, ((on, n), site) in enumerate(zip(self._place, self.sites, strict=True)):
            total_C, recent_SC, losses_2R = by_device[on]
            mine = slice(on.first[n], on.first[n] + site.experts)
            load.append(total_C[mine].long().numpy())
            recent.append(recent_SC[:, mine].long().numpy())
            known = n_site in self._shows_logits and passes
            losses.append(losses_2R[:, n] / passes if known else torch.full((2,), torch.nan))
        losses_2R = torch.stack(losses, 1).double().numpy()
        tokens_R = torch.tensor([round(tokens[s.stack]) for s in self.sites]).numpy()
        return Taken(load, recent, tokens_R, passes, losses_2R[0], losses_2R[1])

    def bias_range(self) -> Any:
        """The range of each router's selection bias, float [R]; NaN where it has none. Waits for
        the devices."""
        biases = [selection_bias(site, self.model) for site in self.sites]
        ranges = [
            torch.full((), torch.nan) if b is None else (b.max() - b.min()).detach().float().cpu()
            for b in biases
        ]
        return torch.stack(ranges).double().numpy()
