"""Watches a trace in the terminal until its writer is done: a view of as many lines as it has, none
wider than it; in a file or a pipe a line for each change.

L routers, E experts of the widest, R rows of the map.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.control import Control
from rich.text import Text

from moe_inspect.analysis.metrics.balance import load_ratios
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.render import heatmap
from moe_inspect.text import plural, printable
from moe_inspect.watch.follow import COMPLETE, INTERRUPTED, KILLED, RECORDING, WAITING, Piece
from moe_inspect.watch.state import HotText, WatchOptions, WatchSession

BARS = "▁▂▃▄▅▆▇█"
PLAIN_BARS = ".:-=+*#@"
# joins lines that are cut at the width
FITTING = Text("\n", no_wrap=True, overflow="ellipsis", end="")


class Screen:
    """Draws what a session has found now, and a text below it where there is one."""

    def __init__(self, session: WatchSession):
        self.session, self.watched = session, session.watched

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unicode = (console.encoding or "").lower().startswith("utf")
        height = options.height or console.height
        yield FITTING.join(islice(self._lines(options.max_width, height, unicode), height))

    def head(self, width: int) -> Text:
        """The first lines again, over the whole width: what the clock alone changes."""
        lines = list(self._head(width))
        for line in lines:
            line.truncate(width, overflow="ellipsis", pad=True)
        return FITTING.join(lines)

    def _lines(self, width: int, height: int, unicode: bool) -> Iterator[Text]:
        yield from self._head(width)
        window, text = self.watched.window, self.session.text
        if window is None:
            return
        worst, alarms = self.watched.worst_routers, self.watched.alarms
        # what is left of the height goes to the map
        rows_of_worst = min(len(worst), max(3, height // 8))
        rows_of_alarms = min(max(1, len(alarms)), max(2, height // 10))
        of_text = [] if text is None else self._text(text, width, 2 if height < 40 else 4)
        fixed = 2 + 2 + (1 + rows_of_worst) + (1 + rows_of_alarms) + len(of_text)
        yield from self._map(window, width, max(1, height - fixed), unicode)
        yield from self._worst(window, worst[:rows_of_worst], width, unicode)
        now = f"  {len(alarms)} now" if alarms else "  none"
        yield Text.assemble(("alarms", "bold"), (now, "dim"))
        shown = alarms if len(alarms) <= rows_of_alarms else alarms[: rows_of_alarms - 1]
        said = [printable(alarm.text) for alarm in shown]
        if len(shown) < len(alarms):
            said.append(f"and {plural(len(alarms) - len(shown), 'more alarm')}")
        yield from (Text(f"• {text}", "red") for text in said)
        if not alarms:
            yield Text()
        yield from of_text

    def _head(self, width: int) -> Iterator[Text]:
        watched = self.watched
        path, writer = printable(self.session.path), printable(self.session.follower.writer)
        said, look = {
            WAITING: ("waiting for a trace", "dim"),
            RECORDING: (f"recording by {writer}", ""),
            COMPLETE: ("complete", "green"),
            INTERRUPTED: ("interrupted: closed before its end", "red"),
            KILLED: (f"{writer} is gone: it was stopped before its end", "red"),
        }[watched.status]
        room = max(12, width - cell_len(f"watch   {said}"))
        path = path if cell_len(path) <= room else "…" + path[1 - room :]  # of a long path its end
        yield Text.assemble((f"watch {path}  ", "bold"), (said, look))
        if not watched.tokens:
            what = watched.trouble or "no tokens yet" * (watched.status != WAITING)
            yield Text(what, "red" if watched.trouble else "")
            return
        parts = [plural(watched.tokens, "token"), plural(watched.decisions, "decision")]
        rates = watched.rates()
        if rates is not None and watched.status == RECORDING:
            parts.append("{:,.0f} tokens/s, {:,.0f} decisions/s".format(*rates))
        if watched.left_tokens:
            parts.append(f"{watched.left_tokens:,} to be counted")
        elif watched.status == RECORDING and watched.changed_s >= 2:
            parts.append(f"last {watched.changed_s:.0f} s ago")
        if gpu := watched.busiest_gpu:
            parts.append(gpu)
        trouble = f"  {watched.trouble}" if watched.trouble else ""
        yield Text.assemble(" · ".join(parts), (trouble, "red"))

    def _map(self, window: Piece, width: int, height: int, unicode: bool) -> Iterator[Text]:
        ratio_LE, names = load_ratios(window.load), self.watched.labels
        together = -(-len(names) // height)
        rows = [names[n : n + together] for n in range(0, len(names), together)]
        labels = [row[0] if len(row) == 1 else f"{row[0]}-{row[-1]}" for row in rows]
        indent = max(map(cell_len, labels)) + 1
        E = ratio_LE.shape[1]
        per_cell = -(-E // max(1, width - indent))
        as_numbers = together == 1 and width - indent >= E * heatmap.NUMBER
        title = f"load ÷ mean, last {window.tokens:,} tokens"
        joint = {"layers": together, "experts": per_cell}
        if shape := [f"{n} {what}" for what, n in joint.items() if n > 1]:
            title += f"; cells: most extreme of {' × '.join(shape)}"
        yield Text(title, "bold")
        experts = " " * indent + "".join(f"{e:>{heatmap.NUMBER}}" for e in range(E))
        yield Text(experts if as_numbers else heatmap.legend(unicode), "dim")
        ratio_RC = heatmap.extremes(heatmap.extremes(ratio_LE.T, together).T, per_cell)
        for label, ratio_C in zip(labels, ratio_RC, strict=True):
            yield Text(label.rjust(indent - 1) + " ") + heatmap.cells(ratio_C, as_numbers, unicode)

    def _worst(self, window: Piece, worst: list[int], width: int, unicode: bool) -> Iterator[Text]:
        """The least balanced layers."""
        watched, bars = self.watched, BARS if unicode else PLAIN_BARS
        history_L = np.array(watched.history)
        what = "  busiest ÷ mean load (at most by chance)"
        yield Text.assemble(("least balanced layers", "bold"), (what, "dim"))
        for r in worst:
            load_E, vio, chance = window.load[r], history_L[-1, r], watched.chance(r)
            dead = int((load_E == 0).sum())
            said = f"layer {watched.labels[r]:<4} {1 + vio:5.2f}x ({watched.by_chance(r)})"
            said += f"  busiest expert {int(load_E.argmax())}"
            said += f", {dead} dead  " if dead else "  "
            room = max(0, min(60, width - cell_len(said)))
            line = sparkline(history_L[-room:, r], chance, bars) if room else ""
            yield Text.assemble((said, "red" if vio > chance and vio >= 0.2 else ""), line)

    def _text(self, text: HotText, width: int, most: int) -> list[Text]:
        """A title, and the last lines of the text."""
        title = f"last text for expert {text.expert} of layer {self.watched.labels[text.router]}"
        lines = [Text()]
        for word, hot in text.words:
            if lines[-1].cell_len + cell_len(word) > width:
                lines.append(Text())
            lines[-1].append(
                f"[{word}]" if hot and not word.strip() else word, "bold reverse" * hot
            )
        marked = "  (its tokens are marked)"
        return [Text.assemble((title, "bold"), (marked, "dim")), *lines[-most:]]


def sparkline(values: np.ndarray, at_least: float, bars: str) -> str:
    """A character per value, from 0 to the largest of the values and `at_least`; a space for
    NaN."""
    top = float(np.nanmax([*values, at_least, 1e-9]))
    steps = np.minimum(np.nan_to_num(values / top, nan=-1.0) * len(bars), len(bars) - 1)
    return "".join(
        " " if math.isnan(v) else bars[int(n)] for v, n in zip(values, steps, strict=True)
    )


def watch(
    path: str | Path, options: WatchOptions, console: Console, *, endings: bool = True
) -> None:
    """Shows the trace until its writer is done. With `endings`, MoeInspectError unless it is
    complete then."""
    session = WatchSession(path, options)
    watched, screen = session.watched, Screen(session)
    if console.is_terminal:
        with console.screen() as whole:
            size = None
            for changed in session.updates():
                if changed or console.size != size:
                    size = console.size
                    with console:  # one write: nothing of the old view shows in between
                        console.control(Control.home())
                        whole.update(screen)
                else:  # a hundredth of the work
                    with console:
                        console.control(Control.home())
                        console.print(screen.head(console.width), soft_wrap=True)
        # left on the terminal, with a line for the prompt
        console.print(screen, height=max(2, console.height - 2))
        console.line()
    else:
        for n, changed in enumerate(session.updates()):
            if changed or n == 0:  # at first also that there is no trace yet
                console.print(status_line(session), soft_wrap=True)
    held = plural(watched.tokens, "token")
    if endings and watched.status == KILLED:
        gone = f"{session.follower.writer} is gone: it was stopped before the end of {session.path}"
        raise MoeInspectError(f"{gone}, which holds {held}")
    if endings and watched.status != COMPLETE:
        raise MoeInspectError(f"{session.path} was closed before its end; it holds {held}")


def status_line(session: WatchSession) -> str:
    """What is new, in a line of a file: status, tokens, the least balanced layer, alarms."""
    watched = session.watched
    if watched.status == WAITING:
        return printable(f"waiting for a trace at {session.path}")
    parts = [f"{time.strftime('%H:%M:%S')} {watched.status}", plural(watched.tokens, "token")]
    if watched.left_tokens:
        parts.append(f"{watched.left_tokens:,} to be counted")
    if watched.status == RECORDING and (rates := watched.rates()) is not None:
        parts.append(f"{rates[0]:,.0f} tokens/s")
    if watched.window is not None:
        r = watched.worst_routers[0]
        busiest = f"{1 + watched.history[-1][r]:.2f}x the mean load"
        chance = watched.by_chance(r)
        chance = "chance is not known yet" if chance == "?" else f"by chance at most {chance}"
        parts.append(f"busiest expert of layer {watched.labels[r]} {busiest} ({chance})")
    if gpu := watched.busiest_gpu:
        parts.append(gpu)
    alarms = [alarm.text for alarm in watched.alarms]
    parts.append(f"{plural(len(alarms), 'alarm')}: {' '.join(alarms)}" if alarms else "no alarm")
    return printable(", ".join(parts))
