"""Alarms: judges windows one after the other by rules, and says what is wrong where, and what
helps.

R routers, E experts, S steps.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from moe_inspect.alarms.chance import (
    PAIRS,
    chance_limit,
    effect_of,
    effect_of_pair,
    far,
    few_p,
    tail_of,
)
from moe_inspect.alarms.rules import (
    BATCH,
    DEFAULT_RULES,
    DRIFT,
    DROP_RATE,
    OF_MODEL,
    Rule,
    parse_rule,
)
from moe_inspect.analysis.metrics import balance as bal
from moe_inspect.analysis.metrics import windows as win
from moe_inspect.analysis.metrics.chance import LONG_DOCUMENT
from moe_inspect.analysis.metrics.registry import metrics
from moe_inspect.text import join_first, layer_label
from moe_inspect.trace.schema import Router


@dataclass(frozen=True)
class Window:
    """Consecutive optimizer steps (or forward passes) `first` to `last`. `load`: assignments of
    each router's experts, int64 [E] each; `tokens_R`: tokens each router saw. `values`: what the
    load does not tell, by metric, float [R]; NaN where a router has no such value. `recent`: the
    loads of the last steps, int64 [S, E] of each router, where they are known."""

    first: int
    last: int
    load: Sequence[np.ndarray]
    tokens_R: np.ndarray
    values: Mapping[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])
    recent: Sequence[np.ndarray] = ()


def drop_rate_R(
    load: Sequence[np.ndarray], tokens_R: np.ndarray, routers: Sequence[Router]
) -> np.ndarray:
    """Share of each router's slots that routed nowhere, float [R]; NaN without tokens."""
    slots_R = tokens_R * np.array([router.top_k for router in routers])
    load_R = np.array([load_E.sum() for load_E in load])
    return np.where(slots_R > 0, 1 - load_R / np.maximum(slots_R, 1), np.nan)


_BALANCE = (
    "Balance each layer by itself (a loss pooled over layers lets one collapse) with a higher "
    "coefficient (arXiv:2101.03961), or by a bias on the selection, without a loss "
    "(arXiv:2408.15664)."
)
_DEAD = (
    f"{_BALANCE} An expert without tokens gets no gradient and stays dead: add noise to the router "
    "(arXiv:1701.06538), or raise the capacity factor where tokens are dropped (arXiv:2101.03961)."
)
_DRIFT = (
    "A lower learning rate of the router, or warm-up, keeps the choice stable (arXiv:2202.08906); "
    "the router's z-loss keeps its logits small (arXiv:2202.08906)."
)
_LOGITS = (
    "Raise the coefficient of the router's z-loss, or lower its learning rate (arXiv:2202.08906)."
)
ADVICE: Mapping[str, str] = {
    "dead_experts": _DEAD,
    "starved_experts": _DEAD,
    "min_over_max": _DEAD,
    "drift": _DRIFT,
    "z_loss": _LOGITS,
    "drop_rate": (
        "Raise the capacity factor (arXiv:2101.03961), or balance the layer, whose dropped tokens "
        "skip the experts that they chose; dropless experts drop none (arXiv:2211.15841)."
    ),
    "bias_range": (
        "Lower the update rate of the selection bias, and check that it is updated once per step "
        "from the load of all ranks (arXiv:2408.15664)."
    ),
}


def advice(metric: str) -> str:
    """One or two sentences on what helps, with a source."""
    return ADVICE.get(metric, _BALANCE)


CALM = 3
VALUES = (DROP_RATE, *OF_MODEL)  # that a window states
At = Callable[[np.ndarray], np.ndarray]
AT_FAULT: dict[str, At] = {  # load_E → bool [E], the experts at fault
    "dead_experts": lambda load_E: load_E == 0,
    "starved_experts": lambda load_E: (load_E > 0) & (load_E < bal.STARVED * load_E.mean()),
    "min_over_max": lambda load_E: np.arange(len(load_E)) == load_E.argmin(),
}


def busiest(load_E: np.ndarray) -> np.ndarray:
    """The busiest expert alone, bool [E]."""
    return np.arange(len(load_E)) == load_E.argmax()


