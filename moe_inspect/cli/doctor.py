"""`moe-inspect doctor`: what this machine can record, and what that costs on it."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import typer

from moe_inspect.capture.options import Device, OfDtype, RandomInit, Revision, TrustRemoteCode
from moe_inspect.cli.capture import quiet
from moe_inspect.cli.emit import to_stdout
from moe_inspect.cli.options import AsJson, argument, option
from moe_inspect.cli.progress import shown
from moe_inspect.progress import phase
from moe_inspect.text import print_stderr, printable


def doctor(
    *,
    model: str | None = argument(
        'Also measure this model: a hub id, a directory, or "demo".', "MODEL"
    ),
    directory: Path = option("The directory where traces will be written.", "DIR", default=Path()),
    measure: bool = option(
        "Also check the kernels and measure speeds (takes seconds).", default=True
    ),
    device: Device = "auto",
    dtype: OfDtype = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    random_init: RandomInit = None,
    as_json: AsJson = False,
) -> None:
    """Show what this machine can record, and what that costs.

    Prints one page to paste into a bug report: versions, devices, possible captures, speeds. With a
    model, also measures its forward passes traced and untraced. Names no user, host or path. Exits
    with 1 if a kernel gives a wrong result.

    Examples:
    moe-inspect doctor
    moe-inspect doctor demo
    moe-inspect doctor allenai/OLMoE-1B-7B-0924 --device cuda"""
    with shown():
        phase("loading torch")
        if find_spec("transformers") is not None:
            quiet()
        from moe_inspect.doctor.page import examine, page

        facts = examine(
            model,
            directory,
            measure,
            device=device,
            dtype=dtype,
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
