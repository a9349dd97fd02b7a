"""The blocks below a layer, computed once: what an expert of this layer changes begins above
them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.nn import Module, ModuleList

from moe_inspect.model.families import LAYER
from moe_inspect.model.routers import Site


class Below:
    """`remembered` notes, in a pass of the whole model, what comes out of the block below each of
    `sites`. While `skipped` lasts for one of these, all blocks below return that at once: the model
    computes the rest. Whether a model allows this (blocks that hand on more than their output do
    not) is for the caller to check, by its losses; `usable` is False where blocks are not found."""

    def __init__(self, network: Any, sites: Sequence[Site]):
        self._of: dict[str, tuple[ModuleList, int]] = {}
        for site in sites:
            if (found := _block(network, site.path)) is not None:
                self._of[site.path] = found
        lists = {id(blocks) for blocks, _ in self._of.values()}
        self.usable = len(lists) == 1 and len(self._of) == len({s.path for s in sites})
        self._outputs: dict[int, Any] = {}

    @contextmanager
    def remembered(self) -> Iterator[None]:
        """A pass of the whole model runs."""
        self._outputs, hooks, calls = {}, [], 0

        def keep(n: int, module: Module, args: Any, output: Any) -> None:
            nonlocal calls
            calls += 1
            self._outputs[n] = output

        if self.usable:
            blocks = next(iter(self._of.values()))[0]
            wanted = {n - 1 for _, n in self._of.values() if n > 0}
            hooks = [blocks[n].register_forward_hook(partial(keep, n)) for n in sorted(wanted)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if calls != len(self._outputs):  # a block that runs several times in a pass
            self.usable = False

    @contextmanager
    def skipped(self, site: Site) -> Iterator[None]:
        """A pass runs from the block of this site on; all of it where that cannot be."""
        if not self.usable or self._of[site.path][1] - 1 not in self._outputs:
            yield
            return
        blocks, n = self._of[site.path]
        output = self._outputs[n - 1]
        below: list[Any] = list(blocks)[:n]
        before = [vars(block).get("forward") for block in below]
        for block in below:
            block.forward = lambda *args, **kwargs: output
        try:
            yield
        finally:
            for block, own in zip(below, before, strict=True):
                if own is not None:
                    block.forward = own
                else:
                    del block.forward


def _block(network: Any, path: str) -> tuple[ModuleList, int] | None:
    """The list of blocks that a module is in, and its place there."""
    found = LAYER.search(path)
    if found is None:
        return None
    blocks = network.get_submodule(path[: found.start(1) - 1])
    return (blocks, int(found.group(1))) if isinstance(blocks, ModuleList) else None
