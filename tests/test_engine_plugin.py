"""The plugin of serving engines, apart from any engine: a stand-in schedules requests and chooses
experts. `make test-vllm` runs it inside a real one."""

from __future__ import annotations

import asyncio
import gc
import gzip
import json
import os
import pickle
import queue
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from prometheus_client.multiprocess import MultiProcessCollector

from moe_inspect import Trace, merge, open_trace
from moe_inspect.analysis.metrics import balance
from moe_inspect.capture.engine import rows, sender, sglang, sidecar, vllm
from moe_inspect.capture.engine.control import tell
from moe_inspect.capture.engine.described import describe
from moe_inspect.capture.engine.sender import Sender
from moe_inspect.capture.engine.settings import Settings, variable
from moe_inspect.capture.engine.sidecar import Traces
from moe_inspect.capture.engine.step import Step
from moe_inspect.capture.engine.steps import Rows, StepRecorder, join_rows, shares_of
from moe_inspect.capture.engine.vllm import ask_engines
from moe_inspect.demo import MODEL_DIR
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.files.lock import process_start
from moe_inspect.trace.verify import verify
from moe_inspect.watch import follow
from moe_inspect.watch.follow import Follower
from moe_inspect.watch.metrics import EngineMetrics
from moe_inspect.watch.state import WatchOptions, WatchSession
from tests.conftest import ROOT
from tests.support.damage import disk_of, restate
from tests.support.watched import waited

L, E, K, T = 4, 8, 2, 64  # of the bundled model; T: rows of the buffer


def about(settings: Settings, **changed: object) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "engine": "vllm",
        "version": "0",
        "model": str(MODEL_DIR),
        "revision": None,
        "tokenizer": str(MODEL_DIR),
        "trust_remote_code": False,
        "vocabulary": 3072,
        "dtype": "float32",
        "device": "cpu",
        "rank": 0,
        "layers": list(range(L)),
        "paths": [f"model.layers.{n}.experts" for n in range(L)],
        "experts": E,
        "top_k": K,
        "physicals": False,
        **vars(settings),
    }
    return facts | changed


class Kept:
    """In the place of the process that writes: keeps what it is handed, as that gets it."""

    def __init__(self, recorder: StepRecorder):
        self.recorder, self.error = recorder, None

    def handed(self) -> tuple[list[Step], dict[str, np.ndarray]]:
        """With the joined arrays of their rows."""
        recorder = self.recorder
        steps = [recorder.queue.get() for _ in range(recorder.queue.qsize())]
        arrays = join_rows(steps, recorder.rows.kept) if steps else {}
        recorder.sent += sum(step.bytes for step in steps)
        return steps, arrays

    def taken(self) -> list[Step]:
        return self.handed()[0]

    def close(self) -> None:
        pass


class Engine:
    """Schedules requests as an engine does, and chooses experts at random. `expected`: (request,
    position) → each time that it was computed, the experts of each layer in ascending order."""

    def __init__(
        self,
        settings: Settings,
        start: Callable[[StepRecorder], Any] = Kept,
        rank: int = 0,
        replicas: torch.Tensor | None = None,
    ):
        """`replicas`: the expert that each physical one is a replica of, [L, P]."""
        traces, device = settings.trace is not None, torch.device("cpu")
        shape, self.replicas = (L, T, K), replicas
        self.rows = Rows(shape, E, settings.logits, device, traces, physicals=replicas is not None)
        self.recorder = StepRecorder(self.rows, settings, start, rank)
        self.recorder.replicas = lambda: self.replicas
        self.random = np.random.default_rng(rank)
        self.expected: dict[tuple[str, int], list[list[tuple[int, ...]]]] = {}
        self.assignments = np.zeros((L, E), np.int64)
        self.prompts: dict[str, int] = {}
        self.places = torch.zeros(2, 0, dtype=torch.int64)  # tokens and positions of a step

    def step(
        self,
        *spans: tuple[str, int, int],
        ended: tuple[str, ...] = (),
        drafts: dict[str, tuple[int, int]] | None = None,
        expect: bool = True,
    ) -> None:
        """`spans`: (request, first position, end) of each. `drafts`: request → (speculated,
        accepted), of its last rows. Prompts have ten tokens unless `prompts` says otherwise."""
        drafts, sizes = drafts or {}, [end - first for _, first, end in spans]
        edges, n = np.concatenate([[0], np.cumsum(sizes)]).astype(int), sum(sizes)
        of = list[np.ndarray]()
        for layer in range(L):
            logits = torch.from_numpy(self.random.normal(size=(n + 3, E)).astype(np.float32))
            weights, ids = logits.softmax(1).topk(K)
            physicals = None if self.replicas is None else self.one_of_each(layer, ids)
            self.rows.keep(layer, ids.int(), weights, logits, physicals)  # 3 rows are padding
            self.assignments[layer] += np.bincount(ids[:n].reshape(-1), minlength=E)
            of.append(np.sort(ids[:n].numpy(), 1))
        for i, (request, first, end) in enumerate(spans):
            speculated, accepted = drafts.get(request, (0, 0))
            for position in range(first, end - speculated + accepted if expect else first):
                row = edges[i] + position - first
                chosen = [tuple(map(int, of[layer][row])) for layer in range(L)]
                self.expected.setdefault((request, position), []).append(chosen)
        requests = [request for request, *_ in spans]
        positions = np.concatenate([np.arange(a, b) for _, a, b in spans] or [np.zeros(0, int)])
        if n > self.places.shape[1]:  # else the same place in each step
            self.places = torch.empty(2, n + T, dtype=torch.int64)
            self.tokens, self.positions = self.places
        self.places[:] = -1
        self.positions[:n] = torch.from_numpy(positions)
        self.tokens[:n] = self.positions[:n] * 7 % 3000
        scheduled = Step(
            requests,
            edges.tolist(),
            [self.prompts.get(request, 10) for request in requests],
            [drafts.get(request, (0, 0))[0] for request in requests] if drafts else [],
            [2**31] * len(requests) if drafts else [],
            self.tokens,
            self.positions,
        )
        self.recorder.after_step(n, set(ended), lambda: scheduled)
        if drafts:
            sampled = [drafts.get(request, (0, 0))[1] + 1 for request in requests]
            self.recorder.after_sampling(torch.tensor(sampled))

    def one_of_each(self, layer: int, ids: torch.Tensor) -> torch.Tensor:
        """A replica of each expert, at random."""
        assert self.replicas is not None
        found = self.replicas[layer] == ids[..., None]
        return (found * torch.from_numpy(self.random.random(found.shape))).argmax(-1)

    def serve(self, requests: int = 12, name: str = "r") -> None:
        """Requests of many lengths, four at once."""
        draw = random.Random(requests)
        waiting, running = [f"{name}{n}" for n in range(requests)], dict[str, list[int]]()
        ended: tuple[str, ...] = ()
        while waiting or running:
            while waiting and len(running) < 4:
                request = waiting.pop(0)
                self.prompts[request] = draw.randrange(1, 30)
                cached = draw.choice((0, self.prompts[request] // 2))
                running[request] = [cached, self.prompts[request] + draw.randrange(1, 8)]
            spans = []
            for request, at in running.items():
                prompt = self.prompts[request]
                end = min(at[0] + 12, prompt) if at[0] < prompt else at[0] + 1
                spans.append((request, at[0], end))
                at[0] = end
            self.step(*spans, ended=ended)
            ended = tuple(request for request, at in running.items() if at[0] >= at[1])
            for request in ended:
                del running[request]
        self.step(ended=ended)


def held(trace: Trace) -> dict[tuple[str, int], list[list[tuple[int, ...]]]]:
    """As `Engine.expected`."""
    source = trace.documents().set_index("document").source
    tokens, routing = trace.tokens(), trace.routing().sort_values(["token", "layer"])
    ids = np.sort(routing[[f"expert_{j}" for j in range(K)]].to_numpy(np.int64), 1)
    ids_TLK = ids.reshape(len(tokens), -1, K)
    found: dict[tuple[str, int], list[list[tuple[int, ...]]]] = {}
    for document, position, of in zip(tokens.document, tokens.position, ids_TLK, strict=True):
        key = source[document], int(position)
        found.setdefault(key, []).append([tuple(map(int, row)) for row in of])
    return found


def written(engine: Engine, settings: Settings, **changed: object) -> list[Path]:
    """What the engine's `Kept` has, written here by the code of the process that writes."""
    traces = Traces(about(settings, **changed), describe)
    steps, arrays = engine.recorder.link.handed()  # type: ignore[attr-defined]
    end = 0
    for step in steps:
        begin, end = end, end + step.edges[-1]
        own = {
            name: array[begin:end] if array.ndim == 1 else array[:, begin:end]
            for name, array in arrays.items()
        }
        traces.write([step], own, engine.recorder.dropped)
    traces.note_dropped(engine.recorder.dropped)
    traces.close("complete")
    return traces.paths


def fine(path: Path, status: str = "complete") -> Trace:
    found = verify(path)
    assert found.ok, found
    assert found.status == status
    return open_trace(path)


# --- settings


def test_variables_are_read_by_one_module() -> None:
    given = {"TRACE": "runs", "SAMPLE": "0.01", "METRICS": "1", "LOGITS": "on", "TEXT": "0"}
    given |= {"QUEUE_MB": "1.5", "MAX_GB": "2", "KEEP": "0", "START": "off", "REPLAY": "runs"}
    given |= {"PER_EXPERT": "1"}
    read = Settings.read({f"MOE_INSPECT_{name}": value for name, value in given.items()})
    runs = Path("runs").absolute()
    expected = Settings(runs, 0.01, True, True, True, False, 1.5, 2.0, 0, False, runs)
    assert read == expected
    assert {variable(f.name) for f in fields(Settings)} == {f"MOE_INSPECT_{name}" for name in given}
    assert Settings.read({}) == Settings() == Settings.read({"MOE_INSPECT_TRACE": " "})
    assert not Settings().is_active
    assert Settings(metrics=True).is_active


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("SAMPLE", "2", "a share from 0 to 1"),
        ("SAMPLE", "nan", "a share from 0 to 1"),
        ("SAMPLE", "half", "a share from 0 to 1"),
        ("METRICS", "yes!", "1 or 0, on or off"),
        ("QUEUE_MB", "0", "megabytes, above 0"),
        ("KEEP", "-1", "a whole number, 0 or more"),
    ],
)
def test_a_value_that_is_none_is_named(name: str, value: str, expected: str) -> None:
    with pytest.raises(MoeInspectError) as error:
        Settings.read({f"MOE_INSPECT_{name}": value})
    assert str(error.value) == f"MOE_INSPECT_{name} is {value!r}, not {expected}"


