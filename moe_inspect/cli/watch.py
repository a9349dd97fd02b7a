"""`moe-inspect watch`: a trace while it is being written."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from moe_inspect.cli.help import traces
from moe_inspect.cli.options import REQUIRED, argument, in_panel, option, seconds

alarm_option, page_option = in_panel("Alarms"), in_panel("Serve a page")


def watch(
    *,
    trace: str = argument(
        "Directory or URL (s3://…) of a trace that is being written, or will be.",
        "TRACE",
        autocompletion=traces,
        default=REQUIRED,
    ),
    window: int = alarm_option(
        "Tokens per window, of the view and of the rules.", "TOKENS", min=1, default=16_384
    ),
    rules: Path | None = alarm_option(
        "Alarm rules, one per line, e.g. max_over_mean > 2 for 3 windows.", "FILE"
    ),
    counts: bool = option("Show numbers only, no text of the corpus.", default=False),
    every: float = option("Polling interval.", "TIME", parser=seconds, default=1.0),
    serve: str | None = page_option(
        "Serve a live page, and /metrics for Prometheus; only to this machine unless HOST "
        "is given.",
        "[HOST:]PORT",
    ),
    per_expert: bool = page_option(
        "With --serve: the load of every expert in /metrics.", default=False
    ),
    allow_host: list[str] | None = page_option(
        "With --serve: answer requests for this host too.", "NAME"
    ),
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
