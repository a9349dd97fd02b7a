"""Alarms: judges windows one after the other by rules, and says what is wrong where.

R routers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from moe_inspect.alarms.advice import advice
from moe_inspect.alarms.chance import DEPENDENCE, chance_limit
from moe_inspect.alarms.rules import DEFAULT_RULES, DRIFT, OF_MODEL, Rule, parse_rule
from moe_inspect.alarms.window import Window
from moe_inspect.analysis.metrics import balance as bal
from moe_inspect.analysis.metrics import windows as win
from moe_inspect.analysis.metrics.registry import metrics
from moe_inspect.text import join_first, layer_label
from moe_inspect.trace.schema import Router

CALM = 3
WHICH: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # load_E → the experts at fault
    "dead_experts": lambda load_E: np.flatnonzero(load_E == 0),
    "starved_experts": lambda load_E: np.flatnonzero(
        (load_E > 0) & (load_E < bal.STARVED * load_E.mean())
    ),
    "min_over_max": lambda load_E: np.array([load_E.argmin()]),
}


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
    it; the best value seen; and whether the alarm was raised."""

    broken: int = 0
    kept: int = 0
    since: int = 0
    best: float = math.nan
    raised: bool = False


@dataclass
class Alarms:
    """Judges windows by rules. An alarm is raised once, and can be again after CALM windows in a
    row (or as many as the rule says, if more) that keep the rule. Windows without tokens at a
    router do not count."""

    routers: Sequence[Router]
    rules: Sequence[Rule] = field(
        default_factory=lambda: [parse_rule(text) for text in DEFAULT_RULES]
    )
    steps: str = "step"  # what first and last of a window number

    def __post_init__(self) -> None:
        self._watched = [[_Watched() for _ in self.routers] for _ in self.rules]
        self._before: Window | None = None

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
        self._before = window
        return raised

    def values(self, metric: str, window: Window) -> np.ndarray:
        """A metric of each router in a window, float [R]; NaN where it has none."""
        if metric in OF_MODEL:
            return np.asarray(window.values.get(metric, np.full(len(self.routers), np.nan)), float)
        if metric == DRIFT:
            return drift_R(self._before, window)
        function = metrics()[metric].function
        return np.array([float(function(load_E[None])[0]) for load_E in window.load])

    def _judge(
        self, rule: Rule, r: int, watched: _Watched, value: float, window: Window
    ) -> list[Alarm]:
        reference = watched.best
        best = max if rule.sign == "falling" else min
        watched.best = value if math.isnan(reference) else best(value, reference)
        chance = self._chance(rule, r, window)
        if not _breaks(rule, value, reference) or (
            rule.beyond_chance
            and not math.isnan(chance)
            and not (value > chance if rule.above else value < chance)
        ):
            watched.broken, watched.kept = 0, watched.kept + 1
            watched.raised &= watched.kept < max(CALM, rule.windows)
            return []
        watched.broken, watched.kept = watched.broken + 1, 0
        if watched.broken == 1:
            watched.since = window.first
        if watched.raised or watched.broken < rule.windows:
            return []
        watched.raised = True
        return [self._alarm(rule, r, watched.since, value, reference, chance, window)]

    def _chance(self, rule: Rule, r: int, window: Window) -> float:
        """What chance alone would at most (at least) give; NaN where that is not known."""
        router, tokens = self.routers[r], int(window.tokens_R[r])
        if rule.metric in OF_MODEL:
            return math.nan
        if rule.metric == DRIFT:
            return _drift_by_chance(self._before, window, r, router.top_k)
        return chance_limit(rule.metric, tokens, router.experts, router.top_k, rule.above)

    def _alarm(
        self,
        rule: Rule,
        r: int,
        since: int,
        value: float,
        reference: float,
        chance: float,
        window: Window,
    ) -> Alarm:
        load_E = np.asarray(window.load[r])
        experts = self._experts(rule.metric, r, load_E)
        where = f"Layer {layer_label(self.routers, r)}"
        named = join_first([str(e) for e in experts], 6, ", ")
        of = f", expert{'s' if len(experts) > 1 else ''} {named}" if len(experts) else ""
        side = "at most" if rule.above else "at least"
        by_chance = f"; by chance {side} {chance:.3g}" if not math.isnan(chance) else ""
        tokens = f"{int(window.tokens_R[r]):,} tokens"
        text = (
            f"{where}{of}: {rule.metric} {_side(rule, reference)} since {self.steps} {since}, "
            f"now {value:.3g} (rule: {rule}; {self.steps} {window.first} to {window.last}, "
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

    def _experts(self, metric: str, r: int, load_E: np.ndarray) -> np.ndarray:
        if metric in OF_MODEL and metric != "max_vio_batch":
            return np.zeros(0, np.int64)
        if metric == DRIFT and self._before is not None:
            return np.array([np.abs(_share(load_E) - _share(self._before.load[r])).argmax()])
        return WHICH.get(metric, lambda load_E: np.array([load_E.argmax()]))(load_E)


def drift_R(before: Window | None, window: Window) -> np.ndarray:
    """Total variation between the load shares of a window and the one before, 0 to 1, of each
    router, [R]. NaN without load in both."""
    if before is None:
        return np.full(len(window.load), np.nan)
    pairs = zip(before.load, window.load, strict=True)
    return np.array([win.step_total_variation(np.stack(pair))[0] for pair in pairs])


def _drift_by_chance(before: Window | None, window: Window, r: int, k: int) -> float:
    if before is None:
        return math.nan
    load_E = np.asarray(before.load[r]) + np.asarray(window.load[r])
    tokens_W = np.array([before.tokens_R[r], window.tokens_R[r]], float)
    floor_W, _ = win.step_floors(_share(load_E), tokens_W, k, DEPENDENCE)
    return 2 * float(floor_W[0])  # the floor is the mean


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
