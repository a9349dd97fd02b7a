"""The process that writes what a serving engine routes: a trace, the next one when it has become
too large, and counters for the engine's /metrics. It takes what a worker sends until that ends, in
whatever way, and closes the trace.

L routers, N tokens, K slots, E experts.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import queue
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moe_inspect.capture.engine.described import Described, ask
from moe_inspect.capture.engine.step import Arrays, Step
from moe_inspect.errors import MoeInspectError
from moe_inspect.text import first_line, print_stderr
from moe_inspect.trace import schema
from moe_inspect.trace.files.lock import is_running, process_start
from moe_inspect.trace.output_dir import remove_trace, stored_bytes
from moe_inspect.trace.writer import Document, RoutedBatch, ShardLimits, TraceWriter

LOOK_S = 2.0  # between two looks at the size of the trace
IDLE_S = 0.2  # between two looks at the worker, and at what is committed, while nothing comes
COMMIT_S = 2.0  # a reader sees what is that old; a writer that is killed loses no more
DOMAIN = "served"
PREFILL, DECODE = (schema.PHASES.index(phase) for phase in ("prefill", "decode"))


class Sent(io.RawIOBase):
    """What the worker sends, as a file. It ends when the worker has ended too: another process may
    have inherited its end of the pipe. `idle` is called again and again while nothing comes."""

    def __init__(self, chunks: queue.Queue[bytes]):
        self.chunks, self.left, self.ended = chunks, memoryview(b""), False
        self._lives = True  # as last looked at: what it sent before it ended may be on its way
        self.worker_lives: Callable[[], bool] = lambda: True
        self.idle: Callable[[], None] = lambda: None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.left and not self.ended:
            try:
                self.left = memoryview(self.chunks.get(timeout=IDLE_S))
                self.ended = not self.left
            except queue.Empty:
                self.idle()
                self.ended, self._lives = not self._lives, self.worker_lives()
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


class Metrics(Protocol):
    """For the engine's /metrics. `add`: of the counts since the last ones; `publish`: as time goes
    on."""

    def add(self, counts: np.ndarray, **facts: Any) -> None: ...
    def publish(self) -> None: ...


def run(chunks: queue.Queue[bytes], metrics: Callable[[dict[str, Any]], Metrics]) -> None:
    """Says how it is on the standard output, which the worker reads: a JSON object per line."""
    report = os.dup(1)
    os.dup2(2, 1)  # what libraries print is for people
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with the worker
    os.nice(5)

    def tell(**facts: object) -> None:
        with suppress(OSError):  # the worker may be gone
            os.write(report, json.dumps(facts).encode() + b"\n")

    said = ""
    try:
        tell(pid=os.getpid())
        write_all(Sent(chunks), metrics, tell)
    except MoeInspectError as error:
        said = str(error)
    except BaseException as error:
        traceback.print_exc()
        said = f"{type(error).__name__}: {first_line(error)}"
    if said:
        print_stderr(f"moe-inspect: {said}")  # the worker may have ended
        tell(error=said[:2000])
    os._exit(1 if said else 0)  # the thread that reads may wait for ever


def write_all(
    raw: Sent, metrics: Callable[[dict[str, Any]], Metrics], tell: Callable[..., None]
) -> None:
    """Until the worker ends. `metrics`: makes what counts; `tell`: tells the worker."""
    received = messages(io.BufferedReader(raw, 2**20))
    first = next(received, None)
    if first is None:
        return
    about = first[1]
    raw.worker_lives = lambda: is_running(about["pid"], about["process_start"])
    written = Written(about, metrics, tell)
    raw.idle = written.catch_up
    status = "interrupted"
    try:
        try:
            written.catch_up()
            for message in received:
                written.take(*message)
                status = "complete" if message[0] == "end" else status
        finally:
            written.close(status)
    except MoeInspectError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        # the writer speaks of --resume, which there is not here
        said = f"cannot write {about['trace']}: {first_line(error.__cause__)}"
        raise MoeInspectError(said) from None


class Written:
    """What is written of one worker: traces, where they are asked for, and counts."""

    def __init__(
        self,
        about: dict[str, Any],
        metrics: Callable[[dict[str, Any]], Metrics],
        tell: Callable[..., None],
    ):
        self.about, self.make_metrics, self.tell, self.told = about, metrics, tell, 0
        self.traces = Traces(about) if about["trace"] else None
        self.counts, self.metrics = bool(about["metrics"]), None

    def take(self, kind: str, *values: Any) -> None:
        traces = self.traces
        if kind == "counts":
            written = {} if traces is None else {"written_bytes": traces.written_bytes}
            self._count(values[0], **values[1], **written)
        elif traces is not None and kind == "steps":
            traces.write(*values)
        elif traces is not None:  # the end
            traces.catch_up(wait=True)
            traces.note_dropped(*values)
        self.catch_up()

    def catch_up(self) -> None:
        """Again and again, also while nothing comes."""
        self._count()
        if self.traces is not None:
            self.traces.catch_up()
            if self.told != (committed := self.traces.committed):
                self.told = committed
                self.tell(committed=committed)

    def _count(self, *given: Any, **facts: Any) -> None:
        try:
            if self.counts:
                self.metrics = self.metrics or self.make_metrics(self.about)
                self.metrics.add(*given, **facts) if given else self.metrics.publish()
        except Exception as error:  # the trace goes on
            print_stderr(f"moe-inspect: no counts in /metrics: {first_line(error)}")
            self.counts = False

    def close(self, status: str) -> None:
        if self.traces is not None:
            try:
                self.traces.close(status)
            finally:
                self.tell(committed=self.traces.committed)


class Requests:
    """Numbers the documents of a trace, which are its requests, and their sequences."""

    def __init__(self) -> None:
        self.documents = self.sequences = 0
        # of each request that has not ended: document, sequence, the next position of the sequence
        self._placed = dict[str, tuple[int, int, int]]()

    def end(self, requests: Iterable[str]) -> None:
        for request in requests:
            self._placed.pop(request, None)

    def place(self, request: str, position: int, rows: int) -> tuple[int, int, bool]:
        """Return the document and the sequence of a request's next rows, which begin at `position`,
        and whether the document is new."""
        is_new = request not in self._placed
        document, sequence, expected = self._placed.get(request, (self.documents, -1, -1))
        self.documents += is_new
        # a new sequence: the request begins, is computed again, or rows are missing
        if expected != position:
            sequence, self.sequences = self.sequences, self.sequences + 1
        self._placed[request] = document, sequence, position + rows
        return document, sequence, is_new


class Traces:
    """The traces of one worker, one after the other. Steps wait, in `queue_mb` of memory, until
    `describe` has told what the model is. `committed`: decisions that are safe, and those of
    rejected drafts, which no trace has; `written_bytes`: of its files, as last looked at."""

    def __init__(
        self, about: dict[str, Any], describe: Callable[[dict[str, Any]], Described] = ask
    ):
        self.about, self.folder = about, about["trace"]
        self.most_bytes, self.keep = about["max_gb"] * 1e9, about["keep"]
        self.dropped = self.rejected = 0  # decisions, the first of the traces before
        self.before, self.before_bytes, self.written_bytes = 0, 0, 0
        self.paths: list[Path] = []
        self.stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-rank{about['rank']}"
        self.described = ThreadPoolExecutor(1).submit(describe, about)
        self.waiting: deque[tuple[list[Step], Arrays, int]] = deque()
        self.waiting_bytes = 0
        self.writer: TraceWriter | None = None
        self.replicas: np.ndarray | None = None  # as of the last step
        self._begin()

    @property
    def committed(self) -> int:
        writer = self.writer
        return self.before + self.rejected + (0 if writer is None else writer.decisions)

    def _begin(self) -> None:
        self.requests, self.given = Requests(), 0  # decisions
        self.looked_s = time.monotonic()

    def write(self, steps: list[Step], arrays: Arrays, dropped: int) -> None:
        """Steps that follow each other, their rows, joined, and how many decisions were dropped
        since the start."""
        self.waiting.append((steps, arrays, dropped))
        self.waiting_bytes += sum(values.nbytes for of in arrays.values() for values in of)
        self.catch_up(wait=self.waiting_bytes > self.about["queue_mb"] * 1e6)

    def catch_up(self, wait: bool = False) -> None:
        """Writes what waits, once it is known what the model is."""
        if wait or self.described.done():
            while self.waiting:
                self._write(*self.waiting.popleft())
            self.waiting_bytes = 0
        if self.writer is not None:
            self.writer.check()

    def _write(self, steps: list[Step], arrays: Arrays, dropped: int) -> None:
        batch = self._batch(steps, arrays)
        self.writer = self.writer or self._open()
        self.note_dropped(dropped)
        self.given += len(batch.token_id) * len(batch.ids)
        self.writer.write(batch)
        if time.monotonic() - self.looked_s > LOOK_S:
            self.looked_s, size = time.monotonic(), stored_bytes(self.paths[-1])
            self.written_bytes = self.before_bytes + size
            if size > self.most_bytes:
                self._next()

    def note_dropped(self, dropped: int) -> None:
        """In all, since the writer began, minus those that its earlier traces state. At the end
        there may be no trace for them: one begins that has nothing else."""
        if self.writer is None and dropped > self.dropped:
            self.writer = self._open()
        if self.writer is not None:
            self.writer.dropped = dropped - self.dropped

    def _batch(self, steps: list[Step], arrays: Arrays) -> RoutedBatch:
        """Return the rows of steps, without those of rejected drafts."""
        documents, replicas = list[Document](), dict[int, Any]()
        of_requests = list[tuple[int, int, int, int, int]]()
        (token_N,), (position_N,) = arrays["tokens"], arrays["positions"]
        keep_N, start = np.ones(len(token_N), bool), 0
        for step in steps:
            self.requests.end(step.ended)
            if step.replicas is not None:
                self.replicas = step.replicas
            replicas[step.number] = self.replicas
            schedule = step.schedule
            for i, (request, prompt) in enumerate(
                zip(schedule.requests, schedule.prompts, strict=True)
            ):
                rows, first = schedule.edges[i + 1] - schedule.edges[i], int(position_N[start])
                accepted = rows
                if schedule.drafts and (drafts := schedule.drafts[i]):
                    # accepted drafts after the end of the answer do not belong to it
                    most = max(schedule.ends[i] - first, rows - drafts)
                    accepted_rows = step.accepted(i)[:most]
                    keep_N[start : start + rows] = False
                    keep_N[start + accepted_rows] = True
                    accepted = len(accepted_rows)
                    self.rejected += (rows - accepted) * len(self.about["layers"])
                document, sequence, is_new = self.requests.place(request, first, accepted)
                if is_new:
                    documents.append(Document(document, DOMAIN, request, prompt))
                of_requests.append((document, sequence, prompt, step.number, accepted))
                start += rows
        *of_rows, rows_R = np.array(of_requests, np.int32).T
        document_N, sequence_N, prompt_N, number_N = np.repeat(of_rows, rows_R, axis=1)
        if not keep_N.all():
            arrays = {name: [values[keep_N] for values in of] for name, of in arrays.items()}
        token_N, position_N = (arrays[n][0].astype(np.int32) for n in ("tokens", "positions"))
        return RoutedBatch(
            batch=steps[-1].number,
            batches=number_N,
            token_id=token_N if self.about["text"] else np.full_like(token_N, -1),
            document=document_N,
            sequence=sequence_N,
            position=position_N,
            domain=np.zeros(len(token_N), np.int32),
            domains=[DOMAIN],
            ids=arrays["ids"],
            weights=arrays["weights"],
            documents=documents,
            phases=np.where(position_N < prompt_N, PREFILL, DECODE),
            extras={name: arrays[name] for name in ("physicals", "logits") if name in arrays},
            replicas=replicas,
        )

    def _open(self) -> TraceWriter:
        path = self.folder / f"{self.stem}-{len(self.paths):04}"
        self.paths.append(path)
        manifest, routers, vocabulary = self.described.result()
        own = {"pid": os.getpid(), "process_start": process_start(os.getpid())}
        writer = TraceWriter(
            path,
            {**manifest, "capture": {**manifest["capture"], **own}},
            routers,
            logits=self.about["logits"],
            physicals=self.about["physicals"],
            vocabulary=vocabulary,
            limits=ShardLimits(commit_every=COMMIT_S),
        )
        print_stderr(f"moe-inspect: recording what the engine routes in {path}")
        return writer

    def _next(self) -> None:
        """Ends this trace; requests that go on are documents of the next one too."""
        if self.writer is not None:
            self.writer.at_close = {"capture": {"followed_by": f"{self.stem}-{len(self.paths):04}"}}
        self._end("complete")
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
        try:
            self.catch_up(wait=True)
        finally:
            self._end(status)

    def _end(self, status: str) -> None:
        writer, self.writer = self.writer, None
        if writer is not None:
            writer.given = self.given
            try:
                writer.close(status, quiet=status != "complete")
            finally:
                self.dropped += writer.dropped
                self.before += writer.decisions
                self.before_bytes += stored_bytes(self.paths[-1])
                self.written_bytes = self.before_bytes
