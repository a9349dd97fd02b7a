"""Routers of one's own that are not what they should be, or are used in ways that a shorter test
would not try: each is recorded as it is, or refused with a line that says what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moe_inspect
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.custom.choice import ChoiceReader
from moe_inspect.model.find import candidates
from tests.support import own
from tests.support.families import build
from tests.support.own import record_once, record_twice
from tests.test_own import B, S, T, spec
from tests.test_own_probes import Probing


def shown(n: int = 0, K: int = 2, E: int = 8, T: int = T) -> tuple[Tensor, Tensor]:
    """Ids and weights of a pass."""
    generator = torch.Generator().manual_seed(n)
    weights, ids = torch.rand(T, E, generator=generator).topk(K)
    return ids, weights


def probe(ids: Any, weights: Any, **settings: Any) -> None:
    moe_inspect.probe(ids, weights, **{"layer": 0, "experts": 8, **settings})


def refused(path: Path, match: str, probing: Any, **options: Any) -> None:
    with pytest.raises(MoeInspectError, match=match):
        record_twice(Probing(probing), path, overwrite=True, **options)


# --- what a router shows


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("options", [{}, {"counts_only": True}, {"ring_tokens": 64}])
def test_a_top_k_that_changes_is_refused(tmp_path: Path, K: int, options: Any) -> None:
    """With K = 1 the one expert would be written into every slot."""
    said = f"chose {K} experts per token, but 2 in its first"
    refused(tmp_path / "t", said, lambda n: probe(*shown(n, K if n else 2)), **options)


@pytest.mark.parametrize("late", [0, 1])
def test_an_expert_that_cannot_be_is_refused_in_any_pass(tmp_path: Path, late: int) -> None:
    """It would look like a slot that went to no expert."""
    ids, weights = shown()
    said = r"probe\(layer=0\) chose expert 8 but is declared with 8 experts"
    refused(tmp_path / "t", said, lambda n: probe(ids + (n == late), weights))


@pytest.mark.parametrize("options", [{}, {"counts_only": True}])
def test_an_expert_twice_in_a_decision_is_refused(tmp_path: Path, options: Any) -> None:
    """As `verify` refuses it, in any pass; -1 may stand in several slots."""

    def probing(n: int) -> None:
        ids, weights = shown(n, K=3)
        ids[:, 1:] = -1
        if n:
            ids[5, 2] = ids[5, 0]
        probe(ids, weights)

    expert = int(shown(1, K=3)[0][5, 0])
    refused(tmp_path / "t", rf"probe\(layer=0\) chose expert {expert} twice", probing, **options)


def test_what_is_no_choice_is_named(tmp_path: Path) -> None:
    ids, weights = shown()

    def of(*args: Any, **kwargs: Any) -> Any:
        return lambda n: probe(*args, **kwargs)

    out = tmp_path / "t"
    refused(out, r"two tensors, ids and weights, not \[48, 2\], NoneType", of(ids, None))
    refused(out, r"two tensors, ids and weights, not list, \[48, 2\]", of(ids.tolist(), weights))
    refused(out, "a bool map and does not state its top-k: give it ids", of(weights > 0, weights))
    refused(out, r"48 experts.* are \[\.\.\., 1\]", of(ids[:, 0], weights[:, 0]))
    for layer in (torch.tensor(0), "0", -1):
        refused(out, "the layer is a number of 0 or more", of(ids, weights, layer=layer))
    for experts in (8.0, torch.tensor(8), "8", 0, -3):
        refused(out, "give it a number of 1 or more", of(ids, weights, experts=experts))
    for E in (1, 4):
        logits = weights[:, :1].expand(T, E)
        refused(out, r"shows logits \[48, .\]", of(ids, weights, logits=logits), logits=True)
    of_numpy = Probing(of(ids, weights, layer=np.int64(3), experts=np.int32(8)))
    record_once(of_numpy, out, overwrite=True)
    assert own.path_of(out).routers[0].layer == 3


def test_what_is_no_choice_of_a_spec_is_named() -> None:
    reader = ChoiceReader("h.0.router", 4, 2, "give it")
    ids, weights = shown(E=4)
    for found in (ids, (ids, weights, weights), None, (ids, 3)):
        with pytest.raises(MoeInspectError, match=r"choice of h\.0\.router must be two tensors"):
            reader.choice(found)
    for wrong, match in (
        (torch.ones(T, 4), "chose 4 experts for a token in its bool map, and its top-k is 2"),
        (torch.ones(T, 2), r"gives a bool map \[48, 2\], not \[\.\.\., 4\]"),
    ):
        with pytest.raises(MoeInspectError, match=match):
            reader.choice((wrong.bool(), wrong))
    with pytest.raises(MoeInspectError, match=r"shows logits \[48, 2\]"):
        reader.logits(weights)
    assert reader.choice((ids, weights))[0] is not None  # control


@pytest.mark.parametrize("ids", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_dtypes_are_recorded(tmp_path: Path, ids: Any, weights: Any) -> None:
    def probing(n: int) -> None:
        i, w = shown(n)
        probe(i.to(ids), w.to(weights))

    record_twice(Probing(probing), tmp_path / "t")
    expected = [frozenset(row) for n in range(2) for row in shown(n)[0].tolist()]
    assert own.recorded(own.path_of(tmp_path / "t"), 0) == expected
    assert moe_inspect.verify(tmp_path / "t").ok


@pytest.mark.parametrize("options", [{}, {"counts_only": True}])
@pytest.mark.parametrize("empty", [(B, 0), (0, S)])
@pytest.mark.parametrize("at", [0, 1])
def test_empty_passes_are_passes(
    tmp_path: Path, options: Any, empty: tuple[int, int], at: int
) -> None:
    model, sizes = Probing(None), [(B, S)] * 2
    sizes.insert(at, empty)
    with moe_inspect.record(model, tmp_path / "t", **options):
        for b, s in sizes:
            model.probing = lambda n, T=b * s: probe(*shown(T=T))
            model(own.tokens(b, s))
    assert own.path_of(tmp_path / "t").n_tokens == 2 * T
    assert moe_inspect.verify(tmp_path / "t").ok


def test_layers_without_a_probe_are_named(tmp_path: Path) -> None:
    for layers in ([99], [1, 99]):
        with pytest.raises(MoeInspectError, match=r"no probe in layer 99: .* layers 0, 1, 2, 3"):
            record_once(own.gpt(), tmp_path / "t", layers=layers, overwrite=True)


# --- how it is used


@pytest.mark.parametrize("how", ["probe", "spec", "spec of the router", "discover"])
@pytest.mark.parametrize("closed_before", ["forward", "backward"])
def test_a_recording_may_begin_or_end_between_forward_and_backward(
    tmp_path: Path, how: str, closed_before: str
) -> None:
    """Under activation checkpointing too: what reads the choice saves nothing for the backward
    pass, which the recomputation would then miss, or have too much of."""
    model, ids = own.gpt(probes=how == "probe"), own.tokens()
    for block in model.blocks:
        block.forward = lambda x, run=block.forward: checkpoint(run, x, use_reentrant=False)
    of_router = spec(
        module="blocks.*.experts.router",
        choice=lambda module, args, kwargs, output: output.softmax(-1).topk(2)[::-1],
    )
    ways: dict[str, dict[str, Any]] = {
        "spec": {"routers": [spec()]},
        "spec of the router": {"routers": [of_router]},
        "discover": {"discover": True},
    }
    recorder = moe_inspect.record(model, tmp_path / "t", **ways.get(how, {}))
    if closed_before == "backward":
        with recorder:
            loss = model(ids).sum()
        loss.backward()
    else:
        loss = model(ids).sum()
        with recorder:
            loss.backward()
            model(ids)
    assert own.path_of(tmp_path / "t").n_tokens == T


@pytest.mark.parametrize("family", ["llama4", "gpt_oss", "olmoe"])
def test_so_may_one_of_transformers(tmp_path: Path, family: str) -> None:
    """Also where an adapter computes the choice."""
    model = build(family).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with moe_inspect.record(model, tmp_path / "t"):
        loss = model(own.tokens() % 50, use_cache=False).logits.sum()
    loss.backward()
    assert own.path_of(tmp_path / "t").n_tokens == T


def test_a_probe_is_not_discovered_a_second_time(tmp_path: Path) -> None:
    assert len(own.exact(own.gpt(), tmp_path / "t", 2, discover=True).routers) == 4


# --- a model without a router that is known


def of_blocks(block: Any) -> Any:
    """A model of three such blocks."""

    def forward(self: Any, idx: Tensor) -> Tensor:
        x = self.tokens(idx)
        for layer in self.layers:
            x = layer(x)
        return x

    layers = nn.ModuleList(block() for _ in range(3))
    return own.module("OfBlocks", forward, tokens=nn.Embedding(256, 8), layers=layers)


def switch() -> Any:
    """The router and the experts are parameters."""
    return own.module(
        "Switch",
        lambda self, x: x + x @ self.w1[(x @ self.gate_w).argmax(-1)[0, 0]],
        gate_w=nn.Parameter(torch.randn(8, 6)),
        w1=nn.Parameter(torch.randn(6, 8, 8)),
    )


def dense() -> Any:
    parts = {"conv": nn.Conv1d(8, 8, 1), "gate_proj": nn.Parameter(torch.randn(8, 8))}
    return own.module("Dense", lambda self, x: x @ self.gate_proj, **parts)


def test_routers_that_are_parameters_are_named(tmp_path: Path) -> None:
    found = candidates(of_blocks(switch))
    assert found.routers == {"layers.*": "Switch, with gate_w"}
    assert found.experts_lists == {"layers.*": "Switch of 6"}
    assert found.experts == 6
    assert candidates(of_blocks(dense)) is None
    for block, options, match in (
        (switch, {}, "no known router was found in OfBlocks"),
        (
            switch,
            {"discover": True},
            r"no block of OfBlocks called torch\.topk to choose experts in",
        ),
        (dense, {}, r"is a dense model: .* judging by the names"),
    ):
        with pytest.raises(MoeInspectError, match=match):
            record_once(of_blocks(block), tmp_path / "t", **options)


def chooser() -> Any:
    """Its experts are called as those of transformers are, and say nothing of their number."""

    def forward(self: Any, x: Tensor) -> Tensor:
        weights, ids = self.router(x.flatten(0, 1)).topk(2)
        return self.experts(x.flatten(0, 1), ids, weights).view_as(x)

    experts = own.module(
        "MyExperts",
        lambda self, x, ids, weights: x + weights.sum(-1, keepdim=True),
        mlps=nn.ModuleList(nn.Linear(8, 8) for _ in range(4)),
    )
    return own.module("Chooser", forward, router=nn.Linear(8, 4), experts=experts)


def gated() -> Any:
    """DeepSeek's gate by name and interface, without its config, as many have copied it."""
    gate = own.module(
        "MoEGate",
        lambda self, x: self.linear(x.flatten(0, 1)).softmax(-1).topk(2)[::-1],
        n_routed_experts=4,
        linear=nn.Linear(8, 4),
    )
    parts = {"gate": gate, "shared_mlp": nn.Linear(8, 8)}
    return own.module("Gated", lambda self, x: x + self.gate(x)[1].sum(), **parts)


