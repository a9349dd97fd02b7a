"""Modules that look like routers, in a model in which no known router was found.

E experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# of a module that chooses experts: the last name in its path, or its class
ROUTER_NAME = re.compile(r"^(?:.*_)?(?:router|gate|gating|wg)$")
ROUTER_CLASS = re.compile(r"(?:Router|Gate|Gating)$")
ROUTER_WEIGHT = re.compile(r"^(?:.*_)?(?:router|gate|gating|wg)(?:_w|_weights?|_kernel)?$")
EXPERTS_CLASS = re.compile(r"Expert|MoE|MOE|Mixture|Switch")
EXPERTS_PATH = re.compile(r"expert|moe|mixture", re.IGNORECASE)
BLOCKS = ("layers", "blocks", "h")  # of a model
NUMBER = re.compile(r"\.\d+(?=\.|$)")
MOST_SHOWN = 3
TIMES = " × "  # between the length of a list and the class in it
CONTAINERS = ("ModuleList", "ModuleDict")  # hold modules, and have no forward


@dataclass(frozen=True)
class Candidates:
    """`routers`, `experts_lists`: patterns of module paths, with what is there. `experts`: E, where
    the lists or a router tell."""

    routers: dict[str, str]
    experts_lists: dict[str, str]
    experts: int | None

    @property
    def pattern(self) -> str:
        if self.routers:
            return next(iter(self.routers))
        path, kind = next(iter(self.experts_lists.items()))
        # a list is not called in a forward pass: what holds it is
        return path.rpartition(".")[0] if TIMES in kind else path

    def described(self) -> str:
        parts = []
        if self.routers:
            parts.append(f"{_listed(self.routers)} may be one")
        if self.experts_lists:
            parts.append(f"{_listed(self.experts_lists)} may be its experts")
        return " and ".join(parts)


def candidates(model: Any) -> Candidates | None:
    """None where nothing in the model looks like a router or like experts."""
    import torch

    routers: dict[str, str] = {}
    lists: dict[str, str] = {}
    sizes: list[int] = []
    kinds = {path: type(module).__name__ for path, module in model.named_modules()}
    for path, module in model.named_modules():
        last, pattern, kind = path.split(".")[-1], NUMBER.sub(".*", path), kinds[path]
        of_experts = bool(
            EXPERTS_PATH.search(path) or EXPERTS_CLASS.search(kinds[path.rpartition(".")[0]])
        )
        if isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict):
            classes = {type(child).__name__ for child in module.children()}
            if of_experts and last not in BLOCKS and len(module) > 1 and len(classes) == 1:
                lists[pattern] = f"{len(module)}{TIMES}{classes.pop()}"
                sizes.append(len(module))
        elif ROUTER_NAME.match(last) or ROUTER_CLASS.search(kind):
            routers[pattern] = kind
        elif not type(module).__module__.startswith("torch.") and "shared" not in path.lower():
            own = dict(module.named_parameters(recurse=False))
            stacked = [p for p in own.values() if p.dim() == 3]
            weights = [n for n, p in own.items() if p.dim() == 2 and ROUTER_WEIGHT.match(n)]
            if stacked and (of_experts or EXPERTS_CLASS.search(kind) or weights):
                lists[pattern] = f"{kind} of {stacked[0].shape[0]}"
                sizes.append(int(stacked[0].shape[0]))
                if weights:
                    routers[pattern] = f"{kind}, with {weights[0]}"
    # a gate without experts beside it may be one of an attention
    beside = {path.rpartition(".")[0] for path in lists}
    routers = {
        path: kind
        for path, kind in routers.items()
        if path.rpartition(".")[0] in beside or "router" in path.lower() or kind != "Linear"
    }
    if not routers and not lists:
        return None
    return Candidates(routers, lists, sizes[0] if len(set(sizes)) == 1 else None)


def _listed(found: dict[str, str]) -> str:
    shown: Iterable[str] = [f"{path} ({kind})" for path, kind in list(found.items())[:MOST_SHOWN]]
    more = len(found) - MOST_SHOWN
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
