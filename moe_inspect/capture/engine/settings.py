"""What the environment asks of the plugin of a serving engine: every variable that it reads.
Nothing heavy is imported, as every process of an engine asks whether there is anything to do."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from logging import Logger
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

from moe_inspect.errors import MoeInspectError
from moe_inspect.text import first_line

REFUSED = "nothing is recorded"
PREFIX = "MOE_INSPECT_"
OTHERS = ("API_KEY",)  # variables that others of moe-inspect read
PATH = "/v1/moe_inspect"  # of the endpoint: below /v1 engines ask for their API key, if any
KEY = "moe_inspect"  # of the internal state that SGLang's server shows and takes


def _cores() -> set[int]:
    """Those of the parent too: an engine may have bound this process to one already."""
    cores = set[int]()
    for process in (0, os.getppid()):
        with suppress(AttributeError, OSError):
            cores |= os.sched_getaffinity(process)
    return cores


CORES = _cores()  # where we run; the engine's threads will be bound to some of them
SWITCH = {"1": True, "on": True, "true": True, "0": False, "off": False, "false": False}


def _switch(text: str) -> bool:
    if text.lower() not in SWITCH:
        raise ValueError("1 or 0, on or off")
    return SWITCH[text.lower()]


def _number(least: float, most: float, said: str) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ValueError(said) from None
        if not least <= value <= most:  # false for NaN too
            raise ValueError(said)
        return value

    return read


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise ValueError("a whole number, 0 or more")
    return int(text)


def _setting(default: Any, read: Callable[[str], Any], meaning: str, shown: str = "") -> Any:
    """A field: `shown` is its default in the documentation."""
    about = {"read": read, "meaning": meaning, "shown": shown or str(default)}
    return field(default=default, metadata=about)


share = _number(0, 1, "a share from 0 to 1")


@dataclass(frozen=True)
class Settings:
    """The variables, named MOE_INSPECT_ and the name of a field."""

    trace: Path | None = _setting(
        None,
        lambda text: Path(text).absolute(),
        "directory of traces: every scheduled token of the sampled requests is recorded there",
        "nothing is recorded",
    )
    sample: float = _setting(
        1.0, share, "share of requests that are recorded, each as a whole or not at all", "1"
    )
    metrics: bool = _setting(
        False,
        _switch,
        "count the assignments of each layer and expert, of all requests, for metrics in the "
        "engine's /metrics",
        "0",
    )
    per_expert: bool = _setting(
        False, _switch, "a series of each layer and expert in /metrics too", "0"
    )
    logits: bool = _setting(False, _switch, "record router logits too", "0")
    text: bool = _setting(
        True, _switch, "0 leaves out token ids and the vocabulary, as `--no-text` does", "1"
    )
    queue_mb: float = _setting(
        256.0,
        _number(0.001, 1e6, "megabytes, above 0"),
        "memory for decisions that wait to be written; what comes while it is full is dropped and "
        "counted: the engine never waits",
        "256",
    )
    max_gb: float = _setting(
        4.0,
        _number(1e-6, 1e6, "gigabytes, above 0"),
        "size of a trace at which it is closed and the next one begun; looked at every two seconds",
        "4",
    )
    keep: int = _setting(
        4,
        _whole,
        "closed traces that each engine keeps beside the one that it writes: the oldest is deleted "
        "first; 0 keeps all",
    )
    start: bool = _setting(True, _switch, "`off` waits for `moe-inspect engine URL on`", "on")
    replay: Path | None = _setting(
        None,
        lambda text: Path(text).absolute(),
        "directory of a trace whose routes vLLM's routing simulator replays, as its strategy "
        "`moe_inspect`",
        "none",
    )

    @property
    def is_active(self) -> bool:
        return self.trace is not None or self.metrics

    @property
    def records_logits(self) -> bool:
        return self.logits and self.trace is not None

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """MoeInspectError for an invalid value. An empty variable is as if it were unset."""
        values = dict[str, Any]()
        for one in fields(cls):
            name = variable(one.name)
            if text := environment.get(name, "").strip():
                try:
                    values[one.name] = one.metadata["read"](text)
                except ValueError as error:
                    raise MoeInspectError(f"{name} is {text!r}, not {error}") from None
        return cls(**values)


def variable(name: str) -> str:
    """Of a field, the variable."""
    return PREFIX + name.upper()


def tell_why(log: Logger, error: Exception) -> str:
    """Why nothing is recorded, in a line, which is also returned."""
    ours = isinstance(error, MoeInspectError)
    said = f"{REFUSED}: {'' if ours else f'{type(error).__name__}: '}{first_line(error)}"
    log.error("moe-inspect: %s", said, exc_info=None if ours else error)
    return said


def tell_unknown(log: Logger) -> None:
    """Names variables that nobody reads, in the first of an engine's processes."""
    known = [variable(name) for name in (*(one.name for one in fields(Settings)), *OTHERS)]
    unknown = [name for name in os.environ if name.startswith(PREFIX) and name not in known]
    if unknown and parent_process() is None:
        from difflib import get_close_matches

        for name in unknown:
            (nearest,) = get_close_matches(name, known, n=1, cutoff=0)
            log.warning("moe-inspect: it reads no %s; the nearest is %s", name, nearest)


def is_asked() -> bool:
    """Whether the environment asks for anything, which costs nothing to know."""
    return any(os.environ.get(PREFIX + name) for name in ("TRACE", "METRICS", "REPLAY"))
