"""A progress bar in forward passes, on a terminal only."""

from __future__ import annotations

import sys
from typing import Any


class PassProgress:
    """Shows passes done, passes in all, and time left."""

    def __init__(self, what: str):
        self.what = what

    def __enter__(self) -> PassProgress:
        self.bar: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

            self.bar = Progress(
                self.what,
                BarColumn(),
                MofNCompleteColumn(),
                "passes",
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self.bar.start()
            self.task = self.bar.add_task("", total=None)
        return self

    def __call__(self, done: int, total: int) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
