"""A router that chooses among fewer experts, by its own code: its logits are masked while it runs.

T tokens, E experts, C logits (of experts, then of what is no routed expert).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.overrides import TorchFunctionMode

from moe_inspect.model.families import BEYOND
from moe_inspect.model.routers import Site

RESELECTED, SHARED_OUT = "chose among the rest", "weights shared out"
PRODUCTS = {"linear", "matmul", "mm", "addmm", "__matmul__"}


def logits_seen(site: Site) -> Module | None:
    """The module that makes the router logits of this site by one matrix with a row per expert, so
    that they can be masked; None where there is none."""
    module = site.logits_module
    # a table of token ids chooses, and logits only weigh (the hashed layers of DeepSeek-V4)
    if module is not None and any(
        b.dim() == 2 and not b.dtype.is_floating_point for b in module.buffers()
    ):
        return None
    if module is None and site.told and site.adapter is not None and not site.adapter.at_call:
        module = site.module
    if module is None or (site.adapter is not None and not site.adapter.by_logits):
        return None
    C = site.experts + beyond(module)
    rows = [p for p in module.parameters() if p.dim() == 2 and len(p) == C]
    return module if len(rows) == 1 else None


def beyond(router: Module | None) -> int:
    """How many logits a router has behind those of its routed experts."""
    of = BEYOND.get(type(router).__name__)
    return of(router) if of is not None else 0


def how_dropped(site: Site) -> str:
    """How experts are dropped at this site."""
    among = site.adapter is not None and site.adapter.among is not None
    return RESELECTED if among or logits_seen(site) is not None else SHARED_OUT


class Among(TorchFunctionMode):
    """While it is active, what is computed as router logits is the lowest number for the experts of
    `dropped_E` (bool [E]), and no `topk` chooses them, whatever a selection bias adds. `beyond`:
    how many logits are behind those of the experts."""

    def __init__(self, dropped_E: Tensor, beyond: int = 0):
        super().__init__()
        self.dropped_E = dropped_E
        self.dropped_C = torch.cat([dropped_E, dropped_E.new_zeros(beyond)])

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "topk":
            return self._top_k(func, *args, **kwargs)
        output = func(*args, **kwargs)
        if name in PRODUCTS:
            # (a finite number: sparsemixer divides by it)
            output = _masked(output, self.dropped_C, torch.finfo(output.dtype).min)
        return output

    def _top_k(
        self, top_k: Any, input: Tensor, k: int, dim: int = -1, *args: Any, **kwargs: Any
    ) -> Any:
        """`torch.topk`, which chooses no dropped expert while there are others."""
        grouped = input.dim() > 2 and input.shape[-2] * input.shape[-1] == len(self.dropped_E)
        if grouped:
            return top_k(self._of_groups(input, k), k, dim, *args, **kwargs)
        of_C = input.shape[-1:] == self.dropped_C.shape
        dropped = self.dropped_C if of_C else self.dropped_E
        output = top_k(_masked(input, dropped, float("-inf")), k, dim, *args, **kwargs)
        if input.shape[-1:] != dropped.shape or dim not in (-1, input.dim() - 1):
            return output
        # with fewer than k left, a dropped expert has its own score, which its logit made 0: a
        # weight of -inf would be one that no sum of weights survives
        return type(output)((input.gather(-1, output.indices), output.indices))

    def _of_groups(self, values: Tensor, k: int) -> Tensor:
        """Values [T, groups, E / groups], as grouped routers look at them to compare groups by
        their k best. Where fewer than k of a group are left, a dropped expert adds nothing to
        it."""
        dropped_GE = self.dropped_E.to(values.device).view(values.shape[-2:])
        left_G = (~dropped_GE).sum(1)
        few_G1 = ((left_G > 0) & (left_G < k)).unsqueeze(1)
        return values.masked_fill(dropped_GE & ~few_G1, float("-inf")).masked_fill(
            dropped_GE & few_G1, 0
        )


def _masked(values: Tensor, dropped: Tensor, fill: float) -> Tensor:
    """Values [T, C] or [T, E], where they are as many as `dropped` says."""
    if not values.dtype.is_floating_point or values.shape[-1:] != dropped.shape:
        return values
    return values.masked_fill(dropped.to(values.device), fill)
