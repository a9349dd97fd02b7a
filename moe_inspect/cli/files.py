"""Commands that read and write traces as such: `moe-inspect watch`, `merge`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import typer

from moe_inspect.cli.emit import to_stdout
from moe_inspect.cli.help import traces as complete
from moe_inspect.cli.options import (
    REQUIRED,
    NewTrace,
    Overwrite,
    argument,
    in_panel,
    option,
    seconds,
)
from moe_inspect.cli.progress import shown
from moe_inspect.text import plural, print_stderr

alarm_option = in_panel("Alarms")


def watch(
    *,
    trace: str = argument(
        "Directory or URL (s3://…) of a trace that is being written, or will be; of a directory of "
        "traces the newest.",
        "TRACE",
        autocompletion=complete,
        default=REQUIRED,
    ),
    window: int = alarm_option(
        "Tokens per window, of the view and of the rules.", "TOKENS", min=1, default=16_384
    ),
    rules: Path | None = alarm_option(
        "Alarm rules, one per line, e.g. max_over_mean > 2 for 3 windows.", "FILE"
    ),
    plan: Path | None = alarm_option(
        "Plan of placement that the engine uses (SGLang's format): judge the load of its GPUs too.",
        "FILE",
    ),
    gpus: int | None = alarm_option("GPUs of --plan.", "N", min=1),
    every: float = option("Polling interval.", "TIME", parser=seconds, default=1.0),
) -> None:
    """Show a trace while it is being written, until it is complete.

    Works for every trace: from trace, record, import, a training run or an engine. Record with
    --commit-every 5s; otherwise nothing shows until a shard is full. On a terminal, shows a live
    view; in a file or a pipe, prints a line per change.

    Examples:
    moe-inspect watch runs/a
    moe-inspect watch runs/a --rules rules.txt
    moe-inspect watch runs/a --plan plan.json --gpus 8"""
    from moe_inspect.reporting.render.console import console_for
    from moe_inspect.watch.rules import read_rules
    from moe_inspect.watch.state import WatchOptions
    from moe_inspect.watch.terminal import watch as watch_trace

    placed = None
    if (plan is None) != (gpus is None):
        raise typer.BadParameter("--plan and --gpus go together")
    if plan is not None and gpus is not None:
        from moe_inspect.simulate.placement.plan import placed_over, read_plan

        read_plan(plan)  # one that cannot be read is refused before there is a trace
        placed = partial(placed_over, plan, gpus)
    options = WatchOptions(
        every_s=every,
        window_tokens=window,
        rules=None if rules is None else read_rules(rules),
        plan=placed,
    )
    with to_stdout():
        watch_trace(trace, options, console_for(sys.stdout))


def merge(
    *,
    traces: list[str] = argument(
        "Directories or URLs of traces of one model, with the same columns.",
        "TRACE...",
        autocompletion=complete,
        default=REQUIRED,
    ),
    output: NewTrace,
    overwrite: Overwrite = False,
) -> None:
    """Merge several traces of the same model into one.

    Each is verified first. Documents are renumbered; trace.json records where they came from. Many
    small shards become a few: also those of a single trace.

    Examples:
    moe-inspect merge runs/a runs/b -o runs/all
    moe-inspect merge runs/a runs/b runs/c -o runs/all --overwrite"""
    from moe_inspect.making import merge as run

    with shown():
        trace = run(traces, output, overwrite=overwrite)
    print_stderr(
        f"merged {plural(len(traces), 'trace')}, {plural(trace.n_tokens, 'token')} into {output}"
    )
