"""Watches a trace in the terminal until its writer is done."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.control import Control
from rich.segment import Segment, Segments

from moe_inspect.alarms.rules import Rule
from moe_inspect.errors import MoeInspectError
from moe_inspect.text import first_line, plural, printable
from moe_inspect.watch.follow import COMPLETE, ENDED, KILLED, WAITING, Follower, News
from moe_inspect.watch.piece import HotText, hot_text
from moe_inspect.watch.screen import Screen, worst_routers
from moe_inspect.watch.state import WINDOW_TOKENS, Watched

EVERY_S = 1.0


@dataclass(frozen=True)
class WatchOptions:
    """`every_s`: between two looks at the trace. `window_tokens`: of the map and of a window that
    rules judge; `rules`: None for the default ones. `texts`: show text of the tokens.
    `of_process`: only the trace that this process writes."""

    every_s: float = EVERY_S
    window_tokens: int = WINDOW_TOKENS
    rules: Sequence[Rule] | None = None
    texts: bool = True
    of_process: int | None = None


class Session:
    """A follower, what it has found, and the last text of the least balanced layer."""

    def __init__(self, path: str | Path, options: WatchOptions):
        self.path, self.options = str(path), options
        self.follower = Follower(path, options.of_process)
        self.watched = Watched(options.window_tokens, options.rules)
        self.text: HotText | None = None

    def update(self) -> bool:
        """Looks at the trace. Whether anything is new."""
        news = self.follower.poll()
        changed = self.watched.take(news, self.follower.header)
        if news.again:
            self.text = None
        if news.shards and self.options.texts:
            try:
                self.text = self._text_of(news) or self.text
            except MoeInspectError as error:  # its shard may have been replaced by now
                self.watched.trouble = first_line(error)
        return changed

    @property
    def is_over(self) -> bool:
        """Whether the writer is done, and all that it wrote is counted."""
        watched = self.watched
        return watched.status in ENDED and not (watched.left_tokens or watched.trouble)

    def _text_of(self, news: News) -> HotText | None:
        header, window = self.follower.header, self.watched.window
        if header is None or window is None or header.counts_only:
            return None
        r = worst_routers(self.watched)[0]
        expert = int(window.load_LE[r].argmax())
        return hot_text(news.shards[-1], r, expert, header.vocabulary_table)

    def screen(self) -> Screen:
        return Screen(self.watched, self.path, self.follower.writer, self.text)

    def updates(self) -> Iterator[bool]:
        """Looks again and again, until the trace is over: whether anything was new."""
        while True:
            began = time.monotonic()
            yield self.update()
            if self.is_over:
                return
            behind = self.watched.left_tokens > 0
            time.sleep(
                max(0.0, (0.0 if behind else self.options.every_s) - time.monotonic() + began)
            )


def watch(
    path: str | Path, options: WatchOptions, console: Console, *, endings: bool = True
) -> None:
    """Shows the trace until its writer is done. With `endings`, MoeInspectError unless it is
    complete then."""
    session = Session(path, options)
    if console.is_terminal:
        with console.screen() as whole:
            size = None
            for changed in session.updates():
                if changed or console.size != size:
                    size = console.size
                    with console:  # one write: nothing of the old view shows in between
                        console.control(Control.home())
                        whole.update(session.screen())
                else:  # a hundredth of the work
                    head = session.screen().head(console.width)
                    console.print(Segments([Control.home().segment, *head]), end="")
        console.print(_Last(session.screen()))
    else:
        for changed in session.updates():
            if changed:
                console.print(status_line(session), soft_wrap=True)
    if endings:
        _refuse_unless_complete(session)


def _refuse_unless_complete(session: Session) -> None:
    watched = session.watched
    if watched.status == KILLED:
        raise MoeInspectError(
            f"{session.follower.writer} is gone: it was stopped before the end of {session.path}, "
            f"which holds {plural(watched.tokens, 'token')}"
        )
    if watched.status != COMPLETE:
        raise MoeInspectError(
            f"{session.path} was closed before its end; it holds {plural(watched.tokens, 'token')}"
        )


class _Last:
    """The screen, left on the terminal with a line for the prompt."""

    def __init__(self, screen: Screen):
        self.screen = screen

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(
            self.screen, options.update(height=max(2, console.height - 2)), pad=False
        )
        for line in lines:
            yield from line
            yield Segment.line()


def status_line(session: Session) -> str:
    """What is new, in a line of a file: status, tokens, the least balanced layer, alarms."""
    watched = session.watched
    if watched.status == WAITING:
        return printable(f"waiting for a trace at {session.path}")
    parts = [f"{time.strftime('%H:%M:%S')} {watched.status}", plural(watched.tokens, "token")]
    if (rates := watched.rates()) is not None:
        parts.append(f"{rates[0]:,.0f} tokens/s")
    if watched.window is not None:
        r = worst_routers(watched)[0]
        busiest = f"{1 + watched.history[-1][r]:.2f}x the mean load"
        chance = f"by chance at most {1 + watched.chance(r):.2f}x"
        parts.append(f"busiest expert of layer {watched.labels[r]} {busiest} ({chance})")
    alarms = watched.alarms
    parts.append(
        f"{plural(len(alarms), 'alarm')}: " + " ".join(a.text for a in alarms)
        if alarms
        else "no alarm"
    )
    return printable(", ".join(parts))
