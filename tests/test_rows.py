"""The rows of a pass: what comes out is what went in, whatever the sizes; nothing that is still
needed is overwritten; what is dropped is counted, and manifest and report agree. And what is handed
over to the writer."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_inspect
from moe_inspect.capture import hand_over, rows
from moe_inspect.capture.hook import kernels
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.writer import Document, RoutedBatch, TraceWriter
from tests.conftest import Put
from tests.support.families import build
from tests.support.streams import LateStream
from tests.support.sweep import WHOLE
from tests.support.synthetic import a_pass, routers, write_passes
from tests.support.witness import agreed, traced, witnessed
from tests.support.zoo import token_batch

CPU = torch.device("cpu")
TWO = [(2, 8), (5, 300)]  # K and E of two routers
pytestmark = pytest.mark.usefixtures("nothing_is_compiled")


def decisions(start: int, T: int, K: int, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Decisions that tell their position."""
    position = torch.arange(start, start + T).unsqueeze(1)
    slot = torch.arange(K)
    return (position * 7 + slot) % experts, ((position % 97) / 128 + slot / 1024).float()


def made(of: list[tuple[int, int]], kinds: tuple[str, ...] = ("",)) -> rows.RouterRows:
    """Rows of routers on the CPU."""
    shown = [rows.ShownRouter(CPU, K, E, E) for K, E in of]
    return rows.RouterRows(shown, range(len(of)), kinds, torch.float16)


@pytest.mark.parametrize("late", [False, True])
@given(sizes=st.lists(st.integers(0, 90), min_size=1, max_size=30), behind=st.integers(0, 5))
@settings(max_examples=150 if WHOLE else 50, deadline=None)
def test_what_comes_out_is_what_went_in(late: bool, sizes: list[int], behind: int) -> None:
    """Passes are read late, also where the buffers have grown meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "LEAST_ROWS", 16)
        if late:
            patch.setitem(rows.SIDE_STREAMS, "cpu", LateStream)
        held, waiting, first = made(TWO), list[tuple[int, int, rows.TakenPass]](), 0

        def read() -> None:
            start, T, taken = waiting.pop(0)
            assert taken.has_arrived(wait=True)
            assert taken.cursors is not None
            assert [cursor.tolist() for cursor in taken.cursors] == [[T] * 2]
            both = zip(
                *(rows.stored_values([taken], name, None) for name in ("ids", "weights")),
                TWO,
                strict=True,
            )
            for of_ids, of_weights, (K, E) in both:
                ids, weights = decisions(start, T, K, E)
                assert of_ids.tolist() == ids.tolist()
                assert of_weights.tolist() == weights.half().tolist()

        for T in sizes:
            held.grow(T)
            for tape, (K, E) in zip(held.tapes[""], TWO, strict=True):
                kernels.record_torch(tape, *decisions(first, T, K, E))
            waiting.append((first, T, held.take(T)))
            first += T
            while len(waiting) > behind:
                read()
        while waiting:
            read()


def test_buffers_that_nobody_reads_keep_their_first_rows() -> None:
    """As when a graph is replayed and replayed: the kernel stops at the limit by itself."""
    held = made([(2, 8)])
    held.grow(2_048)
    for n in range(10):
        kernels.record_torch(held.tapes[""][0], *decisions(n * 1_024, 1_024, 2, 8))
    assert held.seen() == {"": [10_240]}
    (found,) = rows.stored_values([held.take(2_048)], "ids", None)
    assert found.tolist() == decisions(0, 2_048, 2, 8)[0].tolist()
    assert held.seen() == {"": [0]}


def test_a_pass_that_32_bits_cannot_address_is_refused() -> None:
    for R, E, most in ((48, 512, 65_536), (64, 256, 65_536)):
        said = f"of 900,000 tokens with {R * E:,} recorded values each is too large .* {most:,} "
        with pytest.raises(MoeInspectError, match=said):
            made([(8, E)] * R, ("", "logits")).grow(900_000)


# --- in a recording


def hold(monkeypatch: pytest.MonkeyPatch, number: int, late: bool = False) -> None:
    """So many rows wait for others; and whether they leave the device late, as on a GPU."""
    monkeypatch.setattr(hand_over, "HELD_ROWS", number)
    if late:
        monkeypatch.setitem(rows.SIDE_STREAMS, "cpu", LateStream)
        # what a GPU's routers return is not on the host
        monkeypatch.setattr(rows.RouterRows, "whole", lambda *_: pytest.fail("it is read"))


@pytest.fixture
def go_on(put: Put) -> threading.Event:
    """The writer stands still while it is not set."""
    take, go_on = TraceWriter._take, threading.Event()
    put(TraceWriter, _take=lambda self, batch: go_on.wait() and take(self, batch))
    return go_on


# buffers grow; many passes in a batch, and one in many
LENGTHS = [[9, 5], [30, 31, 2], [3], [64, 64], [17], *([n % 5 + 1, 3] for n in range(20)), [70, 3]]


@pytest.mark.parametrize("held", [16, 4096])
@pytest.mark.parametrize(("capture", "late"), [("tap", False), ("dispatch", False), ("auto", True)])
def test_how_passes_are_handed_over_does_not_show_in_the_trace(
    capture: str, late: bool, held: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither how many together, nor how late."""
    hold(monkeypatch, held, late)
    model = build("olmoe")
    with traced(model, tmp_path / "t", logits=True, capture=capture) as seen, torch.no_grad():
        for n, lengths in enumerate([*LENGTHS, [1]]):
            model(**token_batch(lengths, n))
    agreed(tmp_path / "t", seen)


