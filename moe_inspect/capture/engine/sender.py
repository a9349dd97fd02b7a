"""Hands the queued steps of an engine to the process that writes, from a thread of the engine's
process: all that came in a while at once, so that it seldom competes for the interpreter."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from moe_inspect.capture.engine.rows import EngineRows
from moe_inspect.capture.engine.settings import CORES, Settings
from moe_inspect.capture.engine.step import Step
from moe_inspect.capture.engine.steps import StepRecorder, TakenStep, join_rows
from moe_inspect.capture.rows import PHYSICALS
from moe_inspect.errors import writing
from moe_inspect.text import first_line
from moe_inspect.trace.files.lock import process_start

log = logging.getLogger(__name__)
# seconds between two hand-overs
EVERY_S = 0.2
COUNTS_EVERY_S = 1.0
CLOSE_S = 5.0  # engines kill workers that take longer to stop
# the writer gets no GPU and one thread
QUIET = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
# It is no child of the worker's for long, as engines kill those. And it reads while it imports:
# the first steps come before it is ready, and a worker that is killed may have no others
START = """
import os, queue, sys, threading
os.fork() and os._exit(0)
os.setsid()
try:
    os.sched_setaffinity(0, map(int, sys.argv[1].split()))
except (AttributeError, OSError):
    pass
sys.path[:] = sys.argv[2:]
chunks = queue.Queue(1024)
def read():
    while chunk := os.read(0, 2**16):
        chunks.put(chunk)
    chunks.put(b"")