def test_a_mistyped_variable_is_named_with_the_nearest_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether anything is recorded or not; none that is read anywhere, and by one process."""
    for name in [name for name in os.environ if name.startswith("MOE_INSPECT_")]:
        monkeypatch.delenv(name)
    source = "".join(path.read_text() for path in (ROOT / "moe_inspect").rglob("*.py"))
    read = {*map(str.upper, vars(Settings())), *re.findall(r"\bMOE_INSPECT_([A-Z_]+)", source)}
    for name in read - {"TRACE", "METRICS", "REPLAY"}:
        monkeypatch.setenv(f"MOE_INSPECT_{name}", "1")
    vllm.register()
    assert not caplog.messages
    for name in ("SAMPEL", "TRACES"):
        monkeypatch.setenv(f"MOE_INSPECT_{name}", "runs")
    for register in (vllm.register, sglang.register):
        caplog.clear()
        register()
        assert sorted(caplog.messages) == [
            "moe-inspect: it reads no MOE_INSPECT_SAMPEL; the nearest is MOE_INSPECT_SAMPLE",
            "moe-inspect: it reads no MOE_INSPECT_TRACES; the nearest is MOE_INSPECT_TRACE",
        ]
    caplog.clear()
    of_settings = "moe_inspect.capture.engine.settings"
    monkeypatch.setattr(f"{of_settings}.parent_process", lambda: "the server")
    vllm.register()
    assert not caplog.messages


def test_an_engine_without_the_variable_loads_nothing(tmp_path: Path) -> None:
    """Nor does it need vLLM, which would be imported where it is set."""
    code = (
        "import sys, numpy; from moe_inspect.capture.engine.vllm import register; register();"
        "heavy = {'torch', 'pyarrow', 'pandas', 'httpx', 'vllm'};"
        "print({m.split('.')[0] for m in sys.modules} & heavy)"
    )
    run = [sys.executable, "-c", code]
    unset = {k: v for k, v in os.environ.items() if not k.startswith("MOE_INSPECT")}
    assert subprocess.run(run, env=unset, capture_output=True, text=True).stdout == "set()\n"
    asked = {**unset, "MOE_INSPECT_TRACE": str(tmp_path / "x")}
    said = subprocess.run(run, env=asked, capture_output=True, text=True)
    assert said.returncode == 0, "the engine goes on"
    assert "nothing is recorded" in said.stderr


# --- what is taken of a step


def test_a_mixed_step_is_one_batch_and_each_row_has_its_phase(tmp_path: Path) -> None:
    settings = Settings(tmp_path)
    engine = Engine(settings)
    engine.step(("a", 0, 10), ("b", 4, 9))  # four tokens of b were in a cache
    engine.step(("a", 10, 11), ("b", 9, 12))  # b's prompt ends in the middle
    engine.step(("b", 12, 13), ended=("a",))
    (path,) = written(engine, settings)
    trace = fine(path)
    assert held(trace) == engine.expected
    tokens = trace.tokens()
    by_batch = tokens.groupby("batch").phase.agg(list)
    assert by_batch[2] == ["decode", "prefill", "decode", "decode"]
    assert tokens.groupby("document").position.min().tolist() == [0, 4]
    assert tokens.token_id.tolist() == (tokens.position * 7 % 3000).tolist()
    assert trace.documents().tokens.tolist() == [10, 10]
    assert trace.manifest["capture"]["mode"] == "engine"
    assert trace.manifest["capture"]["rank"] == 0


def test_what_is_computed_again_is_a_sequence_of_its_own(tmp_path: Path) -> None:
    settings = Settings(tmp_path)
    engine = Engine(settings)
    engine.step(("a", 0, 10))
    engine.step(("a", 10, 11))
    engine.step(("b", 0, 10))  # a was preempted
    engine.step(("a", 0, 12))
    trace = fine(written(engine, settings)[0])
    assert held(trace) == engine.expected
    tokens = trace.tokens()
    assert tokens.groupby("sequence").position.agg(["min", "max"]).to_numpy().tolist() == [
        [0, 10],
        [0, 9],
        [0, 11],
    ]
    again = tokens[tokens.sequence == 2]
    assert again.phase.tolist() == ["prefill"] * 10 + ["decode"] * 2


def test_rejected_drafts_are_absent(tmp_path: Path) -> None:
    """Also of the last step of a request, after which nothing tells how many were accepted."""
    settings = Settings(tmp_path)
    engine = Engine(settings)
    engine.step(("a", 0, 10), ("b", 0, 10))
    engine.step(("a", 10, 14), ("b", 10, 11), drafts={"a": (3, 1)})
    engine.step(("a", 12, 16), ("b", 11, 14), drafts={"a": (3, 0), "b": (2, 2)})
    engine.step(ended=("a", "b"))
    trace = fine(written(engine, settings)[0])
    assert held(trace) == engine.expected
    assert trace.tokens().groupby("document").position.max().tolist() == [12, 13]
    assert trace.tokens().sequence.nunique() == 2


def test_accepted_drafts_beyond_the_end_of_an_answer_are_absent(tmp_path: Path) -> None:
    settings = Settings(tmp_path)
    engine = Engine(settings)
    engine.step(("a", 0, 10))
    engine.step(("a", 10, 14), drafts={"a": (3, 3)})
    (prompt, step), arrays = engine.recorder.link.handed()  # type: ignore[attr-defined]
    step.ends = [12]
    traces = Traces(about(settings), describe)
    traces.write([prompt, step], arrays, 0)
    traces.close("complete")
    assert fine(traces.paths[0]).tokens().position.max() == 11


def test_of_a_tree_of_drafts_the_path_that_was_accepted_is_recorded(tmp_path: Path) -> None:
    """As SGLang verifies: of each request its last token and three drafts, of which two may follow
    the same token. One request ends within the drafts that were accepted."""
    settings = Settings(tmp_path)
    engine = Engine(settings)
    engine.step(("a", 0, 10), ("b", 0, 10))
    seam = sglang.Seam.__new__(sglang.Seam)
    seam.recorder, seam.unseen, seam.ended, seam.T = engine.recorder, set(), set(), T
    seam.prompts = {"a": (10, 30), "b": (10, 12)}
    ids = np.stack([engine.random.permutation(E)[:K] for _ in range(8)])
    for layer in range(L):
        engine.rows.keep(layer, torch.from_numpy(ids), torch.ones(8, K), torch.ones(8, E))
    says = {"is_idle": False, "is_target_verify": True, "is_extend": True}
    batch = SimpleNamespace(
        rids=["a", "b"],
        forward_mode=SimpleNamespace(**{name: lambda it=it: it for name, it in says.items()}),
        input_ids=torch.arange(8),
        positions=torch.tensor([10, 11, 11, 12, 10, 11, 12, 13]),
    )
    seam.after_step(batch)
    seam.after_sampling((None, None, torch.tensor([[0, 2, 3, -1], [4, 5, 6, 7]])))
    seam.after_sampling((None, None, torch.zeros(0, dtype=torch.int32)))  # of no request
    trace = fine(written(engine, settings)[0])
    tokens = trace.tokens()[trace.tokens().position >= 10]
    facts = [*zip(tokens.document, tokens.token_id, tokens.position, strict=True)]
    assert facts == [(0, 0, 10), (0, 2, 11), (0, 3, 12), (1, 4, 10), (1, 5, 11)]
    of = held(trace)
    for name, position, row in (("a", 11, 2), ("a", 12, 3), ("b", 11, 5)):
        assert of[name, position] == [[tuple(map(int, np.sort(ids[row])))] * L]
    assert trace.tokens().sequence.nunique() == 2


def test_a_request_is_sampled_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    settings = Settings(tmp_path, sample=0.5, logits=True)
    engine = Engine(settings)
    engine.serve(40)
    trace = fine(written(engine, settings)[0])
    sources = set(trace.documents().source)
    assert 8 < len(sources) < 32
    assert held(trace) == {k: v for k, v in engine.expected.items() if k[0] in sources}
    best = trace.logits(layers=0).logits.map(lambda of: int(np.argmax(of)))
    first = trace.routing(layers=0).expert_0
    assert (best.to_numpy() == first.to_numpy()).all()


def test_without_text_no_token_is_named(tmp_path: Path) -> None:
    settings = Settings(tmp_path, text=False)
    engine = Engine(settings)
    engine.step(("a", 0, 10))
    trace = fine(written(engine, settings)[0])
    assert (trace.tokens().token_id == -1).all()
    assert len(trace.vocabulary_table) == 0
    assert trace.manifest["capture"]["text"] is False


def test_a_model_that_transformers_does_not_know_is_named_as_the_engine_does(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(tmp_path / "runs")
    engine = Engine(settings)
    engine.step(("a", 0, 10))
    (path,) = written(engine, settings, model=str(tmp_path / "none"), tokenizer="none")
    trace = fine(path)
    assert [router.path for router in trace.routers][1] == "model.layers.1.experts"
    assert held(trace) == engine.expected
    said = capfd.readouterr().err
    assert "routers are named as the engine does" in said
    assert "the trace has no vocabulary" in said


def test_counts_are_those_of_all_requests() -> None:
    """Whatever is sampled; and none of padding, or while it is off."""
    engine = Engine(Settings(Path("unused"), sample=0.0, metrics=True))
    engine.serve()
    counts = engine.rows.counted()[1].view(L, E).numpy()
    assert (counts == engine.assignments).all()
    assert counts.sum() > 0
    engine.recorder.command("metrics", "off")
    engine.step(("z", 0, 10))
    engine.recorder.command("metrics", "on")
    engine.recorder.command("off")
    engine.step(("z", 10, 11))
    assert (engine.rows.counted()[1].view(L, E).numpy() == counts).all()


def test_a_request_is_recorded_as_a_whole_or_not_at_all_when_the_share_changes() -> None:
    engine = Engine(Settings(Path("unused"), sample=0.0))
    link: Any = engine.recorder.link

    def recorded(*spans: tuple[str, int, int], ended: tuple[str, ...] = ()) -> list[str]:
        engine.step(*spans, ended=ended, expect=False)
        return [request for step in link.taken() for request in step.requests]

    assert recorded(("a", 0, 10)) == []
    engine.recorder.command("sample", "1")
    assert recorded(("a", 10, 11), ("b", 0, 5)) == ["b"]
    engine.recorder.command("sample", "0")
    assert recorded(("a", 11, 12), ("b", 5, 6), ("c", 0, 4)) == ["b"]
    engine.recorder.command("sample", "1")
    # another request of the name
    assert recorded(("a", 0, 3), ("b", 6, 7), ended=("a",)) == ["a", "b"]


def test_a_trace_of_replayed_routes_says_so(tmp_path: Path) -> None:
    settings = Settings(tmp_path / "runs", replay=tmp_path / "real")
    engine = Engine(settings)
    engine.step(("a", 0, 10))
    traces = Traces(about(settings), describe)
    traces.write(*engine.recorder.link.handed(), 0)  # type: ignore[attr-defined]
    traces.close("complete")
    said = f"chose what those of {tmp_path / 'real'} chose, as the engine replayed it"
    assert any(said in str(finding) for finding in fine(traces.paths[0]).report().verdict())


def test_a_comparison_without_text_says_that_requests_have_other_names(tmp_path: Path) -> None:
    made = list[Any]()
    for place, request in (("1", "a"), ("2", "a"), ("3", "b")):
        settings = Settings(tmp_path / place, text=False)
        engine = Engine(settings)
        engine.step((request, 0, 10))
        traces = Traces(about(settings), describe)
        traces.write(*engine.recorder.link.handed(), 0)  # type: ignore[attr-defined]
        traces.close("complete")
        made.append(fine(traces.paths[0]))
    same, other = (
        [str(found) for found in made[0].compare(made[n]).verdict() if "no token ids" in str(found)]
        for n in (1, 2)
    )
    assert "other texts" not in same[0]
    assert 'the same source in both ("a" and "b"): they may be other texts' in other[0]


def test_counts_are_exact_at_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever thread counts."""
    monkeypatch.setattr(rows, "COUNT_AT", 64)
    engine = Engine(Settings(metrics=True))
    found, ended = list[tuple[int, int]](), threading.Event()

    def ask() -> None:
        while not ended.wait(0.0005):
            tokens, counts = engine.rows.counted()
            found.append((tokens, int(counts.sum())))

    asking, often = threading.Thread(target=ask), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    asking.start()
    for n in range(1000):
        engine.step(("a", n, n + 1), ("b", n, n + 1))
    ended.set()
    asking.join()
    sys.setswitchinterval(often)
    assert all(counts == tokens * L * K for tokens, counts in found)
    tokens, counts = engine.rows.counted()
    assert tokens == 2000
    assert (counts.view(L, E).numpy() == engine.assignments).all()


