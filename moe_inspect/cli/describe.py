"""`moe-inspect describe`: parameters, memory and FLOPs of a model, without its weights; or what its
weights say of its routers and experts."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from moe_inspect.cli.capture import Revision, TrustRemoteCode, need_torch, quiet
from moe_inspect.cli.emit import Format, text_to
from moe_inspect.cli.options import in_panel
from moe_inspect.cli.progress import shown
from moe_inspect.cli.show import TableOptions

Gpu = Literal["a100", "h100", "h200", "b200"]
WeightTable = Literal["routers", "experts"]
training_option, weights_option = in_panel("Training"), in_panel("Weights")


@dataclass(frozen=True, kw_only=True)
class FactsOptions(TableOptions):
    """Of a command whose result is text, or every fact as a table."""

    format: Annotated[
        Format | None,
        Option(
            help="Every fact as a table, csv, json (one object per line) or parquet. Default: by "
            "the ending of the file, else text."
        ),
    ] = None


def describe(
    *,
    model: Annotated[
        str,
        Argument(
            metavar="MODEL",
            help="A hub id, a directory, a config.json, a GGUF file, a trace, or demo.",
        ),
    ],
    weights: Annotated[
        bool,
        weights_option(
            help="Show statistics of the weights (safetensors) instead: of each router or expert."
        ),
    ] = False,
    table: Annotated[
        WeightTable,
        weights_option(
            help="With --weights: the geometry of routers, or AIMER and norms of experts."
        ),
    ] = "routers",
    context: Annotated[
        int | None,
        Option(
            min=1,
            help="Context length for the FLOPs per token (default: 4096, or the model's maximum).",
        ),
    ] = None,
    train_tokens: Annotated[
        float | None,
        training_option(
            min=1, help="Also show the FLOPs of training on this many tokens, e.g. 2e12."
        ),
    ] = None,
    gpu: Annotated[
        Gpu, training_option(help="GPU whose dense bf16 peak is used for training.")
    ] = "h100",
    mfu: Annotated[
        float | None,
        training_option(
            min=0.001,
            max=1,
            help="Also show the GPU-hours of training at this model FLOPs utilisation, e.g. 0.4.",
        ),
    ] = None,
    gpu_hours: Annotated[
        float | None,
        training_option(
            min=1, help="Also show the model FLOPs utilisation that this many GPU-hours imply."
        ),
    ] = None,
    write: FactsOptions,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show the parameters, memory and FLOPs of a model.

    Needs only a config. Active parameters are those used per token: of each router's experts, the
    top k. With --weights, reads the weights instead, without torch, and shows how similar the rows
    of each router are, or the AIMER of each expert.

    Examples:
    moe-inspect describe allenai/OLMoE-1B-7B-0924
    moe-inspect describe config.json --train-tokens 2e12 --mfu 0.4
    moe-inspect describe demo --weights --table experts"""
    if (mfu or gpu_hours) and train_tokens is None:
        raise typer.BadParameter("--mfu and --gpu-hours are about training: add --train-tokens")
    form = write.form()
    if weights:
        if context or train_tokens:
            raise typer.BadParameter(
                "--weights computes no FLOPs: leave out --context and --train-tokens"
            )
        from moe_inspect.api import describe_weights

        with shown():
            found = describe_weights(model, revision=revision)[table]
        write.emit(found)
        return
    from moe_inspect.model import describe as description
    from moe_inspect.model.load import stated_config

    made = description.of_trace(model)
    if made is None:
        stated_config(model, revision)  # before torch is imported, whether there is such a model
        gc.disable()  # imports leave nothing to collect, and to look for it takes a fifth of them
        try:
            need_torch()
            quiet()
            made = description.describe(
                model, context=context, revision=revision, trust_remote_code=trust_remote_code
            )
        finally:
            gc.enable()
    training = made.training(train_tokens, gpu, mfu, gpu_hours) if train_tokens is not None else []
    if write.format is None and form is Format.table:
        with text_to(write.output) as file:
            print(made, file=file)
            for n, (_, _, text) in enumerate(training):
                print(f"{'' if n else 'train':<8}{text}", file=file)
        return
    facts = description.describe_table(made, training)
    write.emit(facts.drop(columns="value") if form is Format.table else facts)
