"""`moe-inspect conformance`: the experts that a serving engine returns, compared."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import typer

from moe_inspect.cli.options import argument, option
from moe_inspect.cli.show import TableOptions
from moe_inspect.text import print_stderr


def conformance(
    *,
    url: str | None = argument("The URL of the engine's server.", "[URL]"),
    model: str | None = option("Directory of the model, if the server's name is none.", "DIR"),
    engine: Literal["vllm", "sglang"] | None = option("By default the server is asked."),
    case: list[str] | None = option("Only these cases, e.g. prefix,stop.", "NAME"),
    save: Path | None = option("Write the tiny models there, and end.", "DIR"),
    api_key: str | None = option("The server's API key.", "KEY", envvar="MOE_INSPECT_API_KEY"),
    write: TableOptions,
) -> None:
    """Check the experts that a serving engine returns.

    Sends requests that engines have returned wrong experts for, and compares each decision with the
    same model in transformers, in float32 on this machine's CPU. Serve it in float32 too, with
    --enable-return-routed-experts. Exits with 3 if a decision is wrong or missing.

    Examples:
    moe-inspect conformance --save models
    moe-inspect conformance http://localhost:8000
    moe-inspect conformance http://localhost:8000 --case prefix,stop"""
    from moe_inspect.conformance.check import check
    from moe_inspect.conformance.models import MODELS
    from moe_inspect.conformance.models import save as save_model

    if (url is None) == (save is None):
        raise typer.BadParameter("give the URL of a server, or --save DIR")
    if save is not None:
        for name in MODELS:
            print_stderr(f"wrote {save_model(name, save / name)}")
        return
    assert url is not None
    found = check(url, model, engine=engine, cases=case, api_key=api_key, progress=print_stderr)
    write.emit(found.table)
    for one in found.findings:
        print_stderr(f"{one.severity}: {one.text}")
    if not found.ok:
        raise typer.Exit(3)