def test_what_cannot_be_counted_is_in_no_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "COUNT_AT", 64)
    engine = Engine(Settings(metrics=True))
    engine.step(("a", 0, 64))
    for router in range(L):
        ids = torch.zeros(63 if router == 2 else 64, K, dtype=torch.int32)
        engine.recorder.keep(router, ids, torch.zeros(64, K), torch.zeros(64, E))
    engine.recorder.after_step(64, set(), lambda: None)  # type: ignore[arg-type,return-value]
    said = engine.recorder.command("status")["error"]
    assert said.endswith("64 tokens not counted: a router returned (63, 2), not (64, 2)")
    tokens, counts = engine.rows.counted()
    assert (tokens, int(counts.sum())) == (64, 64 * L * K)


def test_a_writer_that_follows_another_counts_and_drops_from_there_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent = list[tuple[Any, ...]]()
    monkeypatch.setattr(Sender, "_begin", lambda self: None)
    monkeypatch.setattr(Sender, "_send", lambda self, *message: sent.append(message))
    engine = Engine(Settings(Path("unused"), metrics=True), lambda of: Sender(of, {}))
    engine.step(("a", 0, 10))
    engine.recorder.dropped = 7
    engine.recorder.link.close()
    engine.recorder.link.error = "it was killed"
    assert engine.recorder.command("on")["on"]
    engine.step(("a", 10, 11))
    engine.recorder.dropped += 2
    engine.recorder.link.close()
    counts = [message[1] for message in sent if message[0] == "counts"]
    assert len(counts) == 2
    assert (sum(counts).reshape(L, E) == engine.assignments).all()
    assert [message[1] for message in sent if message[0] == "end"] == [7, 2]


def test_steps_that_do_not_arrive_are_lost_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sender, "_begin", lambda self: None)
    monkeypatch.setattr(Step, "arrive", lambda self: 1 / 0)
    engine = Engine(Settings(Path("unused")), lambda of: Sender(of, {}))
    engine.step(("a", 0, 10))
    waited(lambda: engine.recorder.link.error)
    state = engine.recorder.command("status")
    assert "ZeroDivisionError" in state["error"]
    assert (state["decisions"], state["dropped"], state["queued_bytes"]) == (0, 10 * L, 0)


def test_drafts_that_are_judged_when_the_writer_has_ended_are_dropped() -> None:
    engine = Engine(Settings(Path("unused")))
    link: Any = engine.recorder.link
    engine.recorder.after_sampling = lambda sampled: None
    engine.step(("a", 0, 4), drafts={"a": (3, 1)})
    del engine.recorder.after_sampling
    link.error = "it was killed"
    engine.recorder.after_sampling(torch.tensor([1]))
    state = engine.recorder.command("status")
    assert (state["decisions"], state["dropped"], state["queued_bytes"]) == (0, 4 * L, 0)


def test_a_fault_of_ours_ends_the_recording_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what waited for its drafts to be judged is handed over: its room is free again."""
    engine = Engine(Settings(Path("unused")))
    engine.step(("a", 0, 10))
    engine.step(("a", 10, 14), drafts={"a": (3, 1)})
    no_router = torch.zeros(3, 2)
    engine.recorder.keep(L, no_router, no_router, no_router)
    state = engine.recorder.command("status")
    assert not state["on"]
    assert "IndexError" in state["error"]
    link: Any = engine.recorder.link
    assert len(link.taken()) == 2
    assert engine.recorder.command("status")["queued_bytes"] == 0
    monkeypatch.setattr(engine.recorder, "start", lambda _: 1 / 0)
    link.error = "it was killed"
    assert "ZeroDivisionError" in engine.recorder.command("on")["refused"]


def test_where_nothing_can_be_recorded_vllms_routers_are_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    router = SimpleNamespace(_compute_routing=lambda hidden, logits: ("weights", "ids"))
    moe = SimpleNamespace(num_logical_experts=E, experts_per_token=K)
    layer = SimpleNamespace(moe_config=moe, router=router, layer_id=0, layer_name="0")
    monkeypatch.setattr(vllm, "recordable_layers", lambda *_: [layer])
    runner = SimpleNamespace(get_model=lambda: None, device=torch.device("cpu"))
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=None, mode=0),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=T),
    )
    with pytest.raises(AttributeError, match="model_config"):  # as of another version
        vllm.Seam(runner, config, Settings(Path("unused")))
    assert router._compute_routing(None, None) == ("weights", "ids")


def test_routers_that_hide_a_choice_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = "vllm.model_executor.layers.fused_moe"
    runner = type("MoERunner", (torch.nn.Module,), {"is_monolithic": False})
    router = type("ZeroExpertRouter", (), {"zero_expert_type": "identity"})
    for name, what in (("layer.MoERunner", runner), ("router.base_router.BaseRouter", router)):
        module, _, attribute = name.rpartition(".")
        fake = SimpleNamespace(**{attribute: what})
        monkeypatch.setitem(sys.modules, f"{layers}.{module}", fake)
    model = runner()
    model.router = router()
    with pytest.raises(MoeInspectError, match="chose a zero expert"):
        vllm.recordable_layers(model, None)


WRONG = "nothing is recorded: MOE_INSPECT_SAMPLE is '2', not a share from 0 to 1"


@pytest.fixture
def wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_INSPECT_TRACE", str(tmp_path / "runs"))
    monkeypatch.setenv("MOE_INSPECT_SAMPLE", "2")
    monkeypatch.setattr(vllm.Endpoint, "refused", "")
    monkeypatch.setattr(sglang.Here, "refused", "")


@pytest.mark.usefixtures("wrong")
def test_vllms_server_says_which_variable_is_wrong(
    cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its workers only say that they have no such method."""
    monkeypatch.setitem(sys.modules, "fastapi", SimpleNamespace(Body=lambda *_: None))
    routes = dict[str, Any]()
    app = SimpleNamespace(state=SimpleNamespace(engine_client=SimpleNamespace()))
    app.add_api_route = lambda _, answer, methods: routes.update({methods[0]: answer})
    vllm.Endpoint().attach_router(app)

    def answer(_: Any) -> Any:
        return asyncio.run(routes["GET"]())

    with served({"/v1/moe_inspect": answer}) as url:
        said = cli("engine", url, check=1).stderr
        assert said.startswith("error: the engine does not run the plugin (")
        vllm.register()
        assert cli("engine", url, check=1).stderr == f"error: {WRONG}\n"


