"""The progress bar of a command: on a terminal only, and only where the command takes a while."""

from __future__ import annotations

import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from moe_inspect import progress

Costs = list[tuple[str, float]]  # of phases, in order
AFTER_S = 0.5  # a command that is done by then shows no bar


@dataclass
class Phase:
    """One that began. cost: of the whole phase; 0 where it was not planned. told: when it was last
    said how much is done."""

    name: str
    cost: float
    total: int | None
    unit: str
    began: float
    told: float
    done: int = 0

    @property
    def share(self) -> float:
        return min(self.done / self.total, 1.0) if self.total else 0.0

    @property
    def took(self) -> float:
        """Seconds, up to when it was last told of."""
        return self.told - self.began


class Bar:
    """The phases of a command, one after the other. `costs`: the name of each that may come, in
    order, with its cost in any unit: what counts is their ratio, which says how much of the whole a
    phase is. A phase that is not among those to come costs nothing."""

    def __init__(self, costs: Costs):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.names, self.costs = [name for name, _ in costs], [cost for _, cost in costs]
        self.now: Phase | None = None
        self.next = 0  # the phases before `next` have begun or were left out
        self.spent_s = self.paid = 0.0  # of the phases that are done
        self.lock = threading.RLock()
        # stdout stays as it is: what is redirected would be printed to stderr
        self.rich = Progress(
            TextColumn("{task.description}"),
            BarColumn(None),
            TextColumn("{task.fields[count]}"),
            _clock_column(self),
            console=Console(stderr=True),
            transient=True,
            expand=True,
            redirect_stdout=False,
        )
        self.began = time.monotonic()
        self.task: Any = self.rich.add_task("", total=sum(self.costs), count="")
        self.started = threading.Event()
        self.timer = threading.Timer(AFTER_S, self._start)
        self.timer.daemon = True
        self.timer.start()

    def _start(self) -> None:
        self.rich.start()
        self.started.set()

    def phase(self, name: str, total: int | None, unit: str) -> Callable[[int], None]:
        """Begins a phase. Returns what to call with every amount that is done."""
        with self.lock:
            now = time.monotonic()
            if self.now is not None:
                self.spent_s += now - self.now.began if self.now.cost else 0
                self.paid += self.now.cost
            new = name in self.names[self.next :]
            self.next = self.names.index(name, self.next) + 1 if new else self.next
            cost = self.costs[self.next - 1] if new else 0.0
            phase = self.now = Phase(name, cost, total, unit, now, now)

        def advance(done: int) -> None:
            with self.lock:
                phase.done += done
                phase.told = time.monotonic()
                if phase is self.now:
                    self._show(phase)

        advance(0)
        return advance

    def counted(self, name: str, unit: str) -> Callable[[int, int], None]:
        """The same for what tells (done, in all) itself."""
        advance = self.phase(name, None, unit)
        phase = self.now
        assert phase is not None

        def at(done: int, total: int) -> None:
            phase.total = total
            advance(done - phase.done)

        return at

    def _show(self, phase: Phase) -> None:
        label, done = phase.name, f"{phase.done:,} of {phase.total or 0:,} {phase.unit}"
        if len(self.names) > 1 and phase.cost:
            label += f" {self.next}/{len(self.names)}"
        before = sum(self.costs[: self.next]) - phase.cost
        self.rich.update(
            self.task,
            description=label,
            count=done if phase.total else "",
            completed=before + phase.share * phase.cost,
        )

    def left_s(self) -> float | None:
        """Seconds until the command is done: of this phase at its mean speed so far, of those to
        come at the mean cost of a second so far. None where that is not known."""
        with self.lock:
            phase, later = self.now, sum(self.costs[self.next :])
            if phase is None:
                return None
            paid = self.paid + phase.share * phase.cost
            spent_s = self.spent_s + (phase.took if phase.cost else 0)
            rate = spent_s / paid if paid else None
            own = phase.took * (1 / phase.share - 1) if phase.share else None
            if own is None and rate is not None:
                own = phase.cost * rate
            if own is None or (later and rate is None):
                return None
            return own + later * (rate or 0) - (time.monotonic() - phase.told)

    @property
    def estimated(self) -> bool:
        """Whether phases are to come, of which the speed is not known yet."""
        return self.next < len(self.names)

    def close(self) -> None:
        self.timer.cancel()
        self.timer.join()
        if self.started.is_set():
            self.rich.stop()


def _clock_column(bar: Bar) -> Any:
    from rich.progress import ProgressColumn
    from rich.table import Column
    from rich.text import Text

    class Clock(ProgressColumn):
        """Time since the command began, and the time left where that is known."""

        def render(self, task: Any) -> Text:
            said, left = _clock(time.monotonic() - bar.began), bar.left_s()
            if left is not None and left >= 1:
                said += f", {'about ' * bar.estimated}{_clock(left)} left"
            return Text(said)

    return Clock(Column(no_wrap=True))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@contextmanager
def shown(*costs: tuple[str, float]) -> Generator[Bar | None]:
    """Shows the phases that a command goes through, on stderr. `costs`: of `Bar`. None where that
    is no terminal, or where stdout is a pipe: `less` and its like draw on the same terminal."""
    if not sys.stderr.isatty() or _piped():
        yield None
        return
    bar = Bar(list(costs))
    try:
        with progress.listening(bar.phase):
            yield bar
    finally:
        bar.close()


def _piped() -> bool:
    return stat.S_ISFIFO(os.fstat(1).st_mode)
