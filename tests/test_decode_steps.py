"""Decode steps on a CPU, which are written and read together: the trace is that of steps taken one
by one, call by call, whatever happens between and in them."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_inspect
from moe_inspect.capture import hand_over
from moe_inspect.capture.hook import counts as counted
from moe_inspect.capture.hook.inputs import arguments
from moe_inspect.capture.hook.inputs.pass_inputs import PassInputs
from moe_inspect.capture.hook.ring import Rings
from moe_inspect.capture.recorder import Recorder
from moe_inspect.errors import MoeInspectError
from tests.conftest import Put
from tests.support.families import build
from tests.support.zoo import token_batch

pytestmark = pytest.mark.usefixtures("nothing_is_compiled")
Scene = Callable[..., None]  # model, recorder, B


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
            if self.mask is not None:
                self.mask = torch.cat([self.mask, torch.ones_like(ids)], 1)
                given = {**given, "attention_mask": self.mask}
            self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **given)


def padded(model: Any, recorder: Recorder, B: int) -> None:
    Text(model, B, padded=True).step(8)


def by_place(model: Any, recorder: Recorder, B: int) -> None:
    """The token ids without their name."""
    cache = Text(model, B).cache
    for n in range(8):
        model(torch.full((B, 1), n), past_key_values=cache, use_cache=True)
    Text(model, B).step(3)


def in_turn(model: Any, recorder: Recorder, B: int) -> None:
    texts = [Text(model, B), Text(model, B)]
    for n in range(12):
        texts[n // 3 % 2].step()


def cropped(model: Any, recorder: Recorder, B: int) -> None:
    text = Text(model, B)
    text.step(5)
    text.cache.crop(-3)
    text.step(4)
    text.step(1, tokens=3)
    text.step(3)


def failing(model: Any, recorder: Recorder, B: int) -> None:
    """In the first layer, before the cache has grown, and in the last."""
    text = Text(model, B)
    for layer in (0, -1):
        text.step(4)
        hook = model.model.layers[layer].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            text.step()
        hook.remove()
        text.cache.crop(-1)
    text.step(4)


def labelled_within(model: Any, recorder: Recorder, B: int) -> None:
    """By a hook: of the pass that comes next."""
    text = Text(model, B)
    for _ in range(2):
        text.step(3)
        hook = model.model.layers[1].register_forward_pre_hook(
            lambda *_: recorder.label(domains=["next"] * B)
        )
        text.step()
        hook.remove()
        text = Text(model, B)
    text.step(3)


def without_a_cache_in_between(model: Any, recorder: Recorder, B: int) -> None:
    text = Text(model, B)
    text.step(4)
    model(**token_batch([3] * B), use_cache=False)
    text.step(4)


def steps(n: int) -> Scene:
    return lambda model, recorder, B: Text(model, B).step(n)


# (pauses, labels, positions and questions in any order: test_recorder_states)
SCENES = [padded, by_place, in_turn, cropped, failing, labelled_within, without_a_cache_in_between]


def recorded(scene: Scene, model: Any, path: Path, B: int = 1, **options: Any) -> moe_inspect.Trace:
    recording = moe_inspect.record(model, path, domains=["x"] * B, **options)
    with recording as recorder, torch.inference_mode():
        scene(model, recorder, B)
    return moe_inspect.open_trace(path)


@pytest.mark.parametrize("counts_only", [False, True])
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("scene", SCENES)
def test_the_trace_is_that_of_steps_taken_one_by_one(
    scene: Scene, B: int, counts_only: bool, model: Any, put: Put, tmp_path: Path
) -> None:
    found = recorded(scene, model, tmp_path / "together", B, counts_only=counts_only)
    put(Rings, write=lambda *_: False)
    put(counted, MOST_WAITING=1)
    put(hand_over, HELD_SECONDS=-1.0)
    assert_same(found, recorded(scene, model, tmp_path / "one", B, counts_only=counts_only))


def assert_same(found: moe_inspect.Trace, expected: moe_inspect.Trace) -> None:
    assert found.n_tokens == expected.n_tokens
    tables = ["documents", "counts"] if found.counts_only else ["documents", "tokens", "routing"]
    for table in tables:
        assert getattr(found, table)().equals(getattr(expected, table)())


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


def test_counts_are_written_after_as_many_steps_as_was_asked(model: Any, tmp_path: Path) -> None:
    """(while the recording goes on: test_record)"""
    how: dict[str, Any] = {"counts_only": True, "flush_steps": 4}
    found = recorded(steps(12), model, tmp_path / "t", **how)
    files = [shard.files for shard in found.shards]
    assert [(f.first_batch, f.last_batch) for f in files] == [(0, 3), (4, 7), (8, 11), (12, 12)]


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
def test_a_block_may_be_compiled_in_the_middle(
    B: int, counts_only: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The graph writes the choice by itself, when the pass is already being kept."""
    model = build("olmoe")

    def compiling(model: Any, recorder: Recorder, B: int) -> None:
        text = Text(model, B)
        text.step(5)
        model.model.layers[1].mlp.compile(backend="eager")
        monkeypatch.undo()  # `has_compiled` tells
        text.step(5)

    torch.compiler.reset()
    try:
        found = recorded(compiling, model, tmp_path / "compiled", B, counts_only=counts_only)
    finally:
        model.model.layers[1].mlp._compiled_call_impl = None
        torch.compiler.reset()
    assert_same(found, recorded(steps(10), model, tmp_path / "t", B, counts_only=counts_only))


