"""The ring: what comes out is what went in, at its position, whatever the sizes; nothing that is
still needed is overwritten, also where nobody on the host looks; what is dropped is counted, and
device, manifest and report agree."""

from __future__ import annotations

import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_inspect
from moe_inspect.capture.hook import attach, kernels, ring
from moe_inspect.capture.hook.inputs.pass_inputs import PassInputs
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.writer import TraceWriter
from tests.conftest import Put
from tests.support.families import build
from tests.support.sweep import WHOLE
from tests.support.zoo import token_batch

CPU = torch.device("cpu")


def decisions(start: int, T: int, K: int, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Decisions that tell their position."""
    position = torch.arange(start, start + T).unsqueeze(1)
    slot = torch.arange(K)
    return (position * 7 + slot) % experts, ((position % 97) / 128 + slot / 1024).float()


P, ROWS, TWO = 16, 40, [(2, 8), (5, 300)]  # of a page, of the ring; K and E of two routers


def made(module: ModuleType, of: list[tuple[int, int]], rows: int) -> Any:
    """Rings of routers on the CPU."""
    shape = module.PassShape([(CPU, K, E) for K, E in of], range(len(of)))
    return module.Rings(shape, torch.float16, rows, page_rows=P)


def follow(module: ModuleType, sizes: list[int], behind: int, drop: bool = False) -> None:
    """Writes passes of these sizes on two tapes, hands them over late, and compares."""
    held = made(module, TWO, ROWS)
    waiting: list[tuple[int, int, int]] = []
    lost = 0

    def hand_over() -> None:
        start, T, kept = waiting.pop(0)
        for r, (K, E) in enumerate(TWO):
            ids, weights = decisions(start, kept, K, E)
            assert held.rows("ids", r, start, kept).tolist() == ids.tolist()
            assert held.rows("weights", r, start, kept).tolist() == weights.half().tolist()
        held.release(start + T)

    for T in sizes:
        while len(waiting) > behind or (waiting and not drop and held.free_rows < T):
            hand_over()
        kept = min(T, max(0, held.free_rows))
        assert drop or kept == T
        for r, (K, E) in enumerate(TWO):
            kernels.record_torch(held.tapes[""][r], *decisions(held.head, T, K, E))
        waiting.append((held.head, T, kept))
        lost += T - kept
        held.end(T)
        assert held.read_cursors()[0].tolist() == [held.head] * 2
    while waiting:
        hand_over()
    assert held.dropped() == [lost] * 2


def follow_the_largest(module: ModuleType) -> None:
    """Forward passes as large as the ring says that it can hold, wherever in a page they begin."""
    fits = made(module, TWO, ROWS).max_rows
    assert fits >= ROWS
    for start in range(P):
        follow(module, [start, fits, fits], 0)


def test_the_largest_pass_that_fits_is_held_wherever_it_begins() -> None:
    follow_the_largest(ring)


@pytest.mark.parametrize("drop", [False, True])
@given(data=st.data())
@settings(max_examples=150 if WHOLE else 50, deadline=None)
def test_what_comes_out_is_what_went_in(drop: bool, data: st.DataObject) -> None:
    """With dropping, what is kept is right and the rest is counted."""
    sizes = data.draw(st.lists(st.integers(0, 90 if drop else 40), min_size=1, max_size=30))
    follow(ring, sizes, data.draw(st.integers(0, 5 if drop else 3)), drop=drop)


class LateStream:
    """Stands for a side stream: what it was given to copy, it copies when asked whether it has, one
    page a question; until then the device may write over it."""

    def __init__(self, device: torch.device, pages: int):
        self.waiting: list[tuple[int, Any]] = []
        self.pass_launched = self.synchronize = lambda: None

    def pinned(self, like: torch.Tensor) -> torch.Tensor:
        return torch.full_like(like, 77)

    def copy(self, page: int, pairs: Any) -> None:
        self.waiting.append((page, pairs))

    def is_copied(self, page: int, wait: bool) -> bool:
        while self.waiting and (wait or page != self.waiting[0][0]):
            for host, device in self.waiting.pop(0)[1]:
                host.copy_(device)
            if not wait:
                break
        return page not in [p for p, _ in self.waiting]


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ring.SIDE_STREAMS, "cpu", LateStream)


def test_a_router_that_saw_too_little_is_found_when_its_page_arrives(
    late: None, tmp_path: Path
) -> None:
    model = build("mixtral")
    rec = moe_inspect.record(model, tmp_path / "t")
    rec.__enter__()
    with torch.no_grad():
        model(**token_batch([5]))
        model.model.layers[1].mlp.forward = lambda hidden: hidden
        model(**token_batch([4]))
    said = r"layers\.1\.mlp\.experts routed 0 rows in a forward pass of 4"
    with pytest.raises(MoeInspectError, match=said):
        rec.__exit__(None)
    assert moe_inspect.open_trace(tmp_path / "t").n_tokens == 5


def test_a_ring_nobody_drains_keeps_its_first_rows() -> None:
    """As when a graph is replayed and replayed: the kernel stops at the limit by itself."""
    held = made(ring, [(2, 8)], 32)
    for n in range(10):
        kernels.record_torch(held.tapes[""][0], *decisions(n * 16, 16, 2, 8))
    kept = held.free_rows
    assert held.rows("ids", 0, 0, kept).tolist() == decisions(0, kept, 2, 8)[0].tolist()
    assert held.dropped() == [160 - kept]
    assert held.read_cursors()[0].tolist() == [160]


# --- in a recording


@pytest.fixture
def go_on(put: Put) -> threading.Event:
    """The writer stands still while it is not set."""
    take, go_on = TraceWriter._take, threading.Event()
    put(TraceWriter, _take=lambda self, batch: go_on.wait() and take(self, batch))
    return go_on


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ring.PAGE_ROWS, "cpu", 16)


# the ring grows; many passes on a page, and one on many
LENGTHS = [[9, 5], [30, 31, 2], [3], [64, 64], [17], *([n % 5 + 1, 3] for n in range(20)), [70, 3]]
BATCHES = [token_batch(of_rows, n) for n, of_rows in enumerate([*LENGTHS, [1]])]


def shard_of(path: Path, batches: list[Any], **options: Any) -> tuple[Any, Any]:
    """What is recorded of the batches, and the recorder."""
    model = build("olmoe")
    with moe_inspect.record(model, path, logits=True, **options) as rec, torch.no_grad():
        for batch in batches:
            model(**batch)
    return next(moe_inspect.open_trace(path).shards), rec


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Of each batch, what a recording of it alone holds."""
    folder = tmp_path_factory.mktemp("alone")
    return [shard_of(folder / str(n), [batch])[0] for n, batch in enumerate(BATCHES)]


@pytest.mark.parametrize("page_rows", [16, 4096])
@pytest.mark.parametrize(
    ("capture", "stream"), [("tap", None), ("dispatch", None), ("auto", LateStream)]
)
def test_pages_do_not_show_in_the_trace(
    capture: str, stream: Any, page_rows: int, alone: list[Any], monkeypatch: Any, tmp_path: Path
) -> None:
    """Neither how large they are, nor how late they leave."""
    monkeypatch.setitem(ring.PAGE_ROWS, "cpu", page_rows)
    if stream is not None:
        monkeypatch.setitem(ring.SIDE_STREAMS, "cpu", stream)
    whole, rec = shard_of(tmp_path / "t", BATCHES, capture=capture)
    assert rec.stacks[""].rings.synchronous == (stream is None)
    assert rec.tokens == sum(int(batch["attention_mask"].sum()) for batch in BATCHES)
    for r in range(2):
        for values in ("ids", "weights", "logits"):
            parts = [getattr(shard, values)(r) for shard in alone]
            assert (getattr(whole, values)(r) == np.concatenate(parts)).all()


def test_a_slow_writer_is_waited_for(
    go_on: threading.Event, small_pages: None, tmp_path: Path
) -> None:
    model, batch = build("olmoe"), token_batch([9, 5])
    threading.Timer(1, go_on.set).start()
    with moe_inspect.record(model, tmp_path / "t") as rec, torch.no_grad():
        for _ in range(20):
            model(**batch)
    trace = moe_inspect.open_trace(tmp_path / "t")
    assert rec.tokens == trace.n_tokens == 20 * 14
    assert trace.manifest["counts"] == {"tokens": 280, "decisions": 560, "dropped": 0}


def test_what_is_dropped_is_counted_everywhere(
    go_on: threading.Event, small_pages: None, tmp_path: Path
) -> None:
    model, batch = build("olmoe"), token_batch([9, 5])  # 14 tokens in 18 rows
    with moe_inspect.record(model, tmp_path / "t", drop=True) as rec, torch.no_grad():
        for n in range(40):
            model(**batch)
            if n == 30:  # until then the writer stands still
                go_on.set()
        on_device = rec.stacks[""].rings.dropped()
    trace = moe_inspect.open_trace(tmp_path / "t")
    tokens, dropped = trace.n_tokens, trace.manifest["counts"]["dropped"]
    assert 0 < tokens < 40 * 14
    assert tokens == rec.tokens
    assert tokens * 2 + dropped == 40 * 14 * 2  # two routers: every decision is there or counted
    assert on_device == [rec.stacks[""].dropped_rows] * 2
    assert rec.stacks[""].dropped_rows >= dropped / 2
    report = moe_inspect.report(trace)
    assert report.tables["summary"].set_index("key").value["dropped"] == str(dropped)
    assert f"{dropped:,} decisions were dropped while recording" in str(report.warning)
    load = report.tables["load"].groupby("router").assignments.sum()
    assert load.tolist() == [tokens * 4] * 2
    # what is there is right: each pass is a part of the same one
    whole = tmp_path / "whole"
    with moe_inspect.record(model, whole), torch.no_grad():
        model(**batch)
    one = moe_inspect.open_trace(whole).routing(layers=1).filter(like="expert_").to_numpy()
    found = trace.routing(layers=1).filter(like="expert_")
    for _, rows in found.groupby(trace.tokens().batch.to_numpy()):
        assert (rows.to_numpy() == one[: len(rows)]).all()


def test_a_step_that_cannot_be_is_refused(tmp_path: Path) -> None:
    """Before a forward pass; larger than the ring, with the size; of other inputs."""
    model, inputs = build("olmoe"), torch.zeros(2, 3, dtype=torch.long)
    with moe_inspect.record(model, tmp_path / "t", ring_tokens=5000) as rec, torch.no_grad():
        with pytest.raises(MoeInspectError, match=r"step\(\) needs a forward pass"):
            rec.step(4)
        model(**token_batch([9, 5]))
        fits = rec.stacks[""].rings.max_rows
        assert fits >= 5000
        said = rf"20,000 rows exceeds the room .* \({fits:,}\): .* ring_tokens=20000"
        with pytest.raises(MoeInspectError, match=said):
            rec.step(20000)
        with pytest.raises(MoeInspectError, match=r"step\(5\) with inputs of 6 rows"):
            rec.step(5, input_ids=inputs)
        model(**token_batch([9]))
    assert moe_inspect.open_trace(tmp_path / "t").n_tokens == 23


# --- graphs replayed by hand


def replayed(path: Path) -> tuple[Any, Any, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A recording, the replay of a CUDA graph of the model's forward, and the choices that it
    makes: what it launches runs again on the same tensors, and not a line of the model's Python."""
    model = build("olmoe")
    rec = moe_inspect.record(model, path)
    rec.__enter__()
    with torch.no_grad():
        model(**token_batch([4]))
    choices = [(torch.zeros(6, 4, dtype=torch.long), torch.zeros(6, 4)) for _ in range(2)]
    tapes = rec.stacks[""].rings.tapes[""]

    def replay() -> None:
        for tape, choice in zip(tapes, choices, strict=True):
            kernels.record_torch(tape, *choice)

    return rec, replay, choices


def test_replays_that_are_announced_are_recorded(small_pages: None, tmp_path: Path) -> None:
    rec, replay, choices = replayed(tmp_path / "t")
    for n in range(30):
        for ids, weights in choices:
            ids.copy_((torch.arange(24).reshape(6, 4) + n) % 8)
            weights.fill_(n / 64)
        rec.step(6, input_ids=torch.full((2, 3), n))
        replay()
    rec.__exit__(None)
    trace = moe_inspect.open_trace(tmp_path / "t")
    assert trace.n_tokens == 4 + 30 * 6
    table, tokens = trace.routing(layers=1).iloc[4:], trace.tokens().iloc[4:]
    assert (tokens.token_id.to_numpy() == np.repeat(np.arange(30), 6)).all()
    assert tokens.document.nunique() == 60
    assert (table.weight_2.to_numpy() == np.repeat(np.arange(30), 6) / 64).all()
    first = (np.arange(0, 24, 4) + np.arange(30)[:, None]) % 8
    assert (table.expert_0.to_numpy().reshape(30, 6) == first).all()


@pytest.mark.parametrize(
    ("pages", "announced", "replays", "said"),
    [
        ("small_pages", 6, 9, r"routed 54 rows .* of 6: .* a CUDA graph replayed without step\(\)"),
        ("late", 0, 1, "replayed without step|routed 6 rows in a forward pass of 0"),
    ],
)
def test_replays_nobody_announced_are_an_error_and_overwrite_nothing(
    pages: str, announced: int, replays: int, said: str, request: Any, tmp_path: Path
) -> None:
    request.getfixturevalue(pages)
    rec, replay, _ = replayed(tmp_path / "t")
    if announced:
        rec.step(announced)
    for _ in range(replays):
        replay()
    with pytest.raises(MoeInspectError, match=said):
        rec.__exit__(None)
    trace = moe_inspect.open_trace(tmp_path / "t")
    assert (trace.n_tokens, trace.status) == (4, "interrupted")


def test_replays_within_paused_are_not_recorded(tmp_path: Path) -> None:
    rec, replay, _ = replayed(tmp_path / "t")
    for _ in range(2):
        rec.step(6)
        replay()
        with rec.paused():
            with rec.paused():
                replay()
            replay()
    rec.__exit__(None)
    assert moe_inspect.open_trace(tmp_path / "t").n_tokens == 4 + 12


def test_capturing_a_graph_records_nothing(put: Put, tmp_path: Path) -> None:
    """While a stream captures, the host must not look at anything, and nothing has run."""
    model, batch = build("olmoe"), token_batch([4])
    capturing, launched = [False], list[Any]()
    put(attach, has_compiled=lambda: True)  # kernels write, as on a GPU
    captures = {"is_current_stream_capturing": lambda: capturing[0]}
    put(torch.cuda, is_available=lambda: True, **captures)
    with moe_inspect.record(model, tmp_path / "t") as rec, torch.no_grad():
        capturing[0] = True
        said = "before capturing a CUDA graph, record two forward passes"
        with pytest.raises(MoeInspectError, match=said):
            model(**batch)
        capturing[0] = False
        model(**batch)
        model(**batch)
        capturing[0] = True
        put(PassInputs, of_call=lambda *_: pytest.fail("looked at the inputs"))
        put(kernels, record_torch=lambda tape, *choice: launched.append(tape))
        model(**batch)
        assert launched == rec.stacks[""].rings.tapes[""]
        capturing[0] = False
    assert moe_inspect.open_trace(tmp_path / "t").n_tokens == 8


# --- what went wrong once


def test_dropping_survives_growth_and_failure(
    go_on: threading.Event, small_pages: None, tmp_path: Path
) -> None:
    """The device's count of dropped rows stays that of the host."""
    model = build("olmoe")
    with moe_inspect.record(model, tmp_path / "t", drop=True) as rec, torch.no_grad():
        for _ in range(20):
            model(**token_batch([9, 5]))
        assert rec.stacks[""].dropped_rows > 0
        go_on.set()
        model(**token_batch([90]))
        go_on.clear()
        for _ in range(20):
            model(**token_batch([9, 5]))
        block = model.model.layers[1].mlp
        kept, block.forward = block.forward, lambda hidden: 1 / 0
        with pytest.raises(ZeroDivisionError):
            model(**token_batch([9, 5]))
        block.forward = kept
        go_on.set()
        model(**token_batch([9, 5]))
    trace = moe_inspect.open_trace(tmp_path / "t")
    assert trace.status == "complete"
    assert trace.n_tokens * 2 + trace.manifest["counts"]["dropped"] == (41 * 14 + 90) * 2


def test_a_ring_that_32_bits_cannot_address_is_refused() -> None:
    said = (
        "a forward pass of 900,000 tokens with 24,576 recorded values each is too large to record: "
        r"pass at most [\d,]+ tokens per forward pass"
    )
    shape = ring.PassShape([(CPU, 8, 512)] * 48, range(48), ("logits",))
    with pytest.raises(MoeInspectError, match=said):
        ring.Rings(shape, torch.float16, rows=900_000)
