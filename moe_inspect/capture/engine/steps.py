"""Records the steps of an engine, whichever it is: takes the rows that a forward pass has filled
and queues them for the process that writes. The engine's thread never waits here, and no fault of
ours reaches it.

L routers, N rows of a step, E experts, G ranks of expert parallelism, P physical experts.
"""

from __future__ import annotations

import logging
import queue
import socket
import time
import zlib
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from moe_inspect.capture.engine.rows import PLACES, REPLICAS, SAMPLED, EngineRows
from moe_inspect.capture.engine.settings import Settings, share
from moe_inspect.capture.engine.step import Arrays, Schedule, Step
from moe_inspect.capture.rows import TakenPass, stored_values
from moe_inspect.text import first_line

log = logging.getLogger(__name__)
STEP_BYTES = 4096  # of the objects of a step, besides its rows
# the requests of a step, and its tokens and positions, which the engine has on its device
Scheduled = tuple[Schedule, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class TakenStep:
    """A step in the queue. Its rows may still be on their way from a GPU. `ended`: requests that
    have ended before it."""

    number: int
    schedule: Schedule
    ended: Set[str]
    taken: TakenPass
    nbytes: int

    def arrived(self, known: np.ndarray | None) -> Step:
        """Return the step without its rows, once they have arrived; and without its replicas if
        these are the `known` ones."""
        self.taken.has_arrived(wait=True)
        sampled, replicas = (
            values[0].cpu().numpy() if (values := self.taken.values.get(name)) else None
            for name in (SAMPLED, REPLICAS)
        )
        if replicas is not None and known is not None and np.array_equal(replicas, known):
            replicas = None
        return Step(self.number, self.schedule, self.ended, sampled, replicas)


def join_rows(steps: Sequence[TakenStep], names: Sequence[str]) -> Arrays:
    """Join the rows of steps that follow each other and have arrived: to hand over each by itself
    would take long."""
    passes = [step.taken for step in steps]
    return {name: stored_values(passes, name, None) for name in (*PLACES, *names)}


class StepQueue:
    """Steps on their way to the process that writes, in at most `max_bytes`.

    Each number has one thread that changes it: `decisions`, `dropped` and `_bytes` (all that came)
    the engine's, `lost` and `_gone_bytes` the one that takes steps off."""

    def __init__(self, max_bytes: int, L: int):
        self.max_bytes, self.L = max_bytes, L
        self.decisions = self.dropped = 0  # for which there was room; for which there was none
        self.lost = 0  # decisions that were lost after they left the queue
        self._steps = queue.SimpleQueue[TakenStep]()
        self._bytes = self._gone_bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes that wait."""
        return self._bytes - self._gone_bytes

    def has_room(self, nbytes: int) -> bool:
        return self.nbytes + nbytes <= self.max_bytes

    def drop(self, rows: int) -> None:
        """Count a step of so many rows, for which there is no room."""
        self.dropped += rows * self.L

    def admit(self, step: TakenStep) -> None:
        """Reserve the room of a step, which is put in later."""
        self._bytes += step.nbytes
        self.decisions += step.schedule.rows * self.L

    def put(self, step: TakenStep) -> None:
        self._steps.put(step)

    def take(self) -> list[TakenStep]:
        """Take all steps off, which are then to be released."""
        return [self._steps.get() for _ in range(self._steps.qsize())]

    def release(self, steps: Sequence[TakenStep], lost: bool = False) -> int:
        """Steps that were taken off are handed over, or lost. Return their decisions."""
        decisions = sum(step.schedule.rows for step in steps) * self.L
        self._gone_bytes += sum(step.nbytes for step in steps)
        self.lost += decisions * lost
        return decisions


class RequestSample:
    """Chooses a share of the requests, by their names. A request stays chosen, or not, until it
    ends, whatever the share becomes."""

    def __init__(self, share: float):
        self.share = share
        self._recorded, self._skipped = set[str](), set[str]()
        self._ended = set[str]()  # recorded ones, which `hand_over` has not returned yet

    def end(self, requests: Set[str]) -> None:
        if requests:
            self._ended |= requests & self._recorded
            self._recorded -= requests
            self._skipped -= requests

    def chosen(self, requests: Sequence[str]) -> list[bool] | None:
        """Return which requests are chosen; None if all are, as long as the share is 1."""
        if self.share == 1 and not self._skipped:
            return None
        return [self._is_chosen(request) for request in requests]

    def _is_chosen(self, request: str) -> bool:
        if request in self._recorded:
            return True
        if request in self._skipped or zlib.crc32(request.encode()) >= self.share * 2**32:
            self._skipped.add(request)
            return False
        return True

    def hand_over(self, requests: Sequence[str]) -> Set[str]:
        """Note that a step of chosen requests is recorded. Return those that have ended since the
        last one."""
        self._recorded.update(requests)
        ended, self._ended = self._ended, set()
        return ended

    def forget(self) -> None:
        """Begin with a new process that writes, which knows no requests."""
        self._recorded, self._ended = set(), set()


class Link(Protocol):
    """Connection to the process that writes. `error`: why it has ended, if it has."""

    error: str | None

    def close(self) -> None: ...


class StepRecorder:
    """Records the steps of one engine, in the engine's thread.

    start     starts the process that writes
    placed    returns the share of each expert's load that each rank of expert parallelism gets
              [L, E, G], or None
    replicas  returns the expert of each physical expert in the last forward pass [L, P], or None
    """

    def __init__(
        self,
        rows: EngineRows,
        settings: Settings,
        start: Callable[[StepRecorder], Link],
        rank: int = 0,
        placed: Callable[[], np.ndarray | None] = lambda: None,
        replicas: Callable[[], Tensor | None] = lambda: None,
    ):
        self.rows, self.settings, self.rank, self.start = rows, settings, rank, start
        self.placed, self.replicas = placed, replicas
        self.on, self.counting = settings.start, settings.metrics
        self.sample = RequestSample(settings.sample)
        self.queue = StepQueue(int(settings.queue_mb * 1e6), rows.L)
        self.steps, self.seconds = 0, 0.0  # steps so far, and the time that they took here
        self.error: str | None = None
        # a step whose drafts the engine has not judged yet, and its requests among the engine's
        self._unjudged: tuple[TakenStep, np.ndarray] | None = None
        self.link = start(self)

    # --- a step

    def keep(self, router: int, *choice: Tensor) -> None:
        """In the forward pass: keep a router's choice, as `EngineRows.keep` takes it."""
        if torch.compiler.is_compiling():
            self.rows.keep(router, *choice)
        elif self.error is None:
            try:
                self.rows.keep(router, *choice)
            except Exception as error:
                self.stop(error)

    def after_step(self, tokens: int, ended: Set[str], scheduled: Callable[[], Scheduled]) -> None:
        """Take the rows of a forward pass over so many tokens. `ended`: requests that ended before
        it. `scheduled` is only called if a trace is recorded."""
        began = time.perf_counter()
        self.steps += 1
        try:
            self._put_unjudged()
            fault = self.rows.take_fault()  # a compiled graph goes on, and fails in each step
            if fault is not None and self.error is None:
                raise fault
            self.sample.end(ended)
            if self.on and tokens and self.link.error is None:
                self._take(tokens, scheduled)
        except Exception as error:
            self.stop(error)
        self.rows.forget()
        self.seconds += time.perf_counter() - began

    def _take(self, tokens: int, scheduled: Callable[[], Scheduled]) -> None:
        """Count the rows of the step, and queue those of the requests that are sampled."""
        values = None
        if self.counting:
            values = self.rows.written(tokens)
            self.rows.load.add(values["ids"][0])
        if self.settings.trace is None:
            return
        schedule, token_N, position_N = scheduled()
        requests, rows = np.arange(len(schedule.requests)), None
        if (chosen := self.sample.chosen(schedule.requests)) is not None:
            requests, rows = np.flatnonzero(chosen), schedule.rows_of(chosen)
            schedule = schedule.only(chosen)
        nbytes = schedule.rows * self.rows.bytes_per_row + STEP_BYTES
        if not len(requests):
            return
        if not self.queue.has_room(nbytes):
            self.queue.drop(schedule.rows)
            return
        values = values or self.rows.written(tokens)
        taken = self.rows.take(values, rows, token_N, position_N, self.replicas())
        ended = self.sample.hand_over(schedule.requests)
        step = TakenStep(self.steps, schedule, ended, taken, nbytes)
        self.queue.admit(step)
        if any(schedule.drafts):
            self._unjudged = step, requests
        else:
            self.queue.put(step)

    def after_sampling(self, sampled_R: Tensor | None) -> None:
        """Note how many tokens each request of the last step was given."""
        if self._unjudged is None or sampled_R is None:
            return
        try:
            step, requests = self._unjudged
            sampled_R = sampled_R.index_select(0, self.rows.on_device(requests))
            taken = step.taken.joined(self.rows.copy({SAMPLED: [sampled_R]}))
            self._unjudged = replace(step, taken=taken), requests
            self._put_unjudged()
        except Exception as error:
            self.stop(error)

    def _put_unjudged(self) -> None:
        """Queue the step that waited for its drafts to be judged."""
        if self._unjudged is not None:
            (step, _), self._unjudged = self._unjudged, None
            if self.link.error is None:
                self.queue.put(step)
            else:  # nobody takes it
                self.queue.release([step], lost=True)

    def stop(self, error: Exception) -> None:
        """Stop recording. The engine goes on."""
        self.on = False
        self._put_unjudged()
        self.error = f"{type(error).__name__}: {first_line(error)}"
        log.exception("moe-inspect: recording has stopped")

    # --- from outside

    def command(self, what: str, value: str = "") -> dict[str, Any]:
        """Run one of on, off, sample SHARE, metrics on|off, status, and return the state; with
        `refused`, the reason, if the command cannot be run."""
        try:
            refused = self._do(what, value)
        except Exception as error:
            refused = f"{type(error).__name__}: {first_line(error)}"
        state = {
            "rank": self.rank,
            "trace": None if self.settings.trace is None else str(self.settings.trace),
            "host": socket.gethostname(),
            "on": self.on and self.link.error is None,
            "sample": self.sample.share if self.settings.trace is not None else 0.0,
            "metrics": self.counting,
            "steps": self.steps,
            "decisions": self.queue.decisions - self.queue.lost,
            "dropped": self.queue.dropped + self.queue.lost,
            "queued_bytes": self.queue.nbytes,
            "us_per_step": round(self.seconds / max(self.steps, 1) * 1e6, 1),
            "error": self.error or self.link.error,
        }
        return {**state, "refused": refused} if refused else state

    def _do(self, what: str, value: str) -> str | None:
        if what == "on":
            if self.link.error is not None:  # a new process, and a new trace
                self.sample.forget()
                self.link = self.start(self)
            self.error, self.on = None, True
        elif what == "off":
            self.on = False
        elif what == "sample":
            if self.settings.trace is None:
                return "MOE_INSPECT_TRACE was not set when the engine was started"
            try:
                self.sample.share = share(value)
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
        """Wait a few seconds at most until the queue is handed over."""
        try:
            self._put_unjudged()
            self.on = False
            self.link.close()
        except Exception:
            log.exception("moe-inspect: the trace was not closed")
