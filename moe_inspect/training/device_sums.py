"""The sums of the routers of one device.

E experts, R routers, S steps. The routers lie side by side, E + 1 columns (C in all) each: the last
takes padding and slots that routed nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RECENT = 32  # steps whose loads are kept apart, for the max_vio of a step


class DeviceSums:
    """The sums of the routers of one device. `modes`: one set for training, one for evaluation."""

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
            # of the step, of the steps before, and since `read`: training, evaluation
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
        mode = 0 if training else 1
        (self.step_C if training else self.total_C[mode]).add_(self.load_C)
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
        self.losses_2R[mode][0] += self.experts_R * product_R / (load_R * tokens_R).clamp(min=1e-20)
        self.losses_2R[mode][1] += self.z_R / tokens_R.clamp(min=1)

    def end_step(self, n: int) -> None:
        self.total_C[0] += self.step_C
        self.recent_SC[n % RECENT] = self.step_C
        self.step_C.zero_()

    def parts(self, training: bool, steps: int) -> list[Tensor]:
        mode = 0 if training else 1
        recent = self.recent_SC[: steps if training else 0]
        return [self.total_C[mode], recent.reshape(-1), self.losses_2R[mode].reshape(-1)]

    def clear(self, training: bool) -> None:
        mode = 0 if training else 1
        self.total_C[mode].zero_()
        self.losses_2R[mode].zero_()
