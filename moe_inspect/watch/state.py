"""What is shown of a trace while it is written: totals, the last window of tokens, alarms.

L routers, E experts of the widest.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from moe_inspect.alarms.alarms import Alarm, Alarms, Window, drop_rate_R
from moe_inspect.alarms.of_trace import refuse_rules
from moe_inspect.alarms.rules import DEFAULT_RULES, DROP_RATE, Rule, parse_rule
from moe_inspect.analysis.metrics.balance import load_ratio
from moe_inspect.analysis.metrics.registry import metrics
from moe_inspect.text import layer_label
from moe_inspect.trace.header import TraceHeader
from moe_inspect.trace.schema import Router
from moe_inspect.watch.follow import WAITING, News
from moe_inspect.watch.piece import Piece, joined

WINDOW_TOKENS = 16_384
PARTS = 16  # that a window moves on by, at most
HISTORY = 240  # values of a sparkline
RATE_S = 60.0  # over which tokens per second are averaged
MOST_RAISED = 100  # alarms that are remembered


class Watched:
    """Brought up to date by `take`. `window_tokens`: a window holds at least as many, once there
    are; `window` is the last one, which moves on with every shard. Alarms judge windows that do not
    overlap: of a history of training its shards, which are windows of steps. MoeInspectError for a
    rule on what no trace holds.

    window: its load_LE and tokens_L; None without tokens. total_LE: int64 [L, E], of all tokens.
    history: max_vio of the window by router, float [L], after each shard. alarms: those that hold
    now; raised: all of them. `changed_s`: since when nothing came, by the clock."""

    def __init__(
        self,
        window_tokens: int = WINDOW_TOKENS,
        rules: Sequence[Rule] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.window_tokens, self._clock = window_tokens, clock
        self._rules = list(rules) if rules is not None else list(map(parse_rule, DEFAULT_RULES))
        refuse_rules(self._rules)
        self.status, self.trouble, self.left_tokens = WAITING, "", 0
        self.header: TraceHeader | None = None
        self.labels: list[str] = []  # of each router: its name after the word "layer"
        self._changed = clock()
        self._begin()

    def _begin(self) -> None:
        self.tokens = self.decisions = 0
        self.total_LE = np.zeros((0, 0), np.int64)
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
    def routers(self) -> list[Router]:
        return self.header.routers if self.header is not None else []

    @property
    def _is_history(self) -> bool:
        return self.header is not None and self.header.is_history

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
        refuse_rules(self._rules, header)
        changed = news.again or bool(news.pieces) or news.status != self.status
        if news.again:
            self._begin()
        self.status, self.trouble, self.left_tokens = news.status, news.trouble, news.left_tokens
        if header is not self.header:
            self.header = header
            self.labels = [layer_label(self.routers, r) for r in range(len(self.routers))]
        for piece in news.pieces:
            self._add(piece)
        if news.pieces:
            self._changed = self._clock()
            if news.left_tokens:  # what was there already says nothing of the speed
                self._came.clear()
            self._came.append((self._changed, self.tokens, self.decisions))
        return changed

    def _add(self, piece: Piece) -> None:
        if not self.tokens:
            self.total_LE = np.zeros_like(piece.load_LE)
            steps = "step" if self._is_history else "pass"
            self._alarms = Alarms(self.routers, self._rules, steps)
        self.tokens += piece.tokens
        self.decisions += piece.decisions
        self.total_LE += piece.load_LE
        if self._pieces and self._pieces[-1].tokens + piece.tokens <= self.window_tokens / PARTS:
            self._pieces[-1] = joined([self._pieces[-1], piece])
        else:
            self._pieces.append(piece)
        in_all = sum(part.tokens for part in self._pieces)
        while in_all - self._pieces[0].tokens >= self.window_tokens:
            in_all -= self._pieces.popleft().tokens
        self.window = joined(list(self._pieces))
        self.history.append(of_routers("max_vio", self.window.load_LE, self.routers))
        if self._is_history:  # counts do not say where they begin
            piece = replace(piece, first=self._last_step + 1)
            self._last_step = piece.last
        self._to_judge.append(piece)
        if self._is_history or sum(p.tokens for p in self._to_judge) >= self.window_tokens:
            self._judge(joined(self._to_judge))
            self._to_judge = []

    def _judge(self, piece: Piece) -> None:
        assert self._alarms is not None
        load = [row_E[: r.experts] for row_E, r in zip(piece.load_LE, self.routers, strict=True)]
        drops = self.header is not None and self.header.drops
        values = {DROP_RATE: drop_rate_R(load, piece.tokens_L, self.routers)} if drops else {}
        window = Window(piece.first, piece.last, load, piece.tokens_L, values)
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

    def ratios(self) -> np.ndarray:
        """Load ÷ mean load of the window, float [L, E]; NaN beyond the experts of a router and
        without load."""
        ratio_LE = np.full(self.total_LE.shape, np.nan)
        if self.window is not None:
            for rows, E in by_width(self.routers):
                ratio_LE[rows, :E] = load_ratio(self.window.load_LE[rows, :E])
        return ratio_LE

    def chance(self, r: int) -> float:
        """The highest max_vio of the window that chance explains at router r."""
        if self.window is None or self._alarms is None:
            return float("nan")
        load_E = self.window.load_LE[r, : self.routers[r].experts]
        return self._alarms.chance_of("max_vio", r, load_E)


def of_routers(metric: str, load_LE: np.ndarray, routers: Sequence[Router]) -> np.ndarray:
    """A metric of the load, float [L]; NaN where a router has no load."""
    value_L = np.full(len(routers), np.nan)
    function = metrics()[metric].function
    for rows, E in by_width(routers):
        value_L[rows] = function(load_LE[rows, :E])
    return value_L


def by_width(routers: Sequence[Router]) -> list[tuple[np.ndarray, int]]:
    """The indices of routers with the same number of experts, and that number."""
    experts_L = np.array([router.experts for router in routers])
    return [(np.flatnonzero(experts_L == E), int(E)) for E in np.unique(experts_L)]
