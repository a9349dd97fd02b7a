"""`moe-inspect serve-trace`: start a serving engine, trace the model in it, stop it."""

from __future__ import annotations

import inspect
import shlex
import sys
import time
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_inspect.cli.needs import need_torch, stop_cleanly
from moe_inspect.cli.options import seconds, with_options
from moe_inspect.cli.trace.checks import NOT_OF_ENGINES, refuse_early
from moe_inspect.cli.trace.command import (
    EngineName,
    TraceDirectory,
    say_interrupted,
    trace,
)
from moe_inspect.text import print_stderr
from moe_inspect.trace.files.location import Remote, output_location

OWN = ("context", "output", "model", "engine", "model_config")  # options that are not trace's


def _options_of_trace() -> type[Any]:
    """The options of `trace` that mean something to an engine, as a dataclass."""
    return make_dataclass(
        "EngineTraceOptions",
        [
            (name, option.annotation, field(default=option.default))
            for name, option in inspect.signature(trace, eval_str=True).parameters.items()
            if name not in (*OWN, *NOT_OF_ENGINES)
        ],
    )


@with_options(_options_of_trace())
def serve_trace(
    context: typer.Context,
    output: TraceDirectory,
    options: Any,
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="-- COMMAND",
            help="The command that starts the engine, after two dashes: -- vllm serve MODEL …",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[
        EngineName | None,
        typer.Option(help="The serving engine (default: by its command).", show_default=False),
    ] = None,
    model_config: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Hub id or directory of the served model's config and tokenizer (default: the "
            "model of the command).",
            show_default=False,
        ),
    ] = None,
    engine_log: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File to append the engine's output to (default: the trace's name plus "
            ".engine.log, beside it; for a URL, in the current directory).",
            show_default=False,
        ),
    ] = None,
    start_timeout: Annotated[
        float,
        typer.Option(
            metavar="TIME",
            parser=seconds,
            help="How long the engine may take to start (default: 1h).",
            show_default=False,
        ),
    ] = 3600.0,
) -> None:
    """Start a serving engine, trace the model in it, and stop it."""
    from moe_inspect.capture.server.engine_command import read_command
    from moe_inspect.capture.server.serve import serve_engine

    if not command:
        raise typer.BadParameter(
            "give the command that starts the engine after --, like -- vllm serve MODEL"
        )
    if options.resume and options.overwrite:
        raise typer.BadParameter(
            "--resume keeps the existing trace, --overwrite replaces it: give only one"
        )
    read = read_command(command, engine and str(engine))
    config = model_config or read.model
    if config is None:
        raise typer.BadParameter(
            f"{shlex.join(command)[:80]} names no model: give --model-config MODEL"
        )
    # what the engine was told of its model holds for the config too
    options.revision = options.revision or read.revision
    options.trust_remote_code = options.trust_remote_code or read.trust_remote_code
    options.api_key = options.api_key or read.api_key
    refuse_early(None, output, config, options.revision, None, options.resume, options.overwrite)
    given: dict[str, Any] = options.__dict__
    need_torch()  # while nothing waits for it
    place = output_location(output)
    log = engine_log or Path(f"{place.name if isinstance(place, Remote) else place}.engine.log")
    stop_cleanly()
    print_stderr(f"starting {read.name} on port {read.port}; its log is {log}")
    began, ready = time.monotonic(), False
    try:
        with (
            Waiting(f"{read.name} is starting") as waiting,
            serve_engine(
                read,
                api_key=options.api_key,
                log=log,
                start_timeout_s=start_timeout,
                waiting=waiting,
            ) as served,
        ):
            ready = True
            waiting.stop()
            print_stderr(f"{served.name} answers after {time.monotonic() - began:.0f} s")
            try:
                trace(
                    context,
                    output,
                    served.url,
                    engine=EngineName(served.engine),
                    model_config=config,
                    **given,
                )
            finally:
                print_stderr(f"stopping {served.name}")
    except KeyboardInterrupt:
        if not ready:  # trace says it itself
            say_interrupted(output)
        raise


class Waiting:
    """Shows on a terminal for how long something is awaited."""

    def __init__(self, what: str):
        self.what, self.status = what, None

    def __enter__(self) -> Waiting:
        if sys.stderr.isatty():
            from rich.console import Console

            self.status = Console(stderr=True).status(self.what)
            self.status.start()
        return self

    def __call__(self, waited_s: float) -> None:
        if self.status is not None:
            self.status.update(f"{self.what}, {waited_s:.0f} s")

    def stop(self) -> None:
        if self.status is not None:
            self.status.stop()

    def __exit__(self, *_: object) -> None:
        self.stop()
