"""Alarms: judges windows one after the other by rules, and says what is wrong where, and what
helps.

R routers, E experts, k choices per token, T tokens, W windows, S steps.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache

import numpy as np

from moe_inspect.analysis.metrics import balance as bal
from moe_inspect.analysis.metrics import windows as win
from moe_inspect.analysis.metrics.chance import ALPHA, LONG_DOCUMENT, z_of
from moe_inspect.analysis.metrics.registry import metrics
from moe_inspect.analysis.metrics.uncertainty import random_loads, special
from moe_inspect.text import join_first, layer_label
from moe_inspect.trace.schema import Router
from moe_inspect.watch.rules import BATCH, DRIFT, DROP_RATE, GPU_LOAD, OF_MODEL, Rule


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


VALUES = (DROP_RATE, GPU_LOAD, *OF_MODEL)  # metrics that a window states


def drop_rate_R(
    load: Sequence[np.ndarray], tokens_R: np.ndarray, routers: Sequence[Router]
) -> np.ndarray:
    """Share of each router's slots that routed nowhere, float [R]; NaN without tokens."""
    slots_R = tokens_R * np.array([router.top_k for router in routers])
    load_R = np.array([load_E.sum() for load_E in load])
    return np.where(slots_R > 0, 1 - load_R / np.maximum(slots_R, 1), np.nan)


def gpu_load_R(load: Sequence[np.ndarray], placed: Sequence[np.ndarray]) -> np.ndarray:
    """Load of each router's busiest GPU ÷ mean over GPUs, float [R]; NaN without load. `placed`: of
    each router the share of each expert's load that each GPU gets, [E, G]."""
    of_gpus = [load_E @ share_EG for load_E, share_EG in zip(load, placed, strict=True)]
    return np.array([of.max() / of.mean() if of.any() else np.nan for of in of_gpus])


def metric_R(metric: str, window: Window, before: Window | None = None) -> np.ndarray:
    """A metric of each router in a window, float [R]; NaN where it has none. "drift": the total
    variation between the load shares of the window `before` and this one, 0 to 1;
    "max_vio_batch": the mean over the last steps of max_vio; else one of the load."""
    none_R = np.full(len(window.load), np.nan)
    if metric in VALUES:
        return np.asarray(window.values.get(metric, none_R), float)
    if metric == DRIFT and before is not None:
        pairs = zip(before.load, window.load, strict=True)
        return np.array([win.step_total_variation(np.stack(pair))[0] for pair in pairs])
    if metric == BATCH and window.recent:
        vio_RS = [bal.max_vio(load_SE) for load_SE in window.recent]
        return np.array([np.nan if np.isnan(s).all() else np.nanmean(s) for s in vio_RS])
    if metric in (DRIFT, BATCH):
        return none_R
    function = metrics()[metric].function
    return np.array([np.asarray(function(load_E[None])).item() for load_E in window.load], float)


# --- what chance alone does to the metrics of a window, and how much more the text does

WINDOWS = 400  # simulated
RUN = 1_000  # windows of a run: one run in 1 / ALPHA may raise a false alarm by a rule
OFF_RATIO = {"max_over_mean": 0, "max_vio": 1, BATCH: 1}  # load ratio − metric
PAIRS = 64  # windows that a design effect is estimated from, at most


def tail_of(routers: int, windows: int) -> float:
    """The probability by which a window is beyond chance, so that so many in a row are in ALPHA of
    the runs by chance, at any of the routers."""
    return (ALPHA / (routers * RUN)) ** (1 / windows)


def chance_limit(
    metric: str, T: float, E: int, k: int, above: bool, effect: float, tail: float, steps: int = 1
) -> float:
    """The highest (`above`, else the lowest) value of a metric of the load that chance gives with
    probability `tail`: a Gumbel tail at the mean and standard deviation of 400 windows whose
    tokens choose k of E experts at random. A window has T tokens ÷ the design effect of their
    documents, rounded down to a power of 2. `steps`: of the mean over so many windows."""
    tokens = int(max(1.0, T / max(effect, 1.0)))
    mean, sd = _moments(metric, 1 << (tokens.bit_length() - 1), E, k)
    limit = mean + (1 if above else -1) * far(tail) * sd / math.sqrt(steps)
    # not above that of an expert which every token chooses
    return min(limit, E / k - OFF_RATIO[metric]) if metric in OFF_RATIO else limit


def share(load_E: np.ndarray) -> np.ndarray:
    return np.asarray(load_E) / max(int(np.sum(load_E)), 1)


