"""`discover=True` on the ways in which models choose experts: right, compared with what the experts
were given, or refused.

B batch rows, S positions, T = B·S tokens, D hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_inspect.errors import MoeInspectError
from tests.support import own

B, S, D, E = 3, 16, 8, 4
T = B * S
Route = Callable[[Any, Tensor], Tensor]  # block, hidden [T, D] → weights [T, E], 0: not given to it


class Moe(nn.Module):
    """Its experts are a list, of which each is given its rows ("list"), its rows and zeros up to a
    capacity ("padded") or all rows ("dense"); or one tensor ("stacked")."""

    def __init__(self, route: Route, experts: str, E: int):
        super().__init__()
        self.route, self.kind, self.E = route, experts, E
        self.gate = nn.Linear(D, E)
        if experts == "stacked":
            self.weight = nn.Parameter(torch.randn(E, D, D))
        else:
            self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))
        self.given: list[frozenset[int]] = []  # what experts were given, by token

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.flatten(0, 1)
        weights_TE = self.route(self, x_TD)
        self.given += [frozenset(row.nonzero()[:, 0].tolist()) for row in weights_TE]
        if self.kind == "stacked":
            out_TD = torch.einsum("td,edf,te->tf", x_TD, self.weight, weights_TE)
        else:
            out_TD = torch.zeros_like(x_TD)
            for expert, w_T in zip(self.experts, weights_TE.T, strict=True):
                out_TD = out_TD + self.run(expert, x_TD, w_T[:, None])
        return x_BSD + out_TD.view_as(x_BSD)

    def run(self, expert: nn.Module, x_TD: Tensor, w_T1: Tensor) -> Tensor:
        if self.kind == "dense":
            return expert(x_TD) * w_T1
        rows = w_T1[:, 0].nonzero()[:, 0]
        fed = torch.zeros_like(x_TD) if self.kind == "padded" else x_TD[rows]
        fed[: len(rows)] = x_TD[rows]
        out = expert(fed)[: len(rows)]
        return torch.zeros_like(x_TD).index_add(0, rows, out * w_T1[rows])


class Model(nn.Module):
    def __init__(self, route: Route, experts: str = "list", E: int = E, times: int = 1):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.times = nn.Embedding(256, D), times
        self.layers = nn.ModuleList(Moe(route, experts, E) for _ in range(2))

    def forward(self, idx: Tensor) -> Tensor:
        x = self.tokens(idx)
        for _ in range(self.times):
            for layer in self.layers:
                x = layer(x)
        return x


def placed(ids: Tensor, weights: Tensor, E: int = E) -> Tensor:
    return torch.zeros(len(ids), E).scatter(1, ids, weights)


def top_2(moe: Any, x_TD: Tensor) -> Tensor:
    weights, ids = moe.gate(x_TD).softmax(-1).topk(2)
    return placed(ids, weights)


def top_2_slot_by_slot(moe: Any, x_TD: Tensor) -> Tensor:
    weights, ids = moe.gate(x_TD).softmax(-1).topk(2)
    return placed(ids[:, :1], weights[:, :1]) + placed(ids[:, 1:], weights[:, 1:])


def of_the_best_group(moe: Any, x_TD: Tensor) -> Tensor:
    scores = moe.gate(x_TD).softmax(-1)
    groups = scores.view(-1, 2, E // 2).sum(-1).topk(1).indices
    away = torch.ones(len(x_TD), 2).scatter(1, groups, 0).bool().repeat_interleave(E // 2, 1)
    weights, ids = scores.masked_fill(away, 0).topk(2)
    return placed(ids, weights)


def twice_top_1(moe: Any, x_TD: Tensor) -> Tensor:
    scores = moe.gate(x_TD).softmax(-1)
    first, id_1 = scores.topk(1)
    second, id_2 = scores.scatter(1, id_1, 0).topk(1)
    return placed(torch.cat([id_1, id_2], 1), torch.cat([first, second], 1))


def top_2_of_3(moe: Any, x_TD: Tensor) -> Tensor:
    weights, ids = moe.gate(x_TD).softmax(-1).topk(3)
    return placed(ids[:, :2], weights[:, :2])


def above_a_threshold(moe: Any, x_TD: Tensor) -> Tensor:
    weights, ids = moe.gate(x_TD).softmax(-1).topk(2)
    return placed(ids, weights * (weights > 0.3))


def of_product_keys(moe: Any, x_TD: Tensor) -> Tensor:
    scores = moe.gate(x_TD)
    (a, i), (b, j) = scores[:, :2].topk(1), scores[:, 2:].topk(1)
    pairs = torch.cat([a + b, a - b, b - a], 1)
    best = pairs.topk(1).indices
    return placed((best + i + j) % E, torch.ones(len(best), 1))


def experts_choose(moe: Any, x_TD: Tensor) -> Tensor:
    """Each of S experts the best of S tokens."""
    weights, at = moe.gate(x_TD).view(B, S, -1).softmax(-1).transpose(1, 2).topk(5)
    return torch.zeros(B, S, S).scatter(2, at, weights).transpose(1, 2).reshape(T, S)


def of_keys(moe: Any, x_TD: Tensor) -> Tensor:
    """A sparse attention."""
    x_BSD = x_TD.view(B, S, D)
    return placed((x_BSD @ x_BSD.transpose(1, 2)).topk(3).indices[..., 0].view(T, 1) % E, x_TD)


@pytest.mark.parametrize("experts", ["list", "padded", "dense", "stacked"])
@pytest.mark.parametrize("route", [top_2, top_2_slot_by_slot, of_the_best_group])
def test_a_choice_is_found_as_the_experts_are_given_it(
    tmp_path: Path, route: Route, experts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model(route, experts)
    own.record_twice(model, tmp_path / "t", discover=True)
    trace = own.path_of(tmp_path / "t")
    for n, layer in enumerate(model.layers):
        assert own.recorded(trace, n) == layer.given
    for said in (capsys.readouterr().err, trace.manifest["model"]["note"]):
        assert "drops from the choice later (by capacity, a threshold or a slice)" in said


@pytest.mark.parametrize(
    ("match", "route", "experts"),
    [
        (r"calls torch\.topk over 4 values 2 times .*:\d+, .*:\d+\)", twice_top_1, "list"),
        (r"calls torch\.topk over 4 values 2 times", twice_top_1, "stacked"),
        (r"expert \d \d+ times, and layers\.0\.experts\.\d is given \d+ rows", top_2_of_3, "list"),
        (r"is given \d+ rows", top_2_of_3, "padded"),
        ("chooses 3 of 4 values .* takes a slice", top_2_of_3, "dense"),
        ("chooses 3 of 4 values .* takes a slice", top_2_of_3, "stacked"),
        (r"is given \d+ rows", above_a_threshold, "list"),
        (r"is given \d+ rows", above_a_threshold, "padded"),
        ("chooses 1 of 3 values .* nothing in layer 0 has 3 experts", of_product_keys, "list"),
        ("chooses 3 of 16 values .* nothing in layer 0 has 16 experts", of_keys, "list"),
    ],
)
def test_what_cannot_be_told_is_refused(
    tmp_path: Path, match: str, route: Route, experts: str
) -> None:
    with pytest.raises(MoeInspectError, match=match) as error:
        own.record_once(Model(route, experts), tmp_path / "t", discover=True)
    assert "After the line that makes the final choice, call moe_inspect.probe(" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("experts", ["list", "stacked"])
def test_experts_that_choose_tokens_are_refused(tmp_path: Path, experts: str) -> None:
    """As many as there are tokens: the shapes are those of tokens that choose experts."""
    match = "as many as there are tokens" if experts == "stacked" else r"is given \d+ rows"
    with pytest.raises(MoeInspectError, match=match):
        own.record_once(Model(experts_choose, experts, E=S), tmp_path / "t", discover=True)


def test_the_line_named_is_one_of_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not of torch, which calls a forward that is a function."""
    model = Model(top_2)
    for layer in model.layers:
        layer.forward = lambda x, gate=layer.gate: x + gate(x).softmax(-1).topk(2)[0].sum(-1, True)
    own.record_once(model, tmp_path / "t", discover=True)
    assert f"found routers in layers.*: {__file__}:" in capsys.readouterr().err


