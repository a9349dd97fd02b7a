"""torchtitan: the balance of every MoE layer beside the loss, in its own logs.

A MetricsProcessor that watches the routers with RoutingMonitor. Use it in a config in place of
torchtitan's own: `metrics=RoutingMetricsProcessor.Config(log_freq=10, history="runs/routing")`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchtitan.components.metrics import MetricsProcessor

from moe_inspect.training import RoutingMonitor

NEVER = 2**62


class RoutingMetricsProcessor(MetricsProcessor):
    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        history: str | None = None
        """Directory of the history, a trace of counts; None for none"""

        every: int = 1
        """Count every N-th step"""

    monitor: RoutingMonitor | None = None

    def should_log(self, step: int) -> bool:
        # the trainer asks at the beginning of each step: the one before is over
        if self.monitor is None and self.model_parts:
            self.monitor = RoutingMonitor(
                self.model_parts[0],  # without pipeline parallelism there is one
                self.config.history,
                every=self.config.every,
                log_steps=NEVER,  # when torchtitan logs
                flush_steps=NEVER,
                resume_step=step - 1,
            )
            self.monitor.__enter__()
        elif self.monitor is not None:
            self.monitor.step(step - 1)
        return super().should_log(step)

    def log(self, step: int, *args: Any, extra_metrics: Any = None, **kwargs: Any) -> None:
        if self.monitor is not None:
            self.monitor.step(step)
            extra_metrics = {**(extra_metrics or {}), **self.monitor.log()}
            self.monitor.flush()
        super().log(step, *args, extra_metrics=extra_metrics, **kwargs)

    def close(self) -> None:
        if self.monitor is not None:
            self.monitor.__exit__(None, None, None)
            self.monitor = None
        super().close()
