"""Starts a serving engine, for `moe-inspect serve-trace` and `moe_inspect.serve_engine`, and stops
it. The user's command is read, and extended so that the engine returns its routed experts."""

# pyright: strict

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from moe_inspect.capture.inside import recording_inside, said_since
from moe_inspect.capture.server import keeper
from moe_inspect.capture.server.client import NotReady, check_server, server_ended
from moe_inspect.capture.server.protocols import ENGINES, FLAG
from moe_inspect.errors import MoeInspectError, writing
from moe_inspect.text import print_stderr

LOCAL = "127.0.0.1"
EVERY_ADDRESS = {"0.0.0.0": LOCAL, "::": "::1", "": LOCAL}  # to listen at → to connect to
# vLLM returns them by its model runner V2, and says no to the flag without it
ENVIRONMENT = {"vllm": {"VLLM_USE_V2_MODEL_RUNNER": "1"}, "sglang": {}}


@dataclass(frozen=True)
class EngineCommand:
    """`arguments`: the program and all that it is called with; `environment`: the variables that
    are added to those of this process; `host`, `port`: where the engine listens; `model`: hub id or
    directory, None where the command does not say it; `revision`, `trust_remote_code`, `api_key`:
    as the engine was given them."""

    engine: str
    arguments: Sequence[str] = field(repr=False)
    environment: Mapping[str, str]
    host: str
    port: int
    model: str | None
    revision: str | None
    trust_remote_code: bool
    api_key: str | None = field(repr=False)

    @property
    def name(self) -> str:
        """The program, for messages."""
        return Path(self.arguments[0]).name

    @property
    def url(self) -> str:
        host = EVERY_ADDRESS.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


def read_command(command: Sequence[str], engine: str | None = None) -> EngineCommand:
    """The command, completed. `engine`: by its name where that is None. MoeInspectError where there
    is no such program, its engine is unknown, or its port is in use."""
    if not command:
        raise MoeInspectError("no command: give the one that starts the engine, vllm serve MODEL")
    if shutil.which(command[0]) is None:
        raise MoeInspectError(
            f"no program {command[0]}: activate the environment it is installed in, or give its "
            "path"
        )
    # by the first word that is the name of an engine's program or module
    words = (Path(word).name.partition(".")[0] for word in command)
    engine = engine or next((word for word in words if word in ENGINES), None)
    if engine not in ENGINES:
        said = f"cannot tell the engine of {shlex.join(command)[:80]}"
        raise MoeInspectError(f"{said}: give --engine {' or '.join(ENGINES)}")
    at, given = _value(command, "--host"), _value(command, "--port")
    host = LOCAL if at is None else at  # nobody else needs it
    port = _free_port(host, given)
    added = [] if _has(command, FLAG) else [FLAG]
    added += ["--host", host] if at is None else []
    added += ["--port", str(port)] if given is None else []
    environment = {k: v for k, v in ENVIRONMENT[engine].items() if k not in os.environ}
    api_key = _value(command, "--api-key")
    if api_key is None and engine == "vllm":
        api_key = os.environ.get("VLLM_API_KEY")
    model = _value(command, "--model") or _value(command, "--model-path")
    after: Sequence[str] = command[command.index("serve") + 1 :] if "serve" in command else ()
    if after and not after[0].startswith("-"):
        model = after[0]
    revision, trusts = _value(command, "--revision"), _has(command, "--trust-remote-code")
    arguments = [*command, *added]
    return EngineCommand(
        engine, arguments, environment, host, port, model, revision, trusts, api_key
    )


def _has(command: Sequence[str], option: str) -> bool:
    """Whether the option is given, also with _ for the - in it."""
    return any(word.partition("=")[0].replace("_", "-") == option for word in command)


def _value(command: Sequence[str], option: str) -> str | None:
    """What follows the option, the last time that it is given."""
    found = None
    for word, following in zip(command, [*command[1:], None], strict=True):
        if _has([word], option):
            found = word.partition("=")[2] if "=" in word else following
    return found


def _free_port(host: str, given: str | None) -> int:
    """The port, if nobody listens there; any where none is given."""
    if given is not None and not (given.isdecimal() and 0 < int(given) < 2**16):
        raise MoeInspectError(f"--port {given} of the engine is no port: 1 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, int(given or 0)), family=family) as free:
            return free.getsockname()[1]
    except OSError as error:
        is_used = error.errno == errno.EADDRINUSE
        why = "is in use" if is_used else f"cannot be used, {error.strerror}"
        raise MoeInspectError(
            f"port {given or 'of any number'} of {host} {why}: give the engine another --host or "
            "--port; without --port it gets a free one"
        ) from None


GRACE_S = 30.0  # between SIGTERM and SIGKILL
ASK_EVERY_S = 0.5
TAIL_LINES = 20
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
    127.0.0.1 as its host. Our plugin, if its environment has it, records for `trace_engine` in a
    directory beside the log, which is deleted at the end, unless MOE_INSPECT_TRACE is set. The
    block begins when the engine answers. At its end, however it comes, the engine is stopped, with
    all that it started: also when this process is killed.

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
    with writing(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        said = log.open("a+b", buffering=0)  # the keeper also reads it: it drops what is old
    with said, recording_inside(log) as inside:
        began_at = os.fstat(said.fileno()).st_size
        kept = subprocess.Popen(
            [sys.executable, "-m", keeper.__name__, str(GRACE_S), *read.arguments],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, **read.environment, **inside},
            # Ctrl-C in a terminal goes to its whole process group
            start_new_session=True,
        )
        before = server_ended.set(lambda: kept.poll() is not None)
        try:
            began = time.monotonic()
            while not _answers(read.url, api_key or read.api_key):
                took_s = time.monotonic() - began
                if kept.poll() is not None:
                    raise MoeInspectError("it ended")
                if took_s > start_timeout_s:
                    raise MoeInspectError(f"{read.name} does not answer after {took_s:.0f} s")
                if waiting is not None:
                    waiting(took_s)
                time.sleep(ASK_EVERY_S)
            yield read
        except MoeInspectError as error:
            if kept.poll() is None:
                raise
            _show_end(log, began_at)
            code = kept.returncode
            by = {128 + n: n.name for n in signal.Signals}.get(code, f"exit code {code}")
            ended = f"{read.name} ended with {by}"
            if code < 0:  # a signal to the command is 128 + n
                ended = f"a process that keeps {read.name} was killed, and {read.name} is stopped"
            raise MoeInspectError(f"{ended}: the end of {log} is above") from error
        finally:
            server_ended.reset(before)
            kept.communicate()  # closes its stdin, and waits


def _answers(url: str, api_key: str | None) -> bool:
    try:
        check_server(url, api_key)
    except NotReady:
        return False
    return True


def _show_end(log: Path, began_at: int) -> None:
    """The last lines of what was said since."""
    for line in COLOURS.sub("", said_since(log, began_at)).splitlines()[-TAIL_LINES:]:
        print_stderr(line)
