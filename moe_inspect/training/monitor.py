"""RoutingMonitor: watches the routers of a model in any training loop."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moe_inspect.errors import MoeInspectError, check_whole
from moe_inspect.model.wrapped import is_compiled
from moe_inspect.training import metrics as shown
from moe_inspect.training.actions import Action, act, actions_of
from moe_inspect.training.history import History
from moe_inspect.training.sums import RoutingSums, WindowSums
from moe_inspect.watch.alarms import Alarm, Alarms, Window, drop_rate_R
from moe_inspect.watch.rules import DEFAULT_RULES, DROP_RATE, Rule, parse_rule, refuse_gpus

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from matplotlib.figure import Figure
    from torch.distributed import ProcessGroup

    from moe_inspect.capture.options import InputsOf
    from moe_inspect.model.custom.spec import RouterSpec
    from moe_inspect.trace.schema import Router

PREFIX = "routing/"


class RoutingMonitor:
    """Counts, while a model is trained, how many tokens its routers send to each expert:

        with RoutingMonitor(model, "runs/a/routing") as monitor:
            for batch in loader:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if metrics := monitor.step():
                    print(metrics)

    Counts are kept on the device, without padding (by the attention mask). All passes between two
    calls of `step` are one step, however many there are (gradient accumulation); what gradient
    checkpointing computes again is not counted. A pass in evaluation mode, or without gradients, is
    not training: `evaluation` returns what was counted of those. Under torch.distributed every
    process has a monitor, and logs hold the sums of all.

    model        any model that `moe_inspect.record` takes, also wrapped (DDP, FSDP, torch.compile)
    path         directory of the history, a trace of counts whose batches are steps; None: none
    every        count every N-th step
    log_steps    `step` returns metrics after as many steps: the length of a window
    flush_steps  commit the history after as many steps; by default at every log
    detail       "summary": the worst and the median over layers of each metric; "layers": all
    rules        of the alarms, as text or `Rule`; () for none
    on_alarm     "warn", "log", "stop" (sets `should_stop`), a function of the `Alarm`, a `Webhook`,
                 or several of them
    layers       only these block indices
    routers      of a model that is not transformers': as of `moe_inspect.record`, like `inputs`
    resume_step  the run goes on after this step of an earlier one: later steps in the history are
                 replaced
    overwrite    replace an existing history
    group        the processes to sum over, by default all. Ranks of tensor parallelism see the same
                 tokens: give the group of data-parallel ranks

    Raises MoeInspectError for a dense model, and in a pass in which a router has not seen every
    token once."""

    def __init__(
        self,
        model: Any,
        path: str | Path | None = None,
        *,
        every: int = 1,
        log_steps: int = 10,
        flush_steps: int | None = None,
        detail: str = "summary",
        rules: Sequence[str | Rule] = DEFAULT_RULES,
        on_alarm: str | Action | Sequence[str | Action] = "warn",
        layers: Sequence[int] | None = None,
        routers: Sequence[RouterSpec] | None = None,
        inputs: InputsOf | None = None,
        resume_step: int = 0,
        overwrite: bool = False,
        group: ProcessGroup | None = None,
    ):
        for name, n in (("every", every), ("log_steps", log_steps), ("flush_steps", flush_steps)):
            if n is not None:
                check_whole(name, n, 1)
        if detail not in shown.DETAILS:
            raise MoeInspectError(f"no detail {detail!r}: choose from {', '.join(shown.DETAILS)}")
        self.path = Path(path) if path is not None else None
        self.every, self.log_steps, self.detail, self.group = every, log_steps, detail, group
        self.flush_steps = flush_steps or log_steps
        self.actions = actions_of(on_alarm)
        self.rules = [parse_rule(rule) if isinstance(rule, str) else rule for rule in rules]
        refuse_gpus(self.rules)
        self.resume_step, self.overwrite = resume_step, overwrite
        self._sums = RoutingSums(model, routers, layers, inputs)
        self.model, self._attachment = self._sums.model, self._sums.attachment
        self._pauses = is_compiled(model)
        self.steps = resume_step
        self.should_stop = False
        self.raised: list[Alarm] = []
        self.window: Window | None = None  # the last one
        self._alarms: Alarms | None = None
        self._history: History | None = None
        self._collected = self._logged = self._flushed = resume_step  # the last step of each
        self._to_log: WindowSums | None = None
        self._to_flush: WindowSums | None = None

    @property
    def routers(self) -> list[Router]:
        """The routers, once a pass has run."""
        return self._sums.routers

    # --- attach and detach

    def __enter__(self) -> RoutingMonitor:
        if self.path is not None and _rank() == 0:
            settings = {"every": self.every, "log_steps": self.log_steps}
            self._history = History(self.path, self.resume_step, self.overwrite, settings)
        try:
            self._attachment.attach()
        except BaseException:
            self._close("interrupted")
            raise
        self._choose()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._attachment.detach()
        try:
            if kind is None:
                self.flush()
        finally:
            self._close("complete" if kind is None else "interrupted")

    def _close(self, status: str) -> None:
        for action in self.actions:
            if (close := getattr(action, "close", None)) is not None:
                close()
        history, self._history = self._history, None
        if history is not None:
            history.close(status)

    def _choose(self) -> None:
        """Whether the next step is counted. A compiled model runs uncompiled where it is, and is
        left alone elsewhere, evaluation included."""
        self._sums.is_counted = self.steps % self.every == 0
        if self._pauses:
            self._attachment.paused = not self._sums.is_counted

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forward passes inside the block are not counted."""
        before, self._attachment.paused = self._attachment.paused, True
        try:
            yield
        finally:
            self._attachment.paused = before

    # --- steps

    def step(self, step: int | None = None) -> dict[str, float]:
        """The optimizer has taken a step: the passes since the last call were its batch. Returns
        the metrics of the window at every `log_steps`-th step, else nothing. `step`: its number,
        where the caller has one; by default they are counted from 1."""
        self._sums.end_step()
        self.steps = self.steps + 1 if step is None else step
        self._choose()
        if self.steps - self._flushed >= self.flush_steps and self.path is not None:
            self.flush()
        return self.log() if self.steps - self._logged >= self.log_steps else {}

    def log(self) -> dict[str, float]:
        """Ends the window now: its metrics, by key ("routing/max_vio/worst" …). Empty where nothing
        was counted since the last one. Waits for the device, and for the other processes."""
        self._collect()
        taken, self._to_log = self._to_log, None
        first, self._logged = self._logged + 1, self.steps
        if taken is None:
            return {}
        values = self._values(taken, training=True)
        window = Window(first, self.steps, taken.load, taken.tokens_R, values, taken.recent)
        values, self.window = shown.window_metrics(window, self.window), window
        self._judge(window)
        metrics = shown.logged(values, self.routers, self.detail, PREFIX)
        metrics[f"{PREFIX}tokens"] = float(taken.tokens_R.max())
        metrics[f"{PREFIX}alarms"] = float(len(self._alarms.active) if self._alarms else 0)
        return metrics

    def evaluation(self) -> dict[str, float]:
        """The metrics of the passes in evaluation since the last call, by key
        ("eval_routing/max_vio/worst" …); empty where there were none."""
        taken = self._sums.read(training=False, group=self.group)
        if taken is None or not taken.passes:
            return {}
        values = self._values(taken, training=False)
        window = Window(self.steps, self.steps, taken.load, taken.tokens_R, values)
        values = shown.window_metrics(window, None)
        return shown.logged(values, self.routers, self.detail, f"eval_{PREFIX}")

    def flush(self) -> None:
        """Commits the steps so far to the history: what is saved by a checkpoint now is in it."""
        if self.path is None or self.steps == self._flushed:
            return
        self._collect()
        taken, self._to_flush = self._to_flush, None
        self._flushed = self.steps
        if self._history is not None and taken is not None:
            self._history.write(self._sums, taken, self.steps)

    def _collect(self) -> None:
        """Reads the sums, once per step: every process is at the same one."""
        if self._collected == self.steps:
            return
        self._collected = self.steps
        taken = self._sums.read(group=self.group)
        if taken is not None and taken.passes:
            self._to_log = self._to_log.plus(taken) if self._to_log else taken
            if self.path is not None:
                self._to_flush = self._to_flush.plus(taken) if self._to_flush else taken

    def _values(self, taken: WindowSums, training: bool) -> dict[str, np.ndarray]:
        """What the load does not tell, by metric, float [R]. The share of a router's slots that its
        capacity dropped is NaN where what goes to no expert may be something else."""
        drops_R = np.array([site.drops for site in self._sums.sites])
        rate_R = drop_rate_R(taken.load, taken.tokens_R, self.routers)
        rate_R = np.where(drops_R, rate_R, np.nan)
        found: dict[str, np.ndarray] = dict(
            zip(("aux_loss", "z_loss"), taken.losses_2R, strict=True)
        )
        if training:
            found["bias_range"] = self._sums.bias_range()
        return {**found, DROP_RATE: rate_R}

    def _judge(self, window: Window) -> None:
        if not self.rules:
            return
        self._alarms = self._alarms or Alarms(self.routers, self.rules)
        for alarm in self._alarms.see(window):  # every process sees the same window
            self.raised.append(alarm)
            self.should_stop |= "stop" in self.actions
            if _rank() == 0:
                act(alarm, self.actions)

    def picture(self) -> Figure:
        """A matplotlib figure of the last window: the load of every expert of every layer."""
        if self.window is None:
            raise MoeInspectError("no window yet: the first picture follows the first log")
        return shown.load_picture(self.window, self.routers)


