"""Rules: when an alarm is raised, as a line of text.

max_over_mean > 2 for 3 windows
dead_experts > 0 for 3 windows
entropy falling by 0.1
drift > 0.2 in layers 0-3
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_inspect.analysis.metrics.registry import metrics, metrics_of
from moe_inspect.errors import MoeInspectError
from moe_inspect.files import read_small
from moe_inspect.text import no_such
from moe_inspect.trace.header import TraceHeader
from moe_inspect.trace.schema import parse_ranges

DRIFT = "drift"
BATCH = "max_vio_batch"
# metrics of a router that its load does not tell: only where the model is at hand
OF_MODEL = ("aux_loss", "z_loss", "bias_range")
DROP_RATE = "drop_rate"  # share of the slots that capacity dropped: where that is known
# load of the busiest GPU ÷ mean under a plan of placement: where one is given
GPU_LOAD = "gpu_max_over_mean"
# of experts that get too little: judged expert by expert, over the windows in which it gets that
OF_EXPERTS = ("dead_experts", "starved_experts")
SHARES = (DRIFT, DROP_RATE)
DRIFTED = 0.2  # share of the assignments that moved: the rule "drift"
CHANGED = 0.05  # of "falling" and "rising" without a share

DEFAULT_RULES = ("dead_experts > 0 for 3 windows", "max_over_mean > 2.5 for 5 windows")
PLAN_RULE = f"{GPU_LOAD} rising by 0.1 for 3 windows"  # a default one where there is a plan

# where the values of an alarm lie, and whether one does: above (or up from) a limit, or the best so
# far by a share of it
SIGNS: dict[str, tuple[str, Callable[[float, float, float], bool]]] = {
    ">": ("above", lambda value, limit, best: value > limit),
    ">=": ("at least", lambda value, limit, best: value >= limit),
    "<": ("below", lambda value, limit, best: value < limit),
    "<=": ("at most", lambda value, limit, best: value <= limit),
    "falling": ("down from", lambda value, share, best: value < best * (1 - share)),
    "rising": ("up from", lambda value, share, best: value > best * (1 + share)),
}
OF_CHANGE = ("falling", "rising")

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RULE = re.compile(
    rf"(?P<metric>\w+)"
    rf"(?:\s*(?P<sign>>=|<=|>|<)\s*(?P<value>{_NUMBER})"
    rf"|\s+(?P<way>falling|rising)(?:\s+by\s+(?P<by>{_NUMBER}))?)?"
    rf"(?:\s+(?:and\s+)?(?P<chance>beyond\s+chance|even\s+by\s+chance))?"
    rf"(?:\s+for\s+(?P<windows>\d{{1,6}})\s+windows?)?"
    rf"(?:\s+in\s+layers?\s+(?P<layers>[\d,\s-]+))?"
)


@dataclass(frozen=True)
class Rule:
    """The alarm is raised for a router whose `metric` meets the condition in `windows` consecutive
    windows; dead and starved experts: in at least two thirds of them. `sign`: ">", ">=", "<", "<="
    than `value`, or "falling" ("rising"): by the share `value` below the highest (above the lowest)
    of its earlier windows. `beyond_chance`: and tokens that choose their experts at random would
    not give such a value. `layers`: only there."""

    metric: str
    sign: str
    value: float
    windows: int = 1
    beyond_chance: bool = True
    layers: frozenset[int] | None = None

    @property
    def above(self) -> bool:
        """Whether large values raise it."""
        return self.sign in (">", ">=", "rising")

    @property
    def of_experts(self) -> bool:
        """Whether it is judged expert by expert."""
        return self.metric in OF_EXPERTS and self.sign in (">", ">=")

    @property
    def misses(self) -> int:
        """In how many of `windows` an expert may get more."""
        return self.windows // 3 if self.of_experts else 0

    def breaks(self, value: float, best: float) -> bool:
        """Whether a value meets the condition, chance aside."""
        return SIGNS[self.sign][1](value, self.value, best)

    def side(self, best: float) -> str:
        """ "above 1.5": where the values that meet the condition lie."""
        end = f"{best:.3g}" if self.sign in OF_CHANGE else f"{self.value:g}"
        return f"{SIGNS[self.sign][0]} {end}"

    def __str__(self) -> str:
        of = f" by {self.value:g}" if self.sign in OF_CHANGE else f" {self.value:g}"
        chance = "" if self.beyond_chance else " even by chance"
        times = f" for {self.windows} windows" if self.windows > 1 else ""
        layers = f" in layers {','.join(map(str, sorted(self.layers)))}" if self.layers else ""
        return f"{self.metric} {self.sign}{of}{chance}{times}{layers}"


def known_metrics() -> tuple[str, ...]:
    """What a rule can be on."""
    return (*metrics_of("balance", {"load_LE"}), DRIFT, DROP_RATE, BATCH, GPU_LOAD, *OF_MODEL)


def _check_limit(metric: str, sign: str, value: float, text: str) -> None:
    """MoeInspectError where a rule holds always or never: its limit is beyond the metric's range,
    all of which begin at 0 or above, or it is not a share."""
    if sign in OF_CHANGE:
        if 0 < value < (1 if sign == "falling" else math.inf):
            return
        raise MoeInspectError(
            f"the rule {text!r}: {sign} is by a share above 0"
            f"{', below 1' * (sign == 'falling')}: write 0.1 for 10 %"
        )
    known = metrics().get(metric)
    end = known.range.rpartition(" to ")[2] if known else "1" if metric in SHARES else ""
    most = float(end) if end.isdecimal() else math.inf
    if not 0 <= value <= most or value == math.inf:
        upward = f"from 0 to {end}" if most < math.inf else "0 or more"
        raise MoeInspectError(f"the rule {text!r} can tell nothing: {metric} is always {upward}")


def parse_rule(text: str) -> Rule:
    """The rule of a line of text. MoeInspectError where it is none.

    METRIC > VALUE (also >=, <, <=), METRIC falling [by SHARE], METRIC rising [by SHARE], or "drift"
    alone; then, each if wanted: "beyond chance" (the default) or "even by chance", "for N windows",
    "in layers 0-3,7"."""
    found, text = _RULE.fullmatch(" ".join(text.split())), text.strip()
    if found is None:
        raise MoeInspectError(
            f"cannot read the rule {text!r}: write it like "
            '"max_over_mean > 2.5 for 5 windows" or "entropy falling by 0.1"'
        )
    metric = found["metric"]
    if metric not in known_metrics():
        raise MoeInspectError(f"the rule {text!r}: {no_such('metric', metric, known_metrics())}")
    if found["sign"]:
        sign, value = found["sign"], float(found["value"])
    elif found["way"]:
        sign, value = found["way"], float(found["by"] or CHANGED)
    elif metric == DRIFT:
        sign, value = ">", DRIFTED
    else:
        raise MoeInspectError(f"the rule {text!r} has no limit: write {metric} > VALUE")
    _check_limit(metric, sign, value, text)
    windows = int(found["windows"] or 1)
    if windows < 1:
        raise MoeInspectError(f"the rule {text!r}: give at least 1 window")
    layers = frozenset(parse_ranges(found["layers"])) if found["layers"] else None
    beyond_chance = not (found["chance"] or "").startswith("even")
    return Rule(metric, sign, value, windows, beyond_chance, layers)


def refuse_gpus(rules: Sequence[Rule]) -> None:
    """MoeInspectError for a rule on the load of GPUs, where there is no plan of placement."""
    for rule in rules:
        if rule.metric == GPU_LOAD:
            raise MoeInspectError(f"the rule {str(rule)!r} needs a plan: moe-inspect watch --plan")


def refuse_rules(rules: Sequence[Rule], of: TraceHeader | None = None, plan: bool = False) -> None:
    """MoeInspectError for a rule on what no trace holds, or that one `of` does not, and without a
    `plan` for one on GPUs."""
    if not plan:
        refuse_gpus(rules)
    for rule in rules:
        if rule.metric in (BATCH, *OF_MODEL):
            raise MoeInspectError(
                f"the rule {str(rule)!r}: a trace does not hold {rule.metric}, only the monitor of "
                "a training run knows it"
            )
        if rule.metric == DROP_RATE and of is not None and not of.drops:
            raise MoeInspectError(
                f"the rule {str(rule)!r}: {of.path} does not state that its empty slots are drops"
            )


def read_rules(path: str | Path) -> list[Rule]:
    """The rules of a text file, one per line; "#" begins a comment. MoeInspectError where a line is
    none, or there are none."""
    try:
        lines = read_small(path).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MoeInspectError(f"cannot read the rules in {path}: {error}") from None
    rules = list[Rule]()
    for number, line in enumerate(lines, 1):
        if text := line.partition("#")[0].strip():
            try:
                rules.append(parse_rule(text))
            except MoeInspectError as error:
                raise MoeInspectError(f"{path} line {number}: {error}") from None
    if not rules:
        raise MoeInspectError(f"{path} holds no rules: write one per line")
    return rules
