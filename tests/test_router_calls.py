"""Calls on a CPU, which are kept until their pass ends: whatever the model does with its tensors
meanwhile, and however passes are handed over, the trace is that of calls written one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moe_inspect
from moe_inspect.capture.hook import ring
from moe_inspect.capture.hook.ring import PassShape, Rings, by_site
from moe_inspect.capture.hook.stack import Stack
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.schema import PHASES
from moe_inspect.trace.writer import Document, RoutedBatch, TraceWriter
from tests.support.families import build
from tests.support.synthetic import a_pass, routers, write_passes
from tests.support.zoo import recorded, token_batch

LENGTHS = [[9, 5], [3], [1], [7, 7, 2], [1], [17]]
BATCHES = [token_batch(lengths, n) for n, lengths in enumerate(LENGTHS)]

pytestmark = pytest.mark.usefixtures("nothing_is_compiled")


@pytest.fixture(scope="module")
def model() -> Any:
    return build("olmoe")


def traced(model: Any, path: Path, **options: Any) -> moe_inspect.Trace:
    with torch.inference_mode():
        return recorded(model, path, *BATCHES, **options)


def same(a: moe_inspect.Trace, b: moe_inspect.Trace) -> bool:
    tables = [(trace.tokens(), trace.documents(), trace.routing()) for trace in (a, b)]
    return all(x.equals(y) for x, y in zip(*tables, strict=True))


@pytest.fixture(scope="module")
def expected(model: Any, tmp_path_factory: pytest.TempPathFactory) -> moe_inspect.Trace:
    """Written call by call, as kernels write them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rings, "write", lambda *_: False)
        return traced(model, tmp_path_factory.mktemp("expected") / "t")


