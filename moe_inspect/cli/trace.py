"""`moe-inspect trace`: record where a model sends every token of a corpus; `serve-trace`: the same
of a serving engine, which it starts and stops."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moe_inspect.capture.options import (
    Capture,
    FedFields,
    RecordedFields,
    RequestFields,
    Resume,
    Revision,
    Timeout,
    TrustRemoteCode,
)
from moe_inspect.cli.capture import (
    ModelOptions,
    need_torch,
    quiet,
    ranges_of,
    stop_cleanly,
)
from moe_inspect.cli.options import (
    REQUIRED,
    CommitEvery,
    Options,
    Overwrite,
    argument,
    in_panel,
    names,
    option,
    seconds,
)
from moe_inspect.cli.progress import shown
from moe_inspect.progress import phase
from moe_inspect.text import plural, print_stderr
from moe_inspect.trace.files.location import Remote, output_location

if TYPE_CHECKING:
    from moe_inspect.trace.reader import Trace

    Progress = Callable[[int, int | None], None] | None


COMMIT_EVERY_S = 2.0  # unless --commit-every says otherwise
WAIT_S = 30.0  # for the view to show the end

SERVER = "Server, with --engine"
record_option, engine_option, served_option = map(in_panel, ("Record", SERVER, "Engine"))
PARSING = {"serve-trace": {"allow_interspersed_args": False}}  # what follows -- is the engine's
EngineName = Literal["vllm", "sglang"]
RecordedLayers = Annotated[
    list[str] | None, record_option("Record only these layers, e.g. 0-3,7.", "LAYERS")
]


@dataclass(frozen=True, kw_only=True)
class TracedText(Options, FedFields):
    """The text, how it goes on, and whether the trace says which token each is."""

    panel = "Text"


@dataclass(frozen=True, kw_only=True)
class RecordedOptions(Options, RecordedFields):
    """What is recorded of a model that runs here."""

    panel = "Record"


@dataclass(frozen=True, kw_only=True)
class WriteOptions(Options):
    """Where a trace is written, and how."""

    panel = "Trace"

    output: str = option(
        "The directory of the trace, or its URL, such as s3://bucket/trace.",
        "DIR",
        flags=("-o", "--output"),
        default=REQUIRED,
    )
    resume: Resume = False
    overwrite: Overwrite = False
    commit_every: CommitEvery = None
    watch: bool = option(
        "Show the trace while it is written, as moe-inspect watch does (commits every 2 s unless "
        "--commit-every is given).",
        default=False,
    )

    @property
    def place(self) -> Path | Remote:
        return output_location(self.output)

    def keywords(self) -> dict[str, Any]:
        often = self.watch and self.commit_every is None
        return {
            "resume": self.resume,
            "overwrite": self.overwrite,
            "commit_every": COMMIT_EVERY_S if often else self.commit_every,
        }

    def check(self) -> None:
        if self.resume and self.overwrite:
            raise typer.BadParameter(
                "--resume keeps the existing trace, --overwrite replaces it: give only one"
            )

    def say_interrupted(self) -> None:
        state = (
            f'{self.output} is readable; continue it with "--resume"'
            if (self.place / "trace.json").exists()
            else "nothing was traced yet"
        )
        print_stderr(f"interrupted: {state}")


@dataclass(frozen=True, kw_only=True)
class RequestOptions(Options, RequestFields):
    """How an engine is asked."""

    panel = SERVER

    timeout: Timeout = 600.0

    def keywords(self) -> dict[str, Any]:
        given = super().keywords()
        return {"timeout_s": given.pop("timeout"), **given}


OF_BOTH = ("revision", "trust_remote_code")
NOT_OF_ENGINES = {"capture", *names(ModelOptions, RecordedOptions)} - {*OF_BOTH}
OF_ENGINES = {"model_config", *names(RequestOptions)}


def trace(
    *,
    context: typer.Context,
    model: str | None = argument(
        'A hub id, a directory, "demo" (bundled, offline); with --engine, the URL of '
        "a server; with --loader, the argument for your function.",
        "MODEL|URL",
    ),
    text: TracedText,
    capture: Capture = "auto",
    load: ModelOptions,
    layers: RecordedLayers = None,
    recorded: RecordedOptions,
    write: WriteOptions,
    engine: EngineName | None = engine_option("The serving engine at the URL."),
    model_config: str | None = engine_option(
        "Hub id or directory of the served model's config and tokenizer.", "MODEL"
    ),
    requests: RequestOptions,
) -> None:
    """Record which experts a model sends each token of a corpus to.

    Examples:
    moe-inspect trace demo -o runs/demo
    moe-inspect trace allenai/OLMoE-1B-7B-0924 -o runs/olmoe --data wiki.jsonl
    moe-inspect trace ./checkpoint -o runs/a --data corpus/ --generate 32 --logits
    moe-inspect trace http://localhost:8000 --engine vllm -o runs/served"""
    write.check()
    name = load.check(model)
    check_engine_options(context, name, engine, model_config)
    common: dict[str, Any] = {
        **text.keywords(),
        **write.keywords(),
        "layers": ranges_of(layers),
        "revision": load.revision,
        "trust_remote_code": load.trust_remote_code,
    }
    at = name if load.loader is None else None  # the loader decides
    refuse_early(write, at, load.revision, model_config, requests.api_key)

    def run(progress: Progress) -> Trace:
        from moe_inspect.api import trace_engine, trace_model

        if engine is not None and model_config is not None:
            return trace_engine(
                name,
                write.output,
                engine=engine,
                model_config=model_config,
                progress=progress,
                **common,
                **requests.keywords(),
            )
        of_model: dict[str, Any] = {
            **load.keywords(),
            **recorded.keywords(),
            **common,
            "capture": capture,
        }
        return trace_model(name, write.output, progress=progress, **of_model)

    record(run, write, counted=recorded.counts_only)


