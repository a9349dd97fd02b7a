"""Sums over the routing of forward passes, kept on the devices of the routers. Nothing waits for a
device before `read`.

T rows a router sees (padding included), K slots, E experts, R routers, S steps. The routers of a
device lie side by side, E + 1 columns (C in all) each: the last takes padding and slots that routed
nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from moe_inspect.capture.hook.attach import Attachment
from moe_inspect.capture.hook.inputs.arguments import CallReader, mask_of
from moe_inspect.capture.hook.probes import Probes
from moe_inspect.capture.hook.stack import Sinks, router_at
from moe_inspect.capture.options import InputsOf
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.find import no_routers, recordable
from moe_inspect.model.routers import Site, selection_bias
from moe_inspect.model.wrapped import unwrapped
from moe_inspect.trace.schema import Router

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from moe_inspect.model.custom.spec import RouterSpec

Tokens = dict[str, int | Tensor]  # by stack
RECENT = 32  # steps whose loads are kept apart, for the max_vio of a step
# what is summed apart; the passes of a step are training once it has ended
EVALUATION, TRAINING, STEP = range(3)


class DeviceSums:
    """The sums of the routers of one device: of the pass, and since `read` by what it was."""

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
            self.load_C = torch.zeros(self.C, dtype=torch.int64)
            self.probability_C = torch.zeros(self.C)
            self.z_R = torch.zeros(self.R)
            self.total_3C = torch.zeros(3, self.C, dtype=torch.int64)
            self.recent_SC = torch.zeros(RECENT, self.C, dtype=torch.int32)
            self.losses_22R = torch.zeros(2, 2, self.R)  # evaluation, training; auxiliary and z

    def begin(self) -> None:
        for sums in (self.load_C, self.probability_C, self.z_R):
            sums.zero_()

    def add_choices(self, n: int, E: int, ids_TK: Tensor, real_T: Tensor | None) -> None:
        """To the sums of the n-th router. `real_T`: the rows that are no padding; None: all."""
        outside_TK = (ids_TK < 0) | (ids_TK >= E)
        if real_T is not None:
            outside_TK |= ~real_T[:, None]
        slot_N = (ids_TK.long().masked_fill(outside_TK, E) + self.first[n]).reshape(-1)
        self.load_C.scatter_add_(0, slot_N, torch.ones_like(slot_N))

    def add_logits(self, n: int, site: Site, logits_TE: Tensor, real_T: Tensor | None) -> None:
        logits_TE = logits_TE.float()
        log_sum_T1 = logits_TE.logsumexp(1, keepdim=True)
        if site.scoring == "sigmoid":
            score_TE = logits_TE.sigmoid()
            score_TE = score_TE / score_TE.sum(1, keepdim=True)
        else:
            score_TE = (logits_TE - log_sum_T1).exp()
        z_T = log_sum_T1[:, 0] ** 2
        if real_T is not None:
            score_TE, z_T = score_TE * real_T[:, None], z_T * real_T
        first = self.first[n]
        self.probability_C[first : first + site.experts] += score_TE.sum(0)
        self.z_R[n] += z_T.sum()

    def end(self, training: bool, logits: bool) -> None:
        """Adds the pass. Its auxiliary loss is E · Σ f · P of each router: f the share of the
        assignments, P the mean probability of an expert; 1 for a uniform router
        (arXiv:2101.03961)."""
        self.total_3C[STEP if training else EVALUATION] += self.load_C
        if not logits:
            return
        load_R, tokens_R, product_R = (
            torch.zeros(self.R, device=self.device).index_add_(0, self.router_C, values_C)
            for values_C in (
                self.load_C * self.is_expert_C * 1.0,
                self.probability_C,
                self.load_C * self.probability_C,
            )
        )
        aux_R = self.experts_R * product_R / (load_R * tokens_R).clamp(min=1e-20)
        self.losses_22R[int(training)] += torch.stack([aux_R, self.z_R / tokens_R.clamp(min=1)])

    def end_step(self, n: int) -> None:
        self.total_3C[TRAINING] += self.total_3C[STEP]
        self.recent_SC[n % RECENT] = self.total_3C[STEP]
        self.total_3C[STEP].zero_()

    def parts(self, of: int, steps: int) -> list[Tensor]:
        """What was summed: load, that of each recent step, and the losses."""
        return [self.total_3C[of], self.recent_SC[:steps], self.losses_22R[of]]


@dataclass(frozen=True)
class WindowSums:
    """What was summed, on the host. `load`: assignments, int64 [E] of each router. `recent`: those
    of each of the last steps, at most RECENT, int64 [S, E] of each router. `tokens_R`; `passes`:
    forward passes, of all ranks; `losses_2R`: auxiliary and z-loss, means over passes, NaN where
    the model shows no logits."""

    load: list[np.ndarray]
    recent: list[np.ndarray]
    tokens_R: np.ndarray
    passes: int
    losses_2R: np.ndarray

    def plus(self, later: WindowSums) -> WindowSums:
        """The sums of both, of which the other's steps come later."""
        n, m = self.passes, later.passes
        return WindowSums(
            [a + b for a, b in zip(self.load, later.load, strict=True)],
            [np.concatenate(both) for both in zip(self.recent, later.recent, strict=True)],
            self.tokens_R + later.tokens_R,
            n + m,
            (n * self.losses_2R + m * later.losses_2R) / (n + m),
        )