@contextmanager
def replaced(model: Any, part: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """The `forward` of a part of each layer's block is `wrap` of it."""
    parts = [layer.mlp.get_submodule(part) for layer in model.model.layers]
    for module in parts:
        module.forward = wrap(module.forward)
    try:
        yield
    finally:
        for module in parts:
            del module.forward


def changing_in_place(from_call: int = 0) -> Any:
    """Experts that clear the choice they were called with, from a certain call on."""

    def wrap(forward: Any) -> Any:
        calls = itertools.count()

        def run(hidden: Any, ids: Any, weights: Any) -> Any:
            output = forward(hidden, ids, weights)
            if next(calls) >= from_call:
                ids.fill_(1)
                weights.zero_()
            return output

        return run

    return wrap


def reusing_buffers() -> Any:
    """Routers that all return the same tensors, call after call."""
    buffers: dict[Any, Any] = {}

    def buffered(n: int, value: torch.Tensor) -> torch.Tensor:
        return buffers.setdefault((n, value.shape), torch.empty_like(value)).copy_(value)

    return lambda forward: lambda *args: tuple(map(buffered, range(9), forward(*args)))


# part of each block → what it does with tensors
MISUSES = {"experts": changing_in_place, "gate": reusing_buffers}


@pytest.mark.parametrize("capture", ["tap", "dispatch", "counts_only"])
@pytest.mark.parametrize("part", MISUSES)
def test_what_the_model_does_with_its_tensors_does_not_show(
    part: str, capture: str, model: Any, expected: moe_inspect.Trace, tmp_path: Path
) -> None:
    options = {"counts_only": True} if capture == "counts_only" else {"capture": capture}
    with replaced(model, part, MISUSES[part]()):
        found = traced(model, tmp_path / "t", **options)
    if capture != "counts_only":
        assert same(found, expected)
        return
    loads = [moe_inspect.report(t).tables["load"].assignments.tolist() for t in (found, expected)]
    assert loads[0] == loads[1]


@pytest.mark.parametrize("part", MISUSES)
def test_keeping_references_would_show(
    part: str, model: Any, expected: moe_inspect.Trace, monkeypatch: Any, tmp_path: Path
) -> None:
    """Positive control: the same models, where nothing is copied."""
    never = property(lambda self: False, lambda self, value: None)
    monkeypatch.setattr(Stack, "copies", never, raising=False)
    assert same(traced(model, tmp_path / "plain"), expected)
    with replaced(model, part, MISUSES[part]()):
        assert not same(traced(model, tmp_path / "t"), expected)


def test_unknown_code_may_begin_at_any_time(expected: moe_inspect.Trace, tmp_path: Path) -> None:
    """What the first pass shows is not relied on there."""
    model = build("olmoe")
    own = type("OwnModel", (type(model),), {"__module__": "transformers_modules.own"})
    with replaced(model, "experts", changing_in_place(from_call=1)):
        assert not same(traced(model, tmp_path / "known"), expected)
        model.__class__ = own
        assert same(traced(model, tmp_path / "unknown"), expected)


def test_experts_called_in_parts(model: Any, expected: moe_inspect.Trace, tmp_path: Path) -> None:
    """A block that calls its experts with a few tokens at a time."""

    def in_parts(forward: Any) -> Any:
        def run(hidden: Any) -> Any:
            # the routers see rows in the order of the flattened batch
            parts = [forward(part) for row in hidden.split(1) for part in row.split(4, 1)]
            return torch.cat(parts, 1).view(hidden.shape)

        return run

    with replaced(model, "", in_parts):
        found = traced(model, tmp_path / "t")
    a, b = (t.routing().filter(like="expert_").to_numpy() for t in (found, expected))
    assert a.shape == b.shape
    # products of other shapes round otherwise
    assert (np.sort(a, 1) == np.sort(b, 1)).mean() > 0.97


CPU = torch.device("cpu")


def test_ids_of_no_expert_are_nowhere() -> None:
    """Sentinels of other ranks, and anything that a byte cannot hold."""
    ids = torch.tensor([[0, 7, 8, -1], [255, 256 + 3, -253, 2]])
    weights = torch.rand(2, 4)
    rings = Rings(PassShape([(CPU, 4, 8)] * 2, [0, 1]), torch.float16, 16)
    assert rings.write({"": [(0, (ids, weights)), (1, (ids, weights))]}, 2)
    for r in range(2):
        found = rings.rows("ids", r, 0, 2, None).tolist()
        assert found == [[0, 7, 255, 255], [255, 255, 255, 2]]
        assert (rings.rows("weights", r, 0, 2, None) == weights.half().numpy()).all()


@pytest.mark.parametrize("T", [1, 3])
def test_only_a_whole_pass_is_written(T: int) -> None:
    shape = PassShape([(CPU, 2, 8)] * 3, [0, 1, 1])  # the second site is called twice

    def found(*sizes: tuple[int, int], K: int = 2) -> Any:
        """The ids and weights of a pass of calls of these (site, rows); and its calls, by site."""
        calls = [(n, (torch.full((rows, K), n), torch.rand(rows, K))) for n, rows in sizes]
        return shape.whole({"": calls}, T), by_site(calls, 2)

    for sizes in (
        [(0, T), (1, T), (1, T)],
        [(1, T), (0, T), (1, T)],
        [(1, T), (0, T - 1), (1, T), (0, 1)],  # in parts
    ):
        [(ids, weights)], calls = found(*sizes)
        assert ids[..., 0].tolist() == [[0] * T, [1] * T, [1] * T]
        assert weights[0].equal(torch.cat([weights for _, weights in calls[0]]))
    for sizes in (
        [(0, T), (1, T)],
        [(0, T), (1, T), (1, T), (1, T)],
        [(0, T), (1, T), (1, T - 1)],
        [(0, T + 1), (1, T + 1), (1, T + 1)],
        [(0, T), (0, 1), (1, T), (1, T)],
    ):
        assert found(*sizes)[0] is None
    assert found((0, T), (1, T), (1, T), K=3)[0] is None


# --- handed over together


Hold = Callable[[float], None]
AFTER_ALL, AT_ONCE = 1e9, -1.0  # seconds


class Batches(list[RoutedBatch]):
    """The batches that the writer gets, but for the one of pass `stop`: Ctrl-C comes there."""

    stop: int | None = None


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Batches:
    found, write = Batches(), TraceWriter.write

    def noted(self: TraceWriter, batch: RoutedBatch) -> None:
        if batch.batch == found.stop:
            raise KeyboardInterrupt
        found.append(batch)
        write(self, batch)

    monkeypatch.setattr(TraceWriter, "write", noted)
    return found


def generated(model: Any, path: Path, steps: int = 30) -> moe_inspect.Trace:
    with moe_inspect.record(model, path), torch.no_grad():
        for _ in range(2):
            output = model(**token_batch([6, 6]))
            for n in range(steps):
                ids = torch.full((2, 1), n)
                output = model(input_ids=ids, past_key_values=output.past_key_values)
    return moe_inspect.open_trace(path)


def test_steps_come_together(model: Any, hold: Hold, batches: Batches, tmp_path: Path) -> None:
    hold(AFTER_ALL)
    found = generated(model, tmp_path / "t")
    phases = [set(b.phases) for b in batches]
    assert phases == [{PHASES.index("prefill")}, {PHASES.index("decode")}] * 2
    assert [(b.first_batch, b.batch) for b in batches] == [(0, 0), (1, 30), (31, 31), (32, 61)]
    hold(AT_ONCE)
    batches.clear()
    assert same(found, generated(model, tmp_path / "one"))
    assert [b.batch for b in batches] == list(range(62))
    tokens = found.tokens()
    assert tokens.groupby("batch").size().tolist() == ([12] + [2] * 30) * 2
    assert tokens.groupby("document").position.apply(list).tolist() == [list(range(36))] * 4


def test_a_page_that_is_full_is_handed_over(
    model: Any, hold: Hold, batches: Batches, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hold(AFTER_ALL)
    monkeypatch.setitem(ring.PAGE_ROWS, "cpu", 32)
    found = generated(model, tmp_path / "t")
    assert 2 + 2 * (60 + 60) / 64 < len(batches) < 30
    hold(AT_ONCE)
    assert same(found, generated(model, tmp_path / "one"))


def test_ctrl_c_leaves_no_gap(model: Any, hold: Hold, batches: Batches, tmp_path: Path) -> None:
    """Nor is anything after it. Passes 1 and 2, the next one with a cache, are one batch."""
    hold(AT_ONCE)
    batches.stop = 2
    recording = moe_inspect.record(model, tmp_path / "t")
    with pytest.raises(KeyboardInterrupt), recording, torch.no_grad():  # noqa: PT012
        model(**BATCHES[0])
        model(**BATCHES[1])
        with pytest.raises(KeyboardInterrupt):
            model(**BATCHES[2])
        with pytest.raises(MoeInspectError, match="could not be handed over"):
            model(**BATCHES[3])
        raise KeyboardInterrupt
    assert moe_inspect.open_trace(tmp_path / "t").tokens().batch.unique().tolist() == [0]


def test_shards_end_where_they_would_pass_by_pass(tmp_path: Path) -> None:
    """A batch of many passes is taken apart where a shard is full."""
    rng = np.random.default_rng(0)

    def of(numbers: range, decoding: bool) -> RoutedBatch:
        """Three rows per pass, of the same sequences or of new ones."""
        passes = len(numbers)
        row_T = np.arange(3 * numbers[0], 3 * numbers[0] + 3 * passes, dtype=np.int32)
        document_T = np.resize(row_T[:3], 3 * passes) if decoding else row_T
        new = np.unique(document_T).tolist()
        return a_pass(
            numbers[-1],
            [rng.integers(0, 8, (3 * passes, 2)).astype(np.uint8)],
            token_id=row_T,
            document=document_T,
            position=np.repeat(np.arange(passes, dtype=np.int32), 3) * decoding,
            weights=[rng.random((3 * passes, 2)).astype(np.float16)],
            documents=[Document(d, "text", "", passes if decoding else 1) for d in new],
            batches=np.repeat(np.array(numbers, np.int32), 3),
        )

    together = [of(range(10), False), of(range(10, 14), True), of(range(14, 40), False)]
    apart = [part for batch in together for part in batch.passes()]
    listed, how = routers(1, 8, 2), {"weights": True, "shard_tokens": 20}
    whole = write_passes(tmp_path / "together", listed, together, **how)
    other = write_passes(tmp_path / "apart", listed, apart, **how)
    assert same(whole, other)
    assert whole.tokens().batch.tolist() == np.repeat(np.arange(40), 3).tolist()
    assert whole.documents().document.tolist() == sorted(whole.documents().document)
    sizes = [len(shard.tokens()) for shard in whole.shards]
    assert sizes == [len(shard.tokens()) for shard in other.shards]
    assert len(sizes) > 3
