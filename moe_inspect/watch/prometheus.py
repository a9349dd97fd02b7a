"""What is watched as metrics of Prometheus."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_inspect.watch.follow import ENDED, RECORDING, WAITING
from moe_inspect.watch.state import Watched, of_routers

if TYPE_CHECKING:
    from prometheus_client.core import Metric

OF_ROUTERS = {  # metric of the load → what Prometheus is told of it
    "max_vio": "(max - mean) / mean of the load in the last window; 0 is even",
    "dead_experts": "Experts without load in the last window",
    "starved_experts": "Experts with some load, but under a tenth of the mean, in the last window",
    "entropy": "Entropy of the load in the last window, as a ratio to ln E; 1 is even",
    "balancedness": "Mean / max load in the last window; 1 is even",
}
LABELS = ["layer", "router"]


class Collector:
    """Of a private registry of prometheus_client. `per_expert`: assignments of every expert too,
    which are as many series as there are experts."""

    def __init__(self, watched: Watched, per_expert: bool = False):
        self.watched, self.per_expert = watched, per_expert

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily as Counter
        from prometheus_client.core import GaugeMetricFamily as Gauge

        watched = self.watched
        status = Gauge("moe_inspect_status", "1 for the status of the trace", labels=["status"])
        for name in (WAITING, RECORDING, *ENDED):
            status.add_metric([name], float(name == watched.status))
        yield status
        yield Counter("moe_inspect_tokens", "Tokens recorded", watched.tokens)
        yield Counter("moe_inspect_decisions", "Router decisions recorded", watched.decisions)
        yield Gauge(
            "moe_inspect_last_tokens_seconds", "Seconds since the last tokens", watched.changed_s
        )
        if watched.window is None:
            return
        yield Gauge("moe_inspect_window_tokens", "Tokens of the last window", watched.window.tokens)
        names = [[label, str(r)] for r, label in enumerate(watched.labels)]
        for metric, said in OF_ROUTERS.items():
            values_L = of_routers(metric, watched.window.load_LE, watched.routers)
            yield _filled(Gauge(f"moe_inspect_{metric}", said, labels=LABELS), names, values_L)
        chance_L = [watched.chance(r) for r in range(len(names))]
        said = "The highest max_vio of the last window that chance explains"
        yield _filled(Gauge("moe_inspect_max_vio_chance", said, labels=LABELS), names, chance_L)
        said = "1 for each rule that a router breaks now"
        alarms = Gauge("moe_inspect_alarm", said, labels=[*LABELS, "rule"])
        for alarm in watched.alarms:
            alarms.add_metric([*names[alarm.router], alarm.rule], 1.0)
        yield alarms
        if self.per_expert:
            said = "Assignments of each expert"
            experts = Counter("moe_inspect_expert_assignments", said, labels=[*LABELS, "expert"])
            for r, router in enumerate(watched.routers):
                for e, load in enumerate(watched.total_LE[r, : router.experts].tolist()):
                    experts.add_metric([*names[r], str(e)], load)
            yield experts


def _filled(family: Any, names: list[list[str]], values_L: Iterable[float] | np.ndarray) -> Any:
    for name, value in zip(names, values_L, strict=True):
        if not math.isnan(value):
            family.add_metric(name, float(value))
    return family