class RoutingSums:
    """Receives the events of its `attachment` to a model, wrapped or not. A pass in which the model
    is in training mode and gradients are on is training; every other is evaluation. `is_counted`:
    whether training passes are, until it is changed. `sites`: without any, probes show them in the
    first pass. `routers`, `layers`, `inputs`: as of `RoutingMonitor`."""

    def __init__(
        self,
        outer: Any,
        routers: Sequence[RouterSpec] | None,
        layers: Sequence[int] | None,
        inputs: InputsOf | None,
    ):
        self.outer, self.model = outer, unwrapped(outer, by_path=bool(routers))
        self.sites = sites = recordable(self.model, routers, layers)
        self._reader = CallReader(self.model, sites, inputs)
        self.routers: list[Router] = []  # once a pass has shown their top-k
        self.is_counted, self.is_training = True, False
        self._stacks = list(dict.fromkeys([s.stack for s in sites] or [""]))
        self._on: dict[torch.device, DeviceSums] = {}
        self._place: list[tuple[DeviceSums, int]] = []  # of each router
        self._shows_logits: set[int] = set()  # routers that do
        self._steps = 0  # since the last `read`
        self._passes = [0, 0, 0]
        self._tokens: list[Tokens] = [dict.fromkeys(self._stacks, 0) for _ in range(3)]
        self._counting = False
        self._begin_pass()
        logits = not sites or any(site.logits_module is not None for site in sites)
        extras = ("logits",) if logits else ()
        self.attachment = Attachment(outer, self.model, sites, "tap", extras, self)
        for r, sinks in enumerate(self.attachment.sinks):
            self.receive(r, sinks)
        add, scopes = None if sites else self._add_probed, self.attachment.scopes
        self.attachment.probes = Probes(scopes, add, self.model, layers, need_logits=False)

    def _begin_pass(self) -> None:
        self._rows: dict[str, int] = {}  # of each stack that was fed
        self._fed: dict[str, tuple[int, int, np.ndarray | None]] = {}  # B, S, and the rows' order
        self._real: dict[str, Tensor | None] = {}
        self._masks: dict[tuple[str, torch.device], Tensor] = {}
        # rows seen of each router: of its choices, and of its logits
        self._seen: dict[str, list[int]] = {kind: [0] * len(self.sites) for kind in ("", "logits")}
        # calls in the first pass: "" or "logits", router, first row, and ids or logits
        self._early: list[tuple[str, int, int, Tensor]] = []

    def _add_probed(self, site: Site) -> Sinks:
        """One more router, which a probe shows in the first pass."""
        if self._place:
            raise MoeInspectError(
                f"{site.path} was not called in the first forward pass: begin with one that calls "
                "every probe"
            )
        self.sites.append(site)
        for seen in self._seen.values():
            seen.append(0)
        self.receive(len(self.sites) - 1, sinks := self.attachment.add(site))
        return sinks

    def receive(self, r: int, sinks: Sinks) -> None:
        """Has the sinks of router r pass on what they receive."""
        for kind, sink in sinks.items():
            sink.take = partial(self.take, kind, r)

    # --- a forward pass

    def begin(self) -> None:
        self.is_training = self.model.training and torch.is_grad_enabled()
        self._counting = self.is_counted or not self.is_training
        self._begin_pass()
        for on in self._on.values() if self._counting else ():
            on.begin()

    def feed(self, stack: str, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if not self._counting:
            return
        given, fed = self._reader.read(stack, args, kwargs)
        B, S = fed.shape[:2]
        mask_BS = mask_of(given.get("attention_mask"), B, S, 0)
        order_T = None if (order_of := self._reader.row_order) is None else order_of(B, S)
        real_T = None if mask_BS is None else mask_BS.reshape(-1) != 0
        if real_T is not None and order_T is not None:
            real_T = real_T[torch.from_numpy(order_T).to(real_T.device)]
        self._rows[stack], self._real[stack] = B * S if order_T is None else len(order_T), real_T
        self._fed[stack] = B, S, order_T

    def returned(self, stack: str, output: object) -> None:
        pass

    @torch.no_grad()
    def take(self, kind: str, r: int, values: Tensor, *_: Tensor) -> None:
        """One call of router r, for the rows after those it has seen in this pass: its choices
        (""), or its logits."""
        if not self._counting:
            return
        seen = self._seen[kind]
        row, seen[r] = seen[r], seen[r] + len(values)
        if self._place:
            self._add(kind, r, row, values)
        else:
            self._early.append((kind, r, row, values.clone()))

    def _add(self, kind: str, r: int, row: int, values: Tensor) -> None:
        (on, n), site = self._place[r], self.sites[r]
        real_T = self._real[site.stack]
        if real_T is not None:
            at = site.stack, on.device
            if at not in self._masks:
                self._masks[at] = real_T.to(on.device, non_blocking=True)
            real_T = self._masks[at][row : row + len(values)]
        if kind:
            on.add_logits(n, site, values, real_T)
            self._shows_logits.add(r)
        else:
            on.add_choices(n, site.experts, values, real_T)

    @torch.no_grad()
    def end(self) -> None:
        """The pass is over. MoeInspectError unless every router saw every row once."""
        if not self._counting:
            return
        self._counting = False
        self._check()
        if not self._place:
            self._lay_out()
        for on in self._on.values():
            on.end(self.is_training, bool(self._shows_logits))
        of = STEP if self.is_training else EVALUATION
        for stack, T in self._rows.items():
            real_T = self._real[stack]
            n = T if real_T is None else real_T.sum()
            self._tokens[of][stack] = self._tokens[of][stack] + n
        self._passes[of] += 1

    def _check(self) -> None:
        for site, seen in zip(self.sites, self._seen[""], strict=True):
            if site.stack in self._rows and seen != self._rows[site.stack]:
                raise MoeInspectError(
                    f"{site.path} routed {seen} rows in a forward pass of "
                    f"{self._rows[site.stack]}: this model's routing cannot be watched in training"
                )

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
        self._place = [(self._on[d], devices[:r].count(d)) for r, d in enumerate(devices)]
        self.routers = [
            replace(router_at(site, early[r].shape[1]), slot_order="unknown")
            for r, site in enumerate(self.sites)
        ]
        for call in self._early:
            self._add(*call)
        self._early = []

    # --- steps

    @torch.no_grad()
    def end_step(self) -> None:
        """The training passes since the last call are one step."""
        if not self.is_counted or not self._passes[STEP]:
            return
        for on in self._on.values():
            on.end_step(self._steps)
        self._steps += 1
        self._passes[TRAINING] += self._passes[STEP]
        for stack, n in self._tokens[STEP].items():
            self._tokens[TRAINING][stack] = self._tokens[TRAINING][stack] + n
        self._clear(STEP)

    def _clear(self, of: int) -> None:
        self._passes[of], self._tokens[of] = 0, dict.fromkeys(self._stacks, 0)

    @torch.no_grad()
    def read(self, training: bool = True, group: ProcessGroup | None = None) -> WindowSums | None:
        """What was summed since the last `read`, of training or of evaluation; summed over the
        processes of torch.distributed in one all-reduce. Waits for the devices. None before the
        first pass."""
        if not self._place:
            return None
        of, S = TRAINING if training else EVALUATION, min(self._steps, RECENT) if training else 0
        device = self._place[0][0].device
        counted = [self._passes[of], *self._tokens[of].values()]
        parts = [part for on in self._on.values() for part in on.parts(of, S)]
        parts += [torch.as_tensor(n, device=device) for n in counted]
        flat = torch.cat([part.reshape(-1).to(device, torch.float64) for part in parts])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(flat, group=group)
        sizes = [part.numel() for part in parts]
        found = self._of_routers([part.numpy() for part in flat.cpu().split(sizes)], S)
        for on in self._on.values():
            on.total_3C[of].zero_()
            on.losses_22R[of].zero_()
        self._clear(of)
        if training:
            self._steps = 0
        return found

    def _of_routers(self, parts: list[np.ndarray], S: int) -> WindowSums:
        """`parts`: what `DeviceSums.parts` gives of each device, then the passes, and the tokens of
        each stack."""
        of_device = {id(on): parts[3 * n : 3 * n + 3] for n, on in enumerate(self._on.values())}
        passes, *tokens = (round(float(n[0])) for n in parts[3 * len(of_device) :])
        tokens_of = dict(zip(self._stacks, tokens, strict=True))
        load, recent = list[np.ndarray](), list[np.ndarray]()
        losses_2R = np.full((2, len(self.sites)), np.nan)
        for r, ((on, n), site) in enumerate(zip(self._place, self.sites, strict=True)):
            total_C, recent_S, losses = of_device[id(on)]
            mine = slice(on.first[n], on.first[n] + site.experts)
            load.append(total_C[mine].astype(np.int64))
            recent.append(recent_S.reshape(S, on.C)[:, mine].astype(np.int64))
            if r in self._shows_logits and passes:
                losses_2R[:, r] = losses.reshape(2, on.R)[:, n] / passes
        tokens_R = np.array([tokens_of[site.stack] for site in self.sites])
        return WindowSums(load, recent, tokens_R, passes, losses_2R)

    def bias_range(self) -> np.ndarray:
        """The range of each router's selection bias, float [R]; NaN where it has none. Waits for
        the devices."""
        biases = [selection_bias(site, self.model) for site in self.sites]
        return np.array([np.nan if b is None else float(b.max().sub(b.min())) for b in biases])
