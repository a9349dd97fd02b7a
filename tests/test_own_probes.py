"""Probes in the forward of a model that is not transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moe_inspect
from moe_inspect.capture.hook import probes
from moe_inspect.errors import MoeInspectError
from tests import own

B, S = 3, 16
T = B * S


@pytest.mark.parametrize("passes", [1, 4])
def test_a_probe_in_a_forward_is_a_router(tmp_path: Path, passes: int) -> None:
    model, ids = own.gpt(), own.tokens()
    with own.watched(model) as given, moe_inspect.record(model, tmp_path / "t") as recorder:
        for _ in range(passes):
            model(ids).sum().backward()
    trace = own.path_of(tmp_path / "t")
    assert own.same(trace, given) == 4 * passes * T
    assert [(r.layer, r.experts, r.top_k) for r in trace.routers] == [(n, 8, 2) for n in range(4)]
    assert (trace.tokens()["token_id"].to_numpy() == ids.flatten().repeat(passes).numpy()).all()
    assert recorder.tokens == passes * T
    assert not probes._recorders


def test_a_probe_shows_nothing_where_no_recorder_is_open() -> None:
    with own.watched(own.gpt()) as given:
        assert not given.sets
    # not even a mistake in it is noticed: nothing is looked at
    moe_inspect.probe(torch.zeros(2, 2), torch.zeros(3), layer=0)


def test_probes_are_counted(tmp_path: Path) -> None:
    model, ids = own.gpt(), own.tokens()
    recorder = moe_inspect.record(model, counts_only=True)
    with own.watched(model) as given, recorder:
        for _ in range(3):
            model(ids)
    counts = recorder.totals().load
    for layer, passes in given.sets.items():
        expected = np.bincount([e for rows in passes for row in rows for e in row], minlength=8)
        assert (counts[layer] == expected).all()
    assert sum(map(sum, counts)) == 3 * T * 4 * 2


@pytest.mark.parametrize("compiled", ["model", "blocks"])
def test_compiled_probes_break_no_graph(tmp_path: Path, compiled: str) -> None:
    """They record, set before the recorder and after."""
    model, ids = Tiny(), own.tokens()
    plain = Tiny()
    with moe_inspect.record(plain, tmp_path / "plain"):
        for _ in range(3):
            plain(ids)
    fed = model
    if compiled == "model":
        fed = torch.compile(model, backend="eager", fullgraph=True)
    else:
        for block in model.blocks:
            block.compile(backend="eager", fullgraph=True)
    fed(ids)
    with moe_inspect.record(fed, tmp_path / "t"):
        for _ in range(3):
            fed(ids)
    eager, traced = (own.path_of(tmp_path / name) for name in ("plain", "t"))
    for layer in range(2):
        assert own.recorded(traced, layer) == own.recorded(eager, layer)
    fed(ids)
    torch.compiler.reset()


probe, IDS, ONES = moe_inspect.probe, torch.zeros(T, 1, dtype=torch.long), torch.ones(T, 1)
# what is said of it → the probe of the n-th pass
MISTAKES: dict[str, Any] = {
    r"probe\(layer=0\) does not say how many experts": lambda n: probe(IDS, ONES, layer=0),
    "both need the same shape": lambda n: probe(IDS, ONES[:, 0], layer=0, experts=2),
    "ids of dtype float32, not integers": lambda n: probe(ONES, ONES, layer=0, experts=2),
    r"probe\(layer=0\) showed the choices of 24 rows in a forward pass of 48 tokens": (
        lambda n: probe(IDS[:24], ONES[:24], layer=0, experts=2)
    ),
    r"probe\(layer=1\) was not called in the first forward pass": (
        lambda n: probe(IDS, ONES, layer=n, experts=2)
    ),
    r"probe\(layer=0\) shows no router logits": lambda n: probe(IDS, ONES, layer=0, experts=2),
}


@pytest.mark.parametrize("said", MISTAKES)
def test_mistakes_in_probes_are_named(said: str, tmp_path: Path) -> None:
    with pytest.raises(MoeInspectError, match=said):
        own.record_twice(Probing(MISTAKES[said]), tmp_path / "t", logits="logits" in said)
    if "logits" in said:  # control: without them it is as it should be
        own.record_twice(Probing(MISTAKES[said]), tmp_path / "u")


@pytest.mark.parametrize(
    ("pieces", "refused"),
    [
        (lambda x_BSK: x_BSK.split(8, 1), r"in pieces \[3, 8, K\], .* 3 rows of 16 positions"),
        (lambda x_BSK: [half.flatten(0, 1) for half in x_BSK.split(8, 1)], r"in pieces \[24, K\]"),
        (lambda x_BSK: x_BSK.unbind(0), r"in pieces \[16, K\]"),  # or of so many of three rows
        (lambda x_BSK: x_BSK.split(2, 0), ""),  # whole rows
        (lambda x_BSK: [x_BSK], ""),
        (lambda x_BSK: [x_BSK.flatten(0, 1)], ""),
        (lambda x_BSK: [x_BSK, x_BSK], ""),  # a layer that runs twice
        (lambda x_BSK: [x_BSK.transpose(0, 1)], r"choices \[16, 3, K\] of 3 rows of 16 positions"),
    ],
)
def test_pieces_are_refused_where_their_shape_does_not_tell_their_rows(
    tmp_path: Path, pieces: Any, refused: str
) -> None:
    weights, ids = torch.rand(B, S, 8).topk(2)

    def probing(n: int) -> None:
        for i, w in zip(pieces(ids), pieces(weights), strict=True):
            moe_inspect.probe(i, w, layer=0, experts=8)

    if refused:
        with pytest.raises(MoeInspectError, match=refused):
            own.record_once(Probing(probing), tmp_path / "t")
        return
    own.record_once(Probing(probing), tmp_path / "t")
    found = own.recorded(own.path_of(tmp_path / "t"), 0)[:T]
    assert found == [frozenset(row) for row in ids.flatten(0, 1).tolist()]


def test_logits_of_a_probe_are_recorded(tmp_path: Path) -> None:
    logits = torch.randn(T, 4)
    values, ids = logits.softmax(1).topk(2)
    model = Probing(lambda n: moe_inspect.probe(ids, values, layer=5, logits=logits))
    with moe_inspect.record(model, tmp_path / "t", logits=True):
        for _ in range(2):
            model(own.tokens())
    found = own.path_of(tmp_path / "t").logits(layer=5)
    shown = np.stack(found["logits"].to_list())
    assert np.abs(shown - logits.repeat(2, 1).numpy()).max() < 2**-8
    assert own.path_of(tmp_path / "t").routers[0].experts == 4


def test_only_some_layers_are_recorded(tmp_path: Path) -> None:
    model = own.gpt()
    with moe_inspect.record(model, tmp_path / "t", layers=[1, 3]):
        model(own.tokens())
    assert [r.layer for r in own.path_of(tmp_path / "t").routers] == [1, 3]


# --- models


class TinyBlock(nn.Module):
    def __init__(self, layer: int):
        super().__init__()
        self.layer, self.router = layer, nn.Linear(16, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = F.softmax(self.router(x), -1).topk(2)
        moe_inspect.probe(ids, weights, layer=self.layer, experts=4)
        return x + weights.sum(-1, keepdim=True) * x.tanh()


class Tiny(nn.Module):
    """For compilers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(256, 16)
        self.blocks = nn.ModuleList(TinyBlock(n) for n in range(2))

    def forward(self, idx: Tensor) -> Tensor:
        x = self.tokens(idx)
        for block in self.blocks:
            x = block(x)
        return x


class Probing(nn.Module):
    """Calls `probing` with the number of the forward pass."""

    def __init__(self, probing: Any):
        super().__init__()
        self.probing, self.passes, self.weight = probing, 0, nn.Parameter(torch.zeros(1))

    def forward(self, idx: Tensor) -> Tensor:
        self.probing(self.passes)
        self.passes += 1
        return idx * self.weight
