"""`moe-inspect describe`: parameters, memory and FLOPs of a model, without its weights; or what its
weights say of its routers and experts."""

from __future__ import annotations

import gc
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moe_inspect.cli.emit import Format, SafeCsv, emit, format_of, text_to
from moe_inspect.cli.needs import need_torch, quiet
from moe_inspect.cli.progress import shown


class Gpu(StrEnum):
    a100 = "a100"
    h100 = "h100"
    h200 = "h200"
    b200 = "b200"


class WeightTable(StrEnum):
    routers = "routers"
    experts = "experts"


def describe(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A hub id, a directory, a config.json, a GGUF file, a trace, or demo.",
            show_default=False,
        ),
    ],
    weights: Annotated[
        bool,
        typer.Option(
            "--weights",
            help="Show statistics of the weights (safetensors) instead: of each router or expert.",
        ),
    ] = False,
    table: Annotated[
        WeightTable,
        typer.Option(
            help="With --weights: the geometry of routers, or AIMER and norms of experts."
        ),
    ] = WeightTable.routers,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=(
                "Context length for the FLOPs per token (default: 4096, or the model's maximum)."
            ),
            show_default=False,
        ),
    ] = None,
    train_tokens: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="Also show the FLOPs of training on this many tokens, e.g. 2e12.",
            show_default=False,
        ),
    ] = None,
    gpu: Annotated[
        Gpu, typer.Option(help="GPU whose dense bf16 peak is used for training.")
    ] = Gpu.h100,
    mfu: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            max=1,
            help="Also show the GPU-hours of training at this model FLOPs utilisation, e.g. 0.4.",
            show_default=False,
        ),
    ] = None,
    gpu_hours: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="Also show the model FLOPs utilisation that this many GPU-hours imply.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        Format | None,
        typer.Option(
            help=(
                "Every fact as a table, csv, json (one object per line) or parquet. Default: by "
                "the ending of the file, else text."
            ),
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="Write to this file instead of stdout.",
            show_default=False,
        ),
    ] = None,
    safe_csv: SafeCsv = False,
    revision: Annotated[
        str | None,
        typer.Option(
            metavar="REVISION", help="Branch, tag or commit on the hub.", show_default=False
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code from the model's repository.")
    ] = False,
) -> None:
    """Show the parameters, memory and FLOPs of a model.

    Needs only a config. Active parameters are those used per token: of each router's experts, the
    top k. With --weights, reads the weights instead, without torch, and shows how similar the rows
    of each router are, or the AIMER of each expert."""
    if (mfu or gpu_hours) and train_tokens is None:
        raise typer.BadParameter("--mfu and --gpu-hours are about training: add --train-tokens")
    form = format or format_of(output)
    if form is None:
        raise typer.BadParameter(
            f"-o {output}: no format has this ending, add --format {', '.join(Format)}"
        )
    if weights:
        if context or train_tokens:
            raise typer.BadParameter(
                "--weights computes no FLOPs: leave out --context and --train-tokens"
            )
        from moe_inspect.api import describe_weights

        with shown(("reading weights", 1)):
            found = describe_weights(model, revision=revision)[table.value]
        emit(found, form, output, safe_csv)
        return
    from moe_inspect.model.description import describe_table, of_trace
    from moe_inspect.model.load import stated_config

    made = of_trace(model)
    if made is None:
        stated_config(model, revision)  # before torch is imported, whether there is such a model
        gc.disable()  # imports leave nothing to collect, and to look for it takes a fifth of them
        try:
            need_torch()
            quiet()
            from moe_inspect.model.describe import describe as make

            made = make(
                model, context=context, revision=revision, trust_remote_code=trust_remote_code
            )
        finally:
            gc.enable()
    training = (
        made.training(train_tokens, gpu.value, mfu, gpu_hours) if train_tokens is not None else []
    )
    if format is None and form is Format.table:
        with text_to(output) as file:
            print(made, file=file)
            for n, (_, _, text) in enumerate(training):
                print(f"{'' if n else 'train':<8}{text}", file=file)
        return
    facts = describe_table(made, training)
    emit(facts.drop(columns="value") if form is Format.table else facts, form, output, safe_csv)