@dataclass(frozen=True)
class Alarm:
    """A rule that a router has broken. `experts`: those at fault; `since`: the first step of the
    windows that broke it, `step`: the last; `value`: of the last window, `chance`: what chance
    alone would at most (at least) give, NaN where that is not known; `help`: what helps."""

    rule: str
    metric: str
    layer: int
    router: int
    experts: tuple[int, ...]
    since: int
    step: int
    value: float
    chance: float
    text: str
    help: str

    def __str__(self) -> str:
        return f"{self.text} {self.help}"

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        known = {**asdict(self), "experts": list(self.experts)}
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in known.items()}


@dataclass
class _Watched:
    """One rule at one router: how many windows in a row have broken it, since which step, or kept
    it; the best value seen; and whether the alarm was raised. Of each expert since it is at fault:
    windows_E, of those at_fault_E, and their load_E, tokens_E; missed: in which of the last windows
    it was not. since_E: the first step."""

    E: int
    memory: int
    broken: int = 0
    kept: int = 0
    since: int = 0
    best: float = math.nan
    raised: bool = False

    def __post_init__(self) -> None:
        self.windows_E, self.at_fault_E, self.load_E, self.since_E = np.zeros((4, self.E), np.int64)
        self.tokens_E = np.zeros(self.E)
        self.missed: deque[np.ndarray] = deque(maxlen=self.memory)

    def add(self, fault_E: np.ndarray, load_E: np.ndarray, tokens: float, first: int) -> None:
        """One more window."""
        begins_E = fault_E & (self.windows_E == 0)
        self.since_E[begins_E] = first
        on_E = begins_E | (self.windows_E > 0)
        self.windows_E += on_E
        self.at_fault_E += fault_E
        self.load_E += on_E * load_E
        self.tokens_E += on_E * tokens
        self.missed.append(on_E & ~fault_E)

    def forget(self, of_E: np.ndarray) -> None:
        """Begins anew for these experts."""
        for values_E in (self.windows_E, self.at_fault_E, self.load_E, self.tokens_E, *self.missed):
            values_E[of_E] = 0


