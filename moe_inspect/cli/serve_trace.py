"""`moe-inspect serve-trace`: start a serving engine, trace the model in it, stop it."""

from __future__ import annotations

import shlex
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import typer

from moe_inspect.capture.options import Revision, TrustRemoteCode
from moe_inspect.cli.capture import need_torch, ranges_of, stop_cleanly
from moe_inspect.cli.options import argument, in_panel, seconds
from moe_inspect.cli.progress import shown
from moe_inspect.cli.trace import (
    EngineName,
    RecordedLayers,
    RequestOptions,
    TracedText,
    WriteOptions,
    record,
    refuse_early,
)
from moe_inspect.progress import phase
from moe_inspect.text import print_stderr
from moe_inspect.trace.files.location import Remote

engine_option = in_panel("Engine")
PARSING = {"allow_interspersed_args": False}  # what follows -- is the engine's


class ServedRequests(RequestOptions):
    panel = "Engine"


def serve_trace(
    *,
    command: list[str] | None = argument(
        "The command that starts the engine, after two dashes: -- vllm serve MODEL …", "-- COMMAND"
    ),
    engine: EngineName | None = engine_option("The serving engine (default: by its command)."),
    model_config: str | None = engine_option(
        "Hub id or directory of the served model's config and tokenizer (default: the "
        "model of the command).",
        "MODEL",
    ),
    engine_log: Path | None = engine_option(
        "File to append the engine's output to (default: the trace's name plus "
        ".engine.log, beside it; for a URL, in the current directory).",
        "FILE",
    ),
    start_timeout: float = engine_option(
        "How long the engine may take to start (default: 1h).",
        "TIME",
        parser=seconds,
        show_default=False,
        default=3600.0,
    ),
    requests: ServedRequests,
    text: TracedText,
    layers: RecordedLayers = None,
    write: WriteOptions,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Start a serving engine, trace the model in it, and stop it.

    Examples:
    moe-inspect serve-trace -o runs/a -- vllm serve allenai/OLMoE-1B-7B-0924
    moe-inspect serve-trace -o runs/a -- sglang serve --model-path ./model --tp 2"""
    from moe_inspect.api import trace_engine
    from moe_inspect.capture.server.serve import read_command, serve_engine

    if not command:
        raise typer.BadParameter(
            "give the command that starts the engine after --, like -- vllm serve MODEL"
        )
    write.check()
    read = read_command(command, engine)
    config = model_config or read.model
    if config is None:
        raise typer.BadParameter(
            f"{shlex.join(command)[:80]} names no model: give --model-config MODEL"
        )
    # what the engine was told of its model holds for the config too
    common: dict[str, Any] = {
        **text.keywords(),
        **write.keywords(),
        "layers": ranges_of(layers),
        "revision": revision or read.revision,
        "trust_remote_code": trust_remote_code or read.trust_remote_code,
        **requests.keywords(),
        "api_key": requests.api_key or read.api_key,
    }
    refuse_early(write, None, common["revision"], config)
    need_torch()  # while nothing waits for it
    place = write.place
    log = engine_log or Path(f"{place.name if isinstance(place, Remote) else place}.engine.log")
    stop_cleanly()
    print_stderr(f"starting {read.name} on port {read.port}; its log is {log}")
    began, ready = time.monotonic(), False
    try:
        with ExitStack() as running:
            with shown():
                phase(f"{read.name} is starting")
                key = common["api_key"]
                engine_runs = serve_engine(
                    read, api_key=key, log=log, start_timeout_s=start_timeout
                )
                served = running.enter_context(engine_runs)
            ready = True
            print_stderr(f"{served.name} answers after {time.monotonic() - began:.0f} s")
            try:
                run = partial(trace_engine, served.url, write.output, **common)
                record(partial(run, engine=served.engine, model_config=config), write)
            finally:
                print_stderr(f"stopping {served.name}")
    except KeyboardInterrupt:
        if not ready:  # `record` says it itself
            write.say_interrupted()
        raise
