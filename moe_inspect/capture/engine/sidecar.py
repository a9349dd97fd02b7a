"""The process that writes what a serving engine routes: a trace, the next one when it has become
too large, and counters for the engine's /metrics. It takes what a worker sends until that ends, in
whatever way, and closes the trace.

L routers, N tokens, K slots, E experts.
"""

from __future__ import annotations

import io
import os
import pickle
import queue
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_inspect.errors import MoeInspectError, writing
from moe_inspect.text import first_line, print_stderr
from moe_inspect.trace import schema
from moe_inspect.trace.files.lock import is_running
from moe_inspect.trace.output_dir import remove_trace
from moe_inspect.trace.writer import Document, RoutedBatch, TraceWriter

if TYPE_CHECKING:
    from moe_inspect.capture.engine.steps import Step

LOOK_S = 2.0  # between two looks at the worker, and at the size of the trace
COMMIT_S = 2.0  # a reader sees what is that old; a writer that is killed loses no more
DOMAIN = "served"
PREFILL, DECODE = (schema.PHASES.index(phase) for phase in ("prefill", "decode"))


class Sent(io.RawIOBase):
    """What the worker sends, as a file. It ends when the worker has ended too: another process may
    have inherited its end of the pipe."""

    def __init__(self, chunks: queue.Queue[bytes]):
        self.chunks, self.left, self.ended = chunks, memoryview(b""), False
        self.worker_lives: Callable[[], bool] = lambda: True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.left and not self.ended:
            try:
                self.left = memoryview(self.chunks.get(timeout=LOOK_S))
                self.ended = not self.left
            except queue.Empty:
                self.ended = not self.worker_lives() and self.chunks.empty()
        n = min(len(buffer), len(self.left))
        buffer[:n], self.left = self.left[:n], self.left[n:]
        return n


def messages(file: io.BufferedReader) -> Iterator[tuple[Any, ...]]:
    """Until the end; a truncated message is ignored."""
    while True:
        try:
            yield pickle.load(file)
        except (EOFError, pickle.UnpicklingError):
            return


def run(chunks: queue.Queue[bytes]) -> None:
    """What is wrong is said on the standard output, which the worker reads."""
    report = os.dup(1)
    os.dup2(2, 1)  # what libraries print is for people
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with the worker
    os.nice(5)
    raw = Sent(chunks)
    said = ""
    try:
        write_all(raw)
    except MoeInspectError as error:
        cause = error.__cause__  # the writer speaks of --resume, which there is not here
        said = str(error)
        if isinstance(cause, OSError):
            said = f"the trace cannot be written: {first_line(cause)}"
    except BaseException as error:
        traceback.print_exc()
        said = f"{type(error).__name__}: {first_line(error)}"
    if said:
        os.write(report, said.encode(errors="replace")[:4000])
    os._exit(1 if said else 0)  # the thread that reads may wait for ever


def write_all(raw: Sent) -> None:
    received = messages(io.BufferedReader(raw, 2**20))
    first = next(received, None)
    if first is None:
        return
    about = first[1]
    raw.worker_lives = lambda: is_running(about["pid"], about["process_start"]) is not False
    counters, traces = Counters(about), Traces(about) if about["traces"] else None
    status = "interrupted"
    try:
        for kind, *values in received:
            if kind == "steps" and traces is not None:
                traces.write(*values)
            elif kind == "counts":
                try:
                    counters.add(*values)
                except Exception as error:  # the trace goes on
                    if not counters.failed:
                        print_stderr(f"moe-inspect: no counts in /metrics: {first_line(error)}")
                    counters.failed = True
            elif kind == "end":
                status = "complete"
                if traces is not None:
                    traces.note_dropped(*values)
    finally:
        if traces is not None:
            traces.close(status)


class Counters:
    """For Prometheus, in files of PROMETHEUS_MULTIPROC_DIR that the engine's /metrics sums."""

    def __init__(self, about: dict[str, Any]):
        self.about, self.failed = about, False
        self.series: list[Any] = []

    def add(self, counts: np.ndarray) -> None:
        """Assignments since the last ones, by router and expert: [L × E]."""
        if not self.series:
            from prometheus_client import Counter

            labels = ["rank", "layer", "expert"]
            counter = Counter(
                "moe_inspect_engine_assignments", "Assignments of each expert", labels
            )
            rank, layers, E = self.about["rank"], self.about["layers"], self.about["experts"]
            self.series = [counter.labels(rank, n, e) for n in layers for e in range(E)]
        for n in np.flatnonzero(counts):
            self.series[n].inc(int(counts[n]))