@dataclass
class Alarms:
    """Judges windows by rules. An alarm is raised once, and can be again after CALM windows in a
    row (or as many as the rule says, if more) that keep the rule. Windows without tokens at a
    router do not count. `effects`: the design effect of the documents on the load of each router,
    where it is known; else it is estimated from how much the load moves between windows, and for
    the first two it is LONG_DOCUMENT."""

    routers: Sequence[Router]
    rules: Sequence[Rule] = field(
        default_factory=lambda: [parse_rule(text) for text in DEFAULT_RULES]
    )
    steps: str = "step"  # what first and last of a window number
    effects: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        self._watched = [
            [_Watched(router.experts, rule.windows) for router in self.routers]
            for rule in self.rules
        ]
        self._before: Window | None = None
        self._pairs = [deque[float](maxlen=PAIRS) for _ in self.routers]

    @property
    def active(self) -> list[tuple[Rule, int]]:
        """Rules that are broken now, with the router."""
        return [
            (rule, r)
            for rule, of_rule in zip(self.rules, self._watched, strict=True)
            for r, watched in enumerate(of_rule)
            if watched.raised
        ]

    def see(self, window: Window) -> list[Alarm]:
        """The alarms that the next window raises."""
        raised = list[Alarm]()
        values_of = {rule.metric: self.values(rule.metric, window) for rule in self.rules}
        for rule, of_rule in zip(self.rules, self._watched, strict=True):
            for r, watched in enumerate(of_rule):
                if rule.layers is not None and self.routers[r].layer not in rule.layers:
                    continue
                value = float(values_of[rule.metric][r])
                if not math.isnan(value):
                    raised += self._judge(rule, r, watched, value, window)
        if self._before is not None:
            pairs = zip(self._before.load, window.load, strict=True)
            for r, (before_E, load_E) in enumerate(pairs):
                moved = effect_of_pair(before_E, load_E, self.routers[r].top_k)
                if not math.isnan(moved):
                    self._pairs[r].append(moved)
        self._before = window
        return raised

    def effect(self, r: int) -> float:
        """The design effect of the documents on the load of router r."""
        known = self.effects.get(r, math.nan) if self.effects is not None else math.nan
        if not math.isnan(known):
            return known
        pairs = list(self._pairs[r])
        return effect_of(pairs, self.routers[r].experts) if pairs else float(LONG_DOCUMENT)

    def chance_of(self, metric: str, r: int, load_E: np.ndarray) -> float:
        """The highest value of a metric of one window's load that chance explains."""
        return self._limit(metric, r, load_E[None], above=True, windows=1)

    def _limit(self, metric: str, r: int, load_SE: np.ndarray, above: bool, windows: int) -> float:
        """`chance_limit` of a metric of the mean over steps, for so many windows in a row."""
        E, k = self.routers[r].experts, self.routers[r].top_k
        tail = tail_of(len(self.routers), windows)
        tokens = float(np.mean(np.sum(load_SE, -1))) / k
        return chance_limit(metric, tokens, E, k, above, self.effect(r), tail, len(load_SE))

    def values(self, metric: str, window: Window) -> np.ndarray:
        """A metric of each router in a window, float [R]; NaN where it has none."""
        if metric in VALUES:
            return np.asarray(window.values.get(metric, np.full(len(self.routers), np.nan)), float)
        if metric == BATCH:
            return max_vio_of_steps(window.recent or [np.zeros((0, 1))] * len(self.routers))
        if metric == DRIFT:
            return drift_R(self._before, window)
        return of_load(metric, window.load)

    def _judge(
        self, rule: Rule, r: int, watched: _Watched, value: float, window: Window
    ) -> list[Alarm]:
        reference, load_E = watched.best, np.asarray(window.load[r])
        best = max if rule.sign == "falling" else min
        watched.best = value if math.isnan(reference) else best(value, reference)
        chance = self._chance(rule, r, window)
        broken = _breaks(rule, value, reference)
        if rule.beyond_chance and not math.isnan(chance):
            broken &= value > chance if rule.above else value < chance
        fault_E = self._at_fault(rule.metric, r, load_E) & (rule.of_experts | broken)
        tokens = float(load_E.sum()) / self.routers[r].top_k
        watched.add(fault_E, load_E, tokens, window.first)
        if rule.of_experts:
            watched.forget(sum(watched.missed, np.zeros(len(load_E), int)) > rule.misses)
            fault_E = self._stays(rule, r, watched)
            value = float(fault_E.sum())
            broken = _breaks(rule, value, reference)
        if not broken:
            watched.broken, watched.kept = 0, watched.kept + 1
            watched.raised &= watched.kept < max(CALM, rule.windows)
            if not rule.of_experts:
                watched.forget(np.ones(len(load_E), bool))
            return []
        watched.broken, watched.kept = watched.broken + 1, 0
        if watched.broken == 1:
            watched.since = window.first
        if watched.raised or (watched.broken < rule.windows and not rule.of_experts):
            return []
        watched.raised = True
        if rule.of_experts:
            experts, since = np.flatnonzero(fault_E), int(watched.since_E[fault_E].min())
        else:  # the one most often at fault, and of those the one furthest from the mean
            apart_E = np.abs(watched.load_E - watched.load_E.mean())
            order = np.lexsort((apart_E, watched.at_fault_E))[-1:]
            experts, since = order[watched.at_fault_E[order] > 0], watched.since
        return [self._alarm(rule, r, experts, since, value, reference, chance, window)]

    def _stays(self, rule: Rule, r: int, watched: _Watched) -> np.ndarray:
        """Which experts have been at fault in as many windows as the rule says, are starved in all
        of these together, and that beyond chance: the windows since an expert is at fault are
        pooled. bool [E]"""
        k = self.routers[r].top_k
        fair_E = watched.tokens_E * k / len(watched.tokens_E)
        long_E = watched.windows_E >= rule.windows
        long_E &= watched.load_E < bal.STARVED * fair_E
        if not rule.beyond_chance or not long_E.any():
            return long_E
        p_E = few_p(watched.load_E, watched.tokens_E, k, self.effect(r))
        return long_E & (p_E < tail_of(len(self.routers), 1))

    def _chance(self, rule: Rule, r: int, window: Window) -> float:
        """What chance alone would at most (at least) give; NaN where that is not known, or experts
        are judged one by one."""
        if rule.metric in VALUES or rule.of_experts:
            return math.nan
        if rule.metric == DRIFT:
            k, tail = self.routers[r].top_k, tail_of(len(self.routers), rule.windows)
            return _drift_by_chance(self._before, window, r, k, self.effect(r), tail)
        load_SE = window.recent[r] if rule.metric == BATCH else np.asarray(window.load[r])[None]
        return self._limit(rule.metric, r, load_SE, rule.above, rule.windows)

    def _alarm(
        self,
        rule: Rule,
        r: int,
        experts: np.ndarray,
        since: int,
        value: float,
        reference: float,
        chance: float,
        window: Window,
    ) -> Alarm:
        where = f"Layer {layer_label(self.routers, r)}"
        named = join_first([str(e) for e in experts], 6, ", ")
        of = f", expert{'s' if len(experts) > 1 else ''} {named}" if len(experts) else ""
        side = "at most" if rule.above else "at least"
        by_chance = f"; by chance {side} {chance:.3g}" if not math.isnan(chance) else ""
        tokens = f"{int(window.tokens_R[r]):,} tokens"
        now = "" if rule.of_experts else f", now {value:.3g}"
        text = (
            f"{where}{of}: {rule.metric} {_side(rule, reference)} since {self.steps} {since}"
            f"{now} (rule: {rule}; {self.steps} {window.first} to {window.last}, "
            f"{tokens}{by_chance})."
        )
        return Alarm(
            str(rule),
            rule.metric,
            self.routers[r].layer,
            r,
            tuple(int(e) for e in experts),
            since,
            window.last,
            value,
            chance,
            text,
            advice(rule.metric),
        )

    def _at_fault(self, metric: str, r: int, load_E: np.ndarray) -> np.ndarray:
        """The experts at fault in a window, bool [E]."""
        if metric in VALUES:
            return np.zeros(len(load_E), bool)
        if metric == DRIFT and self._before is not None:
            load_E = np.abs(_share(load_E) - _share(self._before.load[r]))
        return AT_FAULT.get(metric, busiest)(load_E)


