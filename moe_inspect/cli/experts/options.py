"""Options of the commands that run a model on held-out text."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class By(StrEnum):
    reap = "reap"
    gate = "gate"
    frequency = "frequency"
    ean = "ean"
    mean_norm = "mean-norm"
    aimer = "aimer"
    ablation = "ablation"
    random = "random"


Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help=(
            'A hub id, a directory, "demo" (bundled, offline); with --loader, the argument for '
            "your function."
        ),
        show_default=False,
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[DOMAIN=]SRC",
        help=(
            "Held-out text: .txt .jsonl .csv .parquet, a folder, a quoted glob or an fsspec URL. "
            "Default: the bundled corpus."
        ),
        show_default=False,
    ),
]
TextField = Annotated[
    str, typer.Option(metavar="NAME", help="Field that holds the text of a document.")
]
DomainField = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Field that holds the domain of a document (default: domain, if present).",
        show_default=False,
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Stop after this many tokens.", show_default=False),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=2,
        help="Split longer documents (default: fits the model and an engine, at most 2048).",
        show_default=False,
    ),
]
BatchTokens = Annotated[
    int, typer.Option(metavar="N", min=1, help="Tokens per forward pass, padding included.")
]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda:1 …")]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        metavar="MAP", help="Spread the model over devices: auto, balanced …", show_default=False
    ),
]
OfDtype = Annotated[Dtype, typer.Option(help="auto: as stored in the checkpoint.")]
Revision = Annotated[
    str | None,
    typer.Option(metavar="REVISION", help="Branch, tag or commit on the hub.", show_default=False),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code from the model's repository.")
]


def model_of(model: str | None, loader: str | None) -> str:
    """The argument MODEL, which only a loader does without."""
    if model is None and loader is None:
        raise typer.BadParameter("give a MODEL, or --loader FILE.py:FUNCTION")
    return model or ""
