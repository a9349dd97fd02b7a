"""How far a command is: on a terminal only, and only where the command takes a while."""

from __future__ import annotations

import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from moe_inspect import progress

AFTER_S = 0.5  # a command that is done by then shows no bar


class Bar:
    """The phase that a command is in, as one line: how much of it is done and how fast, the time
    since the command began, and the time that is left of the phase. A phase whose total is not
    known has a bar that moves to and fro."""

    def __init__(self):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.began = time.monotonic()
        self.lock = threading.Lock()
        # stdout stays as it is: what is redirected would be printed to stderr
        self.rich = Progress(
            TextColumn("{task.description}"),
            BarColumn(None),
            *_columns(self.began),
            console=Console(stderr=True),
            transient=True,
            expand=True,
            redirect_stdout=False,
        )
        self.now: Any = self.rich.add_task("starting", total=None, unit="")
        self.started = threading.Event()
        self.timer = threading.Timer(AFTER_S, self._start)
        self.timer.daemon = True
        self.timer.start()

    def _start(self) -> None:
        self.rich.start()
        self.started.set()

    def phase(self, name: str, total: int, unit: str) -> Callable[[int], None]:
        """Begins a phase. Returns what to call with every amount that is done."""
        with self.lock:
            self.rich.update(self.now, visible=False)
            task = self.now = self.rich.add_task(name, total=total or None, unit=unit)
        return lambda done: self.rich.advance(task, done)

    def counted(self, name: str, unit: str) -> Callable[[int, int | None], None]:
        """The same for what tells (done, in all) itself."""
        self.phase(name, 0, unit)
        task = self.now
        return lambda done, total: self.rich.update(task, completed=done, total=total)

    def close(self) -> None:
        self.timer.cancel()
        self.timer.join()
        if self.started.is_set():
            self.rich.stop()


def _columns(began: float) -> list[Any]:
    from rich.progress import ProgressColumn
    from rich.table import Column
    from rich.text import Text

    class Count(ProgressColumn):
        def render(self, task: Any) -> Text:
            unit = task.fields["unit"]
            done = f"{task.completed:,.0f} of {task.total:,.0f} {unit}" if task.total else ""
            many = done and (task.speed or 0) >= 10  # time left says more of few
            return Text(f"{done}, {task.speed:,.0f} {unit}/s" if many else done)

    class Clock(ProgressColumn):
        def render(self, task: Any) -> Text:
            said, left = _clock(time.monotonic() - began), task.time_remaining
            return Text(f"{said}, {_clock(left)} left" if left else said)

    return [column(Column(no_wrap=True)) for column in (Count, Clock)]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@contextmanager
def shown() -> Generator[Bar | None]:
    """Shows the phases that a command goes through, on stderr. None where that is no terminal, or
    where stdout is a pipe: `less` and its like draw on the same terminal."""
    if not sys.stderr.isatty() or _piped():
        yield None
        return
    bar = Bar()
    try:
        with progress.listening(bar.phase):
            yield bar
    finally:
        bar.close()


def _piped() -> bool:
    return stat.S_ISFIFO(os.fstat(1).st_mode)
