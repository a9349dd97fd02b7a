"""A progress bar in tokens, on a terminal only."""

from __future__ import annotations

import sys
import time
from typing import Any


class TokenProgress:
    """Shows tokens, tokens/s and time left."""

    def __enter__(self) -> TokenProgress:
        self.bar: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:,.0f} tokens"),
                TextColumn("{task.fields[rate]:,.0f} tokens/s"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self.bar.start()
            self.task = self.bar.add_task("starting", total=None, rate=0)
            self.began: float | None = None
        return self

    def __call__(self, done: int, total: int | None) -> None:
        if self.bar is None:
            return
        if self.began is None:  # the first forward pass pays for set-up
            self.began, self.first = time.monotonic(), done
        elapsed = time.monotonic() - self.began
        rate = (done - self.first) / elapsed if elapsed > 0 else 0
        self.bar.update(self.task, description="tracing", completed=done, total=total, rate=rate)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
