"""Sums over the routing of forward passes, kept on the devices of the routers. Nothing waits for a
device before `read`.

T rows a router sees (padding included), K slots, E experts, R routers, S steps. X: what is of the
whole router, then its experts, then nothing up to the widest router of the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from moe_inspect.capture.hook.arguments import CallReader, mask_of
from moe_inspect.capture.hook.attach import Attachment
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

RECENT = 32  # steps whose loads are kept apart, for the max_vio of a step
# what is summed apart; the passes of a step are training once it has ended
EVALUATION, TRAINING, STEP = range(3)


def choice_sums(ids_TK: Tensor, site: Site, real_T: Tensor | None) -> Tensor:
    """The tokens of a call and the load of each expert, without padding, int64 [1 + E]. `real_T`:
    the rows that are no padding; None: all."""
    outside_TK = (ids_TK < 0) | (ids_TK >= site.experts)
    if real_T is not None:
        outside_TK |= ~real_T[:, None]
    place_N = (ids_TK.long() + 1).masked_fill_(outside_TK, 0).reshape(-1)
    sums_X = place_N.new_zeros(1 + site.experts)
    sums_X.scatter_add_(0, place_N, torch.ones_like(place_N))
    # in place of padding and of slots that routed nowhere
    sums_X[0] = len(ids_TK) if real_T is None else real_T.sum()
    return sums_X


def logit_sums(logits_TE: Tensor, site: Site, real_T: Tensor | None) -> Tensor:
    """The squared log-sum-exp of the rows of a call, and the probabilities of each expert, summed,
    float32 [1 + E]."""
    logits_TE = logits_TE.float()
    log_sum_T1 = logits_TE.logsumexp(1, keepdim=True)
    if site.scoring == "sigmoid":
        score_TE = logits_TE.sigmoid()
        score_TE = score_TE / score_TE.sum(1, keepdim=True)
    else:
        score_TE = (logits_TE - log_sum_T1).exp()
    z_T1 = log_sum_T1**2
    if real_T is not None:
        score_TE, z_T1 = score_TE * real_T[:, None], z_T1 * real_T[:, None]
    return torch.cat([z_T1.sum(0), score_TE.sum(0)])


class DeviceSums:
    """The sums of the routers of one device since `read`, by what the passes were."""

    def __init__(self, device: torch.device, experts: Sequence[int]):
        R, X = len(experts), 1 + max(experts)
        with torch.inference_mode(False), torch.device(device):
            self.experts_R = torch.tensor(experts, dtype=torch.float32)
            self.total_3RX = torch.zeros(3, R, X, dtype=torch.int64)
            self.recent_SRX = torch.zeros(RECENT, R, X, dtype=torch.int32)
            self.losses_22R = torch.zeros(2, 2, R)  # evaluation, training; auxiliary and z

    def add(self, training: bool, choices: list[Tensor], logits: list[Tensor]) -> None:
        """Adds what each router has shown in a pass, which may be nothing. Its auxiliary loss is
        E · Σ f · P: f the share of the assignments, P the mean probability of an expert; 1 for a
        uniform router (arXiv:2101.03961)."""
        load_RX = self._stacked(choices)
        self.total_3RX[STEP if training else EVALUATION] += load_RX
        if not any(map(len, logits)):
            return
        sums_RX = self._stacked(logits)
        load_RE, score_RE, tokens_R = load_RX[:, 1:], sums_RX[:, 1:], sums_RX[:, 1:].sum(1)
        even_R = (load_RE.sum(1) * tokens_R).clamp(min=1e-20)
        aux_R = self.experts_R * (load_RE * score_RE).sum(1) / even_R
        self.losses_22R[int(training)] += torch.stack(
            [aux_R, sums_RX[:, 0] / tokens_R.clamp(min=1)]
        )

    def _stacked(self, of_router: list[Tensor]) -> Tensor:
        X = self.total_3RX.shape[2]
        return torch.stack([x if len(x) == X else pad(x, (0, X - len(x))) for x in of_router])

    def end_step(self, n: int) -> None:
        self.total_3RX[TRAINING] += self.total_3RX[STEP]
        self.recent_SRX[n % RECENT] = self.total_3RX[STEP]
        self.total_3RX[STEP].zero_()

    def parts(self, of: int, steps: int) -> list[Tensor]:
        """What was summed in so many steps: load, that of the last of them, in their order, and the
        losses."""
        in_order_SRX = self.recent_SRX.roll(-steps, 0)[max(RECENT - steps, 0) :]
        return [self.total_3RX[of], in_order_SRX, self.losses_22R[of]]


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
        self._on: list[tuple[list[int], DeviceSums]] = []  # of each device, with its routers
        self._top_k: dict[int, int] = {}  # of each router, in its last call
        self._shows_logits: set[int] = set()  # routers that do
        self._steps = 0  # since the last `read`
        self._passes = [0, 0, 0]
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
        self._fed: dict[str, tuple[int, np.ndarray | None]] = {}  # S, and the rows' order
        self._real: dict[str, Tensor | None] = {}
        self._masks: dict[tuple[str, torch.device], Tensor] = {}
        # by router, of its choices and of its logits: the rows seen, and their sums
        self._seen = {kind: Counter[int]() for kind in ("", "logits")}
        self._sums: dict[str, dict[int, Tensor]] = {kind: {} for kind in self._seen}

    def _add_probed(self, site: Site) -> Sinks:
        """One more router, which a probe shows in the first pass."""
        if self._on:
            raise MoeInspectError(
                f"{site.path} was not called in the first forward pass: begin with one that calls "
                "every probe"
            )
        self.sites.append(site)
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
        self._fed[stack] = S, order_T

    def returned(self, stack: str, output: object) -> None:
        pass

    @torch.no_grad()
    def take(self, kind: str, r: int, values: Tensor, *_: Tensor) -> None:
        """One call of router r, for the rows after those it has seen in this pass: its choices
        (""), or its logits."""
        if not self._counting:
            return
        site, sums = self.sites[r], self._sums[kind]
        row = self._seen[kind][r]
        self._seen[kind][r] += len(values)
        if (real_T := self._real[site.stack]) is not None:
            at = site.stack, values.device
            if at not in self._masks:
                self._masks[at] = real_T.to(values.device, non_blocking=True)
            real_T = self._masks[at][row : row + len(values)]
        of_call = (logit_sums if kind else choice_sums)(values, site, real_T)
        sums[r] = sums[r] + of_call if r in sums else of_call
        if not kind:
            self._top_k[r] = values.shape[1]

    @torch.no_grad()
    def end(self) -> None:
        """The pass is over. MoeInspectError unless every router saw every row once."""
        if not self._counting:
            return
        self._counting = False
        self._check()
        if not self._on:
            self._lay_out()
        choices, logits = self._sums[""], self._sums["logits"]
        self._shows_logits |= logits.keys()
        for routers, on in self._on:
            nothing = on.total_3RX.new_zeros(0)
            of_device = ([of.get(r, nothing) for r in routers] for of in (choices, logits))
            on.add(self.is_training, *of_device)
        self._passes[STEP if self.is_training else EVALUATION] += 1

    def _check(self) -> None:
        for r, site in enumerate(self.sites):
            seen, rows = self._seen[""][r], self._rows.get(site.stack)
            if rows is not None and seen != rows:
                raise MoeInspectError(
                    f"{site.path} routed {seen} rows in a forward pass of {rows}: this model's "
                    "routing cannot be watched in training"
                )

    def _lay_out(self) -> None:
        """The first pass has shown the devices and the top-k: makes the sums."""
        if not self.sites:
            raise no_routers(self.model)
        if missing := [s.path for r, s in enumerate(self.sites) if r not in self._sums[""]]:
            raise MoeInspectError(
                f"{missing[0]} did not run in the first forward pass: begin with one of the whole "
                "model"
            )
        routers_on: dict[torch.device, list[int]] = {}
        for r in range(len(self.sites)):
            routers_on.setdefault(self._sums[""][r].device, []).append(r)
        for device, routers in routers_on.items():
            experts = [self.sites[r].experts for r in routers]
            self._on.append((routers, DeviceSums(device, experts)))
        self.routers = [
            replace(router_at(site, self._top_k[r]), slot_order="unknown")
            for r, site in enumerate(self.sites)
        ]

    # --- steps

    @torch.no_grad()
    def end_step(self) -> None:
        """The training passes since the last call are one step."""
        if not self.is_counted or not self._passes[STEP]:
            return
        for _, on in self._on:
            on.end_step(self._steps)
        self._steps += 1
        self._passes[TRAINING] += self._passes[STEP]
        self._passes[STEP] = 0

    @torch.no_grad()
    def read(self, training: bool = True, group: ProcessGroup | None = None) -> WindowSums | None:
        """What was summed since the last `read`, of training or of evaluation; summed over the
        processes of torch.distributed in one all-reduce. Waits for the devices. None before the
        first pass."""
        if not self._on:
            return None
        of, steps = (TRAINING, self._steps) if training else (EVALUATION, 0)
        parts = [part for _, on in self._on for part in on.parts(of, steps)]
        parts.append(torch.tensor([self._passes[of]]))
        device = parts[0].device
        flat = torch.cat([part.reshape(-1).to(device, torch.float64) for part in parts])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(flat, group=group)
        host = flat.cpu().split([part.numel() for part in parts])
        found = self._of_routers(
            [x.view(p.shape).numpy() for x, p in zip(host, parts, strict=True)]
        )
        for _, on in self._on:
            on.total_3RX[of].zero_()
            on.losses_22R[of].zero_()
        self._passes[of] = 0
        if training:
            self._steps = 0
        return found

    def _of_routers(self, parts: list[np.ndarray]) -> WindowSums:
        """`parts`: what `DeviceSums.parts` gives of each device, then the passes."""
        R, passes = len(self.sites), round(float(parts[-1][0]))
        load, recent = ([np.zeros(0, np.int64)] * R for _ in range(2))
        tokens_R, losses_2R = np.zeros(R, np.int64), np.full((2, R), np.nan)
        for n, (routers, _) in enumerate(self._on):
            total_RX, recent_SRX, of_losses_2R = parts[3 * n : 3 * n + 3]
            for at, r in enumerate(routers):
                mine = slice(1, 1 + self.sites[r].experts)
                load[r] = total_RX[at, mine].astype(np.int64)
                recent[r] = recent_SRX[:, at, mine].astype(np.int64)
                tokens_R[r] = total_RX[at, 0]
                if r in self._shows_logits and passes:
                    losses_2R[:, r] = of_losses_2R[:, at] / passes
        return WindowSums(load, recent, tokens_R, passes, losses_2R)

    def bias_range(self) -> np.ndarray:
        """The range of each router's selection bias, float [R]; NaN where it has none. Waits for
        the devices."""
        biases = [selection_bias(site, self.model) for site in self.sites]
        return np.array([np.nan if b is None else float(b.max().sub(b.min())) for b in biases])
