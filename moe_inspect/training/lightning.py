"""The monitor as a callback of Lightning (the extra "lightning")."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_inspect.errors import MoeInspectError
from moe_inspect.training.monitor import OfTrainer

try:
    from lightning.pytorch.callbacks import Callback as _Found  # pyright: ignore
except ImportError:
    _Found = object
Callback: Any = _Found
Trainer = Any  # of an extra, which need not be there


class LightningRoutingCallback(OfTrainer, Callback):
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
        super().__init__(path, picture_logs, options)
        self.model = model

    def on_train_start(self, trainer: Trainer, pl_module: object) -> None:
        self._begin(getattr(pl_module, self.model), trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: object, *_: object) -> None:
        monitor = self.monitor
        if monitor is None or trainer.global_step == monitor.steps:
            return  # gradients are being accumulated
        monitor.step(trainer.global_step)
        if monitor.steps % trainer.log_every_n_steps == 0:
            metrics = monitor.log()
            monitor.flush()
            self._report(trainer, metrics)
            self._picture(trainer)
        if monitor.should_stop:
            trainer.should_stop = True

    def on_validation_end(self, trainer: Trainer, pl_module: object) -> None:
        if self.monitor is not None and (metrics := self.monitor.evaluation()):
            self._report(trainer, metrics)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: object, checkpoint: object) -> None:
        if self.monitor is not None:
            self.monitor.flush()

    def on_train_end(self, trainer: Trainer, pl_module: object) -> None:
        self._picture(trainer, end=True)
        self._end(None)

    def on_exception(self, trainer: Trainer, pl_module: object, exception: BaseException) -> None:
        self._end(type(exception))

    def _report(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    def _picture(self, trainer: Trainer, end: bool = False) -> None:
        boards = [logger.experiment for logger in trainer.loggers]
        boards = [board for board in boards if hasattr(board, "add_image")]
        if trainer.is_global_zero:
            self._show(trainer.global_step, ("wandb", "mlflow"), boards, end)
