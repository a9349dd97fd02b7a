"""The progress bar of a command: on a terminal only, and only where the command takes a while."""

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
    """`phases`: the names of those to come, in order. The bar is of the phase that began last; the
    time left is that of this phase, at its mean speed so far."""

    def __init__(self, phases: tuple[str, ...]):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.phases = phases
        # stdout stays as it is: what is redirected would be printed to stderr
        self.rich = Progress(
            TextColumn("{task.description}"),
            BarColumn(None),
            TextColumn("{task.fields[count]}"),
            _Clock(),
            console=Console(stderr=True),
            transient=True,
            expand=True,
            redirect_stdout=False,
        )
        self.task: Any = None
        self.started = threading.Event()
        self.timer = threading.Timer(AFTER_S, self._start)
        self.timer.daemon = True
        self.timer.start()

    def _start(self) -> None:
        self.rich.start()
        self.started.set()

    def phase(self, name: str, total: int | None, unit: str) -> Callable[[int], None]:
        """Begins a phase. Returns what to call with every amount that is done."""
        label = name
        if len(self.phases) > 1 and name in self.phases:
            label += f" {self.phases.index(name) + 1}/{len(self.phases)}"
        if self.task is not None:
            self.rich.remove_task(self.task)
        self.task = task = self.rich.add_task(label, total=total, count="", began=time.monotonic())
        entry, lock = self.rich.tasks[-1], threading.Lock()

        def advance(done: int) -> None:
            with lock:
                completed = int(entry.completed) + done
                of = f"{completed:,} of {entry.total:,.0f} {unit}" if entry.total else ""
                self.rich.update(task, completed=completed, count=of, told=time.monotonic())

        advance(0)
        return advance

    def counted(self, name: str, unit: str) -> Callable[[int, int], None]:
        """The same for what tells (done, in all) itself."""
        advance, last = self.phase(name, None, unit), 0

        def at(done: int, total: int) -> None:
            nonlocal last
            self.rich.update(self.task, total=total)
            advance(done - last)
            last = done

        return at

    def close(self) -> None:
        self.timer.cancel()
        self.timer.join()
        if self.started.is_set():
            self.rich.stop()


def _Clock() -> Any:
    from rich.progress import ProgressColumn
    from rich.text import Text

    class Clock(ProgressColumn):
        """Time since the phase began, and the time left where that is known."""

        def render(self, task: Any) -> Text:
            now, fields = time.monotonic(), task.fields
            elapsed, left = now - fields["began"], 0.0
            if task.total and 0 < task.completed < task.total:
                mean = (fields["told"] - fields["began"]) / task.completed
                left = mean * (task.total - task.completed) - (now - fields["told"])
            return Text(_clock(elapsed) + (f", {_clock(left)} left" if left >= 1 else ""))

    return Clock()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@contextmanager
def shown(*phases: str) -> Generator[Bar | None]:
    """Shows the phases that a command goes through, on stderr. None where that is no terminal, or
    where stdout is a pipe: `less` and its like draw on the same terminal."""
    if not sys.stderr.isatty() or _piped():
        yield None
        return
    bar = Bar(phases)
    try:
        with progress.listening(bar.phase):
            yield bar
    finally:
        bar.close()


def _piped() -> bool:
    return stat.S_ISFIFO(os.fstat(1).st_mode)