def far(tail: float) -> float:
    """How many standard deviations above its mean the tail of a Gumbel distribution begins."""
    at = -math.log(-math.log1p(-tail)) - float(np.euler_gamma)
    return max(0.0, at * math.sqrt(6) / math.pi)


@lru_cache(maxsize=32)
def _windows(T: int, E: int, k: int) -> np.ndarray:
    return random_loads(T, E, k, WINDOWS)


@lru_cache(maxsize=1024)
def _moments(metric: str, T: int, E: int, k: int) -> tuple[float, float]:
    function = bal.max_vio if metric == BATCH else metrics()[metric].function
    values_W = np.asarray(function(_windows(T, E, k)))
    return float(values_W.mean()), float(values_W.std())


def effect_of_pair(before_E: np.ndarray, load_E: np.ndarray, k: int) -> float:
    """How much more the load moved from one window to the next than that of independent tokens
    does on average: the design effect, as far as documents lie within windows. NaN without load."""
    T_before, T = before_E.sum() / k, load_E.sum() / k
    if not (T_before and T):
        return math.nan
    chosen_E = np.minimum((before_E + load_E) / (T_before + T), 1)
    moved_E = (load_E / T - before_E / T_before) ** 2
    expected = float((chosen_E * (1 - chosen_E)).sum()) * (1 / T_before + 1 / T)
    return float(moved_E.sum()) / expected if expected > 0 else math.nan


def effect_of(pairs: Sequence[float], E: int) -> float:
    """The design effect of a run, from those of pairs of windows: about the upper end of a
    95 % interval (one-sided, χ²) of their median, which one change of the load does not move; at
    least 1, and at most LONG_DOCUMENT: a model that is being trained moves by itself."""
    degrees = len(pairs) * max(E - 1, 1)
    low = 1 - 2 / (9 * degrees) - z_of(0.05) * math.sqrt(2 / (9 * degrees))  # Wilson and Hilferty
    lower_median = sorted(pairs)[(len(pairs) - 1) // 2]
    return float(np.clip(lower_median / max(low, 0.1) ** 3, 1, LONG_DOCUMENT))


# --- what helps

_BALANCE = (
    "Balance each layer by itself (a loss pooled over layers lets one collapse) with a higher "
    "coefficient (arXiv:2101.03961), or by a bias on the selection, without a loss "
    "(arXiv:2408.15664)."
)
_DEAD = (
    f"{_BALANCE} An expert without tokens gets no gradient and stays dead: add noise to the router "
    "(arXiv:1701.06538), or raise the capacity factor where tokens are dropped (arXiv:2101.03961)."
)
ADVICE: Mapping[str, str] = {
    "dead_experts": _DEAD,
    "starved_experts": _DEAD,
    "drift": (
        "A lower learning rate of the router, or warm-up, keeps the choice stable "
        "(arXiv:2202.08906); the router's z-loss keeps its logits small (arXiv:2202.08906)."
    ),
    "z_loss": (
        "Raise the coefficient of the router's z-loss, or lower its learning rate "
        "(arXiv:2202.08906)."
    ),
    GPU_LOAD: (
        "The plan was made for other traffic: make one for this, by `moe-inspect simulate "
        "placement`."
    ),
    "drop_rate": (
        "Raise the capacity factor (arXiv:2101.03961), or balance the layer, whose dropped tokens "
        "skip the experts that they chose; dropless experts drop none (arXiv:2211.15841)."
    ),
    "bias_range": (
        "Lower the update rate of the selection bias, and check that it is updated once per step "
        "from the load of all ranks (arXiv:2408.15664)."
    ),
}


CALM = 3
AT_FAULT: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # load_E → bool [E]
    "dead_experts": lambda load_E: load_E == 0,
    "starved_experts": lambda load_E: (load_E > 0) & (load_E < bal.STARVED * load_E.mean()),
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

    def record(self) -> dict[str, object]:
        """As JSON values."""
        known = {**asdict(self), "experts": list(self.experts)}
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in known.items()}


