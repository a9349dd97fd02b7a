"""Models of one's own in the ways that people use them: wrapped, failing, beside others, without a
router that is known, and loaded by code that may be wrong."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

import moe_inspect
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.find import candidates
from moe_inspect.model.own import as_tokenizer, load_own
from tests.support import own
from tests.support.families import build
from tests.support.own import record_once
from tests.test_own import T, spec
from tests.test_own_probes import Probing, probe, shown


class Wrapper(nn.Module):
    """Hands on its arguments, as DistributedDataParallel does."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def of_router(module: Any, args: Any, kwargs: Any, output: Tensor) -> Any:
    return output.softmax(-1).topk(2)[::-1]


# how the routers are found → what `record` is given
WAYS: dict[str, dict[str, Any]] = {
    "probe": {},
    "spec": {"routers": [spec()]},
    "spec of the router": {"routers": [spec(module="blocks.*.experts.router", choice=of_router)]},
}


@pytest.mark.parametrize("how", WAYS)
def test_a_wrapped_model_is_recorded(tmp_path: Path, how: str) -> None:
    model = own.gpt(probes="probe" in how)
    own.exact(model, tmp_path / "t", 2, Wrapper(model), **WAYS[how])


def test_a_forward_that_returns_nothing_is_recorded(tmp_path: Path) -> None:
    """What raises is told from it, also while another exception is handled."""

    class Silent(Wrapper):
        fails = False

        def forward(self, idx: Tensor) -> None:
            self.loss = self.module(idx).sum()
            if self.fails:
                raise ArithmeticError

    model = Silent(own.gpt())
    with moe_inspect.record(model, tmp_path / "t") as recorder:
        model(own.tokens())
        try:
            raise KeyError
        except KeyError:
            model(own.tokens())
        model.fails = True
        with pytest.raises(ArithmeticError):
            model(own.tokens())
        assert recorder.tokens == 2 * T
    assert own.path_of(tmp_path / "t").n_tokens == 2 * T


def test_a_pass_that_failed_is_over(tmp_path: Path) -> None:
    """The probes of another model after it are not this one's."""
    model, other = own.gpt(), Probing(lambda n: probe(*shown(), layer=9))
    with own.watched(model) as given, moe_inspect.record(model, tmp_path / "t"):
        model(own.tokens())
        hook = model.head.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(own.tokens())
        hook.remove()
        other(own.tokens())
        model(own.tokens())
    for passes in given.values():
        del passes[1]
    assert own.same(own.path_of(tmp_path / "t"), given) == 4 * 2 * T


def test_a_model_in_another_thread_is_another(tmp_path: Path) -> None:
    """Its probes are called while the pass of this one runs."""
    model, other = own.gpt(), own.gpt()
    thread = threading.Thread(target=other, args=(own.tokens(5, 7),))

    def run_other(*_: Any) -> None:
        thread.start()
        thread.join()

    model.blocks[1].register_forward_pre_hook(run_other)
    own.exact(model, tmp_path / "t")
    assert thread.ident


def test_a_copy_made_meanwhile_is_not_recorded(tmp_path: Path) -> None:
    """As of the weights' moving average."""
    model, ids = own.gpt(), own.tokens()
    with own.watched(model) as given, moe_inspect.record(model, tmp_path / "t"):
        model(ids)
        copied = copy.deepcopy(model)
        for block in copied.blocks:  # its hooks are those of `watched`
            block.experts._forward_hooks.clear()
        copied(own.tokens(2, 5))
        model(ids)
    assert own.same(own.path_of(tmp_path / "t"), given) == 4 * 2 * T


def test_a_recording_without_a_forward_pass_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = own.gpt()
    with moe_inspect.record(model, tmp_path / "t"):
        model.forward(own.tokens())
    assert "no forward pass of GPT was recorded" in capsys.readouterr().err
    record_once(model, tmp_path / "t")
    assert not capsys.readouterr().err


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("closed_before", ["forward", "backward"])
def test_a_recording_may_begin_or_end_between_forward_and_backward(
    tmp_path: Path, how: str, closed_before: str
) -> None:
    """What reads the choice saves nothing, which a recomputation would miss."""
    model, ids = own.gpt(probes="probe" in how), own.tokens()
    for block in model.blocks:
        block.forward = lambda x, run=block.forward: checkpoint(run, x, use_reentrant=False)
    recorder = moe_inspect.record(model, tmp_path / "t", **WAYS[how])
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