def with_attention() -> Any:
    """A sparse attention, which chooses keys, before the experts."""
    attention = own.module("Attention", lambda self, x: x + 0 * (x @ x.mT).topk(3)[0].sum())
    parts = {"attention": attention, "moe": chooser()}
    return own.module("WithAttention", lambda self, x: self.moe(self.attention(x)), **parts)


@pytest.mark.parametrize("block", [chooser, gated])
def test_names_and_interfaces_that_are_known_need_nothing(tmp_path: Path, block: Any) -> None:
    record_once(of_blocks(block), tmp_path / "t")
    routers = own.path_of(tmp_path / "t").routers
    assert [(r.layer, r.experts, r.top_k) for r in routers] == [(n, 4, 2) for n in range(3)]
    assert {r.shared_experts for r in routers} == {int(block is gated)}


def test_discovery_does_not_guess_between_two(tmp_path: Path) -> None:
    said = r"layers\.0\.attention and layers\.0\.moe .* over 16 and 4 values"
    with pytest.raises(MoeInspectError, match=said):
        record_once(of_blocks(with_attention), tmp_path / "t", discover=True)


@pytest.mark.parametrize("buffers", [0, 1])
def test_the_model_itself_may_be_the_router(tmp_path: Path, buffers: int) -> None:
    """Without parameters."""
    model = own.module("Hashed", lambda self, ids: shown(T=ids.numel()))
    if buffers:
        model.register_buffer("table", torch.zeros(3, dtype=torch.int64))

    def recorded(**options: Any) -> None:
        router = moe_inspect.RouterSpec(module="Hashed", choice=lambda *call: call[-1], **options)
        record_once(model, tmp_path / "t", routers=[router], overwrite=True)

    with pytest.raises(MoeInspectError, match=r"^Hashed \(Hashed\) does not say how many experts"):
        recorded()
    with pytest.raises(MoeInspectError, match="in the module path Hashed: give"):
        recorded(experts=8)
    recorded(experts=8, layer=0)
    trace = own.path_of(tmp_path / "t")
    assert [(r.name, r.path) for r in trace.routers] == [("Hashed", "Hashed")]
    assert own.recorded(trace, 0) == [frozenset(row) for row in shown()[0].tolist()]
    capture = trace.manifest["capture"]
    assert (capture["device"], capture["dtype"]) == ("cpu", None)


