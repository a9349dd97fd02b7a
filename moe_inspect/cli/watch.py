"""`moe-inspect watch`: a trace while it is being written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from moe_inspect.cli.help import traces
from moe_inspect.cli.options import in_panel, seconds

alarm_option, page_option = in_panel("Alarms"), in_panel("Serve a page")


def watch(
    trace: Annotated[
        str,
        Argument(
            metavar="TRACE",
            autocompletion=traces,
            help="Directory or URL (s3://…) of a trace that is being written, or will be.",
        ),
    ],
    window: Annotated[
        int,
        alarm_option(
            min=1, metavar="TOKENS", help="Tokens per window, of the view and of the rules."
        ),
    ] = 16_384,
    rules: Annotated[
        Path | None,
        alarm_option(
            metavar="FILE", help="Alarm rules, one per line, e.g. max_over_mean > 2 for 3 windows."
        ),
    ] = None,
    counts: Annotated[bool, Option(help="Show numbers only, no text of the corpus.")] = False,
    every: Annotated[float, Option(metavar="TIME", parser=seconds, help="Polling interval.")] = 1.0,
    serve: Annotated[
        str | None,
        page_option(
            metavar="[HOST:]PORT",
            help="Serve a live page, and /metrics for Prometheus; only to this machine unless HOST "
            "is given.",
        ),
    ] = None,
    per_expert: Annotated[
        bool, page_option(help="With --serve: the load of every expert in /metrics.")
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        page_option(metavar="NAME", help="With --serve: answer requests for this host too."),
    ] = None,
) -> None:
    """Show a trace while it is being written, until it is complete.

    Works for every trace: from trace, record, import, a training run or an engine. Record with
    --commit-every 5s; otherwise nothing shows until a shard is full. On a terminal, shows a live
    view; in a file or a pipe, prints a line per change.

    Examples:
    moe-inspect watch runs/a
    moe-inspect watch runs/a --rules rules.txt
    moe-inspect watch runs/a --serve 8000"""
    from moe_inspect.alarms.rules import read_rules
    from moe_inspect.cli.emit import to_stdout
    from moe_inspect.reporting.render.console import console_for
    from moe_inspect.watch.state import WatchOptions
    from moe_inspect.watch.terminal import watch as watch_trace

    options = WatchOptions(
        every_s=every,
        window_tokens=window,
        rules=None if rules is None else read_rules(rules),
        texts=not counts,
    )
    if serve is not None:
        from moe_inspect.watch.serve import serve as serve_trace

        serve_trace(trace, options, serve, per_expert=per_expert, allow_hosts=allow_host or ())
        return
    if per_expert or allow_host:
        raise typer.BadParameter("--per-expert and --allow-host need --serve")
    with to_stdout():
        watch_trace(trace, options, console_for(sys.stdout))
