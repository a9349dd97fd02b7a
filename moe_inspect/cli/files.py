"""Commands that read and write traces as such: `moe-inspect watch`, `verify`, `merge`."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import typer

from moe_inspect.cli.emit import Format, text_to, to_stdout
from moe_inspect.cli.help import traces as complete
from moe_inspect.cli.options import (
    REQUIRED,
    AsJson,
    FactsOptions,
    NewTrace,
    Overwrite,
    TraceArgument,
    argument,
    exit_if_failed,
    in_panel,
    option,
    seconds,
)
from moe_inspect.cli.progress import shown
from moe_inspect.cli.show import TableOptions
from moe_inspect.text import join_first, plural, print_stderr, printable

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
    from moe_inspect.alarms.rules import read_rules
    from moe_inspect.reporting.render.console import console_for
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


def verify(trace: TraceArgument, as_json: AsJson = False) -> None:
    """Check every file of a trace: checksums, ids, counts, order.

    Names the first violation by file and row, and exits with 1.

    Examples:
    moe-inspect verify runs/a
    moe-inspect verify runs/a --json"""
    from moe_inspect.trace.verify import verify as check

    with shown():
        found = check(trace)
    with to_stdout():
        if as_json:
            print(json.dumps(found.record()))
        elif found.ok:
            print(found)
    if not found.ok:
        if not as_json:
            print_stderr(f"error: {found}")
        raise typer.Exit(1)


def lint(
    *,
    source: str = argument(
        "A trace, or its URL (s3://…); or a file or folder that import reads.",
        "TRACE|FILE",
        autocompletion=complete,
        default=REQUIRED,
    ),
    against: str | None = option(
        "A right trace of the same model, on any text: is each layer the same one?",
        "TRACE",
        autocompletion=complete,
    ),
    facts: FactsOptions,
    write: TableOptions,
) -> None:
    """Look for what is wrong with routes, without a reference.

    Buffers that were not written, other tokens' routes, layers over layers, ids that are no
    expert's: what, where, how sure, and which published bug looks like it. Says nothing where it
    cannot tell. Exits with 3 if anything is wrong, but for notes. Responses of an engine are taken
    as they came.

    Examples:
    moe-inspect lint runs/a
    moe-inspect lint rollout.jsonl --model Qwen/Qwen3-30B-A3B
    moe-inspect lint runs/new --against runs/right --format json"""
    from moe_inspect.linting.sources import lint_path
    from moe_inspect.reporting.render.console import console_for
    from moe_inspect.reporting.render.terminal import print_verdict
    from moe_inspect.reporting.verdict.checks import verdict_table

    form = write.form()
    with shown():
        made = lint_path(source, **facts.keywords(), against=against, warn=print_stderr)
    if form is Format.table:
        many = plural(len(made.found), "finding") if made.found else "nothing"
        with text_to(write.output) as file:
            print_verdict(made.found, console_for(file))
            print(printable(f"{source}: {many} in {made}"), file=file)
    else:
        write.emit(verdict_table(made.found, values=form is Format.json))
    wrong = [one.kind for one in made.found if one.severity != "note"]
    exit_if_failed([f"failed: {join_first(dict.fromkeys(wrong))}"] if wrong else [])


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
    from moe_inspect.trace.merge import merge as run

    with shown():
        trace = run(traces, output, overwrite=overwrite)
    print_stderr(
        f"merged {plural(len(traces), 'trace')}, {plural(trace.n_tokens, 'token')} into {output}"
    )
