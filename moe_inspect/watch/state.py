"""What is shown of a trace while it is written: totals, the last window of tokens, alarms, and the
text that made an expert busy.

L routers, T tokens of a shard.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from moe_inspect.errors import MoeInspectError
from moe_inspect.text import first_line, layer_label, printable
from moe_inspect.trace.header import TraceHeader
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.schema import Router
from moe_inspect.trace.shard import Shard
from moe_inspect.trace.texts import as_text
from moe_inspect.watch.alarms import Alarm, Alarms, drop_rate_R, gpu_load_R, metric_R
from moe_inspect.watch.follow import (
    COMPLETE,
    ENDED,
    WAITING,
    Follower,
    News,
    Piece,
    joined,
    piece_of,
)
from moe_inspect.watch.rules import (
    DEFAULT_RULES,
    DROP_RATE,
    GPU_LOAD,
    PLAN_RULE,
    Rule,
    parse_rule,
    refuse_rules,
)

WINDOW_TOKENS = 16_384
PARTS = 16  # that a window moves on by, at most
HISTORY = 240  # values of a sparkline
RATE_S = 60.0  # over which tokens per second are averaged
MOST_RAISED = 100  # alarms that are remembered


# of each router the share of each expert's load that each GPU gets, [E, G]
Plan = Callable[[Sequence[Router]], list[np.ndarray]]


class Watched:
    """Brought up to date by `take`. `window_tokens`: a window holds at least as many, once there
    are; `window` is the last one, which moves on with every shard. Alarms judge windows that do not
    overlap: of a history of training its shards, which are windows of steps. `plan`: what places
    the experts on GPUs. MoeInspectError for a rule on what no trace holds, and for a plan that is
    not of its experts.

    window: None without tokens; `total`: the same of all tokens. history: max_vio of the window by
    router, float [L], after each shard. `gpu_total`: load of each GPU of the plan, float [G].
    alarms: those that hold now; raised: all of them. `changed_s`: since when nothing came, by the
    clock."""

    def __init__(
        self,
        window_tokens: int = WINDOW_TOKENS,
        rules: Sequence[Rule] | None = None,
        clock: Callable[[], float] = time.monotonic,
        plan: Plan | None = None,
    ):
        self.window_tokens, self._clock, self.plan = window_tokens, clock, plan
        usual = (*DEFAULT_RULES, PLAN_RULE) if plan is not None else DEFAULT_RULES
        self._rules = list(rules) if rules is not None else list(map(parse_rule, usual))
        self._placed = list[np.ndarray]()
        refuse_rules(self._rules, plan=plan is not None)
        self.status, self.trouble, self.left_tokens = WAITING, "", 0
        self.header: TraceHeader | None = None
        self.routers: list[Router] = []
        self.labels: list[str] = []  # of each router: its name after the word "layer"
        self._changed = clock()
        self._begin()

    def _begin(self) -> None:
        self.tokens = self.decisions = self.dropped = 0
        self.gpu_total: np.ndarray | None = None
        self.total: Piece | None = None
        self.window: Piece | None = None
        self.history: deque[np.ndarray] = deque(maxlen=HISTORY)
        self.raised: deque[Alarm] = deque(maxlen=MOST_RAISED)
        self._pieces: deque[Piece] = deque()
        self._to_judge: list[Piece] = []
        self._alarms: Alarms | None = None
        self._last_of: dict[tuple[str, int], Alarm] = {}
        self._came: deque[tuple[float, int, int]] = deque()
        self._last_step = 0

    @property
    def alarms(self) -> list[Alarm]:
        active = self._alarms.active if self._alarms is not None else []
        return [self._last_of[str(rule), r] for rule, r in active]

    @property
    def changed_s(self) -> float:
        """Seconds since tokens came last."""
        return self._clock() - self._changed

    def take(self, news: News, header: TraceHeader | None) -> bool:
        """Adds what a poll of the follower has found. Whether any tokens came, or the status is
        another. MoeInspectError for a rule on what this trace does not hold."""
        refuse_rules(self._rules, header, self.plan is not None)
        if self.plan is not None and header is not None and header is not self.header:
            self._placed = self.plan(header.routers)
        changed = news.again or bool(news.pieces) or news.status != self.status
        if news.again:
            self._begin()
        self.status, self.trouble, self.left_tokens = news.status, news.trouble, news.left_tokens
        self.dropped = news.dropped
        if header is not self.header:
            self.header, self.routers = header, [] if header is None else header.routers
            self.labels = [layer_label(self.routers, r) for r in range(len(self.routers))]
        if header is not None:
            for piece in news.pieces:
                self._add(piece, header)
        if news.pieces:
            self._changed = self._clock()
            if news.left_tokens:  # what was there already says nothing of the speed
                self._came.clear()
            self._came.append((self._changed, self.tokens, self.decisions))
        return changed

    def _add(self, piece: Piece, header: TraceHeader) -> None:
        if self._alarms is None:
            steps = "step" if header.is_history else "pass"
            gpus = self._placed[0].shape[1] if self._placed else 0
            self._alarms = Alarms(self.routers, self._rules, steps, gpus=gpus)
        self.tokens += piece.tokens
        self.decisions += piece.decisions
        if self._placed:
            of = [
                load_E @ share_EG for load_E, share_EG in zip(piece.load, self._placed, strict=True)
            ]
            self.gpu_total = np.sum(of, 0) + (0 if self.gpu_total is None else self.gpu_total)
        self.total = piece if self.total is None else joined([self.total, piece])
        if self._pieces and self._pieces[-1].tokens + piece.tokens <= self.window_tokens / PARTS:
            self._pieces[-1] = joined([self._pieces[-1], piece])
        else:
            self._pieces.append(piece)
        in_all = sum(part.tokens for part in self._pieces)
        while in_all - self._pieces[0].tokens >= self.window_tokens:
            in_all -= self._pieces.popleft().tokens
        self.window = joined(self._pieces)
        self.history.append(metric_R("max_vio", self.window))
        if header.is_history:  # counts do not say where they begin
            piece = replace(piece, first=self._last_step + 1)
            self._last_step = piece.last
        self._to_judge.append(piece)
        if header.is_history or sum(p.tokens for p in self._to_judge) >= self.window_tokens:
            window, self._to_judge = joined(self._to_judge), []
            values = {}
            if header.drops:
                values[DROP_RATE] = drop_rate_R(window.load, window.tokens_R, self.routers)
            if self._placed:
                values[GPU_LOAD] = gpu_load_R(window.load, self._placed)
            window = replace(window, values=values)
            for alarm in self._alarms.see(window):
                self.raised.append(alarm)
                self._last_of[alarm.rule, alarm.router] = alarm

    def rates(self) -> tuple[float, float] | None:
        """Tokens and decisions per second over the last minute, or since the two last times that
        any came; None before."""
        now = self._clock()
        while len(self._came) > 2 and self._came[1][0] < now - RATE_S:
            self._came.popleft()
        if len(self._came) < 2:
            return None
        (since, tokens, decisions), (until, *_) = self._came[0], self._came[-1]
        # nothing has come for longer than it took before: the speed falls
        seconds = max(until - since, now - self._came[-2][0], 1e-3)
        return (self.tokens - tokens) / seconds, (self.decisions - decisions) / seconds

    def chance(self, r: int) -> float:
        """The highest max_vio of the window that chance explains at router r."""
        if self.window is None or self._alarms is None:
            return float("nan")
        return self._alarms.chance("max_vio", r, self.window)

    @property
    def gpu_load(self) -> np.ndarray | None:
        """Load of the busiest GPU ÷ mean in the window, under the plan, by router; None without
        one."""
        if self.window is None or not self._placed:
            return None
        return gpu_load_R(self.window.load, self._placed)

    @property
    def busiest_gpu(self) -> str:
        """ "busiest GPU 1.31x (layer 3)", of the window under the plan; "" where there is none."""
        load_L = self.gpu_load
        if load_L is None or np.isnan(load_L).all():
            return ""
        r = int(np.nanargmax(load_L))
        return f"busiest GPU {load_L[r]:.2f}x (layer {self.labels[r]})"

    def by_chance(self, r: int) -> str:
        """The highest load of an expert ÷ mean load that chance explains; "?" where it may be any,
        as nothing is known yet of how much the load moves from window to window."""
        limit, router = 1 + self.chance(r), self.routers[r]
        return f"{limit:.2f}x" if limit < router.experts / router.top_k else "?"

    @property
    def worst_routers(self) -> list[int]:
        """Routers of an alarm first, then by the load of the busiest expert in the window."""
        if not self.history:
            return []
        vio_L = np.nan_to_num(self.history[-1], nan=-1.0)
        alarmed = {alarm.router for alarm in self.alarms}
        return sorted(range(len(vio_L)), key=lambda r: (r not in alarmed, -vio_L[r]))


BEFORE, AFTER = 40, 10  # tokens that are shown around it


@dataclass(frozen=True)
class HotText:
    """`words`: consecutive tokens of a sequence, and whether each was sent to the expert."""

    router: int
    expert: int
    words: list[tuple[str, bool]]


def hot_text(shard: Shard, router: int, expert: int) -> HotText | None:
    """None where the shard sends the expert nothing, or the trace has no text."""
    if shard.trace.counts_only or not len(vocabulary := shard.trace.vocabulary_table):
        return None
    seen, hot_T = shard.seen(router), np.zeros(shard.files.tokens, bool)
    chosen = np.logical_or.reduce([slot == expert for slot in shard.slots(router)])
    hot_T[slice(None) if seen is None else seen] = chosen
    if not hot_T.any():
        return None
    last, tokens = int(np.flatnonzero(hot_T)[-1]), shard.tokens(["token_id", "sequence"])
    sequence_T = tokens["sequence"].to_numpy()
    # a decoded sequence has one token in each pass: its tokens lie apart
    of_sequence = np.flatnonzero(sequence_T == sequence_T[last])
    at = int(np.searchsorted(of_sequence, last))
    shown = of_sequence[max(0, at - BEFORE) : at + AFTER]
    ids = tokens["token_id"].to_numpy()[shown]
    if (ids < 0).any() or (ids >= len(vocabulary)).any():
        return None
    texts = as_text(vocabulary["token"].take(pa.array(ids)).to_pylist())
    words = zip(map(printable, texts), hot_T[shown].tolist(), strict=True)
    return HotText(router, expert, list(words))


EVERY_S = 1.0


@dataclass(frozen=True)
class WatchOptions:
    """`every_s`: between two looks at the trace. `window_tokens`: of the map and of a window that
    rules judge; `rules`: None for the default ones. `plan`: what places the experts on GPUs.
    `of_process`: only the trace that this process writes."""

    every_s: float = EVERY_S
    window_tokens: int = WINDOW_TOKENS
    rules: Sequence[Rule] | None = None
    plan: Plan | None = None
    of_process: int | None = None


class WatchSession:
    """A follower, what it has found, and the last text of the least balanced layer."""

    def __init__(self, path: str | Path, options: WatchOptions):
        self.path, self.options = str(path), options
        self.follower = Follower(path, options.of_process)
        self.watched = Watched(options.window_tokens, options.rules, plan=options.plan)
        self.text: HotText | None = None

    def update(self) -> bool:
        """Looks at the trace. Whether anything is new."""
        news, watched = self.follower.poll(), self.watched
        changed, window = watched.take(news, self.follower.header), watched.window
        self.path = str(self.follower.path)
        if news.again:
            self.text = None
        if news.shards and window is not None:
            r = watched.worst_routers[0]
            try:
                self.text = hot_text(news.shards[-1], r, int(window.load[r].argmax())) or self.text
            except MoeInspectError as error:  # its shard may have been replaced by now
                watched.trouble = first_line(error)
        return changed

    @property
    def is_over(self) -> bool:
        """Whether the writer is done, and all that it wrote is counted."""
        watched = self.watched
        return watched.status in ENDED and not (watched.left_tokens or watched.trouble)

    def updates(self) -> Iterator[bool]:
        """Looks again and again, until the trace is over: whether anything was new."""
        while True:
            began = time.monotonic()
            yield self.update()
            if self.is_over:
                return
            pause_s = 0.0 if self.watched.left_tokens else self.options.every_s
            time.sleep(max(0.0, pause_s - time.monotonic() + began))


class HistoryAlarms(NamedTuple):
    """Number of windows of a training history, and the alarms raised over them, oldest first."""

    windows: int
    alarms: list[Alarm]


def alarms_of_history(trace: Trace) -> HistoryAlarms:
    """The alarms that the default rules raise over the windows of a training history."""
    pieces, watched = [piece_of(shard) for shard in trace.shards], Watched()
    watched.take(News(COMPLETE, pieces), trace)
    return HistoryAlarms(len(pieces), list(watched.raised))
