"""`moe-inspect trace`: record where a model sends every token of a corpus."""

from __future__ import annotations

import os
import time
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from moe_inspect.cli.needs import need_torch, quiet, stop_cleanly
from moe_inspect.cli.options import CommitEvery, Dequantize, Loader, RandomInit, Routers
from moe_inspect.cli.progress.tokens import TokenProgress
from moe_inspect.cli.trace.arguments import ranges_of, routers_of
from moe_inspect.cli.trace.beside import COMMIT_EVERY_S, Beside
from moe_inspect.cli.trace.checks import (
    check_engine_options,
    is_complete,
    refuse_early,
    stored_bytes,
)
from moe_inspect.text import plural, print_stderr
from moe_inspect.trace.files.location import output_location

if TYPE_CHECKING:
    from moe_inspect.capture.options import CorpusKeywords


class Capture(StrEnum):
    auto = "auto"
    dispatch = "dispatch"
    tap = "tap"


class EngineName(StrEnum):
    vllm = "vllm"
    sglang = "sglang"


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


TraceDirectory = Annotated[
    str,
    typer.Option(
        "-o",
        "--output",
        metavar="DIR",
        help="The directory of the trace, or its URL, such as s3://bucket/trace.",
        show_default=False,
    ),
]


def trace(
    context: typer.Context,
    output: TraceDirectory,
    model: Annotated[
        str | None,
        typer.Argument(
            help=(
                'A hub id, a directory, a GGUF file, "demo" (bundled, offline); with --engine, the '
                "URL of a server; with --loader, the argument for your function."
            ),
            metavar="MODEL|URL",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[DOMAIN=]SRC",
            help="A .txt, .jsonl, .csv or .parquet file, a folder (its subfolders are domains), a "
            "quoted glob, or an fsspec URL (hf:// s3:// …). Default: the bundled corpus.",
            show_default=False,
        ),
    ] = None,
    text_field: Annotated[
        str, typer.Option(metavar="FIELD", help="The field that holds the text.")
    ] = "text",
    domain_field: Annotated[
        str | None,
        typer.Option(
            metavar="FIELD",
            help='The field that holds the domain (default: "domain", if present).',
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many tokens.", show_default=False)
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Split longer documents (default: fits the model and an engine, at most 2048).",
            show_default=False,
        ),
    ] = None,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens per forward pass, padding included.")
    ] = 8192,
    special_tokens: Annotated[
        bool, typer.Option(help="Add the tokenizer's special tokens to each text (<s> …).")
    ] = True,
    text: Annotated[
        bool,
        typer.Option(
            help="Record which token each is. Without it, the trace is smaller but not anonymous: "
            "routes alone reveal most of the text (arXiv:2602.04105)."
        ),
    ] = True,
    generate: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help=(
                "Continue each document by N tokens, decoded one at a time, and trace them too; "
                "an encoder-decoder decodes them after its start token."
            ),
        ),
    ] = 0,
    temperature: Annotated[
        float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    capture: Annotated[
        Capture,
        typer.Option(
            help=(
                "tap: record the calls of the model's own experts; dispatch: run and record "
                "moe-inspect's experts; auto: dispatch where the model would run the stock "
                "grouped_mm on a GPU, else tap."
            )
        ),
    ] = Capture.auto,
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:1, …")
    ] = "auto",
    device_map: Annotated[
        str | None,
        typer.Option(
            metavar="MAP",
            help="Spread the model over devices: auto, balanced, … (needs accelerate).",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="auto: as stored in the checkpoint.")] = Dtype.auto,
    revision: Annotated[
        str | None,
        typer.Option(
            metavar="REVISION", help="Branch, tag or commit on the hub.", show_default=False
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run code from the model's repository."),
    ] = False,
    dequantize: Dequantize = False,
    random_init: RandomInit = None,
    loader: Loader = None,
    routers: Routers = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYERS", help="Record only these layers, e.g. 0-3,7.", show_default=False
        ),
    ] = None,
    weights: Annotated[bool, typer.Option(help="Record the gate weights.")] = True,
    logits: Annotated[bool, typer.Option("--logits", help="Record the router logits too.")] = False,
    output_norms: Annotated[
        bool,
        typer.Option(
            "--output-norms",
            help="Record the norm of each expert's output for its token (with --capture dispatch).",
        ),
    ] = False,
    output_peaks: Annotated[
        bool,
        typer.Option(
            "--output-peaks",
            help="Record the largest |value| of each expert's output (with --capture dispatch).",
        ),
    ] = False,
    token_loss: Annotated[
        bool,
        typer.Option(
            "--token-loss",
            help="Record the loss and the entropy of each next-token prediction.",
        ),
    ] = False,
    counts_only: Annotated[
        bool,
        typer.Option(
            "--counts-only", help="Record counts by layer, domain and expert instead of decisions."
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Resume an interrupted trace of the same corpus, model and options."
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing trace.")
    ] = False,
    commit_every: CommitEvery = None,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            help="Show the trace while it is written, as moe-inspect watch does (commits every 2 s "
            "unless --commit-every is given).",
        ),
    ] = False,
    engine: Annotated[
        EngineName | None, typer.Option(help="The serving engine at the URL.", show_default=False)
    ] = None,
    model_config: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Hub id or directory of the served model's config and tokenizer.",
            show_default=False,
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Sequences in flight at once.")] = 8,
    timeout: Annotated[
        float,
        typer.Option(
            min=0.1,
            metavar="SECONDS",
            help="Time limit per request, after which it is sent again.",
        ),
    ] = 600.0,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar="MOE_INSPECT_API_KEY",
            help="Sent as a bearer token; never written to a file.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Record which experts a model sends each token of a corpus to."""
    if resume and overwrite:
        raise typer.BadParameter(
            "--resume keeps the existing trace, --overwrite replaces it: give only one"
        )
    if model is None and loader is None:
        raise typer.BadParameter("give a MODEL, or --loader FILE.py:FUNCTION")
    model = model or ""
    check_engine_options(context, model, engine, model_config)
    chosen = ranges_of(layers)
    refuse_early(
        model if loader is None else None,
        output,
        model_config,
        revision,
        api_key,
        resume,
        overwrite,
    )
    corpus: CorpusKeywords = {
        "data": data or (),
        "text_field": text_field,
        "domain_field": domain_field,
        "max_tokens": max_tokens,
        "max_length": max_length,
        "batch_tokens": batch_tokens,
        "special_tokens": special_tokens,
        "text": text,
        "generate": generate,
        "temperature": temperature,
        "seed": seed,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "layers": chosen,
        "resume": resume,
        "overwrite": overwrite,
        "commit_every": COMMIT_EVERY_S if watch and commit_every is None else commit_every,
    }
    began, place = time.monotonic(), output_location(output)
    complete_before = resume and is_complete(place)
    stop_cleanly()
    try:
        with Beside(place) if watch and _is_first() else TokenProgress() as progress:
            need_torch()
            from moe_inspect.api import trace_engine, trace_model
            from moe_inspect.capture.options import EngineOptions, TraceOptions
            from moe_inspect.model.own import load_object

            quiet()
            if engine is not None and model_config is not None:
                of_engine = EngineOptions(
                    **corpus, concurrency=concurrency, timeout_s=timeout, api_key=api_key
                )
                written = trace_engine(
                    model,
                    output,
                    of_engine,
                    engine=str(engine),
                    model_config=model_config,
                    progress=progress,
                )
            else:
                of_model = TraceOptions(
                    **corpus,
                    capture=str(capture),
                    device=device,
                    device_map=device_map,
                    dtype=str(dtype),
                    random_init=random_init,
                    dequantize=dequantize,
                    weights=weights,
                    logits=logits,
                    output_norms=output_norms,
                    output_peaks=output_peaks,
                    token_loss=token_loss,
                    counts_only=counts_only,
                    routers=routers_of(routers),
                    loader=load_object(loader) if loader is not None else None,
                )
                written = trace_model(model, output, of_model, progress=progress)
    except KeyboardInterrupt:
        say_interrupted(output)
        raise
    # of a torchrun: the first speaks for all
    if not _is_first():
        return
    size = stored_bytes(place)
    stacks = any(r.stack for r in written.routers)  # of which each sees only its own tokens
    n_routers, seconds = len(written.routers), time.monotonic() - began
    print_stderr(
        f"{'complete already: ' if complete_before else ''}{plural(written.n_tokens, 'token')} "
        f"{'at' if stacks else '×'} {plural(n_routers, 'router')} = "
        f"{plural(written.n_decisions, 'decision')}{' counted' if counts_only else ''} in {output} "
        f"({f'{size / 1e6:.1f} MB' if size >= 1e5 else f'{size / 1e3:.0f} kB'}, {seconds:.1f} s)"
    )


def say_interrupted(output: str) -> None:
    began_writing = (output_location(output) / "trace.json").exists()
    state = (
        f'{output} is readable; continue it with "--resume"'
        if began_writing
        else "nothing was traced yet"
    )
    print_stderr(f"interrupted: {state}")


def _is_first() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) == 1 or os.environ["RANK"] == "0"
