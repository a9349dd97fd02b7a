"""Starts a serving engine, for `moe-inspect serve-trace` and `moe_inspect.serve_engine`, and stops
it."""

# pyright: strict

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from moe_inspect.capture.server import keeper
from moe_inspect.capture.server.client import NotReady, check_server, server_ended
from moe_inspect.capture.server.engine_command import EngineCommand, read_command
from moe_inspect.errors import MoeInspectError, writing
from moe_inspect.text import print_stderr

GRACE_S = 30.0  # between SIGTERM and SIGKILL
ASK_EVERY_S = 0.5
TAIL_LINES, TAIL_BYTES = 20, 2**14
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@contextmanager
def serve_engine(
    command: Sequence[str] | EngineCommand,
    *,
    engine: str | None = None,
    api_key: str | None = None,
    log: str | Path = "engine.log",
    start_timeout_s: float = 3600.0,
    waiting: Callable[[float], None] | None = None,
) -> Generator[EngineCommand]:
    """Runs a serving engine within a `with` block:

        with moe_inspect.serve_engine(["vllm", "serve", "./model"]) as served:
            moe_inspect.trace_engine(
                served.url, "runs/a", engine=served.engine, model_config="./model"
            )

    The command gets what it needs to return routed experts, and where it has none a free port and
    127.0.0.1 as its host. The block begins when the engine answers. At its end, however it comes,
    the engine is stopped, with all that it started: also when this process is killed.

    command          program and arguments
    engine           "vllm" or "sglang"; None: by the command's name
    api_key          that the engine asks for; None: as the command has it
    log              what the engine says is appended here; the older half of 32 MB is dropped
    start_timeout_s  how long it may take to answer
    waiting          called with the seconds since the start, until the engine answers

    Yields what is known of the engine: url, engine, model, revision, api_key. Raises
    MoeInspectError where the command cannot be run, or ends before or in the block; the end of the
    log is then on stderr."""
    read = command if isinstance(command, EngineCommand) else read_command(command, engine)
    log = Path(log)
    with _appended(log) as said:
        began_at = os.fstat(said).st_size
        kept = _start(read, said)
        before = server_ended.set(lambda: kept.poll() is not None)
        try:
            _wait(kept, read, api_key or read.api_key, start_timeout_s, waiting)
            yield read
        except MoeInspectError as error:
            if kept.poll() is None:
                raise
            _show_end(log, began_at)
            ended = f"{read.name} ended with {_code(kept.returncode)}"
            if kept.returncode < 0:  # a signal to the command is 128 + n
                ended = f"a process that keeps {read.name} was killed, and {read.name} is stopped"
            raise MoeInspectError(f"{ended}: the end of {log} is above") from error
        finally:
            server_ended.reset(before)
            assert kept.stdin is not None
            kept.stdin.close()
            kept.wait()


@contextmanager
def _appended(log: Path) -> Generator[int]:
    """A file descriptor of the log, which the keeper also reads: it drops what is old."""
    with writing(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        said = os.open(log, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        yield said
    finally:
        os.close(said)


def _start(command: EngineCommand, said: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", keeper.__name__, str(GRACE_S), *command.arguments],
        stdin=subprocess.PIPE,
        stdout=said,
        stderr=subprocess.STDOUT,
        env={**os.environ, **command.environment},
        # Ctrl-C in a terminal goes to its whole process group
        start_new_session=True,
    )


def _wait(
    kept: subprocess.Popen[bytes],
    command: EngineCommand,
    api_key: str | None,
    start_timeout_s: float,
    waiting: Callable[[float], None] | None,
) -> None:
    """Until the engine answers."""
    began = time.monotonic()
    while True:
        try:
            return check_server(command.url, api_key)
        except NotReady:
            took_s = time.monotonic() - began
        if kept.poll() is not None:
            raise MoeInspectError("it ended")
        if took_s > start_timeout_s:
            raise MoeInspectError(f"{command.name} does not answer after {took_s:.0f} s")
        if waiting is not None:
            waiting(took_s)
        time.sleep(ASK_EVERY_S)


def _show_end(log: Path, began_at: int) -> None:
    """The last lines of what was said since."""
    with open(log, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        # it is shorter where the older half was dropped
        file.seek(max(began_at if began_at <= end else 0, end - TAIL_BYTES))
        text = file.read().decode(errors="replace")
    for line in COLOURS.sub("", text).splitlines()[-TAIL_LINES:]:
        print_stderr(line)


def _code(code: int) -> str:
    """An exit code as a shell has it, in words."""
    try:
        return signal.Signals(code - 128).name
    except ValueError:
        return f"exit code {code}"
