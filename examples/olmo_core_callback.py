"""OLMo-core: the balance of every MoE layer beside the loss, in its own logs.

A callback that watches the routers with RoutingMonitor: give it to the trainer as
`callbacks={"routing": OLMoRoutingCallback(history="runs/routing")}`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from olmo_core.train.callbacks import Callback

from moe_inspect.training import RoutingMonitor

NEVER = 2**62


@dataclass
class OLMoRoutingCallback(Callback):
    """`history`: directory of a trace of counts; None for none. `interval`: steps between logs."""

    history: str | None = None
    interval: int = 10
    every: int = 1
    monitor: Any = None

    def pre_train(self) -> None:
        self.monitor = RoutingMonitor(
            self.trainer.train_module.model,
            self.history,
            every=self.every,
            log_steps=NEVER,
            flush_steps=NEVER,
            resume_step=self.step,
        )
        self.monitor.__enter__()

    def post_train_batch(self) -> None:
        self.monitor.step(self.step)
        if self.step % self.interval == 0:
            for name, value in self.monitor.log().items():
                self.trainer.record_metric(name, value)
            self.monitor.flush()

    def post_checkpoint_saved(self, path: Any) -> None:
        self.monitor.flush()

    def post_train(self) -> None:
        self.close()

    def on_error(self, exc: BaseException) -> None:
        self._end(type(exc))

    def close(self) -> None:
        self._end(None)

    def _end(self, kind: type[BaseException] | None) -> None:
        if self.monitor is not None:
            monitor, self.monitor = self.monitor, None
            monitor.__exit__(kind, None, None)