class _Standing:
    """How a rule stands at one router: how many windows in a row have broken it, since which step,
    or kept it; the best value seen; and whether the alarm was raised. Of each expert since it is at
    fault: windows_E, of those at_fault_E, and their load_E, tokens_E; missed: in which of the last
    windows it was not. since_E: the first step."""

    def __init__(self, rule: Rule, r: int, router: Router) -> None:
        self.rule, self.r, self.k, E = rule, r, router.top_k, router.experts
        self.broken = self.kept = self.since = 0
        self.best, self.raised = math.nan, False
        self.windows_E, self.at_fault_E, self.load_E, self.since_E = np.zeros((4, E), np.int64)
        self.tokens_E = np.zeros(E)
        self.missed = deque[np.ndarray](maxlen=rule.windows)

    def add(self, fault_E: np.ndarray, load_E: np.ndarray, first: int) -> None:
        """One more window."""
        begins_E = fault_E & (self.windows_E == 0)
        self.since_E[begins_E] = first
        on_E = begins_E | (self.windows_E > 0)
        self.windows_E += on_E
        self.at_fault_E += fault_E
        self.load_E += on_E * load_E
        self.tokens_E += on_E * (float(load_E.sum()) / self.k)
        self.missed.append(on_E & ~fault_E)

    def forget(self, of_E: np.ndarray | slice = slice(None)) -> None:
        """Begins anew for these experts."""
        for values_E in (self.windows_E, self.at_fault_E, self.load_E, self.tokens_E, *self.missed):
            values_E[of_E] = 0


