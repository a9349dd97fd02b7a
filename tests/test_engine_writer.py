"""The process that writes what an engine routes, and its traces, one after the other: through
faults that happen, in stand-ins for engines (tests/support/engines)."""

from __future__ import annotations

import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from multiprocessing import Pipe, get_context
from pathlib import Path
from typing import Any

import pytest

from moe_inspect import MoeInspectError, Trace, open_trace
from moe_inspect.capture.engine import sidecar
from moe_inspect.capture.engine.described import describe
from moe_inspect.capture.engine.sidecar import Traces
from moe_inspect.trace.output_dir import stored_bytes
from moe_inspect.watch.follow import Follower
from moe_inspect.watch.state import WatchOptions, WatchSession
from tests.conftest import ROOT
from tests.support.damage import disk_of
from tests.support.engines import Sglang, Vllm, VllmV2, check, fine, metrics_in, recorded, span
from tests.support.sweep import sample
from tests.support.watched import waited

L, K = 4, 2


def traces(folder: Path) -> list[Trace]:
    """Those that have begun, in order."""
    paths = sorted(folder.glob("*/trace.json")) if folder.exists() else []
    return [open_trace(path.parent) for path in paths]


def has(folder: Path, tokens: int, status: str = "", n: int = 1) -> Callable[[], Trace | None]:
    """The n-th trace, when it has so many tokens and the status."""

    def found() -> Trace | None:
        trace = traces(folder)[n - 1] if len(traces(folder)) >= n else None
        right = trace and trace.n_tokens >= tokens and status in ("", trace.status)
        return trace if right else None

    return found


# --- one after the other


def test_a_trace_that_is_large_is_followed_by_the_next_and_the_oldest_deleted(
    start: Callable[..., Any], tmp_path: Path
) -> None:
    """Requests that go on are documents of the next one too."""
    engine = start(MAX_GB=1e-6, KEEP=2)
    for n in range(5):
        engine.step(span("a", 10 * n, 10 * n + 10), span(f"b{n}", 0, 5))
        engine.recorder.link.take()
    paths = engine.recorder.link.write(always_next=True)
    assert len(paths) == 5
    assert sorted((tmp_path / "runs").iterdir()) == paths[-2:]
    rows = engine.rows
    for n, path in enumerate(paths[-2:], 3):
        fine(path)
        engine.rows = [row for row in rows if row["batch"] == n + 1]
        check(recorded(path), engine.expected())
    assert open_trace(paths[3]).manifest["capture"]["followed_by"] == paths[4].name


def test_what_is_dropped_behind_the_last_trace_is_in_the_next(start: Callable[..., Any]) -> None:
    engine = start(MAX_GB=1e-6, QUEUE_MB=0.005)
    engine.step(span("a", 0, 10))
    engine.recorder.link.take()
    engine.step(span("a", 10, 60))
    first, last = map(fine, engine.recorder.link.write(always_next=True))
    dropped = [trace.manifest["counts"]["dropped"] for trace in (first, last)]
    assert (dropped, last.n_tokens) == ([0, 50 * L], 0)


def one_by_one(engine: Any) -> Iterator[Traces]:
    """Writes three traces, each when it is asked for."""
    written = Traces(engine.recorder.link.about, describe)
    for n in range(3):
        engine.step(span("a", 10 * n, 10 * n + 10))
        engine.recorder.link.take()
        steps, arrays, _ = engine.recorder.link.handed[-1]
        written.looked_s -= 1000  # and so it is as large as MAX_GB
        written.write(steps, arrays, 5 * n)
        written.catch_up(wait=True)
        yield written


def test_bytes_written_are_those_of_all_traces(start: Callable[..., Any]) -> None:
    writes = one_by_one(start(MAX_GB=1e-6))
    first = next(writes)
    first.most_bytes = 1e9  # the second one goes on
    assert len([*writes]) == len(first.paths) == 2
    assert first.written_bytes == sum(map(stored_bytes, first.paths)) > 0


@pytest.mark.parametrize("by", ["trace", "directory"])
def test_watch_goes_on_with_the_trace_that_follows(
    by: str, start: Callable[..., Any], tmp_path: Path
) -> None:
    """Also while there is none yet, as long as the process that writes is there."""
    engine, (here, there) = start(MAX_GB=1e-6), Pipe()

    def writes() -> None:
        for written in one_by_one(engine):
            there.send(written.paths[0])
            there.recv()

    writer = get_context("fork").Process(target=writes, daemon=True)
    writer.start()
    assert here.poll(60)
    first = here.recv()
    session = WatchSession(first if by == "trace" else tmp_path / "runs", WatchOptions())
    for n in range(3):
        for _ in range(3):
            session.update()
        assert (session.watched.tokens, session.watched.status) == (10 * n + 10, "recording")
        assert session.watched.dropped == 5 * n  # of all of them
        if n < 2:
            here.send("next")
            assert here.poll(60)
            here.recv()
    assert Path(session.path).name.endswith("-0003")
    assert not session.is_over
    writer.kill()
    writer.join()
    session.update()
    assert session.is_over
    assert session.watched.status == "complete"