def record(run: Callable[..., Trace], write: WriteOptions, counted: bool = False) -> None:
    """Shows how far `run` is, or the trace while it is written, and says what was recorded."""
    from moe_inspect.trace.manifest import read_manifest
    from moe_inspect.trace.output_dir import stored_bytes
    from moe_inspect.trace.schema import MANIFEST

    began, place = time.monotonic(), write.place
    there = write.resume and (place / MANIFEST).exists()
    complete_before = there and read_manifest(place)["status"] == "complete"
    stop_cleanly()
    try:
        with WatchView(place) if write.watch and _is_first() else shown() as bar:
            need_torch()
            quiet()
            written = run(progress=bar.counted("tracing", "tokens") if bar else None)
    except KeyboardInterrupt:
        write.say_interrupted()
        raise
    # of a torchrun: the first speaks for all
    if not _is_first():
        return
    size = stored_bytes(place)
    stacks = any(r.stack for r in written.routers)  # of which each sees only its own tokens
    print_stderr(
        f"{'complete already: ' if complete_before else ''}{plural(written.n_tokens, 'token')} "
        f"{'at' if stacks else '×'} {plural(len(written.routers), 'router')} = "
        f"{plural(written.n_decisions, 'decision')}{' counted' if counted else ''} in "
        f"{write.output} ({f'{size / 1e6:.1f} MB' if size >= 1e5 else f'{size / 1e3:.0f} kB'}, "
        f"{time.monotonic() - began:.1f} s)"
    )


class WatchView:
    """`trace --watch`: the view of `moe-inspect watch`, by another process, which costs the model's
    process nothing but the commits. It takes the place of the progress bar. What is written to
    stderr while it has the terminal is kept, and written when it is gone."""

    def __init__(self, output: Path | Remote):
        self.output = output
        self._kept, self._stderr = None, -1

    def __enter__(self) -> None:
        command = [sys.executable, "-m", "moe_inspect.watch", str(self.output), str(os.getpid())]
        sys.stderr.flush()
        self._view = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2)
        if os.isatty(2):
            self._kept = tempfile.TemporaryFile()
            self._stderr = os.dup(2)
            os.dup2(self._kept.fileno(), 2)

    def __exit__(self, *_: object) -> None:
        try:
            if not self._is_over():
                self._view.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._view.wait(WAIT_S)
        finally:
            if self._view.poll() is None:
                self._view.kill()
            if self._kept is not None:
                sys.stderr.flush()
                os.dup2(self._stderr, 2)
                os.close(self._stderr)
                self._kept.seek(0)
                with open(2, "wb", closefd=False) as stderr:
                    shutil.copyfileobj(self._kept, stderr)
                self._kept.close()

    def _is_over(self) -> bool:
        """Whether this process has closed the trace: then the view ends by itself."""
        from moe_inspect.errors import MoeInspectError
        from moe_inspect.trace.manifest import read_manifest

        try:
            manifest = read_manifest(self.output)
        except (MoeInspectError, OSError):
            return False
        return manifest["status"] != "recording" and manifest["capture"].get("pid") == os.getpid()


