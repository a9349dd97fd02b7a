"""The metrics of a serving engine's own /metrics, computed from the assignments that its worker
counts: in files of PROMETHEUS_MULTIPROC_DIR, which its server reads.

L routers, E experts, G GPUs.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_inspect.trace.header import TraceHeader
from moe_inspect.trace.schema import Router
from moe_inspect.watch.alarms import metric_R
from moe_inspect.watch.follow import ENDED, RECORDING, WAITING, News, Piece
from moe_inspect.watch.rules import GPU_LOAD
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
WORST = 8  # layers of which a metric is told
EVERY_S = 5.0


class EngineMetrics:
    """Of one worker. `about`: its rank, layers, experts, top_k, and whether a series of each expert
    is asked for."""

    def __init__(self, about: dict[str, Any]):
        E, K = about["experts"], about["top_k"]
        routers = [Router(layer, "", "", E, K) for layer in about["layers"]]
        self.manifest: dict[str, Any] = {
            "status": RECORDING,
            "routers": [asdict(router) for router in routers],
            "tables": ["counts"],
            "capture": {},
        }
        self.rank, self.per_expert = str(about["rank"]), about["per_expert"]
        self.header = TraceHeader(Path(), self.manifest)
        self.placed: list[np.ndarray] | None = None  # the share that each GPU gets
        self.watched = Watched()
        self.written_bytes: int | None = None
        self.steps, self.published_s = 0, -math.inf
        self.watched.take(News(RECORDING), self.header)
        self.publish()

    def add(
        self,
        counts: np.ndarray,
        *,
        tokens: int,
        steps: int,
        dropped: int,
        placed: np.ndarray | None = None,
        written_bytes: int | None = None,
    ) -> None:
        """Assignments and tokens since the last ones, [L × E]; what was dropped in all. `placed`:
        where they were counted, if it is not as before."""
        if placed is not None:
            if self.placed is None:  # with the first counts
                self.watched = Watched(plan=lambda _: self.placed or [])
            self.placed = list(placed)
            self.header = TraceHeader(Path(), self.manifest)
        L = len(self.header.routers)
        load_LE = counts.reshape(L, -1)
        piece = Piece(
            self.steps + 1,
            steps,
            list(load_LE),
            np.full(L, tokens),
            tokens=tokens,
            decisions=tokens * L,
        )
        self.steps = steps
        some = tokens or counts.any()  # the worker may see one of them first
        pieces = [piece] if some else []
        self.watched.take(News(RECORDING, pieces, dropped=dropped), self.header)
        self.written_bytes = written_bytes
        self.publish(now=True)

    def publish(self, now: bool = False) -> None:
        """Writes files anew, as a series that is told no more must be gone; unless `now`, where
        they are EVERY_S old."""
        from prometheus_client.mmap_dict import MmapedDict, mmap_key

        if not now and time.monotonic() - self.published_s < EVERY_S:
            return
        self.published_s = time.monotonic()
        if not (folder := os.environ.get("PROMETHEUS_MULTIPROC_DIR")):
            return
        values: dict[str, list[tuple[str, float]]] = {"counter": [], "gauge_livemostrecent": []}
        for family in self._families():
            of = values["counter" if family.type == "counter" else "gauge_livemostrecent"]
            for sample in family.samples:
                names, labels = ["rank", *sample.labels], [self.rank, *sample.labels.values()]
                key = mmap_key(family.name, sample.name, names, labels, family.documentation)
                of.append((key, sample.value))
        for kind, of in values.items():
            path = Path(folder) / f"{kind}_{os.getpid()}.db"
            draft = path.with_suffix(".draft")
            draft.unlink(missing_ok=True)
            file = MmapedDict(str(draft))
            for key, value in of:
                file.write_value(key, value, time.time())
            file.close()
            draft.replace(path)  # a server reads whole files

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
        if metric in COUNTS:
            return known[value_R[known] > 0]
        worst = np.argsort(value_R[known] if metric in LOWEST else -value_R[known], kind="stable")
        return np.sort(known[worst[:WORST]])

    def _families(self) -> Iterator[Metric]:
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
        if self.written_bytes is not None:
            written = "Bytes of the traces written"
            yield Counter("moe_inspect_written_bytes", written, self.written_bytes)
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