def test_watch_of_a_copy_ends_though_its_successor_is_elsewhere(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a trace that another host wrote, unless it was seen while it was written."""
    written = one_by_one(start())
    path = next(written).paths[0]
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    live = Follower(path)
    assert live.poll().status == "recording"
    of = next(written)
    of.most_bytes = 0
    next(written)
    assert [live.poll().status for _ in range(3)] == ["recording"] * 3
    session = WatchSession(path, WatchOptions())
    for _ in range(3):
        session.update()
    assert session.is_over
    assert (session.watched.tokens, session.watched.status) == (30, "complete")


def test_what_the_last_commit_could_not_write_was_dropped(start: Callable[..., Any]) -> None:
    engine = start(TEXT=0)
    for n in range(40):
        engine.step(span("a", 60 * n, 60 * n + 60))
    engine.recorder.link.take()
    written = Traces(engine.recorder.link.about, describe)
    written.write(*engine.recorder.link.handed[0])
    written.catch_up(wait=True)
    with disk_of(20_000), pytest.raises(MoeInspectError, match="File too large"):
        written.close("complete")
    counts = open_trace(written.paths[0]).manifest["counts"]
    assert counts == {"tokens": 0, "decisions": 0, "dropped": 2400 * L}


# --- the process


def test_the_process_that_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It imports neither torch nor tokenizers, knows the model, and writes what the schedule
    computed, with its replicas; the counts in /metrics are those of all rows. When it is killed its
    trace stays, its gauges go, the engine serves on, and `on` begins another trace, which counts
    and drops from there on."""
    folder, runs = tmp_path / "prometheus", tmp_path / "runs"
    folder.mkdir()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(folder))
    how: dict[str, Any] = {"replicas": 2, "drafts": 2, "placement": "linear", "T": 20_000}
    engine = Vllm(monkeypatch, tmp_path, METRICS=1, QUEUE_MB=0.5, **how)
    engine.step(span("too large", 0, 19_000))
    assert engine.recorder.queue.dropped == 19_000 * L
    engine.rows = []
    window = "moe_inspect_window_tokens", "0"

    def served(name: str, n: int) -> Trace:
        for seed in range(3):
            engine.map_LP = engine.spread(2)
            engine.serve(2, seed=seed, name=f"{name}{seed}-")
            waited(lambda: engine.command("status")["queued_bytes"] == 0)
        assert engine.recorder.queue.dropped == 19_000 * L * n
        return waited(has(runs, len(engine.rows), n=n))

    first = served("a", 1)
    pid = first.manifest["capture"]["pid"]
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert pid != os.getpid()
    assert "arrow" in maps
    assert not re.search("libtorch|tokenizers", maps)
    tokens = "moe_inspect_tokens_total", "0"
    waited(lambda: metrics_in(folder).get(tokens) == engine.load_LE.sum() / (L * K))
    assert window in metrics_in(folder)
    # the engine knows what is committed, rejected drafts among it
    made = engine.recorder.queue.decisions
    assert made > len(engine.rows) * L
    waited(lambda: engine.recorder.link._told.get("committed") == made)
    os.kill(pid, signal.SIGKILL)
    waited(lambda: engine.recorder.link.error)
    assert window not in metrics_in(folder)
    engine.on = False
    engine.step(span("unseen", 0, 3))
    state = engine.command("status")
    assert not state["on"]
    assert state["error"].startswith("the process that writes has ended")
    assert (state["decisions"], state["dropped"]) == (made, 19_000 * L)
    check(recorded(Path(first.path)), engine.expected())
    assert fine(Path(first.path), "interrupted").manifest["model"]["class"] == "MixtralForCausalLM"
    assert engine.command("on")["on"]
    engine.rows = []
    engine.step(span("too large", 0, 19_000))
    engine.rows = []
    second = served("b", 2)
    session = WatchSession(runs, WatchOptions())
    session.update()
    assert not session.is_over
    engine.close()
    waited(has(runs, len(engine.rows), "complete", 2))
    check(recorded(Path(second.path)), engine.expected())
    assert fine(Path(second.path)).manifest["counts"]["dropped"] == 19_000 * L
    counted = metrics_in(folder)
    assert counted[tokens] * L * K == engine.load_LE.sum()
    layers = [v for (name, *_), v in counted.items() if name == "moe_inspect_assignments_total"]
    assert layers == engine.load_LE.sum(1).tolist()
    gpus = [v for (name, *_), v in counted.items() if name == "moe_inspect_gpu_assignments_total"]
    assert sum(gpus) == pytest.approx(engine.load_LE.sum())
    waited(lambda: session.update() or session.is_over)


