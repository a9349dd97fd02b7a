"""`moe-inspect doctor`: what this machine can record, and what that costs on it."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from moe_inspect.cli.emit import to_stdout
from moe_inspect.cli.needs import quiet
from moe_inspect.cli.progress import shown
from moe_inspect.cli.progress.phases import examining
from moe_inspect.cli.trace import Dtype
from moe_inspect.progress import phase
from moe_inspect.text import print_stderr, printable


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help='Also measure this model: a hub id, a directory, or "demo".',
            show_default=False,
        ),
    ] = None,
    directory: Annotated[
        Path, typer.Option(metavar="DIR", help="The directory where traces will be written.")
    ] = Path(),
    measure: Annotated[
        bool, typer.Option(help="Also check the kernels and measure speeds (takes seconds).")
    ] = True,
    device: Annotated[
        str,
        typer.Option(
            metavar="DEVICE", help="Device of the model: auto (cuda if available), cpu, cuda:1, …"
        ),
    ] = "auto",
    dtype: Annotated[
        Dtype, typer.Option(help="Dtype of the model; auto: as stored in the checkpoint.")
    ] = Dtype.auto,
    revision: Annotated[
        str | None,
        typer.Option(
            metavar="REVISION", help="Branch, tag or commit on the hub.", show_default=False
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code from the model's repository.")
    ] = False,
    random_init: Annotated[
        int | None,
        typer.Option(
            metavar="SEED",
            help="Initialise the weights at random with this seed instead of reading them.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object.")
    ] = False,
) -> None:
    """Show what this machine can record, and what that costs.

    Prints one page to paste into a bug report: versions, devices, possible captures, speeds. With a
    model, also measures its forward passes traced and untraced. Names no user, host or path. Exits
    with 1 if a kernel gives a wrong result."""
    with shown(*examining(model is not None, measure)):
        phase("loading torch")
        if find_spec("transformers") is not None:
            quiet()
        from moe_inspect.doctor.examine import examine
        from moe_inspect.doctor.page import page

        facts = examine(
            model,
            directory,
            measure,
            device=device,
            dtype=str(dtype),
            revision=revision,
            trust_remote_code=trust_remote_code,
            random_init=random_init,
        )
    with to_stdout():
        if as_json:
            print(json.dumps(facts))
        else:
            print("\n".join(printable(line) for line in page(facts).split("\n")))
    wrong = {row["kernel"]: row["device"] for row in facts.get("selfcheck", []) if row["wrong"]}
    if wrong:
        on = ", ".join(f"{kernel} on {gpu}" for kernel, gpu in wrong.items())
        print_stderr(
            f"error: kernels that are wrong: {on}; torch does their work: please report it"
        )
        raise typer.Exit(1)