@dataclass
class Sequence:
    """Of a request, what was written last. `position`: the next one of its sequence."""

    document: int
    number: int = -1
    position: int = -1


class Traces:
    """The traces of one worker, one after the other."""

    def __init__(self, about: dict[str, Any]):
        self.about, self.folder = about, Path(about["traces"])
        self.most_bytes, self.keep = about["max_gb"] * 1e9, about["keep"]
        self.dropped = 0  # decisions, of the traces before
        self.paths: list[Path] = []
        self.stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-rank{about['rank']}"
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        # while the engine still starts
        self.manifest, self.routers, self.vocabulary = described(about)
        self.writer: TraceWriter | None = None
        self._begin()

    def _begin(self) -> None:
        self.known: dict[str, Sequence] = {}
        self.documents = self.sequences = 0
        self.looked_s = time.monotonic()

    def write(self, steps: list[Step], dropped: int) -> None:
        """Steps that follow each other, and how many decisions were dropped since the start."""
        documents = list[Document]()
        parts = [part for step in steps if (part := self._rows(step, documents)) is not None]
        if parts:
            self.writer = self.writer or self._open()
            self.note_dropped(dropped)
            self.writer.write(self._batch(parts, documents))
            if time.monotonic() - self.looked_s > LOOK_S:
                self.looked_s = time.monotonic()
                if size_of(self.paths[-1]) > self.most_bytes:
                    self._next()

    def note_dropped(self, dropped: int) -> None:
        """In all, since the writer began, minus those that its earlier traces state."""
        if self.writer is not None:
            self.writer.dropped = dropped - self.dropped

    def _rows(self, step: Step, documents: list[Document]) -> Part | None:
        """What is recorded of a step: all rows but those of rejected drafts. Adds the documents of
        requests that begin."""
        for request in step.ended:
            self.known.pop(request, None)
        keep_N, of_requests = np.ones(len(step.tokens), bool), list[tuple[int, int, int, int]]()
        for i, request in enumerate(step.requests):
            start, end, prompt = int(step.edges[i]), int(step.edges[i + 1]), int(step.prompts[i])
            first, rows = int(step.positions[start]), end - start
            if drafts := int(step.drafts[i]):
                accepted = 0 if step.sampled is None else max(int(step.sampled[i]) - 1, 0)
                # accepted ones beyond the end of the answer are none of its tokens
                most = max(int(step.ends[i]) - first, rows - drafts)
                rows = min(rows - drafts + accepted, rows, most)
                keep_N[start + rows : end] = False
            at = self.known.get(request)
            if at is None:
                at = self.known[request] = Sequence(self.documents)
                documents.append(Document(at.document, DOMAIN, request, prompt))
                self.documents += 1
            # a new sequence: the request begins, is computed again, or rows are missing
            if at.position != first:
                at.number, self.sequences = self.sequences, self.sequences + 1
            at.position = first + rows
            of_requests.append((at.document, at.number, prompt, rows))
        if not of_requests:
            return None
        of_rows = np.array(of_requests, np.int32)
        document_N, sequence_N, prompt_N, _ = np.repeat(of_rows, of_rows[:, 3], axis=0).T
        kept = slice(None) if keep_N.all() else keep_N
        return Part(step, kept, document_N, sequence_N, step.positions[kept] < prompt_N)

    def _batch(self, parts: list[Part], documents: list[Document]) -> RoutedBatch:
        def joined(name: str) -> list[np.ndarray]:
            """Of each router."""
            of_steps = [getattr(part.step, name)[:, part.kept] for part in parts]
            return list(np.concatenate(of_steps, axis=1))

        E, text = self.about["experts"], self.about["text"]
        token_N = np.concatenate([part.step.tokens[part.kept] for part in parts]).astype(np.int32)
        in_prompt_N = np.concatenate([part.in_prompt for part in parts])
        numbers = [part.step.number for part in parts]
        dtype = np.uint8 if E <= 255 else np.uint16
        nowhere = np.iinfo(dtype).max
        return RoutedBatch(
            batch=numbers[-1],
            batches=np.repeat(np.array(numbers, np.int32), [len(p.document) for p in parts]),
            token_id=token_N if text else np.full_like(token_N, -1),
            document=np.concatenate([part.document for part in parts]),
            sequence=np.concatenate([part.sequence for part in parts]),
            position=np.concatenate([p.step.positions[p.kept] for p in parts]).astype(np.int32),
            domain=np.zeros(len(token_N), np.int32),
            domains=[DOMAIN],
            ids=[
                np.where((ids >= 0) & (ids < E), ids, nowhere).astype(dtype)
                for ids in joined("ids")
            ],
            weights=joined("weights"),
            documents=documents,
            phases=np.where(in_prompt_N, PREFILL, DECODE),
            extras={"logits": joined("logits")} if self.about["logits"] else {},
        )

    def _open(self) -> TraceWriter:
        path = self.folder / f"{self.stem}-{len(self.paths):04}"
        self.paths.append(path)
        writer = TraceWriter(
            path,
            self.manifest,
            self.routers,
            logits=self.about["logits"],
            vocabulary=self.vocabulary,
            commit_every=COMMIT_S,
        )
        print_stderr(f"moe-inspect: recording what the engine routes in {path}")
        return writer

    def _next(self) -> None:
        """Ends this trace; requests that go on are documents of the next one too."""
        self.close("complete")
        self._begin()
        old = self.paths[: -self.keep] if self.keep else []
        for path in [path for path in old if path.exists()]:
            try:
                remove_trace(path)
                said = f"{path} is deleted, as MOE_INSPECT_KEEP is {self.keep}"
            except (OSError, MoeInspectError) as error:
                said = f"{path} is not deleted: {first_line(error)}"
            print_stderr(f"moe-inspect: {said}")

    def close(self, status: str) -> None:
        writer, self.writer = self.writer, None
        if writer is not None:
            self.dropped += writer.dropped
            writer.close(status, quiet=status != "complete")


