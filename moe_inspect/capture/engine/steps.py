"""What is kept of the steps of an engine, whichever it is: what is taken of the rows that a forward
pass has filled, and handed to the process that writes. The engine's thread never waits here, and no
fault of ours reaches it.

L routers, T rows of the buffer, n tokens of a step, K slots, E experts.
"""

from __future__ import annotations

import logging
import queue
import socket
import time
import zlib
from collections.abc import Callable, Sequence, Set
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from moe_inspect.capture.engine.rows import Rows, joined
from moe_inspect.capture.engine.settings import Settings, share
from moe_inspect.capture.engine.step import OF_SLOTS, Step
from moe_inspect.text import first_line

log = logging.getLogger(__name__)
TENSOR = 512  # bytes that one takes which holds little (measured: 455)


def shares_of(map_LP: np.ndarray, E: int, G: int) -> np.ndarray:
    """The share of each expert's load that each of G ranks gets, [L, E, G], where each rank holds
    as many physical experts, one behind the other. `map_LP`: the logical expert of each, −1 for
    none."""
    L, P = map_LP.shape
    share_LEG = np.zeros((L, E, G))
    layer_LP, rank_LP = np.indices((L, P))
    there = map_LP >= 0
    np.add.at(share_LEG, (layer_LP[there], map_LP[there], rank_LP[there] * G // P), 1)
    return share_LEG / np.maximum(share_LEG.sum(2, keepdims=True), 1)


def join_rows(steps: Sequence[Step], buffers: Sequence[Tensor | None]) -> dict[str, np.ndarray]:
    """Takes the arrays of rows from steps that follow each other, and joins them: to hand over each
    by itself would take long. `buffers`: of ids, weights, logits and physical ids, those that are
    recorded."""
    for step in steps:
        step.arrive()
    tokens, positions, *taken = zip(*(step.rows for step in steps), strict=True)
    arrays = {"tokens": np.concatenate(tokens), "positions": np.concatenate(positions)}
    rows = [step.edges[-1] for step in steps]
    for n, (name, buffer) in enumerate(zip(OF_SLOTS, buffers, strict=True)):
        if buffer is not None and len(taken) == 1:  # of a CPU, what each router returned
            values = [[choice[n] for choice in held] for held in taken[0]]
            arrays[name] = joined(values, rows, buffer)
        elif buffer is not None:
            arrays[name] = np.concatenate(taken[n], axis=1)
    for step in steps:
        step.rows = None
    return arrays


class Link(Protocol):
    """To the process that writes. `error`: why it has ended, if it has."""

    error: str | None

    def close(self) -> None: ...


class StepRecorder:
    """Of one engine, in its own thread. `start` starts the process that writes."""

    def __init__(
        self, rows: Rows, settings: Settings, start: Callable[[StepRecorder], Link], rank: int = 0
    ):
        L, _, K = rows.shape
        self.rows, self.settings, self.rank, self.start = rows, settings, rank, start
        self._keep = rows.keep if rows.host is None else rows.host.keep
        self.on, self.sample, self.counting = settings.start, settings.sample, settings.metrics
        self.room = int(settings.queue_mb * 1e6)
        size = 2 if rows.host is None else 4  # of a value: what is held is as routers return it
        values = K * (2 if rows.physicals is None else 3) + (0 if rows.logits is None else rows.E)
        self.bytes_per_row = L * size * values
        held = 2 + (rows.logits is not None) + (rows.physicals is not None)
        self.bytes_per_step = 0 if rows.host is None else L * held * TENSOR
        # the share of each expert's load that each rank of expert parallelism gets, [L, E, G]
        self.placed: Callable[[], np.ndarray | None] = lambda: None
        # where experts have replicas, the expert that each of a router is a replica of, [L, P]
        self.replicas: Callable[[], Tensor | None] = lambda: None
        self.queue: queue.SimpleQueue[Step] = queue.SimpleQueue()
        self.steps = self.recorded = self.dropped = 0  # steps; decisions that were queued, or not
        self.taken = 0  # bytes that were queued
        # of these what has left the queue, and decisions that were lost on their way: the link's
        self.sent = self.lost = 0
        # tokens and their assignments, as they were handed over
        self.counted: tuple[int, np.ndarray] = 0, np.zeros(L * rows.E, np.int64)
        self.seconds = 0.0  # of the engine's thread
        self.error: str | None = None
        # requests that the process that writes knows of, and those that are not recorded; both stay
        # so until they end, whatever the share of requests becomes
        self._live, self._skipped = set[str](), set[str]()
        self._ended: set[str] = set()  # of the first, what it is to be told
        self._held: Step | None = None  # whose drafts are to be judged
        gpu = rows.device.type != "cpu"
        self._copies = torch.Stream(rows.device) if gpu else None
        if rows.staged is not None:  # compiled before the engine serves
            for kind in (torch.int32, torch.int64):  # of token ids
                rows.take(0, 1, None, rows.every.to(kind), rows.every)
        self.link = start(self)

    def keep(self, router: int, *choice: Tensor) -> None:
        """In the forward pass: a router's choice, as `Rows.keep` takes it."""
        if self.rows.compiled and torch.compiler.is_compiling():
            self.rows.keep(router, *choice)
        elif self.error is None:
            try:
                self._keep(router, *choice)
            except Exception as error:
                self.stop(error)

    def after_step(self, tokens: int, ended: Set[str], whose: Callable[[], Step]) -> None:
        """Takes what a forward pass over so many tokens has left in the rows. `ended`: requests
        that ended before it. `whose` is only asked where something is recorded."""
        began = time.perf_counter()
        self.steps += 1
        try:
            self._release()
            # a compiled graph runs on, and fails in each step
            fault, self.rows.fault = self.rows.fault, None
            if fault is not None and self.error is None:
                raise fault
            if ended:
                self._ended |= ended & self._live
                self._live -= ended
                self._skipped -= ended
            if self.on and tokens and self.link.error is None:
                counted = tokens if self.counting else 0
                if self.settings.trace is not None:
                    self._take(counted, whose())
                elif counted:
                    self.rows.take(counted)
        except Exception as error:
            self.stop(error)
        self.seconds += time.perf_counter() - began

    def after_sampling(self, sampled_R: Tensor | None) -> None:
        """Tells how many tokens each request of the last step was given."""
        if self._held is None or sampled_R is None:
            return
        step = self._held
        try:
            (step.sampled,), copied = self._to_host([sampled_R.clone()])
            step.copied = copied or step.copied  # the later event, of the same stream
            self._release()
        except Exception as error:
            self.stop(error)

    def _release(self) -> None:
        """Hands over the step that waited for its drafts to be judged."""
        if self._held is not None:
            step, self._held = self._held, None
            if self.link.error is None:
                self.queue.put(step)
            else:  # nobody takes it
                self.sent += step.bytes
                self.lost += step.edges[-1] * self.rows.shape[0]

    def stop(self, error: Exception) -> None:
        """The engine goes on without us."""
        self.on = False
        self._release()
        self.error = f"{type(error).__name__}: {first_line(error)}"
        log.exception("moe-inspect: recording has stopped")

    def _take(self, counted: int, step: Step) -> None:
        """Counts the first `counted` rows, and queues the step, filled with those of the requests
        that are sampled."""
        wanted, rows, nobody = None, None, not step.requests
        if self.sample < 1 or self._skipped:
            wanted = [self._is_sampled(request) for request in step.requests]
            nobody = not any(wanted)
            if not nobody:
                step, rows = step.only(wanted)
        L, n = self.rows.shape[0], 0 if nobody else step.edges[-1]
        size = n * self.bytes_per_row + self.bytes_per_step
        if full := self.taken - self.sent + size > self.room:
            self.dropped += n * L
        if full or nobody:
            if counted:
                self.rows.take(counted)
            return
        picked = None
        if rows is not None:
            picked = torch.from_numpy(rows)
            picked = picked if self._copies is None else picked.pin_memory()
            picked = picked.to(self.rows.device, non_blocking=True)
        if self._copies is not None:  # what was taken before is on its way from the same place
            torch.accelerator.current_stream().wait_stream(self._copies)
        taken = self.rows.take(counted, n, picked, step.tokens, step.positions)
        replicas = self.replicas()  # the next forward pass may have others
        taken.append(None if replicas is None else replicas.to(torch.int16, copy=True))
        (*step.rows, step.replicas), step.copied = self._to_host(taken)
        step.tokens = step.positions = None
        step.number, step.bytes = self.steps, size
        step.ended, self._ended = self._ended, set()
        self._live.update(step.requests)
        self.taken += size
        self.recorded += n * L
        if any(step.drafts):
            self._held, step.wanted = step, wanted
        else:
            self.queue.put(step)

    def _to_host(self, arrays: list[Tensor | None]) -> tuple[list[Tensor | None], Any]:
        """Beside the model's work, on a stream of its own; and the event behind it."""
        if self._copies is None:
            return arrays, None
        self._copies.wait_stream(torch.accelerator.current_stream())
        with self._copies:
            host = [None if a is None else a.to("cpu", non_blocking=True) for a in arrays]
            copied = self._copies.record_event()
        for array in arrays:
            if array is not None:
                array.record_stream(self._copies)
        return host, copied

    def _is_sampled(self, request: str) -> bool:
        if request in self._live:
            return True
        if request in self._skipped or zlib.crc32(request.encode()) >= self.sample * 2**32:
            self._skipped.add(request)
            return False
        return True

    # --- from outside

    def command(self, what: str, value: str = "") -> dict[str, Any]:
        """Does one of on, off, sample SHARE, metrics on|off, status, and says how things are. What
        cannot be done is said as `refused`."""
        try:
            refused = self._do(what, value)
        except Exception as error:
            refused = f"{type(error).__name__}: {first_line(error)}"
        state = {
            "rank": self.rank,
            "trace": None if self.settings.trace is None else str(self.settings.trace),
            "host": socket.gethostname(),
            "on": self.on and self.link.error is None,
            "sample": self.sample if self.settings.trace is not None else 0.0,
            "metrics": self.counting,
            "steps": self.steps,
            "decisions": self.recorded - self.lost,
            "dropped": self.dropped + self.lost,
            "queued_bytes": self.taken - self.sent,
            "us_per_step": round(self.seconds / max(self.steps, 1) * 1e6, 1),
            "error": self.error or self.link.error,
        }
        return {**state, "refused": refused} if refused else state

    def _do(self, what: str, value: str) -> str | None:
        if what == "on":
            if self.link.error is not None:  # a new process, and a new trace
                self._live, self._ended = set(), set()
                self.link = self.start(self)
            self.error, self.on = None, True
        elif what == "off":
            self.on = False
        elif what == "sample":
            if self.settings.trace is None:
                return "MOE_INSPECT_TRACE was not set when the engine was started"
            try:
                self.sample = share(value)
            except ValueError as error:
                return f"sample is {value!r}, not {error}"
        elif what == "metrics":
            if not self.settings.metrics:
                return "MOE_INSPECT_METRICS=1 was not set when the engine was started"
            self.counting = value == "on"
        elif what != "status":
            return f"no command {what!r}"
        return None

    def close(self) -> None:
        """Waits a few seconds at most for what is queued to be handed over."""
        try:
            self._release()
            self.on = False
            self.link.close()
        except Exception:
            log.exception("moe-inspect: the trace was not closed")