def test_a_slow_writer_is_waited_for(
    go_on: threading.Event, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The model waits, in a thread, until the writer goes on: nothing is dropped."""
    hold(monkeypatch, 16)
    model, done = build("olmoe"), list[int]()

    @torch.no_grad()
    def run() -> None:
        for n in range(20):
            model(**token_batch([9, 5]))
            done.append(n)

    with traced(model, tmp_path / "t") as seen:
        running = threading.Thread(target=run)
        running.start()
        running.join(0.5)
        assert running.is_alive()
        assert len(done) < 20
        go_on.set()
        running.join()
    agreed(tmp_path / "t", seen)
    counts = moe_inspect.open_trace(tmp_path / "t").manifest["counts"]
    assert counts == {"tokens": 280, "decisions": 560, "dropped": 0}


@pytest.mark.parametrize("late", [False, True])
def test_what_is_dropped_is_counted_everywhere(
    late: bool, go_on: threading.Event, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also when the passes have grown and one has failed meanwhile: what is there is whole."""
    hold(monkeypatch, 16, late)
    model, batch, ends = build("olmoe"), token_batch([9, 5]), [0]
    with (
        moe_inspect.record(model, tmp_path / "t", drop=True) as rec,
        witnessed(model) as seen,
        torch.no_grad(),
    ):

        def run(batch: Any) -> None:
            model(**batch)
            ends.append(len(seen.ids))

        for _ in range(30):  # the writer stands still
            run(batch)
        go_on.set()
        run(token_batch([90]))
        go_on.clear()
        for _ in range(20):
            run(batch)
        with (
            model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0),
            pytest.raises(ZeroDivisionError),
        ):
            model(**batch)
        go_on.set()
        run(batch)
    trace = moe_inspect.open_trace(tmp_path / "t")
    tokens, dropped = trace.n_tokens, trace.manifest["counts"]["dropped"]
    assert trace.status == "complete"
    assert 0 < tokens == rec.tokens
    assert dropped > 0
    # a document whose first pass is dropped may go on
    assert trace.documents()["document"].tolist() == [*range(2 * 51 + 1)]
    # two routers: every decision is there or counted
    assert tokens * 2 + dropped == len(seen.ids) * 2 == (51 * 14 + 90) * 2
    report = moe_inspect.report(trace)
    assert report.tables["summary"].set_index("key").value["dropped"] == str(dropped)
    assert f"{dropped:,} decisions were dropped while recording" in str(report.warning)
    load = report.tables["load"].groupby("router").assignments.sum()
    assert load.tolist() == [tokens * 4] * 2
    for layer in (0, 1):
        found = trace.routing(layers=layer).filter(like="expert_")
        for number, of_pass in found.groupby(trace.tokens().batch.to_numpy()):
            whole = seen.routes(layer)[0][ends[number] : ends[number + 1]]
            assert (np.sort(of_pass, 1) == np.sort(whole, 1)).all()


