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


def placed(weights: Tensor, ids: Tensor) -> Tensor:
    return torch.zeros(len(ids), E).scatter(1, ids, weights)


def of_top(k: int, to: Callable[[Tensor, Tensor], Tensor] = placed) -> Route:
    return lambda moe, x_TD: to(*moe.gate(x_TD).softmax(-1).topk(k))


def of_the_best_group(moe: Any, x_TD: Tensor) -> Tensor:
    scores = moe.gate(x_TD).softmax(-1)
    groups = scores.view(-1, 2, E // 2).sum(-1).topk(1).indices
    away = torch.ones(len(x_TD), 2).scatter(1, groups, 0).bool().repeat_interleave(E // 2, 1)
    return placed(*scores.masked_fill(away, 0).topk(2))


def twice_top_1(moe: Any, x_TD: Tensor) -> Tensor:
    scores = moe.gate(x_TD).softmax(-1)
    weights, ids = scores.topk(1)
    return placed(weights, ids) + placed(*scores.scatter(1, ids, 0).topk(1))


def of_product_keys(moe: Any, x_TD: Tensor) -> Tensor:
    scores = moe.gate(x_TD)
    (a, i), (b, j) = scores[:, :2].topk(1), scores[:, 2:].topk(1)
    ids = torch.cat([a + b, a - b, b - a], 1).topk(1).indices
    return placed(torch.ones(len(ids), 1), (ids + i + j) % E)


def experts_choose(moe: Any, x_TD: Tensor) -> Tensor:
    """Each of S experts the best of S tokens: the shapes are those of tokens that choose."""
    weights, at = moe.gate(x_TD).view(B, S, -1).softmax(-1).transpose(1, 2).topk(5)
    return torch.zeros(B, S, S).scatter(2, at, weights).transpose(1, 2).reshape(T, S)


def of_keys(moe: Any, x_TD: Tensor) -> Tensor:
    """A sparse attention."""
    x_BSD = x_TD.view(B, S, D)
    return placed(x_TD, (x_BSD @ x_BSD.transpose(1, 2)).topk(3).indices[..., 0].view(T, 1) % E)


top_2 = of_top(2)
ROUTES: dict[str, Route] = {
    "top 2": top_2,
    "slot by slot": of_top(2, lambda w, i: placed(w[:, :1], i[:, :1]) + placed(w[:, 1:], i[:, 1:])),
    "of the best group": of_the_best_group,
    "twice top 1": twice_top_1,
    "top 2 of 3": of_top(3, lambda w, ids: placed(w[:, :2], ids[:, :2])),
    "above a threshold": of_top(2, lambda w, ids: placed(w * (w > 0.3), ids)),
    "product keys": of_product_keys,
    "sparse attention": of_keys,
    "experts choose": experts_choose,
}


@pytest.mark.parametrize("experts", ["list", "padded", "dense", "stacked"])
@pytest.mark.parametrize("route", ["top 2", "slot by slot", "of the best group"])
def test_a_choice_is_found_as_the_experts_are_given_it(
    tmp_path: Path, route: str, experts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model(ROUTES[route], experts)
    own.record_twice(model, tmp_path / "t", discover=True)
    trace = own.path_of(tmp_path / "t")
    for n, layer in enumerate(model.layers):
        assert own.recorded(trace, n) == layer.given
    for said in (capsys.readouterr().err, trace.manifest["model"]["note"]):
        assert "drops from the choice later (by capacity, a threshold or a slice)" in said


@pytest.mark.parametrize(
    ("route", "experts", "match"),
    [
        ("twice top 1", "list", r"calls torch\.topk over 4 values 2 times .*:\d+, .*:\d+\)"),
        ("twice top 1", "stacked", r"calls torch\.topk over 4 values 2 times"),
        ("top 2 of 3", "list", r"expert \d \d+ times, and layers\.0\.experts\.\d is given \d+ r"),
        ("top 2 of 3", "padded", r"is given \d+ rows"),
        ("top 2 of 3", "dense", "chooses 3 of 4 values .* takes a slice"),
        ("top 2 of 3", "stacked", "chooses 3 of 4 values .* takes a slice"),
        ("above a threshold", "list", r"is given \d+ rows"),
        ("above a threshold", "padded", r"is given \d+ rows"),
        ("product keys", "list", "chooses 1 of 3 values .* nothing in layer 0 has 3 experts"),
        ("sparse attention", "list", "chooses 3 of 16 values .* nothing in layer 0 has 16 experts"),
        ("experts choose", "stacked", "as many as there are tokens"),
        ("experts choose", "list", r"is given \d+ rows"),
    ],
)
def test_what_cannot_be_told(tmp_path: Path, route: str, experts: str, match: str) -> None:
    model = Model(ROUTES[route], experts, S if route == "experts choose" else E)
    with pytest.raises(MoeInspectError, match=match) as error:
        own.record_once(model, tmp_path / "t", discover=True)
    assert "After the line that makes the final choice, call moe_inspect.probe(" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_line_is_of_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    for name in "tu":
        own.record_once(model, tmp_path / name, discover=True)
        assert not torch.nn.modules.module._global_forward_pre_hooks
    layer: Any = model.layers[0]
    assert own.recorded(own.path_of(tmp_path / "u"), 0) == layer.given[T:]
