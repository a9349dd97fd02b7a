"""The GPT of examples/your_own_moe.py, and what its experts were given: the truth that its traces
are compared with.

B batch rows, S positions, K slots.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import moe_inspect
from moe_inspect.public import Trace
from tests.conftest import ROOT
from tests.support.mutation import load_file

EXAMPLE = ROOT / "examples" / "your_own_moe.py"


def example() -> Any:
    """The module, imported once: its classes are the same in every test."""
    return sys.modules.get("your_own_moe") or load_file("your_own_moe", EXAMPLE)


def gpt(probes: bool = True) -> Any:
    """Without `probes` its forward has none."""
    torch.manual_seed(0)
    model = example().GPT()
    if not probes:
        for block in model.blocks:
            block.experts.__class__ = without_probe()
    return model


def without_probe() -> type:
    """The experts of the example, with a forward of their own that shows nothing."""
    found = sys.modules["your_own_moe"]
    if not hasattr(found, "Silent"):
        code = EXAMPLE.read_text().partition("class Experts(")[2].partition("class Block(")[0]
        kept = "\n".join(line for line in code.splitlines() if "probe" not in line)
        exec(compile("class Silent(" + kept, str(EXAMPLE), "exec"), vars(found))
    return found.Silent


def module(name: str, forward: Any, **parts: Any) -> Any:
    """A module of a class of this name, with these parts, and `forward` (self, …)."""
    made = type(name, (torch.nn.Module,), {"forward": forward})()
    for part, value in parts.items():
        setattr(made, part, value)
    return made


def tokens(B: int = 3, S: int = 16, seed: int = 7) -> Tensor:
    return torch.randint(0, 256, (B, S), generator=torch.Generator().manual_seed(seed))


# layer → by forward pass the experts that each token was given to
Given = dict[int, list[list[frozenset[int]]]]


@contextmanager
def watched(model: Any) -> Iterator[Given]:
    """Watches the input of each expert; a row is known by its bits."""
    given: Given = {}

    def bits(args: tuple[Tensor]) -> list[bytes]:
        return [row.numpy().tobytes() for row in args[0].detach().flatten(0, -2)]

    def watch(layer: int, experts: Any) -> Iterator[Any]:
        now: dict[int, set[bytes]] = {}
        for e, mlp in enumerate(experts.mlps):
            yield mlp.register_forward_pre_hook(lambda m, args, e=e: now.update({e: {*bits(args)}}))

        def after(module: Any, args: Any, output: Any) -> None:
            found = [frozenset(e for e, of in now.items() if row in of) for row in bits(args)]
            given.setdefault(layer, []).append(found)
            now.clear()

        yield experts.register_forward_hook(after)

    hooks = [hook for n, block in enumerate(model.blocks) for hook in watch(n, block.experts)]
    yield given
    for hook in hooks:
        hook.remove()


def recorded(trace: Trace, layer: int) -> list[frozenset[int]]:
    """The experts of each token of a trace, in its order."""
    routing = trace.routing(layers=layer)
    ids = routing[[c for c in routing.columns if c.startswith("expert_")]].to_numpy(float)
    return [frozenset(int(e) for e in row if e >= 0) for row in np.nan_to_num(ids, nan=-1)]


def same(trace: Trace, given: Given, order: Any = None) -> int:
    """Decisions compared, in the `order` of the tokens [T] of each pass; all are alike."""
    compared = 0
    for layer, passes in given.items():
        places = [order if order is not None else range(len(rows)) for rows in passes]
        truth = [rows[i] for rows, at in zip(passes, places, strict=True) for i in at]
        assert recorded(trace, layer) == truth
        compared += len(truth)
    assert moe_inspect.check(trace.path, quick=True).ok
    return compared


def exact(
    model: Any, path: Path, passes: int = 1, run: Any = None, order: Any = None, **options: Any
) -> Trace:
    """The trace of passes, within `run`: in `order`, what the experts were given."""
    run, ids = run or model, tokens()
    with watched(model) as given, moe_inspect.record(run, path, **options):
        for _ in range(passes):
            run(ids).sum().backward()
    trace = path_of(path)
    rows = len(order) if order is not None else ids.numel()
    assert same(trace, given, order) == 4 * passes * rows
    return trace


def path_of(trace: Path) -> Trace:
    return moe_inspect.open_trace(trace)


def record_once(model: Any, path: Path, passes: int = 1, **options: Any) -> None:
    with moe_inspect.record(model, path, **options):
        for _ in range(passes):
            model(tokens())


def record_twice(model: Any, path: Path, **options: Any) -> None:
    record_once(model, path, 2, **options)