def test_of_an_engine_that_only_counts_the_gauges_go_with_the_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    window = "moe_inspect_window_tokens"
    engine = Sglang(monkeypatch, tmp_path, TRACE=None, METRICS=1)
    engine.step(span("a", 0, 10))
    waited(lambda: metrics_in(tmp_path).get((window, "0")) == 10)
    (gauges,) = tmp_path.glob("gauge_*")
    os.kill(int(gauges.stem.rpartition("_")[2]), signal.SIGKILL)
    waited(lambda: engine.recorder.link.error)
    found = metrics_in(tmp_path)
    assert (window, "0") not in found
    assert found["moe_inspect_tokens_total", "0"] == 10


def test_a_writer_that_cannot_be_started_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    engine = Vllm(monkeypatch, tmp_path)
    waited(lambda: engine.recorder.link.error)
    engine.step(span("a", 0, 10))
    state = engine.command("status")
    assert (state["on"], state["decisions"]) == (False, 0)
    assert "recording has failed: FileNotFoundError" in state["error"]


FAULTS = {
    "a full disk": "cannot write {runs}: File too large",
    "a disk that becomes full": "cannot write {runs}: File too large",
    "a directory that is gone": "cannot write {runs}: No such file or directory",
}


@pytest.mark.parametrize("fault", sample(FAULTS, 3))
def test_a_fault_of_the_writer_ends_the_recording_and_is_told(
    fault: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Though nothing follows the step that it fails at. What was committed is a trace, and the rest
    is counted as dropped."""
    runs = tmp_path / "runs"
    with ExitStack() as stack:
        if "disk" in fault:
            stack.enter_context(disk_of(1500 if fault == "a full disk" else 9000))
        engine = VllmV2(monkeypatch, tmp_path, TEXT=0)
        stack.callback(engine.close)
        engine.step(span("a", 0, 10))
        committed = 0 if fault == "a full disk" else 10
        waited(has(runs, committed)) if committed else None
        made = 10
        if fault == "a directory that is gone":
            runs.rename(tmp_path / "elsewhere")
        for n in range(30 * bool(committed)):
            with suppress(IndexError):  # of the stand-in's own bookkeeping
                engine.step(span(f"b{n}", 0, 60))
            made += 60
        waited(lambda: engine.recorder.link.error)
        state = engine.command("status")
    said = FAULTS[fault].format(runs=runs)
    assert state["error"].startswith(said)
    assert not state["on"]
    assert state["decisions"] == committed * L
    assert state["dropped"] + state["decisions"] <= made * L
    assert state["error"] in caplog.text
    if "File" in said:
        assert f"moe-inspect: {said}\n" in capfd.readouterr().err
    if "gone" not in fault and committed:
        waited(has(runs, 10, "interrupted"))
        trace = fine(traces(runs)[0].path, "interrupted")
        assert trace.n_tokens == 10


WORKER = """
import sys
from pathlib import Path
import pytest
from tests.support.engines import Vllm, span
with pytest.MonkeyPatch.context() as patch:
    engine = Vllm(patch, Path(sys.argv[1]))
    engine.step(span("a", 0, 10))
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_a_worker_that_is_killed_leaves_a_trace_that_is_closed(tmp_path: Path) -> None:
    """At once: what it had handed over is there."""
    run = [sys.executable, "-c", WORKER, str(tmp_path)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(run, text=True, cwd=ROOT, **pipes) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        waited(lambda: traces(tmp_path / "runs"))
        worker.kill()
    waited(has(tmp_path / "runs", 10, "interrupted"))
    assert fine(traces(tmp_path / "runs")[0].path, "interrupted").n_tokens == 10


def test_what_a_worker_sent_before_it_ended_is_read() -> None:
    """Though another process has its end of the pipe, and so nobody says that it has ended."""
    chunks = queue.Queue[bytes]()
    sent = sidecar.Sent(chunks)

    def ends() -> bool:
        threading.Timer(sidecar.IDLE_S / 4, chunks.put, (b"last",)).start()
        sent.worker_lives = lambda: False
        return False

    sent.worker_lives = ends
    assert sent.read() == b"last"