def test_a_shard_may_begin_with_dropped_passes(
    go_on: threading.Event, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Several together, between steps of decoding whose shards are due at once."""
    hold(monkeypatch, 4)
    model, go = build("olmoe"), {"use_cache": True}
    recording = moe_inspect.record(model, tmp_path / "t", drop=True, commit_every=1e-9)
    with recording as rec, torch.no_grad():
        out = model(torch.zeros(2, 4, dtype=torch.long), **go)
        for n in range(40):
            go_on.clear() if n % 20 == 2 else None
            go_on.set() if n % 20 == 15 else None
            token = torch.full((2, 1), n % 9)
            out = model(token, past_key_values=out.past_key_values, **go)
    trace = moe_inspect.open_trace(tmp_path / "t")
    counts = trace.manifest["counts"]
    assert trace.status == "complete"
    assert counts["dropped"] > 0
    assert counts["decisions"] + counts["dropped"] == (8 + 80) * 2
    assert rec.tokens == trace.n_tokens


def test_a_step_that_cannot_be_is_refused(tmp_path: Path) -> None:
    """Before a forward pass; larger than the room there is, with the size; of other inputs."""
    model, inputs = build("olmoe"), torch.zeros(2, 3, dtype=torch.long)
    with moe_inspect.record(model, tmp_path / "t", ring_tokens=5000) as rec, torch.no_grad():
        with pytest.raises(MoeInspectError, match=r"step\(\) needs a forward pass"):
            rec.step(4)
        model(**token_batch([9, 5]))
        said = r"20,000 rows exceeds the room .* \(5,000\): .* ring_tokens=20000"
        with pytest.raises(MoeInspectError, match=said):
            rec.step(20000)
        with pytest.raises(MoeInspectError, match=r"step\(5\) with inputs of 6 rows"):
            rec.step(5, input_ids=inputs)
        model(**token_batch([9]))
    assert moe_inspect.open_trace(tmp_path / "t").n_tokens == 23


def test_a_router_that_saw_too_little_is_found_when_its_rows_arrive(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hold(monkeypatch, 4096, late=True)
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
    rec.stacks[""].grow(6)
    tapes = rec.stacks[""].rows.tapes[""]

    def replay() -> None:
        for tape, choice in zip(tapes, choices, strict=True):
            kernels.record_torch(tape, *choice)

    return rec, replay, choices


def test_replays_that_are_announced_are_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And those within `paused` are not."""
    hold(monkeypatch, 16)
    rec, replay, choices = replayed(tmp_path / "t")
    for n in range(30):
        for ids, weights in choices:
            ids.copy_((torch.arange(24).reshape(6, 4) + n) % 8)
            weights.fill_(n / 64)
        rec.step(6, input_ids=torch.full((2, 3), n))
        replay()
        if n % 10 == 5:
            with rec.paused():
                with rec.paused():
                    replay()
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
    ("late", "announced", "replays", "said"),
    [
        (False, 6, 9, r"routed 54 rows .* of 6: .* a CUDA graph replayed without step\(\)"),
        (True, 0, 1, "replayed without step|routed 6 rows in a forward pass of 0"),
    ],
)
def test_replays_nobody_announced_are_an_error_and_overwrite_nothing(
    late: bool, announced: int, replays: int, said: str, monkeypatch: Any, tmp_path: Path
) -> None:
    hold(monkeypatch, 4096 if late else 16, late)
    rec, replay, _ = replayed(tmp_path / "t")
    if announced:
        rec.step(announced)
    for _ in range(replays):
        replay()
    with pytest.raises(MoeInspectError, match=said):
        rec.__exit__(None)
    trace = moe_inspect.open_trace(tmp_path / "t")
    assert (trace.n_tokens, trace.status) == (4, "interrupted")