class OfTrainer:
    """The monitor of a callback, whose steps and logs are a trainer's. It shows a picture at every
    `picture_logs`-th log and at the end, 0 for never; `options`: of the monitor."""

    def __init__(self, path: str | Path | None, picture_logs: int, options: dict[str, Any]):
        self.path, self.picture_logs, self.options = path, picture_logs, options
        self.monitor: RoutingMonitor | None = None
        self._logs = 0
        self._pictured: Window | None = None  # in the last picture

    def _begin(self, model: Any, step: int) -> None:
        options = {"flush_steps": sys.maxsize, **self.options}
        self.monitor = RoutingMonitor(  # it logs when the trainer does
            model, self.path, log_steps=sys.maxsize, resume_step=step, **options
        )
        self.monitor.__enter__()
        self._logs, self._pictured = 0, None

    def _show(
        self, step: int, reporters: Iterable[str], boards: Sequence[object], end: bool
    ) -> None:
        """Shows a picture of the window, if none has shown it and one is due: at a log, or at the
        `end`. `boards`: summary writers of TensorBoard."""
        self._logs += 0 if end else 1
        every = self.picture_logs
        if self.monitor is None or not every or not (end or self._logs % every == 1 % every):
            return
        window, before = self.monitor.window, self._pictured
        self._pictured = window
        wanted = {"wandb", "mlflow"}.intersection(reporters)
        if window is not before and (boards or wanted):
            shown.show_picture(self.monitor.picture(), step, wanted, *boards[:1])

    def _end(self, kind: type[BaseException] | None) -> None:
        if self.monitor is not None:
            monitor, self.monitor = self.monitor, None
            monitor.__exit__(kind, None, None)


def _rank() -> int:
    distributed = torch.distributed
    there = distributed.is_available() and distributed.is_initialized()
    return distributed.get_rank() if there else 0