@pytest.mark.parametrize("B", [1, 3])
def test_another_thread_may_ask_how_many_tokens(B: int, model: Any, tmp_path: Path) -> None:
    steps, numbers, over = 150, list[int](), threading.Event()

    def ask() -> None:
        while not over.wait(0.0005):
            numbers.append(recorder.tokens)

    with moe_inspect.record(model, tmp_path / "t") as recorder, torch.inference_mode():
        asking = threading.Thread(target=ask)
        asking.start()
        try:
            Text(model, B).step(steps)
        finally:
            over.set()
            asking.join()
        assert recorder.tokens == (5 + steps) * B
    assert len(set(numbers)) > 10
    assert numbers == sorted(numbers)
    tokens = moe_inspect.open_trace(tmp_path / "t").tokens()
    positions = tokens.groupby("document")["position"].apply(list).tolist()
    assert positions == [list(range(5 + steps))] * B


@pytest.mark.parametrize("where", ["read", "write"])
def test_a_signal_handler_may_ask_for_the_number_of_tokens(
    where: str, model: Any, put: Put, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """While a step is being read or written, on the same thread."""
    asked: list[int] = []
    owner, name = (arguments, "copies_of") if where == "read" else (Rings, "write")
    real = getattr(owner, name)

    def and_ask(*args: Any) -> Any:
        found = real(*args)
        asked.append(recorder.tokens)
        return found

    with moe_inspect.record(model, tmp_path / "t") as recorder, torch.inference_mode():
        text = Text(model, 1)
        text.step(3)
        put(owner, **{name: and_ask})
        text.step(3)
        monkeypatch.undo()
        text.step(3)
    assert len(asked) == 3
    found = moe_inspect.open_trace(tmp_path / "t")
    assert found.tokens()["position"].tolist() == list(range(14))
    expected = recorded(steps(9), model, tmp_path / "plain")
    assert found.routing().equals(expected.routing())


def test_an_interrupt_leaves_what_was_counted(model: Any, put: Put, tmp_path: Path) -> None:
    put(counted, MOST_WAITING=8)
    rows_of, called = PassInputs.rows, []

    def interrupted(self: PassInputs, fed: Any) -> Any:
        called.append(fed)
        if len(called) == 2 * 8 + 1:
            raise KeyboardInterrupt
        return rows_of(self, fed)

    put(PassInputs, rows=interrupted)
    recording = moe_inspect.record(model, tmp_path / "t", counts_only=True)
    with pytest.raises(KeyboardInterrupt), recording, torch.inference_mode():
        Text(model, 1).step(40)
    found = moe_inspect.open_trace(tmp_path / "t")
    assert found.status == "interrupted"
    assert found.n_tokens == 5 + 7 + 8  # the prompt and 7 steps, then 8 steps
