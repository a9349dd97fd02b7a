"""What an alarm does: warn, log, call a function, post to a webhook, stop the run."""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
import urllib.request
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from moe_inspect.errors import MoeInspectError
from moe_inspect.watch.alarms import Alarm

LOGGER = logging.getLogger("moe_inspect.training")
Action = Callable[[Alarm], object]
NAMED = ("warn", "log", "stop")


class RoutingWarning(UserWarning):
    """An alarm of a training run."""


class Webhook:
    """Posts each alarm as JSON to a URL, from a thread of its own: training never waits for it. At
    most `most_per_hour` are posted; what is beyond that, or cannot be delivered, is logged as a
    warning and not tried again."""

    def __init__(self, url: str, *, timeout_s: float = 5.0, most_per_hour: int = 20):
        if urlsplit(url).scheme not in ("http", "https"):
            raise MoeInspectError(f"{url!r} is not a webhook: give an http or https URL")
        self.url, self.timeout_s, self.most_per_hour = url, timeout_s, most_per_hour
        self._sent: deque[float] = deque()
        self._queue: queue.Queue[Alarm] = queue.Queue(most_per_hour)
        self._thread: threading.Thread | None = None

    def __call__(self, alarm: Alarm) -> None:
        now = time.monotonic()
        while self._sent and now - self._sent[0] > 3600:
            self._sent.popleft()
        if len(self._sent) >= self.most_per_hour or self._queue.full():
            LOGGER.warning("webhook: %d alarms in an hour, not posted: %s", len(self._sent), alarm)
            return
        self._sent.append(now)
        self._queue.put_nowait(alarm)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="moe-inspect-hook", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Waits, for the time of one request at most, until what is queued has been posted."""
        until = time.monotonic() + self.timeout_s
        while self._queue.unfinished_tasks and time.monotonic() < until:
            time.sleep(0.01)

    def _run(self) -> None:
        while True:
            alarm = self._queue.get()
            text = json.dumps({"text": str(alarm), **alarm.record()}).encode()
            headers = {"Content-Type": "application/json", "User-Agent": "moe-inspect"}
            try:
                request = urllib.request.Request(self.url, text, headers)
                urllib.request.urlopen(request, timeout=self.timeout_s).close()
            except (OSError, ValueError) as error:
                LOGGER.warning("webhook: could not post to %s: %s", self.url, error)
            finally:
                self._queue.task_done()


def actions_of(on_alarm: str | Action | Sequence[str | Action]) -> list[str | Action]:
    actions = [on_alarm] if isinstance(on_alarm, str) or callable(on_alarm) else list(on_alarm)
    for action in actions:
        if not callable(action) and action not in NAMED:
            known = f"{', '.join(NAMED)}, a function or a Webhook"
            raise MoeInspectError(f"no action {action!r} on an alarm: give {known}")
    return actions


def _warn(text: str) -> None:
    """A warning, of which Python shows the text, but not the line of code that it came from."""
    format_of_python = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"
    try:
        warnings.warn(text, RoutingWarning, stacklevel=3)
    finally:
        warnings.formatwarning = format_of_python


def act(alarm: Alarm, actions: Sequence[str | Action]) -> bool:
    """Does what is asked for. Returns whether the run is to stop."""
    for action in actions:
        if callable(action):
            action(alarm)
        elif action == "warn":
            _warn(str(alarm))
        elif action == "log":
            LOGGER.warning("%s", alarm)
    return "stop" in actions
