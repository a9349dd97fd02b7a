"""RoutingCallback: the monitor as a callback of transformers' Trainer, and so of TRL's trainers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Trainer, TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Args

from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.verdict.findings import Finding
from moe_inspect.text import print_stderr
from moe_inspect.training.audit import LossAudit, audit_loss
from moe_inspect.training.metrics import balance_moved, unevenness
from moe_inspect.training.monitor import OfTrainer, RoutingMonitor

AUDITED_STEPS = 60  # after which is said whether the load moves
Metrics = dict[str, float] | None


class RoutingCallback(OfTrainer, TrainerCallback):
    """Watches the routers of the model that a Trainer trains:

        Trainer(model, args, train_dataset=…, callbacks=[RoutingCallback("runs/a/routing")])

    Metrics of the routers are part of the Trainer's own logs, every `logging_steps`, and so go to
    whatever it reports to. The load of all experts goes there as one picture (W&B, TensorBoard,
    MLflow) every `picture_logs`-th log and at the end, 0 for never. Evaluation is logged apart, as
    eval_routing/….

    audit: runs `audit_loss` on the first batch, after its step, and says on stderr what it finds;
    after AUDITED_STEPS steps, or at the end, whether the load has become more even. `audited` and
    `moved` hold both.

    path, every, flush_steps, detail, rules, on_alarm, layers, overwrite, group: as of
    `RoutingMonitor`; "stop" among `on_alarm` stops the training. The history is committed before
    each checkpoint is saved, and a training that is resumed from one goes on in it."""

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        picture_logs: int = 10,
        audit: bool = False,
        **options: Any,
    ):
        super().__init__(path, picture_logs, options)
        self.audit = audit
        self.audited: LossAudit | None = None
        self.moved: Finding | None = None
        self._batch: dict[str, Any] | None = None  # the first
        self._hook: Any = None  # which keeps it
        self._uneven: list[np.ndarray] = []  # [steps, routers] of each log
        self._metrics: dict[str, float] = {}
        self._trainer: Trainer | None = None

    def on_train_begin(self, args: Args, state: State, control: Control, **kwargs: object) -> None:
        if getattr(args, "n_gpu", 1) > 1:
            raise MoeInspectError(
                f"the Trainer runs {args.n_gpu} copies of the model in one process (DataParallel), "
                "whose routers cannot be told apart: start it with torchrun"
            )
        self._trainer = _trainer_that_calls()
        if self._trainer is not None:
            # before those that report: they see what is added to the logs
            callbacks = self._trainer.callback_handler.callbacks
            callbacks.remove(self)
            callbacks.insert(min(1, len(callbacks)), self)  # after what decides when to log
        self._end(KeyboardInterrupt)
        self._begin(kwargs["model"], state.global_step)
        self._metrics = {}
        self.audited = self.moved = self._batch = None
        self._uneven = []
        if self._hook is not None:  # of a training that ended before its first step
            self._hook.remove()
        if self.audit and self.monitor is not None:
            inner = self.monitor.model
            self._hook = inner.register_forward_pre_hook(self._keep_first, with_kwargs=True)

    def _keep_first(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model.training and self._batch is None:
            self._batch = {k: v for k, v in kwargs.items() if k != "num_items_in_batch"}

    def _audit_first(self, monitor: RoutingMonitor, state: State) -> None:
        """Once, when the first step has been taken."""
        if self._batch is not None:
            self._hook.remove()
            batch, self._batch = self._batch, None
            with monitor.paused():
                self.audited = audit_loss(monitor.model, batch)
            _say(self.audited.findings, state)

    def _say_moved(self, state: State, end: bool = False) -> None:
        steps = sum(map(len, self._uneven))
        if self.audited is None or self.moved is not None or not (end or steps >= AUDITED_STEPS):
            return
        if self.monitor is not None and steps:
            self.moved = balance_moved(np.concatenate(self._uneven), self.monitor.routers)
            _say([self.moved], state)

    def on_step_end(self, args: Args, state: State, control: Control, **kwargs: object) -> None:
        if (monitor := self.monitor) is None:
            return
        monitor.step(state.global_step)
        self._audit_first(monitor, state)
        if control.should_log:
            self._metrics = monitor.log()
            if self.audit and monitor.window is not None:
                self._uneven.append(unevenness(monitor.window))
                self._say_moved(state)
            if "flush_steps" not in self.options:
                monitor.flush()
            self._picture(args, state)
        if control.should_save:
            monitor.flush()
        if monitor.should_stop:
            control.should_training_stop = True

    def on_evaluate(
        self, args: Args, state: State, control: Control, metrics: Metrics = None, **kwargs: object
    ) -> None:
        if self.monitor is not None and (found := self.monitor.evaluation()):
            if self._trainer is not None:
                self._trainer.log(found)
            elif metrics is not None:
                metrics.update(found)

    def on_log(
        self, args: Args, state: State, control: Control, logs: Metrics = None, **kwargs: object
    ) -> None:
        """Adds the metrics of the window that has just ended to the log."""
        if logs is not None and "loss" in logs and self._metrics:
            logs.update(self._metrics)
            if state.log_history:
                state.log_history[-1].update(self._metrics)
            self._metrics = {}

    def on_train_end(self, args: Args, state: State, control: Control, **kwargs: object) -> None:
        self._say_moved(state, end=True)
        self._picture(args, state, end=True)  # what a run ended with, however few its logs
        self._end(None)

    def _picture(self, args: Args, state: State, end: bool = False) -> None:
        callbacks = self._trainer.callback_handler.callbacks if self._trainer else []
        boards = [getattr(callback, "tb_writer", None) for callback in callbacks]
        if state.is_world_process_zero:
            self._show(state.global_step, args.report_to or (), [b for b in boards if b], end)


def _say(findings: Sequence[Finding], state: State) -> None:
    for found in findings if state.is_world_process_zero else ():
        print_stderr(f"routing: {found.severity}: {found.text}")


def _trainer_that_calls() -> Trainer | None:
    """The Trainer that calls this callback, which is not told; None where something else does."""
    frame = sys._getframe(1)
    while frame is not None:
        if isinstance(found := frame.f_locals.get("self"), Trainer):
            return found
        frame = frame.f_back
    return None