def of_load(metric: str, load: Sequence[np.ndarray]) -> np.ndarray:
    """A metric of the load of each router, float [R]."""
    function = metrics()[metric].function
    return np.array([float(function(load_E[None])[0]) for load_E in load])


def max_vio_of_steps(recent: Sequence[np.ndarray]) -> np.ndarray:
    """The mean over steps of each router's max_vio, float [R]. recent: int64 [S, E] each."""
    return np.array([_mean(bal.max_vio(load_SE)) for load_SE in recent])


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if not np.isnan(values).all() else math.nan


def drift_R(before: Window | None, window: Window) -> np.ndarray:
    """Total variation between the load shares of a window and the one before, 0 to 1, of each
    router, [R]. NaN without load in both."""
    if before is None:
        return np.full(len(window.load), np.nan)
    pairs = zip(before.load, window.load, strict=True)
    return np.array([win.step_total_variation(np.stack(pair))[0] for pair in pairs])


def _drift_by_chance(
    before: Window | None, window: Window, r: int, k: int, effect: float, tail: float
) -> float:
    if before is None:
        return math.nan
    load_WE = np.stack([before.load[r], window.load[r]])
    floor_W, _ = win.step_floors(_share(load_WE.sum(0)), load_WE.sum(1) / k, k, effect)
    # the mean of a sum of half-normal parts, each with a deviation of 0.756 of its mean
    return float(floor_W[0]) * (1 + far(tail) * 0.756 / math.sqrt(max(len(load_WE[0]) - 1, 1)))


def _breaks(rule: Rule, value: float, reference: float) -> bool:
    """Whether a value meets the condition, chance aside."""
    limit = rule.value
    if rule.sign == "falling":
        return value < reference * (1 - limit)
    if rule.sign == "rising":
        return value > reference * (1 + limit)
    return {
        ">": value > limit,
        ">=": value >= limit,
        "<": value < limit,
        "<=": value <= limit,
    }[rule.sign]


def _side(rule: Rule, reference: float) -> str:
    """ "above 1.5": where the values that break a rule lie."""
    if rule.sign in ("falling", "rising"):
        return f"{'down' if rule.sign == 'falling' else 'up'} from {reference:.3g}"
    words = {">": "above", ">=": "at least", "<": "below", "<=": "at most"}
    return f"{words[rule.sign]} {rule.value:g}"


def _share(load_E: np.ndarray) -> np.ndarray:
    return np.asarray(load_E) / max(int(np.sum(load_E)), 1)