threading.Thread(target=read, daemon=True).start()
from moe_inspect.capture.engine.sidecar import run
from moe_inspect.watch.metrics import EngineMetrics
run(chunks, EngineMetrics)
"""


def recorder_of(
    rows: EngineRows, settings: Settings, about: dict[str, Any], **maps: Any
) -> StepRecorder:
    """Return a recorder with a process that writes. `about`: what that must know of the engine, its
    model and the layers; `maps`: `placed` and `replicas` of a StepRecorder. The directory of traces
    exists before the engine serves."""
    if settings.trace is not None:
        with writing(settings.trace):
            settings.trace.mkdir(parents=True, exist_ok=True)
    facts = {
        **about,
        "version": version(about["engine"]),
        "experts": rows.E,
        "top_k": rows.K,
        "physicals": PHYSICALS in rows.kinds,
        "device": str(rows.device),
        **vars(settings),
    }
    if rows.has_buffers:
        log.info("moe-inspect: buffers of %.0f MB on %s", rows.nbytes / 1e6, rows.device)
    return StepRecorder(rows, settings, partial(Sender, about=facts), about["rank"], **maps)


class Sender(threading.Thread):
    """`about`: what the process that writes must know of the engine, its model and the settings."""

    def __init__(self, recorder: StepRecorder, about: dict[str, Any]):
        super().__init__(name="moe-inspect", daemon=True)
        self.recorder, self.error = recorder, None
        self._about, self._ending = about, threading.Event()
        self._counted_s = time.monotonic()
        self._dropped = recorder.queue.dropped  # before it: of another's traces
        self._handed = 0  # decisions
        self._process: Any = None
        self._heard, self._told = b"", dict[str, Any]()
        self._stated_drops = 0
        self._placed: np.ndarray | None = None
        self._replicas: np.ndarray | None = None  # as the one that writes knows them
        self.start()

    def run(self) -> None:
        with suppress(AttributeError, OSError):
            os.sched_setaffinity(0, CORES)  # of this thread alone
        try:
            self._begin()
            traces = self.recorder.settings.trace is not None
            while not self._ending.wait(EVERY_S if traces else COUNTS_EVERY_S):
                self._hand_over()
            self._hand_over(last=True)
            self._send("end", self.recorder.queue.dropped - self._dropped)
            self._close_pipe()
        except Exception as error:  # the engine goes on
            self._fail(error)

    def _begin(self) -> None:
        python = sys.executable, "-P", "-c", START
        self._process = subprocess.Popen(
            [*python, " ".join(map(str, CORES)), *map(os.path.abspath, sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **QUIET},
        )
        self._process.wait()  # the one that writes has parted from it
        own = {"pid": os.getpid(), "process_start": process_start(os.getpid())}
        self._send("about", {**self._about, **own})

    def close(self) -> None:
        """Hands over what is queued, if that takes no longer than CLOSE_S."""
        self._ending.set()
        self.join(CLOSE_S)

    def _hand_over(self, last: bool = False) -> None:
        recorder = self.recorder
        if steps := recorder.queue.take():
            try:
                arrived = [self._arrived(step) for step in steps]
                arrays = join_rows(steps, recorder.rows.names)
                # waits for the one that writes; meanwhile the queue fills, and the engine drops
                self._send("steps", arrived, arrays, recorder.queue.dropped - self._dropped)
            except Exception:
                recorder.queue.release(steps, lost=True)
                raise
            self._handed += recorder.queue.release(steps)
        if recorder.settings.metrics:
            now = time.monotonic()
            if last or now - self._counted_s >= COUNTS_EVERY_S:
                self._counted_s = now
                self._send_counts()
        if self._listen():
            raise BrokenPipeError

    def _arrived(self, step: TakenStep) -> Step:
        arrived = step.arrived(self._replicas)
        if arrived.replicas is not None:
            self._replicas = arrived.replicas
        return arrived

    def _send_counts(self) -> None:
        recorder, load = self.recorder, self.recorder.rows.load
        dropped = recorder.queue.dropped + recorder.queue.lost
        facts: dict[str, Any] = {"steps": recorder.steps, "dropped": dropped}
        # otherwise the GPU is not asked: it may be capturing a graph
        if load.tokens != load.handed_over[0] or dropped != self._stated_drops:
            placed, known = recorder.placed(), self._placed
            if placed is not None and (known is None or (placed != known).any()):
                facts["placed"] = self._placed = placed
            (before, before_LE), (tokens, counts_LE) = load.handed_over, load.so_far()
            self._send(
                "counts", (counts_LE - before_LE).ravel(), {"tokens": tokens - before} | facts
            )
            load.handed_over, self._stated_drops = (tokens, counts_LE), dropped

    def _send(self, *message: Any) -> None:
        pipe = self._process.stdin
        pickle.dump(message, pipe, protocol=5)
        pipe.flush()

    def _fail(self, error: Exception) -> None:
        self.recorder.on = False  # nothing is queued any more
        self._close_pipe()
        self._listen(wait=not self._ending.is_set())
        said = self._told.get("error")
        if not said:
            said = f"recording has failed: {type(error).__name__}: {first_line(error)}"
            if isinstance(error, BrokenPipeError):
                said = "the process that writes has ended"
        queue = self.recorder.queue
        queue.release(queue.take(), lost=True)
        if self.recorder.settings.trace is not None:  # on their way, or not committed yet
            queue.lost += self._handed - self._told.get("committed", 0)
        self._forget_gauges()
        self.error = said
        log.error("moe-inspect: recording has stopped, the engine goes on: %s", said)

    def _close_pipe(self) -> None:
        if self._process is not None:
            with suppress(OSError):
                self._process.stdin.close()

    def _listen(self, wait: bool = False) -> bool:
        """Takes what the process that writes has said; with `wait`, until it has ended. Whether it
        has."""
        if self._process is None:
            return False
        file, ended = self._process.stdout.fileno(), False
        os.set_blocking(file, wait)
        with suppress(BlockingIOError):
            while chunk := os.read(file, 2**16):
                self._heard += chunk
            ended = True
        *lines, self._heard = self._heard.split(b"\n")
        for line in lines:
            self._told |= json.loads(line)
        return ended

    def _forget_gauges(self) -> None:
        """What it last said in /metrics is true no more. Counters stay: they are sums."""
        if folder := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            for file in Path(folder).glob(f"gauge_*_{self._told.get('pid')}.db"):
                with suppress(OSError):
                    file.unlink()
