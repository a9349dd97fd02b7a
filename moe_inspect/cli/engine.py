"""`moe-inspect engine`: the recording inside a serving engine, switched while it serves."""

from __future__ import annotations

from typing import Literal

import typer

from moe_inspect.cli.options import REQUIRED, argument, option
from moe_inspect.cli.show import ShowOptions

Command = Literal["status", "on", "off", "sample", "metrics"]
SWITCH = ("on", "off")
TAKES = {"sample": "a share from 0 to 1", "metrics": "on or off"}


def engine(
    *,
    url: str = argument("The URL of the engine's server.", "URL", default=REQUIRED),
    command: Command = argument("What to do.", "COMMAND", default="status"),
    value: str = argument(
        "With sample, a share of requests; with metrics, on or off.", "VALUE", default=""
    ),
    api_key: str | None = option(
        "The server's API key.", "KEY", envvar="MOE_INSPECT_API_KEY", default=None
    ),
    show: ShowOptions,
) -> None:
    """Switch the recording inside a serving engine.

    The engine was started with MOE_INSPECT_TRACE=DIR, a vLLM with VLLM_PLUGINS=moe_inspect too.
    Prints the status of each engine behind the server. A writer that has ended is started again by
    on.

    Examples:
    moe-inspect engine http://localhost:8000
    moe-inspect engine http://localhost:8000 off
    moe-inspect engine http://localhost:8000 sample 0.01"""
    import pandas as pd

    from moe_inspect.capture.engine.control import tell
    from moe_inspect.reporting.shown import Result

    expected = TAKES.get(command)
    if expected is None and value:
        raise typer.BadParameter(f"{command} takes no value")
    if expected is not None and (not value or (command == "metrics" and value not in SWITCH)):
        raise typer.BadParameter(f"{command} takes {expected}")
    status = pd.DataFrame(tell(url, command, value, api_key))
    show.show(Result(f"engine {url}", {"status": status}))
