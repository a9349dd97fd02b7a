"""The metrics of `watch --serve` in a serving engine's own /metrics, of the assignments that its
worker counts: in files of PROMETHEUS_MULTIPROC_DIR, which its server reads.

L routers, E experts, G GPUs.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from moe_inspect.trace.header import TraceHeader
from moe_inspect.trace.schema import Router
from moe_inspect.watch.follow import RECORDING, News, Piece
from moe_inspect.watch.metrics import Collector
from moe_inspect.watch.state import Watched

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
        self.watched.written_bytes = written_bytes
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
        for family in Collector(self.watched, self.per_expert, WORST).collect():
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