def test_what_a_later_pass_drops_is_seen(tmp_path: Path) -> None:
    def dropping(moe: Any, x_TD: Tensor) -> Tensor:
        weights_TE = top_2(moe, x_TD)
        return weights_TE if len(moe.given) < T else weights_TE * (torch.arange(E) > 0)

    with pytest.raises(MoeInspectError, match=r"layers\.0\.experts\.0 is given 0 rows"):
        own.record_twice(Model(dropping), tmp_path / "t", discover=True)
    assert own.path_of(tmp_path / "t").n_tokens == T


def test_a_second_router_or_run_of_a_layer_is_refused(tmp_path: Path) -> None:
    model = Model(top_2)
    inner = model.layers[1].experts[2] = Moe(top_2, "list", E)
    inner.forward = lambda x, run=inner.forward: run(x[None])[0]
    for refused, match in (
        (model, r"layers\.1 and layers\.1\.experts\.2 both call torch\.topk"),
        (Model(top_2, times=2), r"layers\.0 calls torch\.topk over 4 values 2 times"),
    ):
        with pytest.raises(MoeInspectError, match=match):
            own.record_once(refused, tmp_path / "t", discover=True, overwrite=True)


def test_a_compared_choice_is_recorded_by_others_too(tmp_path: Path) -> None:
    """What discovery watches by is gone once the recording is over."""
    model = Model(top_2)
    own.record_once(model, tmp_path / "t", discover=True)
    assert not torch.nn.modules.module._global_forward_pre_hooks
    own.record_once(model, tmp_path / "u", discover=True)
    layer: Any = model.layers[0]
    assert own.recorded(own.path_of(tmp_path / "u"), 0) == layer.given[T:]