@pytest.mark.usefixtures("wrong")
def test_sglangs_state_says_which_variable_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    hooked = dict[str, Any]()
    registry = SimpleNamespace(register=lambda target, hook, _: hooked.update({target: hook}))
    for name in ("sglang", "sglang.srt", "sglang.srt.plugins"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    hooks = SimpleNamespace(HookRegistry=registry, HookType=SimpleNamespace(AROUND=0))
    monkeypatch.setitem(sys.modules, "sglang.srt.plugins.hook_registry", hooks)
    sglang.register()
    (get,) = (hook for target, hook in hooked.items() if target.endswith("get_internal_state"))
    state = get(lambda *_: SimpleNamespace(internal_state={}), None, None).internal_state
    assert state["moe_inspect"] == {"refused": WRONG}
    assert not any("load_model" in target for target in hooked)
    monkeypatch.setenv("MOE_INSPECT_SAMPLE", "1")
    sglang.register()
    assert any("load_model" in target for target in hooked)


def test_the_state_of_sglang_is_its_own_but_for_our_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer(SimpleNamespace):
        pass

    struct = SimpleNamespace(SetInternalStateReqOutput=Answer)
    monkeypatch.setitem(sys.modules, "sglang", ModuleType("sglang"))
    for name in ("sglang.srt", "sglang.srt.managers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.io_struct", struct)
    engine = Engine(Settings(Path("unused")))
    monkeypatch.setattr(sglang.Here, "seam", SimpleNamespace(recorder=engine.recorder))

    def asked(**server_args: float) -> Any:
        request = SimpleNamespace(server_args=server_args)
        return sglang._set_state(lambda *_: "its own", None, request)

    assert asked() == "its own"
    assert asked(pp_max_micro_batch_size=8) == "its own"
    assert asked(**{"moe_inspect.off": 1, "pp_max_micro_batch_size": 8}) == "its own"
    assert engine.recorder.on
    assert asked(**{"moe_inspect.off": 1}).updated
    assert not engine.recorder.on
    assert not asked(**{"moe_inspect.sample": 2}).updated
    answer = sglang._get_state(lambda *_: SimpleNamespace(internal_state={}), None, None)
    assert "not a share" in answer.internal_state["moe_inspect"]["refused"]


def test_what_there_is_no_room_for_is_dropped_and_counted(tmp_path: Path) -> None:
    """And a sequence with a gap becomes two."""
    settings = Settings(tmp_path, queue_mb=0.005)
    engine = Engine(settings)
    engine.step(("a", 0, 10))
    engine.step(("a", 10, 35), expect=False)  # beyond the room
    assert engine.recorder.dropped == 25 * L
    kept, arrays = engine.recorder.link.handed()  # type: ignore[attr-defined]
    assert len(kept) == 1
    engine.step(("a", 35, 36))
    traces = Traces(about(settings), describe)
    traces.write(kept, arrays, 0)
    traces.write(*engine.recorder.link.handed(), engine.recorder.dropped)  # type: ignore[attr-defined]
    traces.close("complete")
    trace = fine(traces.paths[0])
    assert trace.manifest["counts"]["dropped"] == 25 * L
    assert held(trace) == engine.expected
    assert trace.tokens().sequence.nunique() == 2


def test_memory_is_bounded_and_the_engine_never_waits() -> None:
    """Of a writer that takes nothing, and of one that takes everything, by what is live."""
    stalled = Engine(Settings(Path("unused"), queue_mb=0.01))
    following = Engine(Settings(Path("unused")))
    for engine in (stalled, following):
        engine.step(("long", 0, 2), expect=False)  # never ends
    for n in range(3000):
        for engine in (stalled, following):
            ended = (f"r{n - 1}",) if n else ()
            engine.step((f"r{n}", 0, 2), ended=ended, expect=False)
        following.recorder.link.taken()  # type: ignore[attr-defined]
    assert stalled.recorder.taken - stalled.recorder.sent <= 10_000
    assert stalled.recorder.recorded + stalled.recorder.dropped == 3001 * 2 * L
    assert stalled.recorder.dropped > 0
    for engine in (stalled, following):
        assert len(engine.recorder._live) <= 200
        assert len(engine.recorder._ended) <= 200


def test_a_fault_of_ours_stops_the_recording_and_not_the_engine(tmp_path: Path) -> None:
    engine = Engine(Settings(tmp_path))
    engine.step(("a", 0, 10))

    def whose() -> Step:
        raise RuntimeError("no such attribute")

    engine.recorder.after_step(3, set(), whose)
    state = engine.recorder.command("status")
    assert not state["on"]
    assert state["error"] == "RuntimeError: no such attribute"
    engine.step(("a", 10, 11))  # the engine goes on
    assert engine.recorder.command("on")["error"] is None
    engine.step(("a", 11, 12))
    assert len(engine.recorder.link.taken()) == 2  # type: ignore[attr-defined]


# --- on a GPU, whose kernels are interpreted here


@pytest.fixture
def launched(on_triton: None, monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """What a CUDA graph would hold: each launch again, with the same tensors and numbers."""
    from moe_inspect.capture.engine import rows

    launches = list[Callable[[], None]]()

    class Noted:
        def __init__(self, kernel: Any):
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*given: Any, **named: Any) -> None:
                launches.append(lambda: self.kernel[grid](*given, **named))
                launches[-1]()

            return launch

    for name in ("_keep_kernel", "_take_kernel"):
        monkeypatch.setattr(rows, name, Noted(getattr(rows, name)))

    def to_host(_: Any, of: list[Any]) -> tuple[list[Any], None]:
        return [None if t is None else t.clone() for t in of], None

    # what is taken waits on the device, until the next step
    monkeypatch.setattr(StepRecorder, "_to_host", to_host)
    return launches


def test_more_rows_than_there_are_are_refused(on_triton: None) -> None:
    rows = Rows((L, T, K), E, False, torch.device("cpu"))
    rows.take(len(rows.every))
    with pytest.raises(ValueError, match="rows of a buffer of"):
        rows.take(len(rows.every) + 1)


def test_a_graph_that_is_replayed_without_python(launched: list[Callable[[], None]]) -> None:
    """Captured for two numbers of tokens; replayed with others, padded, and for dummy batches."""
    rows, draw = Rows((L, T, K), E, False, torch.device("cpu")), np.random.default_rng(0)
    graphs = dict[int, tuple[Any, list[Callable[[], None]]]]()
    for size in (40, 8):
        fed = torch.zeros(L, size, K, dtype=torch.int32), torch.zeros(L, size, K)
        launched.clear()
        for layer in range(L):
            rows.keep(layer, fed[0][layer], fed[1][layer], fed[1][layer])
        graphs[size] = fed, launched[:]
        assert len(launched) == L, "one launch per router"

    def replayed(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        (ids, weights), launches = graphs[size]
        ids.copy_(torch.from_numpy(draw.integers(0, E, (L, size, K))))
        weights.copy_(torch.from_numpy(draw.random((L, size, K))))
        for launch in launches:
            launch()
        return ids, weights.half()

    load_LE = np.zeros((L, E), np.int64)
    for n, picked in ((33, [3, 32]), (5, [4]), (8, None), (40, None), (1, [0])):
        replayed(40)  # a dummy batch
        ids, weights = replayed(40 if n > 8 else 8)
        launched.clear()
        tokens = torch.arange(40)
        at = torch.arange(n) if picked is None else torch.tensor(picked)
        given = None if picked is None else at
        found = rows.take(n, len(at), given, tokens.int(), tokens + 7)
        assert len(launched) == 1
        wanted = tokens[at], tokens[at] + 7, ids[:, at], weights[:, at]
        for got, want in zip(found[:4], wanted, strict=True):
            assert torch.equal(got, want.to(got.dtype))
        for layer in range(L):
            load_LE[layer] += np.bincount(ids[layer, :n].reshape(-1), minlength=E)
        assert (rows.counted()[1].view(L, E).numpy() == load_LE).all()


@pytest.mark.parametrize("logits", [False, True])
def test_its_kernels_record_what_torch_does(
    launched: list[Callable[[], None]], tmp_path: Path, logits: bool
) -> None:
    settings = Settings(tmp_path, sample=0.5, metrics=True, logits=logits)
    engine = Engine(settings)
    launched.clear()
    engine.serve(20)
    assert len(launched) == engine.recorder.steps * (L + 1) - 1, "the last step has padding alone"
    trace = fine(written(engine, settings)[0])
    sources = set(trace.documents().source)
    assert 4 < len(sources) < 16
    assert held(trace) == {k: v for k, v in engine.expected.items() if k[0] in sources}
    assert (engine.rows.counted()[1].view(L, E).numpy() == engine.assignments).all()
    if logits:
        best = trace.logits(layers=3).logits.map(lambda of: int(np.argmax(of)))
        assert (best.to_numpy() == trace.routing(layers=3).expert_0).all()


def test_its_kernels_count_where_nothing_is_recorded(launched: list[Callable[[], None]]) -> None:
    engine = Engine(Settings(metrics=True))
    engine.serve(20)
    assert (engine.rows.counted()[1].view(L, E).numpy() == engine.assignments).all()
    assert engine.rows.nbytes < T * L * K * 2 + T * 8 + L * (E + 2) * 8 + 1, "ids alone"


@pytest.mark.parametrize("logits", [False, True])
def test_torch_compile_keeps_the_choices_in_its_graph(on_triton: None, logits: bool) -> None:
    """fullgraph: a graph break would raise. dynamic: other sizes need no other graph."""
    rows = Rows((L, T, K), E, logits, torch.device("cpu"))
    graphs = list[Any]()

    def noted(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    @torch.compile(backend=noted, fullgraph=True, dynamic=True)
    def routers(logits_LNE: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(logits_LNE.shape[1])
        for layer in range(L):
            weights, ids = logits_LNE[layer].softmax(1).topk(K)
            rows.keep(layer, ids, weights, logits_LNE[layer])
            total = total + weights.sum(1)
        return total

    for n in (7, 40, 9):
        logits_LNE = torch.randn(L, n, E, generator=torch.Generator().manual_seed(n))
        routers(logits_LNE)
        weights, ids = logits_LNE.softmax(2).topk(K)
        assert torch.equal(rows.ids[:, :n], ids.short())
        assert torch.allclose(rows.weights[:, :n].float(), weights, atol=1e-3)
        if rows.logits is not None:
            assert torch.equal(rows.logits[:, :n], logits_LNE.half())
    (graph,) = graphs
    calls = [node for node in graph.graph.nodes if "keep_rows" in str(node.target)]
    assert len(calls) == L


def test_a_fault_of_ours_in_a_compiled_graph_stops_the_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And not the forward pass, nor another engine of the process. The step is not recorded."""
    engine, other = Engine(Settings(tmp_path)), Engine(Settings(tmp_path))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def router(logits_NE: torch.Tensor) -> torch.Tensor:
        weights, ids = logits_NE.softmax(1).topk(K)
        engine.rows.keep(0, ids, weights, logits_NE)
        return weights.sum(1)

    logits_NE = torch.randn(5, E)
    router(logits_NE)
    engine.step(("a", 0, 10))
    assert engine.recorder.command("status")["error"] is None

    def fails(*_: object) -> None:
        raise RuntimeError("no kernel")

    for position in (10, 11, 12):
        with monkeypatch.context() as patch:
            patch.setattr(rows.HostRows, "keep", fails)
            assert router(logits_NE).shape == (5,)
        other.step(("b", position, position + 1))
        engine.step(("a", position, position + 1))
    assert sum("stopped" in record.message for record in caplog.records) == 1
    state = engine.recorder.command("status")
    assert (state["on"], state["error"]) == (False, "RuntimeError: no kernel")
    assert engine.recorder.command("on")["error"] is None
    engine.step(("a", 13, 14))
    steps, arrays = engine.recorder.link.handed()  # type: ignore[attr-defined]
    assert [step.edges for step in steps] == [[0, 10], [0, 1]]
    assert arrays["positions"].tolist() == [*range(10), 13]
    steps, arrays = other.recorder.link.handed()  # type: ignore[attr-defined]
    assert [step.edges for step in steps] == [[0, 1]] * 3
    assert arrays["positions"].tolist() == [10, 11, 12]


def test_its_memory_is_that_of_the_most_tokens_of_a_step(on_triton: None) -> None:
    """Twice 4 × k bytes per token and layer, with logits 2 × experts more; and little beside."""
    for logits, per_decision in ((False, 4 * K), (True, 4 * K + 2 * E)):
        rows = Rows((L, 4096, K), E, logits, torch.device("cpu"))
        assert 0 < rows.nbytes - 2 * 4096 * L * per_decision <= 4096 * 16 + L * (E + 2) * 8


# --- traces, one after the other


def test_a_trace_that_is_large_is_followed_by_the_next_and_the_oldest_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sidecar, "LOOK_S", 0.0)
    settings = Settings(tmp_path, max_gb=1e-6, keep=2)
    engine = Engine(settings)
    for n in range(5):
        engine.step(("a", 10 * n, 10 * n + 10), (f"b{n}", 0, 5))
    paths = written(engine, settings)
    there = sorted(tmp_path.iterdir())
    assert len(paths) == 5
    assert there == paths[-2:]
    traces = [fine(path) for path in there]
    assert [set(trace.documents().source) for trace in traces] == [{"a", "b3"}, {"a", "b4"}]
    assert traces[1].tokens().position.min() == 0
    assert held(traces[1]) == {k: v for k, v in engine.expected.items() if k in held(traces[1])}


def test_what_is_dropped_behind_the_last_trace_is_in_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sidecar, "LOOK_S", 0.0)
    settings = Settings(tmp_path, max_gb=1e-6, queue_mb=0.006)
    engine = Engine(settings)
    traces = Traces(about(settings), describe)
    engine.step(("a", 0, 10))
    traces.write(*engine.recorder.link.handed(), 0)  # type: ignore[attr-defined]
    traces.catch_up(wait=True)
    engine.step(("a", 10, 60), expect=False)
    assert engine.recorder.dropped == 50 * L
    assert not engine.recorder.link.taken()  # type: ignore[attr-defined]
    traces.note_dropped(engine.recorder.dropped)
    traces.close("complete")
    first, last = map(fine, traces.paths)
    assert first.manifest["capture"]["followed_by"] == Path(last.path).name
    dropped = [trace.manifest["counts"]["dropped"] for trace in (first, last)]
    assert (dropped, last.n_tokens) == ([0, 50 * L], 0)


@pytest.mark.parametrize("by", ["trace", "directory"])
def test_watch_goes_on_with_the_trace_that_follows(
    by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while there is none yet, as long as the process that writes is there."""
    monkeypatch.setattr(sidecar, "LOOK_S", 0.0)
    watched = tmp_path if by == "directory" else None
    settings = Settings(tmp_path, max_gb=1e-6)
    engine, traces, session = Engine(settings), Traces(about(settings), describe), None
    for n in range(3):
        engine.step(("a", 10 * n, 10 * n + 10))
        traces.write(*engine.recorder.link.handed(), 5 * n)  # type: ignore[attr-defined]
        traces.catch_up(wait=True)
        session = session or WatchSession(watched or traces.paths[0], WatchOptions())
        for _ in range(3):
            session.update()
        assert (session.watched.tokens, session.watched.status) == (10 * n + 10, "recording")
        assert session.watched.dropped == 5 * n  # of all of them
    assert session is not None
    assert Path(session.path).name.endswith("-0003")
    assert len(traces.paths) == 3
    assert not session.is_over
    monkeypatch.setattr(follow, "is_running", lambda *_: False)
    session.update()
    assert session.is_over
    assert session.watched.status == "complete"


def test_watch_of_a_copy_ends_though_its_successor_is_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a trace that another host wrote, unless it was seen while it was written."""
    monkeypatch.setattr(sidecar, "LOOK_S", 0.0)
    settings = Settings(tmp_path / "runs")
    engine, traces = Engine(settings), Traces(about(settings), describe)

    def step(first: int) -> None:
        engine.step(("a", first, first + 10))
        traces.write(*engine.recorder.link.handed(), 0)  # type: ignore[attr-defined]
        traces.catch_up(wait=True)

    step(0)
    (path,) = (tmp_path / "runs").iterdir()
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    live = Follower(path)
    assert live.poll().status == "recording"
    traces.most_bytes = 0
    step(10)
    assert [live.poll().status for _ in range(3)] == ["recording"] * 3
    session = WatchSession(path, WatchOptions())
    for _ in range(3):
        session.update()
    assert session.is_over
    assert (session.watched.tokens, session.watched.status) == (20, "complete")


def test_ranks_are_merged(tmp_path: Path) -> None:
    settings, expected, paths = Settings(tmp_path / "runs"), {}, []
    for rank in (0, 1):
        engine = Engine(settings, rank=rank)
        engine.serve(6, name=f"rank{rank}-")
        expected |= engine.expected
        paths += written(engine, settings, rank=rank)
    merged = merge(paths, tmp_path / "all")
    assert fine(tmp_path / "all").status == "complete"
    assert held(merged) == expected


# --- replicas of experts


def spread(seed: int) -> torch.Tensor:
    """10 physical experts per layer, two of them second replicas. [L, P]"""
    draw = np.random.default_rng(seed)
    return torch.from_numpy(np.array([draw.permutation([*range(E), 1, 2]) for _ in range(L)]))


def rearrange(engine: Engine, rank: int = 0) -> None:
    """Serves, with another map of all layers, then of one, then with the same elsewhere."""
    for n in range(4):
        if n == 1:
            engine.replicas = spread(rank + 2)
        elif n == 2:
            assert engine.replicas is not None
            engine.replicas[1] = engine.replicas[1].flip(0)
        elif n == 3:
            assert engine.replicas is not None
            engine.replicas = engine.replicas.clone()
        engine.serve(4, f"rank{rank}-{n}-")


def balanced(folder: Path, rank: int = 0) -> tuple[Engine, Path]:
    """An engine whose map changes, and its trace."""
    settings = Settings(folder)
    engine = Engine(settings, rank=rank, replicas=spread(rank))
    rearrange(engine, rank)
    (path,) = written(engine, settings, rank=rank, physicals=True)
    return engine, path


def check_replicas(trace: Trace, expected: dict[Any, Any]) -> pd.DataFrame:
    """Each decision's physical experts are replicas of its experts, by the accessor alone."""
    assert held(trace) == expected
    batches = trace.tokens()[["token", "batch"]]
    rows = trace.routing().merge(batches, on="token").sort_values("batch", kind="stable")
    for j in range(K):
        of, by = rows.assign(physical=rows[f"physical_{j}"]), ["layer", "router", "physical"]
        found = pd.merge_asof(of, trace.replicas(), on="batch", by=by)
        assert (found.expert == found[f"expert_{j}"]).all()
    return rows


def test_vllms_router_has_chosen_replicas_when_they_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the model, not of its draft model."""
    weights, ids = torch.rand(3, K), torch.tensor([[0, 1], [2, 3], [7, 0]])
    router = SimpleNamespace(
        _compute_routing=lambda hidden, logits: (weights, ids),
        _apply_eplb_mapping=lambda ids: (ids + 8).int(),
    )
    moe = SimpleNamespace(num_logical_experts=E, experts_per_token=K)
    layer = SimpleNamespace(moe_config=moe, router=router, layer_id=0, layer_name="0")
    monkeypatch.setattr(vllm, "recordable_layers", lambda *_: [layer])
    made = lambda rows, settings, _: StepRecorder(rows, settings, Kept)  # noqa: E731
    monkeypatch.setattr(sender, "recorder_of", made)
    maps = {name: SimpleNamespace(physical_to_logical_map=spread(n)) for n, name in enumerate("dm")}
    state = SimpleNamespace(model_states=maps)
    device = torch.device("cpu")
    runner = SimpleNamespace(get_model=lambda: None, device=device, eplb_state=state)
    model = dict.fromkeys(("model", "revision", "tokenizer", "trust_remote_code", "dtype"), "m")
    named = SimpleNamespace(**model, compute_hash=lambda: "m", get_vocab_size=lambda: 9)
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=None, mode=0),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=T),
        model_config=named,
        parallel_config=SimpleNamespace(data_parallel_rank=0),
        speculative_config=None,
    )
    recorder = vllm.Seam(runner, config, Settings(tmp_path)).recorder
    for _ in range(2):
        chosen = router._compute_routing(None, weights)
        assert torch.equal(router._apply_eplb_mapping(chosen[1]), ids + 8)
    tokens = torch.arange(3)
    recorder.after_step(3, set(), lambda: Step(["a"], [0, 3], [3], [], [], tokens, tokens))
    (step,), arrays = recorder.link.handed()  # type: ignore[attr-defined]
    assert arrays["ids"].tolist() == [ids.tolist()]
    assert arrays["physicals"].tolist() == [(ids + 8).tolist()]
    assert step.replicas.tolist() == maps["m"].physical_to_logical_map.tolist()
    assert recorder.replicas() is maps["m"].physical_to_logical_map


def test_replicas_are_recorded_and_when_they_change(tmp_path: Path) -> None:
    with recording(Settings(tmp_path), replicas=spread(0)) as engine:
        rearrange(engine)
    trace = waited(lambda: (t := committed(tmp_path, 1)) and t.status == "complete" and t)
    assert fine(trace.path).n_tokens
    rows = check_replicas(trace, engine.expected)
    for layer in range(L):  # both replicas of expert 1 are chosen
        of = rows[(rows.layer == layer) & (rows.expert_0 == 1)]
        assert (of.groupby("batch").physical_0.nunique() > 1).any()
    changed = trace.replicas().groupby("batch").layer.unique().map(sorted).tolist()
    assert changed == [[0, 1, 2, 3], [0, 1, 2, 3], [1]]
    assert (trace.replicas().groupby(["batch", "layer"]).size() == 10).all()


def test_merged_traces_keep_replicas(tmp_path: Path) -> None:
    expected, paths = {}, []
    for rank in (0, 1):
        engine, path = balanced(tmp_path / "runs", rank)
        expected |= engine.expected
        paths.append(path)
    check_replicas(merge(paths, tmp_path / "all"), expected)
    assert fine(tmp_path / "all").replicas().batch.nunique() == 6
    without = Engine(Settings(tmp_path / "runs"))
    without.serve(4)
    (plain,) = written(without, Settings(tmp_path / "runs"), rank=2)
    with pytest.raises(MoeInspectError, match="has no physical experts"):
        open_trace(plain).replicas()
    with pytest.raises(MoeInspectError, match=r"has physical_j, .* does not"):
        merge([*paths, plain], tmp_path / "mixed")


def stating(path: Path, change: Callable[[list[dict[str, Any]]], object] | None) -> None:
    """Changes what the file of decisions states of replicas; None: it states nothing."""
    name = "routing/part-0-0.parquet"
    table = pq.read_table(path / name)
    stated = json.loads((table.schema.metadata or {})[b"replicas"])
    if change is not None:
        change(stated)
    metadata = None if change is None else {"replicas": json.dumps(stated)}
    pq.write_table(table.replace_schema_metadata(metadata), path / name)
    restate(path, name)


MISSTATED: dict[str, Callable[[list[dict[str, Any]]], object] | None] = {
    "its metadata have no replicas": None,
    "router of entry 0 is not one of 0 to 3": lambda of: of[0].update(router=4),
    "batch of entry 1 is not one of 0 to": lambda of: of[1].update(batch=-1),
    "experts of entry 2 are not a list of −1 to 7": lambda of: of[2]["experts"].append(8),
    "experts of entry 0 are not a list": lambda of: of[0].update(experts=[[0]]),
    "entry 8 is of forward pass 1, after a later one": lambda of: of[8].update(batch=1),
    "unexpected keyword argument 'more'": lambda of: of[0].update(more=1),
    "a replica of expert -1 in forward pass": lambda of: of[0].update(batch=2),
}


def test_a_wrong_replica_is_found(tmp_path: Path) -> None:
    _, whole = balanced(tmp_path / "runs")
    for n, (said, change) in enumerate(MISSTATED.items()):
        path = tmp_path / f"{n}"
        shutil.copytree(whole, path)
        stating(path, change)
        assert said in str(verify(path).violation)
    path, name = tmp_path / "one", "routing/part-0-0.parquet"
    shutil.copytree(whole, path)
    table = pq.read_table(path / name)
    at = table.schema.get_field_index("physical_1")
    column = table["physical_1"].to_pylist()
    column[33] = (column[33] + 1) % 10 if column[33] < 9 else 10
    table = table.set_column(at, table.schema.field(at), pa.array(column, pa.uint16()))
    pq.write_table(table, path / name)
    restate(path, name)
    found = verify(path)
    assert (found.ok, found.row) == (False, 33)
    assert f"physical_1 is {column[33]}, a replica of expert" in str(found.violation)
    late = list[int]()

    def a_pass_late(of: list[dict[str, Any]]) -> None:
        late.append(of[5]["batch"])
        of[5]["batch"] += 1

    stating(whole, a_pass_late)
    assert f"in forward pass {late[0]}, expert_" in str(verify(whole).violation)


# --- the process that writes


@contextmanager
def recording(settings: Settings, replicas: torch.Tensor | None = None) -> Iterator[Engine]:
    facts = about(settings, physicals=replicas is not None)
    engine = Engine(settings, lambda recorder: Sender(recorder, facts), replicas=replicas)
    try:
        yield engine
    finally:
        engine.recorder.close()


def committed(folder: Path, tokens: int) -> Trace | None:
    """The last trace in a folder, when it has so many tokens."""
    for path in sorted(folder.iterdir() if folder.exists() else ())[-1:]:
        if (path / "trace.json").exists() and (trace := open_trace(path)).n_tokens >= tokens:
            return trace
    return None


def writer_of(folder: Path) -> int:
    (path,) = sorted(folder.iterdir())[-1:]
    return json.loads((path / "trace.json").read_text())["capture"]["pid"]


def test_the_process_that_writes(tmp_path: Path) -> None:
    with recording(Settings(tmp_path)) as engine:
        engine.serve(30)
        waited(lambda: committed(tmp_path, 1))
        assert writer_of(tmp_path) != os.getpid()
    (path,) = tmp_path.iterdir()
    waited(lambda: open_trace(path).status == "complete")
    assert held(fine(path)) == engine.expected


def test_a_writer_that_is_killed_leaves_its_trace_and_on_starts_another(tmp_path: Path) -> None:
    with recording(Settings(tmp_path)) as engine:
        engine.step(("a", 0, 10))
        waited(lambda: committed(tmp_path, 10))
        time.sleep(1)  # and the engine knows it
        engine.step(("a", 10, 11))
        os.kill(writer_of(tmp_path), signal.SIGKILL)
        waited(lambda: engine.step(("a", 11, 12)) or engine.recorder.link.error)
        state = engine.recorder.command("status")
        assert not state["on"]
        assert state["error"].startswith("the process that writes has ended")
        (path,) = tmp_path.iterdir()
        # what it had been handed, and had not committed, is counted too
        assert fine(path, "interrupted").n_tokens * L == state["decisions"] == 10 * L
        handed = engine.recorder.recorded // L
        assert state["dropped"] == (handed - 10) * L > 0
        assert engine.recorder.command("on")["on"]
        engine.step(("b", 0, 10))
        again = waited(lambda: len([*tmp_path.iterdir()]) == 2 and committed(tmp_path, 10))
        assert set(again.documents().source) == {"b"}


def test_a_full_disk_ends_the_recording_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Though nothing follows the step whose trace cannot be begun."""
    with disk_of(1500), recording(Settings(tmp_path)) as engine:
        engine.step(("a", 0, 10))
        waited(lambda: engine.recorder.link.error)
        state = engine.recorder.command("status")
    assert state["error"] == f"cannot write {tmp_path}: File too large"
    assert not state["on"]
    assert (state["decisions"], state["dropped"]) == (0, 10 * L)
    assert state["error"] in caplog.text


def test_what_the_last_commit_could_not_write_was_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(tmp_path)
    engine = Engine(settings)
    engine.step(("a", 0, 10))
    traces = Traces(about(settings), describe)
    traces.write(*engine.recorder.link.handed(), 0)  # type: ignore[attr-defined]
    traces.catch_up(wait=True)
    monkeypatch.setattr("moe_inspect.trace.writer.write_shard", Mock(side_effect=OSError("full")))
    with pytest.raises(MoeInspectError, match="full"):
        traces.close("complete")
    counts = open_trace(traces.paths[0]).manifest["counts"]
    assert counts == {"tokens": 0, "decisions": 0, "dropped": 10 * L}


def test_of_a_step_only_what_is_recorded_stays_in_memory(tmp_path: Path) -> None:
    """On a CPU, where it is not copied at once."""
    engine = Engine(Settings(tmp_path, sample=0.5, metrics=True, logits=True))
    logits_of = list[Any]()
    keep = engine.rows.host.keep  # type: ignore[union-attr]

    def noted(router: int, *given: torch.Tensor) -> None:
        logits_of.append(weakref.ref(given[2]))
        keep(router, *given)

    engine.rows.host.keep = noted  # type: ignore[union-attr,method-assign]
    sampled = [name for name in map(str, range(40)) if engine.recorder._is_sampled(name)]
    left = next(name for name in map(str, range(40)) if name not in sampled)
    engine.step((sampled[0], 0, 1), (left, 0, 60))
    gc.collect()
    assert not any(of() is not None for of in logits_of)
    step = engine.recorder.queue.get()
    assert all(len(t) == 1 for ids, weights, *_ in step.rows[-1] for t in (ids, weights))


def test_what_a_full_disk_takes_is_a_trace_and_the_rest_is_dropped(tmp_path: Path) -> None:
    """Though nothing follows the steps that fill it."""
    with disk_of(9000), recording(Settings(tmp_path, text=False)) as engine:
        engine.step(("a", 0, 10))
        waited(lambda: committed(tmp_path, 10))
        for n in range(30):
            engine.step((f"b{n}", 0, T))
        waited(lambda: engine.recorder.link.error)
        state = engine.recorder.command("status")
    (path,) = tmp_path.iterdir()
    trace = fine(path, "interrupted")
    assert trace.n_tokens * L == state["decisions"] == 10 * L
    assert trace.manifest["counts"]["dropped"] == state["dropped"] == 30 * T * L
    assert state["error"] == f"cannot write {tmp_path}: File too large"


def test_a_disk_that_is_full_at_the_end_is_in_the_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nobody else hears it then."""
    with disk_of(1500), recording(Settings(tmp_path)) as engine:
        engine.step(("a", 0, 10))
    said = list[str]()
    waited(lambda: said.append(capfd.readouterr().err) or "File too large" in "".join(said))
    assert f"moe-inspect: cannot write {tmp_path}: File too large\n" in "".join(said)


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


def test_a_directory_that_is_gone_ends_the_recording(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    with recording(Settings(folder)) as engine:
        engine.step(("a", 0, 10))
        waited(lambda: committed(folder, 10))
        folder.rename(tmp_path / "elsewhere")
        waited(lambda: engine.step(("a", 10, 11)) or engine.recorder.link.error)
        error = engine.recorder.command("status")["error"]
        assert error == f"cannot write {folder}: No such file or directory"


WORKER = """
import sys, time
from pathlib import Path
from tests.test_engine_plugin import Settings, recording
with recording(Settings(Path(sys.argv[1]))) as engine:
    engine.step(("a", 0, 10))
    print("ready", flush=True)
    time.sleep(600)
"""


def test_a_worker_that_is_killed_leaves_a_trace_that_is_closed(tmp_path: Path) -> None:
    """At once: what it had handed over is there."""
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert worker.stdout is not None
    assert worker.stdout.readline() == "ready\n"
    time.sleep(1)
    worker.kill()
    worker.wait()
    trace = waited(lambda: (t := committed(tmp_path, 10)) and t.status != "recording" and t)
    assert trace.status == "interrupted"
    assert fine(Path(trace.path), "interrupted").n_tokens == 10


WRITER = """
import queue, sys
from pathlib import Path
from moe_inspect.capture.engine.sidecar import Sent, write_all
from moe_inspect.watch.metrics import EngineMetrics
chunks = queue.Queue()
for chunk in (sys.stdin.buffer.read(), b""):
    chunks.put(chunk)
write_all(Sent(chunks), EngineMetrics, lambda **said: print(said))
print({m.split(".")[0] for m in sys.modules} & {"torch", "transformers", "prometheus_client"})
"""


def test_the_process_that_writes_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    """Where it writes, counts and knows the model."""
    settings = Settings(tmp_path / "runs", metrics=True)
    engine = Engine(settings)
    engine.step(("a", 0, 10))
    facts = {"tokens": 10, "steps": 1, "dropped": 0}
    own = {"pid": os.getpid(), "process_start": process_start(os.getpid())}
    sent = [
        ("about", about(settings) | own),
        ("counts", engine.rows.counted()[1].numpy(), facts),
        ("steps", *engine.recorder.link.handed(), 0),  # type: ignore[attr-defined]
        ("end", 0),
    ]
    (tmp_path / "prometheus").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", WRITER],
        input=b"".join(pickle.dumps(message) for message in sent),
        stdout=subprocess.PIPE,
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "prometheus")},
        check=True,
    )
    said = done.stdout.decode().splitlines()
    assert said[-2:] == [str({"committed": 10 * L}), str({"prometheus_client"})]
    (path,) = (tmp_path / "runs").iterdir()
    trace = fine(path)
    assert held(trace) == engine.expected
    assert trace.manifest["model"]["class"] == "MixtralForCausalLM"
    assert len(trace.vocabulary_table)
    counted = metrics_in(tmp_path / "prometheus")
    assert counted["moe_inspect_tokens_total", "0"] == 10


# --- for /metrics


def metrics_in(folder: Path) -> dict[tuple[str, ...], float]:
    """What a server reads there: (name, values of the labels by their names) → value."""
    found = dict[tuple[str, ...], float]()
    for family in MultiProcessCollector(None, str(folder)).collect():
        for sample in family.samples:
            found[sample.name, *(value for _, value in sorted(sample.labels.items()))] = (
                sample.value
            )
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    return tmp_path


def test_a_servers_metrics_are_bounded_by_the_layers(folder: Path) -> None:
    """And sum up to what was fed; dead experts that come to life are told no more."""
    layers, experts, told = 20, 16, {"steps": 9, "dropped": 7}
    settings = Settings(Path("unused"), metrics=True)
    of = {"layers": list(range(layers)), "experts": experts, "rank": 3}
    draw = np.random.default_rng(0)
    load_LE = np.stack([draw.multinomial(2000, [1 / experts] * experts) for _ in range(layers)])
    load_LE[4], load_LE[7, :3] = [2000] + [0] * 15, [0, 0, load_LE[7, :3].sum()]
    load_LE[9, :2] = 1, load_LE[9, :2].sum() - 1  # starved
    metrics = EngineMetrics(about(settings, **of))
    metrics.add(load_LE.reshape(-1), tokens=1000, written_bytes=5, **told)
    found = metrics_in(folder)
    for name in ("max_vio", "dead_experts", "starved_experts", "entropy", "balancedness"):
        value_L = getattr(balance, name)(load_LE)
        told_L = {int(at[0]): v for (of, *at), v in found.items() if of == f"moe_inspect_{name}"}
        assert told_L
        assert told_L == pytest.approx({r: value_L[r] for r in told_L}), name
    in_all = [v for (name, *_), v in found.items() if name == "moe_inspect_assignments_total"]
    assert sum(in_all) == 1000 * layers * K
    assert found["moe_inspect_tokens_total", "3"] == 1000
    assert found["moe_inspect_dropped_decisions_total", "3"] == 7
    assert found["moe_inspect_written_bytes_total", "3"] == 5
    vio_L = load_LE.max(1) / load_LE.mean(1) - 1
    worst = {str(r) for r in np.argsort(-vio_L)[:8]}
    for name in ("moe_inspect_max_vio", "moe_inspect_max_vio_chance"):
        assert {labels[0] for of, *labels in found if of == name} == worst
    dead = {labels[0]: v for (name, *labels), v in found.items() if name.endswith("dead_experts")}
    assert dead == {"4": 15, "7": 2}
    metrics.add(np.full(layers * experts, 5000), tokens=40_000, **told)
    again = metrics_in(folder)
    assert not any(name.endswith("dead_experts") for name, *_ in again)
    assert again["moe_inspect_tokens_total", "3"] == 41_000


def test_the_dashboard_and_the_page_name_metrics_that_there_are(folder: Path) -> None:
    load_E = np.full(E, 10_000)
    load_E[0], load_E[1] = 0, 10  # dead, starved
    metrics = EngineMetrics(about(Settings(Path("unused"), metrics=True, per_expert=True)))
    of_ranks = shares_of(np.tile(np.arange(E), (L, 1)), E, 2)
    for step in range(1, 9):  # windows, until there is an alarm
        metrics.add(
            np.tile(load_E, L),
            tokens=int(load_E.sum()) // K,
            steps=step,
            dropped=0,
            placed=of_ranks if step == 1 else None,
            written_bytes=1,
        )
    told = {name for name, *_ in metrics_in(folder)}
    dashboard = json.loads((ROOT / "docs/grafana-dashboard.json").read_text(encoding="utf-8"))
    queries = [query["expr"] for panel in dashboard["panels"] for query in panel["targets"]]
    asked = set(re.findall(r"moe_inspect_\w+", " ".join(queries)))
    assert len(asked) >= 8
    assert asked <= told
    page = (ROOT / "docs/engines.md").read_text(encoding="utf-8")
    assert told == set(re.findall(r"`(moe_inspect_\w+)`", page))


def test_a_series_per_expert_is_told_on_request(folder: Path) -> None:
    settings = Settings(Path("unused"), metrics=True, per_expert=True)
    engine = Engine(settings)
    engine.serve()
    metrics = EngineMetrics(about(settings))
    tokens = int(engine.assignments.sum()) // (L * K)
    metrics.add(engine.rows.counted()[1].numpy(), tokens=tokens, steps=9, dropped=0)
    found = metrics_in(folder)
    for layer, load_E in enumerate(engine.assignments):
        for expert, load in enumerate(load_E):
            at = str(expert), str(layer), "0", str(layer)
            assert found["moe_inspect_expert_assignments_total", *at] == load


def test_counts_that_are_seen_before_their_tokens_are_told(folder: Path) -> None:
    metrics = EngineMetrics(about(Settings(Path("unused"), metrics=True)))
    metrics.add(np.full(L * E, 5), tokens=0, steps=1, dropped=0)
    metrics.add(np.zeros(L * E, np.int64), tokens=20, steps=1, dropped=0)
    found = metrics_in(folder)
    in_all = [v for (name, *_), v in found.items() if name == "moe_inspect_assignments_total"]
    assert sum(in_all) == found["moe_inspect_tokens_total", "0"] * L * K == 20 * L * K


def test_the_load_of_ranks_is_told_where_experts_are_parallel(folder: Path) -> None:
    settings = Settings(Path("unused"), metrics=True)
    engine = Engine(settings)
    engine.serve()
    placed = shares_of(np.tile(np.arange(E), (L, 1)), E, 2)
    metrics = EngineMetrics(about(settings))
    tokens = int(engine.assignments.sum()) // (L * K)
    told: dict[str, Any] = {"tokens": tokens, "steps": 9, "dropped": 0}
    metrics.add(engine.rows.counted()[1].numpy(), placed=placed, **told)
    found, of_L2 = metrics_in(folder), engine.assignments.reshape(L, 2, -1).sum(2)
    for gpu in (0, 1):
        assert found["moe_inspect_gpu_assignments_total", str(gpu), "0"] == of_L2[:, gpu].sum()
    for r in range(L):
        ratio = found["moe_inspect_gpu_max_over_mean", str(r), "0", str(r)]
        assert ratio == pytest.approx(of_L2[r].max() / of_L2[r].mean())
    # it moves two experts, and gives a third a replica on each rank
    moved = np.tile([0, 1, 2, 4, 7, 3, 5, 6, 7, 7], (L, 1))
    before = found["moe_inspect_gpu_assignments_total", "0", "0"]
    metrics.add(engine.rows.counted()[1].numpy(), placed=shares_of(moved, E, 2), **told)
    load_E = engine.assignments.sum(0)
    first = load_E[[0, 1, 2, 4]].sum() + load_E[7] / 3
    now = metrics_in(folder)["moe_inspect_gpu_assignments_total", "0", "0"]
    assert now - before == pytest.approx(first)


def test_the_gauges_of_a_writer_that_was_killed_are_gone(folder: Path) -> None:
    with recording(Settings(None, metrics=True)) as engine:
        engine.step(("a", 0, 10))
        window = "moe_inspect_window_tokens", "0"
        waited(lambda: metrics_in(folder).get(window) == 10)
        (gauges,) = folder.glob("gauge_*")
        os.kill(int(gauges.stem.rpartition("_")[2]), signal.SIGKILL)
        waited(lambda: engine.step(("a", 10, 11)) or engine.recorder.link.error)
        left = metrics_in(folder)
        assert window not in left
        assert left["moe_inspect_tokens_total", "0"] >= 10


# --- switched by the server


class Fleet:
    """The client of a server's engines, as vLLM has it."""

    def __init__(self, engines: list[Engine]):
        self.engine_core, self.engines = self, engines

    async def call_utility_all_async(self, *call: Any) -> list[list[Any]]:
        *named, _timeout, (what, value), _keywords = call
        assert named == ["collective_rpc", "moe_inspect"]
        return [[engine.recorder.command(what, value), None] for engine in self.engines]


@contextmanager
def served(routes: dict[str, Callable[[Any], Any]]) -> Iterator[str]:
    """The URL of a server. `routes`: path → what it answers, of the body that it is sent."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"command": "status"})

        def do_POST(self) -> None:
            self.answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

        def answer(self, asked: Any) -> None:
            found = routes[self.path](asked) if self.path in routes else {}
            body = json.dumps(found).encode()
            self.send_response(200 if self.path in routes else 404)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def of_vllm(fleet: Fleet) -> dict[str, Callable[[Any], Any]]:
    def answer(asked: dict[str, str]) -> dict[str, Any]:
        found = asyncio.run(ask_engines(fleet, asked["command"], asked.get("value", "")))
        return {"engines": found}

    return {"/v1/moe_inspect": answer}


def test_sglang_is_switched_by_the_state_of_its_server() -> None:
    engines = [{"rank": 1, "on": True}, {"rank": 0, "on": False}]  # as they come in
    sent, states = list[Any](), [{"moe_inspect": engine} for engine in engines]

    def taken(body: Any) -> list[bool]:
        sent.append(body["server_args"])
        return [True]

    shown = {"/set_internal_state": taken, "/server_info": lambda _: {"internal_states": states}}
    with served(shown) as url:
        assert tell(url, "sample", "0.25") == engines[::-1]
        tell(url, "metrics", "off")
        tell(url, "off")
        assert sent == [
            {"moe_inspect.sample": 0.25},
            {"moe_inspect.metrics": 0.0},
            {"moe_inspect.off": 1.0},
        ]
        for value in ("2", "nan", "a"):
            with pytest.raises(MoeInspectError, match=f"sample is '{value}', not a share"):
                tell(url, "sample", value)
        states[0]["moe_inspect"] = {"refused": "nothing is recorded: no MoE layer"}
        with pytest.raises(MoeInspectError, match="nothing is recorded: no MoE layer"):
            tell(url, "status")
        states[:] = [{"world_size": 1}]
        with pytest.raises(MoeInspectError, match="has no /v1/moe_inspect"):
            tell(url, "status")


def test_all_engines_behind_a_server_are_switched(tmp_path: Path, cli: Any) -> None:
    engines = [Engine(Settings(tmp_path), rank=rank) for rank in (0, 1)]
    with served(of_vllm(Fleet(engines))) as url:
        assert [state["rank"] for state in tell(url, "status")] == [0, 1]
        shown = cli("engine", url, "off", "--format", "csv")
        assert pd.read_csv(pd.io.common.StringIO(shown.stdout)).on.tolist() == [False, False]
        for engine in engines:
            engine.step(("a", 0, 10))
            assert engine.recorder.recorded == 0
        tell(url, "on")
        assert [state["sample"] for state in tell(url, "sample", "0.25")] == [0.25, 0.25]
        with pytest.raises(MoeInspectError, match="sample is '7', not a share from 0 to 1"):
            tell(url, "sample", "7")
        with pytest.raises(MoeInspectError, match="MOE_INSPECT_METRICS=1 was not set"):
            tell(url, "metrics", "on")
        for engine in engines:
            engine.recorder.sample = 1.0
            engine.step(("a", 10, 11))
            assert engine.recorder.recorded == L
        with pytest.raises(MoeInspectError, match="VLLM_PLUGINS=moe_inspect"):
            tell(f"{url}/elsewhere", "status")


def test_what_a_server_refuses_is_one_line(cli: Any) -> None:
    """The key is sent, and appears in no message. Nothing is decompressed, or read without end."""
    hostile = "\x1b[2J\x9b31m"
    answers = {
        "/closed": (401, {}, b"sesame"),
        "/busy": (503, {}, hostile.encode()),
        "/text": (200, {}, b"<html>"),
        "/endless": (200, {}, b" " * (2**24 + 1)),
        "/moved": (307, {"Location": "/text"}, b""),
        "/packed": (200, {"Content-Encoding": "gzip"}, gzip.compress(b"{}")),
    }
    keys = list[str]()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keys.append(self.headers["authorization"])
            status, headers, body = answers[self.path.removesuffix("/v1/moe_inspect")]
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    said = dict[str, str]()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for path in answers:
            said[path] = cli("engine", f"{url}{path}/v1", "--api-key", "sesame", check=1).stderr
        server.shutdown()
    assert {*keys} == {"Bearer sesame"}
    assert not any("sesame" in text or text.count("\n") > 1 for text in said.values())
    assert (
        "rejected the API key (HTTP 401): set --api-key or MOE_INSPECT_API_KEY" in said["/closed"]
    )
    assert r"refused the request (HTTP 503): \x1b[2J" in said["/busy"]
    assert "expected a JSON object, got b'<html>'" in said["/text"]
    assert "answered with more than 16,777,216 bytes" in said["/endless"]
    assert "(HTTP 307)" in said["/moved"]
    assert r"expected a JSON object, got b'\x1f\x8b" in said["/packed"]
    wrong = cli("engine", "http://me:sesame@localhost:no", check=1).stderr
    assert wrong.startswith("error: localhost:no is not a URL")
    assert "is not the URL of a server" in cli("engine", "localhost:8000", check=1).stderr