def _is_first() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) == 1 or os.environ["RANK"] == "0"


def check_engine_options(
    context: typer.Context, model: str, engine: str | None, model_config: str | None
) -> None:
    """A URL and --engine belong together, and with either only the options that mean something
    there."""
    is_url = model.startswith(("http://", "https://"))
    sources = {o: context.get_parameter_source(o) for o in context.params}
    given = [o for o, source in sources.items() if source and source.name == "COMMANDLINE"]
    if is_url and engine is None:
        raise typer.BadParameter("a URL is traced with --engine vllm or --engine sglang")
    if engine is not None and not is_url:
        raise typer.BadParameter(
            f"--engine {engine} takes the URL of a server, like http://HOST:PORT; the model goes "
            "to --model-config"
        )
    if engine is not None and model_config is None:
        raise typer.BadParameter(
            "--engine needs --model-config: the hub id or directory of the model that is served"
        )
    wrong = [o for o in given if o in (OF_ENGINES if engine is None else NOT_OF_ENGINES)]
    if wrong:
        option = f"--{wrong[0].replace('_', '-')}"
        raise typer.BadParameter(
            f"{option} needs --engine"
            if engine is None
            else f"{option} does not apply with --engine: the engine runs the model, and returns "
            "no weights or logits"
        )


def refuse_early(
    write: WriteOptions,
    model: str | None,
    revision: str | None,
    model_config: str | None,
    api_key: str | None = None,
) -> None:
    """What is wrong for certain is said before torch is imported, which takes seconds.
    `trace_model` and `trace_engine` look again. `model`: None where it is not known yet."""
    from moe_inspect.trace.files.lock import refuse_while_locked
    from moe_inspect.trace.output_dir import check_directory
    from moe_inspect.trace.schema import MANIFEST

    # of a torchrun another process may have begun there
    alone, place = int(os.environ.get("WORLD_SIZE", 1)) == 1, write.place
    if alone and write.resume and (place / MANIFEST).exists():
        refuse_while_locked(place)
    elif alone:
        check_directory(place, write.overwrite)
    if find_spec("torch") is None:  # then the rest of the extra may be missing too
        return
    from moe_inspect.model.load import refuse_unless_found

    if (name := model_config or model) is not None:
        refuse_unless_found(name, revision)
    if model_config is not None and model is not None:
        from moe_inspect.capture.server.client import check_server

        check_server(model, api_key)


class ServedRequests(RequestOptions):
    panel = "Engine"


def engine_command(context: typer.Context, command: list[str] | None) -> list[str] | None:
    """The first word that is no option begins it, so that options behind that word are lost."""
    before = command[: command.index("--")] if command and "--" in command else []
    # what stands in front of the command was read before it
    if {"-o", "--output"} & {*before} and "output" not in context.params:
        raise typer.BadParameter(
            f"{before[0]!r} stands before the options: they come first, then -- and the command, "
            "like -o runs/a -- vllm serve MODEL"
        )
    return command


def serve_trace(
    *,
    command: list[str] | None = argument(
        "The command that starts the engine, after two dashes: -- vllm serve MODEL …",
        "-- COMMAND",
        callback=engine_command,
    ),
    engine: EngineName | None = served_option("The serving engine (default: by its command)."),
    model_config: str | None = served_option(
        "Hub id or directory of the served model's config and tokenizer (default: the "
        "model of the command).",
        "MODEL",
    ),
    engine_log: Path | None = served_option(
        "File to append the engine's output to (default: the trace's name plus "
        ".engine.log, beside it; for a URL, in the current directory).",
        "FILE",
    ),
    start_timeout: float = served_option(
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
    from moe_inspect.capture.options import EngineOptions
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
    quiet()
    from moe_inspect.capture.server.run import EngineRun

    place = write.place
    run = EngineRun(read.url, place, read.engine, config, EngineOptions(**common))
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
                record(run.run, write)
            finally:
                print_stderr(f"stopping {served.name}")
    except KeyboardInterrupt:
        if not ready:  # `record` says it itself
            write.say_interrupted()
        raise
