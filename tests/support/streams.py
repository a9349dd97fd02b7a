"""Stand-ins, on a CPU, for the side stream that copies from a GPU to the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class LateCopy:
    """Arrives when somebody has asked `asks` times, or waits for it."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor]], asks: int):
        self.pairs, self.asks = pairs, asks

    def synchronize(self) -> None:
        for host, copied in self.pairs:
            host.copy_(copied)
        self.pairs = []

    def query(self) -> bool:
        self.asks -= 1
        if self.asks <= 0:
            self.synchronize()
        return not self.pairs


class LateStream:
    """Its copies arrive late."""

    asks = 2

    def __init__(self, device: torch.device):
        pass

    def copy(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], LateCopy]:
        host = [torch.full_like(tensor, 77) for tensor in tensors]
        pairs = [(to, tensor.clone()) for to, tensor in zip(host, tensors, strict=True)]
        return host, LateCopy(pairs, self.asks)


class PromptStream(LateStream):
    """Its copies arrive when somebody first asks."""

    asks = 1
