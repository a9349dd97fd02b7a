"""A router that chooses among fewer experts, by its own code: its logits are masked while it runs.

T tokens, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.overrides import TorchFunctionMode

from moe_inspect.model.routers import Site

PRODUCTS = {"linear", "matmul", "mm", "addmm", "__matmul__"}


def logits_seen(site: Site) -> Module | None:
    """The module that makes the router logits of this site by one matrix with a row per expert, so
    that they can be masked; None where there is none."""
    module = site.logits_module
    if module is None and site.told and site.adapter is not None and not site.adapter.at_call:
        module = site.module
    if module is None:
        return None
    rows = [p for p in module.parameters() if p.dim() == 2 and len(p) == site.experts]
    return module if len(rows) == 1 else None


class Among(TorchFunctionMode):
    """While it is active, what is computed as router logits is the lowest number for the experts of
    `dropped_E` (bool [E]), and no `topk` chooses them, whatever a selection bias adds."""

    def __init__(self, dropped_E: Tensor):
        super().__init__()
        self.dropped_E = dropped_E

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "topk" and args:
            args = (self._masked(args[0], float("-inf")), *args[1:])
        output = func(*args, **kwargs)
        if name in PRODUCTS:
            # (a finite number: sparsemixer divides by it)
            output = self._masked(output, torch.finfo(output.dtype).min)
        return output

    def _masked(self, values: Tensor, fill: float) -> Tensor:
        """Values [T, E], or [T, groups, E / groups] as grouped routers look at them."""
        E = len(self.dropped_E)
        if not values.dtype.is_floating_point:
            return values
        dropped = self.dropped_E.to(values.device)
        if values.shape[-1:] == (E,):
            return values.masked_fill(dropped, fill)
        if values.dim() > 2 and values.shape[-2] * values.shape[-1] == E:
            return values.masked_fill(dropped.view(values.shape[-2:]), fill)
        return values