@dataclass
class Part:
    """Of a step, which of its rows are recorded, and whose they are: [N] each. `in_prompt`: whether
    a token was fed as a prompt."""

    step: Step
    kept: Any
    document: np.ndarray
    sequence: np.ndarray
    in_prompt: np.ndarray


def size_of(trace: Path) -> int:
    """Bytes of its files; what is deleted meanwhile has none."""
    found = 0
    for file in trace.rglob("*"):
        try:
            found += file.stat().st_size
        except OSError:
            continue
    return found


def described(about: dict[str, Any]) -> tuple[dict[str, Any], list[schema.Router], Any]:
    """The manifest, the routers and the vocabulary, of what transformers knows of the model. Of one
    that it does not know, of what the engine does."""
    from moe_inspect.capture.open_trace import process_facts
    from moe_inspect.capture.server.protocols import routers_of
    from moe_inspect.model.load import config_record, load_config, load_tokenizer
    from moe_inspect.model.vocabulary import vocabulary_table

    of_hub = {"revision": about["revision"], "trust_remote_code": about["trust_remote_code"]}
    layers, E, K = about["layers"], about["experts"], about["top_k"]
    model, vocabulary = {"id": about["model"], "revision": about["revision"]}, None
    try:
        config = load_config(about["model"], **of_hub)
        kind, known = routers_of(config, about["trust_remote_code"])
        of_layer = {router.layer: router for router in known}
        routers = [of_layer[layer] for layer in layers if layer in of_layer]
        if len(routers) < len(layers) or any((r.experts, r.top_k) != (E, K) for r in routers):
            raise MoeInspectError("its config states other routers than the engine runs")
        model |= {"class": kind, "config": config_record(config)}
    except MoeInspectError as error:
        print_stderr(f"moe-inspect: routers are named as the engine does: {error}")
        paths = about["paths"]
        routers = [
            schema.Router(layer, path.rpartition(".")[2], path, E, K)
            for layer, path in zip(layers, paths, strict=True)
        ]
    if about["text"]:
        try:
            tokenizer = load_tokenizer(about["tokenizer"], **of_hub)
            vocabulary = vocabulary_table(tokenizer, about["vocabulary"])
        except MoeInspectError as error:
            print_stderr(f"moe-inspect: the trace has no vocabulary: {error}")
    facts: dict[str, Any] = process_facts([])
    facts["versions"][about["engine"]] = about["version"]
    capture = {
        "mode": "engine",
        "engine": about["engine"],
        "rank": about["rank"],
        "device": about["device"],
        "dtype": about["dtype"],
        "weight_dtype": "float16",
        **({} if about["text"] else {"text": False}),
        **facts,
    }
    return {"model": model, "capture": capture}, routers, vocabulary