@dataclass
class Alarms:
    """Judges windows by rules. An alarm is raised once, and can be again after CALM windows in a
    row (or as many as the rule says, if more) that keep the rule. Windows without tokens at a
    router do not count. `gpus`: of the plan of placement, if there is one."""

    routers: Sequence[Router]
    rules: Sequence[Rule]
    steps: str = "step"  # what first and last of a window number
    gpus: int = 0

    def __post_init__(self) -> None:
        self._standings = [
            _Standing(rule, r, router)
            for rule in self.rules
            for r, router in enumerate(self.routers)
            if rule.layers is None or router.layer in rule.layers
        ]
        self._before: Window | None = None
        self._pairs = [deque[float](maxlen=PAIRS) for _ in self.routers]

    @property
    def active(self) -> list[tuple[Rule, int]]:
        """Rules that are broken now, with the router."""
        return [(at.rule, at.r) for at in self._standings if at.raised]

    def see(self, window: Window) -> list[Alarm]:
        """The alarms that the next window raises."""
        metrics_judged = {rule.metric for rule in self.rules}
        values_of = {name: metric_R(name, window, self._before) for name in metrics_judged}
        raised = list[Alarm]()
        for at in self._standings:
            value = float(values_of[at.rule.metric][at.r])
            if not math.isnan(value) and (alarm := self._judge(at, value, window)):
                raised.append(alarm)
        for r, before_E in enumerate(self._before.load if self._before is not None else ()):
            moved = effect_of_pair(before_E, window.load[r], self.routers[r].top_k)
            if not math.isnan(moved):
                self._pairs[r].append(moved)
        self._before = window
        return raised

    def effect(self, r: int) -> float:
        """The design effect of the documents on the load of router r: estimated from how much the
        load moves between windows, and for the first two LONG_DOCUMENT."""
        pairs = list(self._pairs[r])
        return effect_of(pairs, self.routers[r].experts) if pairs else float(LONG_DOCUMENT)

    def chance(
        self, metric: str, r: int, window: Window, above: bool = True, windows: int = 1
    ) -> float:
        """The highest (`above`, else the lowest) value of a metric that chance explains at router
        r, in so many windows in a row; NaN where that is not known."""
        E, k = self.routers[r].experts, self.routers[r].top_k
        effect, tail = self.effect(r), tail_of(len(self.routers), windows)
        if metric == DRIFT and self._before is not None:
            load_WE = np.stack([self._before.load[r], window.load[r]])
            floor_W, _ = win.step_floors(share(load_WE.sum(0)), load_WE.sum(1) / k, k, effect)
            # the mean of a sum of half-normal parts, each with a deviation of 0.756 of its mean
            beyond = far(tail) * 0.756 / math.sqrt(max(E - 1, 1))
            return float(floor_W[0]) * (1 + beyond)
        if metric == GPU_LOAD:  # as if each assignment chose its GPU
            slots = float(window.load[r].sum())
            return chance_limit("max_over_mean", slots, self.gpus, 1, above, effect, tail)
        if metric in (DRIFT, *VALUES):
            return math.nan
        load_SE = window.recent[r] if metric == BATCH else np.asarray(window.load[r])[None]
        tokens = float(np.mean(np.sum(load_SE, -1))) / k
        return chance_limit(metric, tokens, E, k, above, effect, tail, len(load_SE))

    def _judge(self, at: _Standing, value: float, window: Window) -> Alarm | None:
        rule, load_E, by_chance = at.rule, np.asarray(window.load[at.r]), math.nan
        broken = rule.breaks(value, at.best)
        better = max if rule.sign == "falling" else min
        at.best = value if math.isnan(at.best) else better(value, at.best)
        if not rule.of_experts:  # they are judged one by one, over all their windows
            by_chance = self.chance(rule.metric, at.r, window, rule.above, rule.windows)
            if rule.beyond_chance and not math.isnan(by_chance):
                broken &= value > by_chance if rule.above else value < by_chance
        fault_E = self._at_fault(rule.metric, at.r, load_E) & (rule.of_experts | broken)
        at.add(fault_E, load_E, window.first)
        if rule.of_experts:
            at.forget(sum(at.missed, np.zeros(len(load_E), int)) > rule.misses)
            fault_E = self._stays(at)
            value = float(fault_E.sum())
            broken = rule.breaks(value, at.best)
        if not broken:
            at.broken, at.kept = 0, at.kept + 1
            at.raised &= at.kept < max(CALM, rule.windows)
            if not rule.of_experts:
                at.forget()
            return None
        at.broken, at.kept = at.broken + 1, 0
        if at.broken == 1:
            at.since = window.first
        if at.raised or (at.broken < rule.windows and not rule.of_experts):
            return None
        at.raised = True
        return self._alarm(at, fault_E, value, by_chance, window)

    def _stays(self, at: _Standing) -> np.ndarray:
        """Which experts have been at fault in as many windows as the rule says, and are starved in
        all of these together, beyond chance. bool [E]"""
        fair_E = at.tokens_E * at.k / len(at.tokens_E)
        long_E = (at.windows_E >= at.rule.windows) & (at.load_E < bal.STARVED * fair_E)
        if not at.rule.beyond_chance or not long_E.any():
            return long_E
        # that chance gives any of the experts so few of its tokens: a binomial tail of loads ÷
        # design effect, times E
        E, by = len(long_E), max(self.effect(at.r), 1.0)
        n_E = np.maximum(at.tokens_E / by, 1e-9)
        few_E = np.minimum(at.load_E / by, n_E * (1 - 1e-9))
        p_E = E * special("betainc")(n_E - few_E, few_E + 1, max(1 - at.k / E, 1e-12))
        return long_E & (np.minimum(1, p_E) < tail_of(len(self.routers), 1))

    def _at_fault(self, metric: str, r: int, load_E: np.ndarray) -> np.ndarray:
        """The experts at fault in a window, bool [E]; by default the busiest."""
        if metric in VALUES:
            return np.zeros(len(load_E), bool)
        if metric == DRIFT and self._before is not None:
            load_E = np.abs(share(load_E) - share(self._before.load[r]))
        if metric in AT_FAULT:
            return AT_FAULT[metric](load_E)
        return np.arange(len(load_E)) == load_E.argmax()

    def _alarm(
        self, at: _Standing, fault_E: np.ndarray, value: float, by_chance: float, window: Window
    ) -> Alarm:
        rule, r = at.rule, at.r
        if rule.of_experts:
            experts, since = np.flatnonzero(fault_E), int(at.since_E[fault_E].min())
        else:  # the one most often at fault, and of those the one furthest from the mean
            apart_E = np.abs(at.load_E - at.load_E.mean())
            order = np.lexsort((apart_E, at.at_fault_E))[-1:]
            experts, since = order[at.at_fault_E[order] > 0], at.since
        named = tuple(int(e) for e in experts)
        listed = join_first(named)
        of = f", expert{'s' if len(named) > 1 else ''} {listed}" if named else ""
        most = "at most" if rule.above else "at least"
        limit = f"; by chance {most} {by_chance:.3g}" if not math.isnan(by_chance) else ""
        now = "" if rule.of_experts else f", now {value:.3g}"
        text = (
            f"Layer {layer_label(self.routers, r)}{of}: {rule.metric} {rule.side(at.best)} "
            f"since {self.steps} {since}{now} (rule: {rule}; {self.steps} {window.first} to "
            f"{window.last}, {int(window.tokens_R[r]):,} tokens{limit})."
        )
        place = str(rule), rule.metric, self.routers[r].layer, r, named
        helps = ADVICE.get(rule.metric, _BALANCE)
        return Alarm(*place, since, window.last, value, by_chance, text, helps)
