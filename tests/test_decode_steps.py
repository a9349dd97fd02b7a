"""Decode steps on a CPU, which are written and read together: the trace is what a witness sees in
each of them, whatever happens between and in them. Passes in any order: test_recorder_states."""

from __future__ import annotations

import gc
import signal
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_inspect
from moe_inspect.capture.hook.inputs import PassInputs
from moe_inspect.errors import MoeInspectError
from tests.conftest import Put
from tests.support.families import build
from tests.support.witness import agreed, witnessed
from tests.support.zoo import token_batch

pytestmark = pytest.mark.usefixtures("nothing_is_compiled")


@pytest.fixture(scope="module")
def model() -> Any:
    return build("olmoe")


class Text:
    """A text of B rows that is being decoded."""

    def __init__(self, model: Any, B: int, padded: bool = False):
        self.model, self.B = model, B
        prompt = token_batch([5, *[3 if padded else 5] * (B - 1)], seed=B)
        self.mask = prompt["attention_mask"].flip(1) if padded else None
        given = {"attention_mask": self.mask, "use_cache": True}
        self.cache = model(input_ids=prompt["input_ids"], **given).past_key_values

    def step(self, n: int = 1, tokens: int = 1, **given: Any) -> None:
        for _ in range(n):
            ids = torch.arange(self.B * tokens).view(self.B, tokens) + self.cache.get_seq_length()
            ids = ids % 200
            if self.mask is not None:
                self.mask = torch.cat([self.mask, torch.ones_like(ids)], 1)
                given = {**given, "attention_mask": self.mask}
            self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **given)


Positions = list[list[int]]  # of each row of the texts, one after the other


def padded(model: Any, recorder: Any, B: int) -> Positions:
    Text(model, B, padded=True).step(8)
    return [[*range(13)], *[[*range(2, 13)]] * (B - 1)]  # those of the cache


def by_place(model: Any, recorder: Any, B: int) -> Positions:
    """The token ids without their name."""
    cache = Text(model, B).cache
    for n in range(8):
        model(torch.full((B, 1), n), past_key_values=cache, use_cache=True)
    Text(model, B).step(3)
    return [[*range(13)]] * B + [[*range(8)]] * B


