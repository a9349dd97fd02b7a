"""The monitor as a callback of Lightning (the extra "lightning")."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from moe_inspect.alarms.alarms import Window
from moe_inspect.errors import MoeInspectError
from moe_inspect.training.metrics import show_picture
from moe_inspect.training.monitor import RoutingMonitor

try:
    from lightning.pytorch.callbacks import Callback as _Found  # pyright: ignore
except ImportError:
    _Found = object
Callback: Any = _Found


class LightningRoutingCallback(Callback):
    """Watches the routers of the model that Lightning trains:

        Trainer(callbacks=[LightningRoutingCallback("runs/a/routing")])

    `model`: the name of the attribute of the LightningModule that holds the model. Metrics are
    logged every `log_every_n_steps` through the module's loggers; the other options are those of
    `RoutingCallback`."""

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        model: str = "model",
        picture_logs: int = 10,
        **options: Any,
    ):
        if Callback is object:
            raise MoeInspectError(
                'Lightning is not installed: run pip install "moe-inspect[lightning]"'
            )
        self.path, self.model, self.picture_logs, self.options = path, model, picture_logs, options
        self.monitor: RoutingMonitor | None = None
        self._logs = 0
        self._pictured: Window | None = None  # in the last picture

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.monitor = RoutingMonitor(
            getattr(pl_module, self.model),
            self.path,
            log_steps=sys.maxsize,
            resume_step=trainer.global_step,
            **{"flush_steps": sys.maxsize, **self.options},
        )
        self.monitor.__enter__()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        monitor = self.monitor
        if monitor is None or trainer.global_step == monitor.steps:
            return  # gradients are being accumulated
        monitor.step(trainer.global_step)
        if monitor.steps % trainer.log_every_n_steps == 0:
            metrics = monitor.log()
            monitor.flush()
            self._report(trainer, metrics)
            self._logs += 1
            if self.picture_logs and self._logs % self.picture_logs == 1 % self.picture_logs:
                self._show(trainer)
        if monitor.should_stop:
            trainer.should_stop = True

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self.monitor is not None and (metrics := self.monitor.evaluation()):
            self._report(trainer, metrics)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        if self.monitor is not None:
            self.monitor.flush()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.picture_logs:
            self._show(trainer)
        self._end(None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._end(type(exception))

    def _end(self, kind: type[BaseException] | None) -> None:
        if self.monitor is not None:
            monitor, self.monitor = self.monitor, None
            monitor.__exit__(kind, None, None)

    def _report(self, trainer: Any, metrics: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    def _show(self, trainer: Any) -> None:
        monitor = self.monitor
        if not trainer.is_global_zero or monitor is None or monitor.window is self._pictured:
            return
        self._pictured = monitor.window
        boards = [
            logger.experiment
            for logger in trainer.loggers
            if hasattr(logger.experiment, "add_image")
        ]
        show_picture(monitor.picture(), trainer.global_step, ("wandb", "mlflow"), *boards[:1])