# --- a model without a router that is known


def of_blocks(block: Any) -> Any:
    """A model of three such blocks."""
    parts = {"tokens": nn.Embedding(256, 8), "layers": nn.Sequential(*(block() for _ in range(3)))}
    return own.module("OfBlocks", lambda self, idx: self.layers(self.tokens(idx)), **parts)


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


@pytest.mark.parametrize("block", [chooser, gated])
def test_names_and_interfaces_that_are_known_need_nothing(tmp_path: Path, block: Any) -> None:
    record_once(of_blocks(block), tmp_path / "t")
    routers = own.path_of(tmp_path / "t").routers
    assert [(r.layer, r.experts, r.top_k) for r in routers] == [(n, 4, 2) for n in range(3)]
    assert {r.shared_experts for r in routers} == {int(block is gated)}


def test_what_needs_to_be_told_is_named(tmp_path: Path) -> None:
    found = candidates(of_blocks(switch))
    assert found.routers == {"layers.*": "Switch, with gate_w"}
    assert found.experts_lists == {"layers.*": "Switch of 6"}
    assert found.experts == 6
    assert candidates(of_blocks(dense)) is None
    line = r"add one line to its forward: moe_inspect\.probe\(ids, weights, layer=i, experts=6\)"
    for block, match in (
        (switch, f"no known router was found in OfBlocks, .*: {line}"),
        (dense, r"is a dense model: .* judging by the names"),
    ):
        with pytest.raises(MoeInspectError, match=match):
            record_once(of_blocks(block), tmp_path / "t", overwrite=True)


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


# --- loaders and tokenizers


def test_a_tokenizer_that_fails_says_on_what() -> None:
    class Strict:
        n_vocab = 256

        def encode(self, text: str) -> list[int]:
            if "<|" in text:
                raise ValueError("disallowed special token\nand much more")
            return list(text.encode())

        def decode(self, ids: list[int]) -> str:
            return bytes(ids).decode()

    strict = as_tokenizer(Strict())
    assert strict("ab")["input_ids"] == [97, 98]
    said = r"\(Strict\) failed on the text 'a<\|b\|>': ValueError: disallowed special token$"
    with pytest.raises(MoeInspectError, match=said):
        strict("a<|b|>")

    class Tiktoken(Strict):
        def encode_ordinary(self, text: str) -> list[int]:
            return list(text.encode())

    assert len(as_tokenizer(Tiktoken())("a<|b|>")["input_ids"]) == 6


def test_loaders_that_are_wrong_are_named() -> None:
    good = own.example()
    loader: Any
    for loader, match in (
        (3, "a loader is a function that returns .* not a int"),
        (lambda: (own.gpt(), good.Bytes(), 3), "returned a int in place of a function"),
        (lambda: own.gpt(), r"must return \(model, tokenizer\) or .*, not a GPT"),
        (lambda: (3, good.Bytes()), "returned a int in place of a model"),
        (lambda: (own.gpt(), object()), "a object is not a tokenizer"),
        (lambda: exit(2), "failed: SystemExit: 2"),
    ):
        with pytest.raises(MoeInspectError, match=match):
            load_own(loader, "x")


def test_a_loader_of_a_model_that_states_no_positions_is_told_what_to_give(tmp_path: Path) -> None:
    """Its config may be one of transformers without the model being so."""

    def load() -> Any:
        model = own.gpt()
        model.config = PreTrainedConfig()
        return model, own.example().Bytes()

    text = tmp_path / "long.txt"
    text.write_text("word " * 200)
    given: dict[str, Any] = {"loader": load, "data": [str(text)]}
    match = r"IndexError: index out of range in self \(no max_position"
    with pytest.raises(MoeInspectError, match=match):
        moe_inspect.trace_model("", tmp_path / "t", **given)
    assert moe_inspect.trace_model("", tmp_path / "t", **given, max_length=100).n_tokens