def test_capturing_a_graph_records_nothing(put: Put, tmp_path: Path) -> None:
    """While a stream captures, the host must not look at anything, and nothing has run."""
    model, batch, capturing = build("olmoe"), token_batch([4]), [False]
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))  # tapes are used, as on a GPU
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
        model(**batch)
        assert rec.stacks[""].rows.seen() == {"": [4, 4]}, "the kernels are launched"
        rec.stacks[""].rows.rewind()  # (in a graph, which does not run now)
        capturing[0] = False
        model(**batch)
    batches = moe_inspect.open_trace(tmp_path / "t").tokens().batch.tolist()
    assert batches == np.repeat(range(3), 4).tolist()


# --- to the writer


def test_an_interrupt_between_ring_and_writer_leaves_no_gap(put: Put, tmp_path: Path) -> None:
    """Nor is anything after it."""
    model, write = build("olmoe"), TraceWriter.write

    def interrupted(self: TraceWriter, batch: RoutedBatch) -> None:
        if batch.batch == 2:
            raise KeyboardInterrupt
        write(self, batch)

    put(TraceWriter, write=interrupted)
    recording = moe_inspect.record(model, tmp_path / "t", commit_every=1e-9)  # handed over at once
    with pytest.raises(KeyboardInterrupt), recording, torch.no_grad():  # noqa: PT012
        model(**token_batch([9, 5]))
        model(**token_batch([3]))
        with pytest.raises(KeyboardInterrupt):
            model(**token_batch([1]))
        with pytest.raises(MoeInspectError, match="could not be handed over"):
            model(**token_batch([7, 2]))
        raise KeyboardInterrupt
    assert moe_inspect.open_trace(tmp_path / "t").tokens().batch.unique().tolist() == [0]


def test_shards_end_where_they_would_pass_by_pass(tmp_path: Path) -> None:
    """A batch of many passes is taken apart where a shard is full."""
    rng = np.random.default_rng(0)

    def of(numbers: range, decoding: bool) -> RoutedBatch:
        """Three rows per pass, of the same sequences or of new ones."""
        T = 3 * len(numbers)
        row_T = np.arange(3 * numbers[0], 3 * numbers[0] + T, dtype=np.int32)
        document_T = np.resize(row_T[:3], T) if decoding else row_T
        tokens = len(numbers) if decoding else 1
        return a_pass(
            numbers[-1],
            [rng.integers(0, 8, (T, 2)).astype(np.uint8)],
            token_id=row_T,
            document=document_T,
            position=np.repeat(np.arange(len(numbers), dtype=np.int32), 3) * decoding,
            documents=[Document(d, "text", "", tokens) for d in np.unique(document_T).tolist()],
            batches=np.repeat(np.array(numbers, np.int32), 3),
        )

    together = [of(range(10), False), of(range(10, 14), True), of(range(14, 40), False)]
    apart = [part for batch in together for part in batch.passes()]
    whole, other = (
        write_passes(tmp_path / name, routers(1, 8, 2), batches, shard_tokens=20)
        for name, batches in (("together", together), ("apart", apart))
    )
    for table in ("tokens", "documents", "routing"):
        assert getattr(whole, table)().equals(getattr(other, table)())
    assert whole.tokens().batch.tolist() == np.repeat(np.arange(40), 3).tolist()
    assert whole.documents().document.tolist() == sorted(whole.documents().document)
    sizes, sizes_apart = ([len(s.tokens()) for s in trace.shards] for trace in (whole, other))
    assert sizes == sizes_apart
    assert len(sizes) > 3