def test_a_list_of_modules_is_not_a_router(tmp_path: Path) -> None:
    model = own.gpt(probes=False)
    router = moe_inspect.RouterSpec(module="blocks.*.experts.mlps", choice=lambda *a: None)
    with pytest.raises(MoeInspectError, match=r"ModuleList, .* such as blocks\.0\.experts$"):
        record_once(model, tmp_path / "t", routers=[router])

    experts = [nn.ModuleDict({str(e): nn.Linear(8, 8) for e in range(4)}) for _ in range(2)]
    of_lists = nn.Module()
    of_lists.layers = nn.ModuleList(nn.ModuleDict({"experts": of}) for of in experts)
    assert candidates(of_lists).pattern == "layers.*"


@pytest.mark.parametrize("shape", [(B, S), (T,)])
@pytest.mark.parametrize("weights", [(1,), ()])
@pytest.mark.parametrize("first", [0, 1])
def test_one_expert_for_each_token_needs_a_last_dimension(
    tmp_path: Path, shape: tuple[int, ...], weights: tuple[int, ...], first: int
) -> None:
    """Whatever else is wrong with it, in the first pass and in a later one."""
    ids = torch.arange(T).reshape(shape) % 3

    def probing(n: int) -> None:
        shape = weights if n == first else (1,)
        chosen = ids if n == first else ids[..., None]
        probe(chosen, torch.ones(*ids.shape, *shape))

    refused(tmp_path / "t", r"unsqueeze\(-1\)", probing)


def test_rows_that_are_missing_are_not_taken_for_experts(tmp_path: Path) -> None:
    """Half of the tokens with two experts each are as many numbers as tokens."""
    for rows, said in ((slice(T // 2), "must show each token once"), (0, "unsqueeze")):
        chosen = [part[rows] if rows else part[:, 0] for part in shown()]
        refused(tmp_path / "t", said, lambda n, c=chosen: probe(*c))
