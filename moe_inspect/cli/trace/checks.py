"""What `moe-inspect trace` refuses before it loads anything."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import typer

from moe_inspect.trace.files.location import Remote, output_location

NOT_OF_ENGINES = (
    "capture",
    "device",
    "device_map",
    "dtype",
    "random_init",
    "dequantize",
    "weights",
    "logits",
    "output_norms",
    "output_peaks",
    "token_loss",
    "counts_only",
    "loader",
    "routers",
)
OF_ENGINES = ("model_config", "concurrency", "timeout", "api_key")


def check_engine_options(
    context: typer.Context, model: str, engine: str | None, model_config: str | None
) -> None:
    """A URL and --engine belong together, and with either only the options that mean something
    there."""
    is_url = model.startswith(("http://", "https://"))
    given = [
        o
        for o in context.params
        if (source := context.get_parameter_source(o)) is not None and source.name == "COMMANDLINE"
    ]
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
    wrong = [o for o in given if o in (NOT_OF_ENGINES if engine is not None else OF_ENGINES)]
    if wrong:
        option = f"--{wrong[0].replace('_', '-')}"
        raise typer.BadParameter(
            f"{option} does not apply with --engine: the engine runs the model, and returns no "
            "weights or logits"
            if engine is not None
            else f"{option} needs --engine"
        )


def is_complete(place: Path | Remote) -> bool:
    """Whether a complete trace is there."""
    from moe_inspect.trace.manifest import read_manifest
    from moe_inspect.trace.schema import MANIFEST

    return (place / MANIFEST).exists() and read_manifest(place)["status"] == "complete"


def stored_bytes(place: Path | Remote) -> int:
    """Of all files of a trace."""
    if isinstance(place, Path):
        return sum(f.stat().st_size for f in place.rglob("*") if f.is_file())
    return sum(place.sizes().values())


def refuse_early(
    model: str | None,
    output: str,
    model_config: str | None,
    revision: str | None,
    api_key: str | None,
    resume: bool,
    overwrite: bool,
) -> None:
    """What is wrong for certain is said before torch is imported, which takes seconds.
    `trace_model` and `trace_engine` look again. `model`: None where a loader decides."""
    from moe_inspect.trace.files.lock import refuse_while_locked
    from moe_inspect.trace.output_dir import check_directory
    from moe_inspect.trace.schema import MANIFEST

    # of a torchrun another process may have begun there
    alone, place = int(os.environ.get("WORLD_SIZE", 1)) == 1, output_location(output)
    if alone and resume and (place / MANIFEST).exists():
        refuse_while_locked(place)
    elif alone:
        check_directory(place, overwrite)
    if find_spec("torch") is None:  # then the rest of the extra may be missing too
        return
    from moe_inspect.model.load import refuse_unless_found

    if (name := model_config or model) is not None:
        refuse_unless_found(name, revision)
    if model_config is not None and model is not None:
        from moe_inspect.capture.server.client import check_server

        check_server(model, api_key)
