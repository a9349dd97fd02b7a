"""`moe-inspect describe`: parameters, memory and FLOPs of a model, without its weights;
`moe-inspect doctor`: what this machine can record."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, TextIO

import typer

from moe_inspect.capture.options import Revision, TrustRemoteCode
from moe_inspect.cli.capture import need_torch, quiet
from moe_inspect.cli.emit import to_stdout
from moe_inspect.cli.options import REQUIRED, AsJson, argument, in_panel, option
from moe_inspect.cli.progress import shown
from moe_inspect.cli.show import ShowOptions
from moe_inspect.progress import phase
from moe_inspect.text import print_stderr, printable

Hardware = Literal["a100", "h100", "h200", "b200"]
training_option = in_panel("Training")


def describe(
    *,
    model: str = argument(
        "A hub id, a directory, a config.json, a GGUF file, a trace, or demo.",
        "MODEL",
        default=REQUIRED,
    ),
    context: int | None = option(
        "Context length for the FLOPs per token (default: 4096, or the model's maximum).", min=1
    ),
    train_tokens: float | None = training_option(
        "Also show the FLOPs of training on this many tokens, e.g. 2e12.", min=1
    ),
    hardware: Hardware = training_option(
        "GPU whose dense bf16 peak is used for training.", default="h100"
    ),
    mfu: float | None = training_option(
        "Also show the GPU-hours of training at this model FLOPs utilisation, e.g. 0.4.",
        min=0.001,
        max=1,
    ),
    gpu_hours: float | None = training_option(
        "Also show the model FLOPs utilisation that this many GPU-hours imply.", min=1
    ),
    show: ShowOptions,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show the parameters, memory and FLOPs of a model.

    Needs only a config. Active parameters are those used per token: of each router's experts, the
    top k.

    Examples:
    moe-inspect describe allenai/OLMoE-1B-7B-0924
    moe-inspect describe config.json --train-tokens 2e12 --mfu 0.4"""
    if (mfu or gpu_hours) and train_tokens is None:
        raise typer.BadParameter("--mfu and --gpu-hours are about training: add --train-tokens")
    from moe_inspect.model import describe as description
    from moe_inspect.model.load import stated_config
    from moe_inspect.reporting.shown import Result

    show.chosen(("facts",), "facts")  # a usage error comes before the model is built
    made = description.of_trace(model)
    if made is None:
        stated_config(model, revision)  # before torch is imported, whether there is such a model
        need_torch()
        quiet()
        made = description.describe(
            model, context=context, revision=revision, trust_remote_code=trust_remote_code
        )
    training = (
        made.training(train_tokens, hardware, mfu, gpu_hours) if train_tokens is not None else []
    )
    lines = [str(made)]
    lines += [f"{'' if n else 'train':<8}{text}" for n, (_, _, text) in enumerate(training)]

    def text(file: TextIO) -> None:
        print(*lines, sep="\n", file=file)

    facts = description.describe_table(made, training)
    show.show(Result(f"describe {model}", {"facts": facts}, text))


def doctor(
    *,
    directory: Path = option("The directory where traces will be written.", "DIR", default=Path()),
    as_json: AsJson = False,
) -> None:
    """Show what this machine can record.

    Prints one page to paste into a bug report: versions, devices, possible captures, and whether
    the kernels are right. Names no user, host or path. Exits with 1 if a kernel gives a wrong
    result.

    Examples:
    moe-inspect doctor
    moe-inspect doctor --directory /data/traces --json"""
    with shown():
        phase("loading torch")
        if find_spec("transformers") is not None:
            quiet()
        from moe_inspect.doctor import examine, page

        facts = examine(directory)
    with to_stdout():
        if as_json:
            print(json.dumps(facts))
        else:
            print("\n".join(printable(line) for line in page(facts).split("\n")))
    if wrong := [row for row in facts.get("kernels", []) if row["wrong"]]:
        on = ", ".join(f"{row['kernel']} on {row['device']}" for row in wrong)
        print_stderr(
            f"error: kernels that are wrong: {on}; torch does their work: please report it"
        )
        raise typer.Exit(1)
