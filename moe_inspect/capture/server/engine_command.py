"""The command that starts a serving engine: what is read from it, and what is added so that the
engine returns its routed experts."""

# pyright: strict

from __future__ import annotations

import errno
import os
import shlex
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moe_inspect.capture.server.protocols import ENGINES, FLAG
from moe_inspect.errors import MoeInspectError

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
    engine = engine or _engine_of(command)
    if engine not in ENGINES:
        raise MoeInspectError(
            f"cannot tell the engine of {shlex.join(command)[:80]}: give --engine "
            f"{' or '.join(ENGINES)}"
        )
    added: list[str] = [] if _has(command, FLAG) else [FLAG]
    host = _value(command, "--host")
    if host is None:  # nobody else needs it
        added += ["--host", host := LOCAL]
    given = _value(command, "--port")
    port = _free_port(host, given)
    if given is None:
        added += ["--port", str(port)]
    environment = {k: v for k, v in ENVIRONMENT[engine].items() if k not in os.environ}
    api_key = _value(command, "--api-key")
    if api_key is None and engine == "vllm":
        api_key = os.environ.get("VLLM_API_KEY")
    return EngineCommand(
        engine,
        [*command, *added],
        environment,
        host,
        port,
        _model_of(command),
        _value(command, "--revision"),
        _has(command, "--trust-remote-code"),
        api_key,
    )


def _engine_of(command: Sequence[str]) -> str | None:
    """By the first word that is the name of an engine's program or module."""
    words = (Path(word).name.partition(".")[0] for word in command)
    return next((word for word in words if word in ENGINES), None)


def _model_of(command: Sequence[str]) -> str | None:
    after: Sequence[str] = command[command.index("serve") + 1 :] if "serve" in command else ()
    if after and not after[0].startswith("-"):
        return after[0]
    return _value(command, "--model") or _value(command, "--model-path")


def _option(word: str) -> str:
    """The name of an option as its help has it: engines take _ for - in it."""
    return word.partition("=")[0].replace("_", "-")


def _has(command: Sequence[str], option: str) -> bool:
    return any(word.startswith("--") and _option(word) == option for word in command)


def _value(command: Sequence[str], option: str) -> str | None:
    """What follows the option, the last time that it is given."""
    found = None
    for word, following in zip(command, [*command[1:], None], strict=True):
        if word.startswith("--") and _option(word) == option:
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
        why = (
            "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used, {error.strerror}"
        )
        raise MoeInspectError(
            f"port {given or 'of any number'} of {host} {why}: give the engine another --host or "
            "--port; without --port it gets a free one"
        ) from None
