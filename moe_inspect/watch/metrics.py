"""What is watched as metrics for Prometheus: of `watch --serve`, and of an engine itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moe_inspect.alarms.alarms import metric_R
from moe_inspect.alarms.rules import GPU_LOAD
from moe_inspect.watch.follow import ENDED, RECORDING, WAITING, Piece
from moe_inspect.watch.state import Watched

if TYPE_CHECKING:
    from prometheus_client.core import Metric

OF_ROUTERS = {  # metric of the load → what Prometheus is told of it
    "max_vio": "(max - mean) / mean of the load in the last window; 0 is even",
    "dead_experts": "Experts without load in the last window",
    "starved_experts": "Experts with some load, but under a tenth of the mean, in the last window",
    "entropy": "Entropy of the load in the last window, as a ratio to ln E; 1 is even",
    "balancedness": "Mean / max load in the last window; 1 is even",
    GPU_LOAD: "Load of the busiest GPU / mean in the last window, as the plan places the experts",
    "max_vio_chance": "The highest max_vio of the last window that chance explains",
}
LABELS = ["layer", "router"]


COUNTS = ("dead_experts", "starved_experts")  # of these layers that have none may be left out
LOWEST = ("entropy", "balancedness")  # lower is worse


class Collector:
    """Of a private registry of prometheus_client. `per_expert`: assignments of every expert too,
    which are as many series as there are experts. `worst`: of each metric of the routers only so
    many, those that are worst by it, and what chance explains of their max_vio."""

    def __init__(self, watched: Watched, per_expert: bool = False, worst: int | None = None):
        self.watched, self.per_expert, self.worst = watched, per_expert, worst

    def _values(self, metric: str, window: Piece) -> Sequence[float]:
        """Of each router, NaN where there is none: of the load of GPUs without a plan."""
        watched = self.watched
        if metric == "max_vio_chance":
            return [watched.chance(r) for r in range(len(watched.labels))]
        if metric == GPU_LOAD:
            load_L = watched.gpu_load
            return [math.nan] * len(watched.labels) if load_L is None else load_L.tolist()
        return metric_R(metric, window).tolist()

    def _shown(self, values_of: dict[str, np.ndarray], metric: str) -> np.ndarray:
        """The routers of which a metric is told."""
        value_R = values_of["max_vio" if metric == "max_vio_chance" else metric]
        known = np.flatnonzero(~np.isnan(value_R))
        if self.worst is None:
            return known
        if metric in COUNTS:
            return known[value_R[known] > 0]
        worst = np.argsort(value_R[known] if metric in LOWEST else -value_R[known], kind="stable")
        return np.sort(known[worst[: self.worst]])

    def collect(self) -> Iterator[Metric]:
        yield from self._of_trace()
        if self.watched.window is not None and self.watched.total is not None:
            yield from self._of_window(self.watched.window)
            yield from self._of_all(self.watched.total)

    def _of_trace(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily as Counter
        from prometheus_client.core import GaugeMetricFamily as Gauge

        watched = self.watched
        status = Gauge("moe_inspect_status", "1 for the status of the trace", labels=["status"])
        for name in (WAITING, RECORDING, *ENDED):
            status.add_metric([name], float(name == watched.status))
        yield status
        yield Counter("moe_inspect_tokens", "Tokens recorded", watched.tokens)
        yield Counter("moe_inspect_decisions", "Router decisions recorded", watched.decisions)
        dropped = "Router decisions that were made but could not be recorded"
        yield Counter("moe_inspect_dropped_decisions", dropped, watched.dropped)
        if watched.written_bytes is not None:
            written = "Bytes of the traces written"
            yield Counter("moe_inspect_written_bytes", written, watched.written_bytes)
        since = "Seconds since the last tokens"
        yield Gauge("moe_inspect_last_tokens_seconds", since, watched.changed_s)

    def _names(self) -> list[list[str]]:
        return [[label, str(r)] for r, label in enumerate(self.watched.labels)]

    def _of_window(self, window: Piece) -> Iterator[Metric]:
        from prometheus_client.core import GaugeMetricFamily as Gauge

        yield Gauge("moe_inspect_window_tokens", "Tokens of the last window", window.tokens)
        names = self._names()
        values_of = {name: np.array(self._values(name, window), float) for name in OF_ROUTERS}
        for metric, said in OF_ROUTERS.items():
            family = Gauge(f"moe_inspect_{metric}", said, labels=LABELS)
            for r in self._shown(values_of, metric):
                if not math.isnan(value := float(values_of[metric][r])):
                    family.add_metric(names[r], value)
            yield family
        said = "1 for each rule that a router breaks now"
        alarms = Gauge("moe_inspect_alarm", said, labels=[*LABELS, "rule"])
        for alarm in self.watched.alarms:
            alarms.add_metric([*names[alarm.router], alarm.rule], 1.0)
        yield alarms

    def _of_all(self, total: Piece) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily as Counter

        said = "Assignments of each layer"
        layers = Counter("moe_inspect_assignments", said, labels=LABELS)
        for name, load_E in zip(self._names(), total.load, strict=True):
            layers.add_metric(name, int(load_E.sum()))
        yield layers
        if self.watched.gpu_total is not None:
            said = "Assignments of each GPU, as its experts are placed"
            gpus = Counter("moe_inspect_gpu_assignments", said, labels=["gpu"])
            for gpu, load in enumerate(self.watched.gpu_total.tolist()):
                gpus.add_metric([str(gpu)], load)
            yield gpus
        if self.per_expert:
            said = "Assignments of each expert"
            experts = Counter("moe_inspect_expert_assignments", said, labels=[*LABELS, "expert"])
            for name, load_E in zip(self._names(), total.load, strict=True):
                for e, load in enumerate(load_E.tolist()):
                    experts.add_metric([*name, str(e)], load)
            yield experts