def in_turn(model: Any, recorder: Any, B: int) -> Positions:
    texts = [Text(model, B), Text(model, B)]
    for n in range(12):
        texts[n // 3 % 2].step()
    return [[*range(11)]] * 2 * B


def cropped(model: Any, recorder: Any, B: int) -> Positions:
    text = Text(model, B)
    text.step(5)
    text.cache.crop(-3)
    text.step(4)
    text.step(1, tokens=3)
    text.step(3)
    return [[*range(10), *range(7, 17)]] * B


def failing(model: Any, recorder: Any, B: int) -> Positions:
    """In the first layer, before the cache has grown, and in the last."""
    text = Text(model, B)
    for layer in (0, -1):
        text.step(4)
        with (
            model.model.layers[layer].mlp.register_forward_pre_hook(lambda *_: 1 / 0),
            pytest.raises(ZeroDivisionError),
        ):
            text.step()
        text.cache.crop(-1)
    text.step(4)
    return [[*range(17)]] * B


def labelled_within(model: Any, recorder: Any, B: int) -> Positions:
    """By a hook: of the pass that comes next."""
    layer = model.model.layers[1]
    for _ in range(2):
        text = Text(model, B)
        text.step(3)
        label = lambda *_: recorder.label(domains=["next"] * B)  # noqa: E731
        with layer.register_forward_pre_hook(label):
            text.step()
    Text(model, B).step(3)
    return [[*range(9)]] * 2 * B + [[*range(8)]] * B


def without_a_cache_in_between(model: Any, recorder: Any, B: int) -> Positions:
    text = Text(model, B)
    text.step(4)
    model(**token_batch([3] * B), use_cache=False)
    text.step(4)
    return [[*range(13)]] * B + [[0, 1, 2]] * B


SCENES = [padded, by_place, in_turn, cropped, failing, labelled_within, without_a_cache_in_between]


@pytest.mark.parametrize("counts_only", [False, True])
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("scene", SCENES)
def test_the_trace_is_that_of_each_step(
    scene: Callable[..., Positions], B: int, counts_only: bool, model: Any, tmp_path: Path
) -> None:
    recording = moe_inspect.record(
        model, tmp_path / "t", domains=["x"] * B, counts_only=counts_only
    )
    with witnessed(model) as seen, recording as recorder, torch.inference_mode():
        positions = scene(model, recorder, B)
    tokens = agreed(tmp_path / "t", seen)
    trace = moe_inspect.open_trace(tmp_path / "t")
    documents = trace.documents().set_index("document")
    if scene is labelled_within:
        assert documents.domain.tolist() == ["x"] * B + ["next"] * 2 * B
    if not counts_only:
        assert tokens.groupby("document").position.apply(list).tolist() == positions
        assert tokens.batch.nunique() == seen.passes
        assert tokens.domain.tolist() == documents.domain.loc[tokens.document].tolist()


def test_a_step_without_one_of_the_routers_is_refused(model: Any, tmp_path: Path) -> None:
    layer = model.model.layers[1]
    said = r"layers\.1\S* routed 0 rows in a forward pass of 1"
    recording = moe_inspect.record(model, tmp_path / "t")
    with pytest.raises(MoeInspectError, match=said), recording, torch.inference_mode():  # noqa: PT012
        text = Text(model, 1)
        text.step(6)
        mlp, layer.mlp = layer.mlp, torch.nn.Identity()
        try:
            text.step()
        finally:
            layer.mlp = mlp
    assert moe_inspect.open_trace(tmp_path / "t").n_tokens == 5 + 6


def test_the_cache_is_not_kept_alive(model: Any, tmp_path: Path) -> None:
    with moe_inspect.record(model, tmp_path / "t"), torch.inference_mode():
        text = Text(model, 1)
        text.step(5)
        cache = weakref.ref(text.cache)
        del text
        gc.collect()
        assert cache() is None


@pytest.mark.parametrize("counts_only", [False, True])
@pytest.mark.parametrize("B", [1, 3])
def test_a_block_may_be_compiled_in_the_middle(B: int, counts_only: bool, tmp_path: Path) -> None:
    """The graph writes the choice by itself, when the pass is already being kept."""
    found = list[Any]()
    for compiles in (False, True):
        model, path = build("olmoe"), tmp_path / f"{compiles}"
        torch.compiler.reset()
        with moe_inspect.record(model, path, counts_only=counts_only), torch.inference_mode():
            text = Text(model, B)
            text.step(5)
            if compiles:
                model.model.layers[1].mlp.compile(backend="eager")
            text.step(5)
        trace = moe_inspect.open_trace(path)
        found.append([trace.documents(), trace.counts() if counts_only else trace.routing()])
    torch.compiler.reset()
    assert all(a.equals(b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("who", ["another thread", "a signal handler"])
@pytest.mark.parametrize("B", [1, 3])
def test_anyone_may_ask_how_many_tokens(B: int, who: str, model: Any, tmp_path: Path) -> None:
    """A handler does so on the same thread, while a step is being read or written."""
    steps, numbers, over = 150, list[int](), threading.Event()

    def ask_often() -> None:
        while not over.wait(0.0005):
            numbers.append(recorder.tokens)

    def ask(*_: Any) -> None:
        numbers.append(recorder.tokens)
        signal.setitimer(signal.ITIMER_REAL, 0.0005 * (not over.is_set()))

    asking = threading.Thread(target=ask_often) if who == "another thread" else None
    before = signal.signal(signal.SIGALRM, ask)
    with moe_inspect.record(model, tmp_path / "t") as recorder, torch.inference_mode():
        asking.start() if asking else signal.setitimer(signal.ITIMER_REAL, 0.0005)
        try:
            Text(model, B).step(steps)
        finally:
            over.set()
            if asking:
                asking.join()
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert recorder.tokens == (5 + steps) * B
    assert len(set(numbers)) > 10
    assert numbers == sorted(numbers)
    tokens = moe_inspect.open_trace(tmp_path / "t").tokens()
    positions = tokens.groupby("document")["position"].apply(list).tolist()
    assert positions == [list(range(5 + steps))] * B


def test_an_interrupt_leaves_what_was_counted(model: Any, put: Put, tmp_path: Path) -> None:
    """Steps are counted 256 at a time."""
    rows_of, called = PassInputs.rows, []

    def interrupted(self: PassInputs, fed: Any) -> Any:
        called.append(fed)
        if len(called) == 256 + 9:
            raise KeyboardInterrupt
        return rows_of(self, fed)

    put(PassInputs, rows=interrupted)
    recording = moe_inspect.record(model, tmp_path / "t", counts_only=True)
    with pytest.raises(KeyboardInterrupt), recording, torch.inference_mode():
        Text(model, 1).step(600)
    found = moe_inspect.open_trace(tmp_path / "t")
    assert found.status == "interrupted"
    assert found.n_tokens == 5 + 255
