"""What `--help` prints, and what a shell completes besides commands and options."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup

from moe_inspect.text import separated

if TYPE_CHECKING:
    from typer._click.core import Context
    from typer._click.formatting import HelpFormatter

OUTPUTS = {"output", "html", "plots", "resume", "engine_log"}  # which name what is written
HYPHEN = "\u2011"  # lines do not break at it: names of options stay whole
MOST = 200  # traces that are completed
CHOICES_WIDTH = 18  # of values in the column of names; longer lists move to the text
DOMAINS = {"domains", "fit_domains"}  # whose names may have commas: `select` splits them
# what stands for a value that has no name of its own, by typer's name of its type
VALUES = {
    "str": "",  # of an argument, which has a name
    "path": "PATH",
    **dict.fromkeys(("int", "int range"), "N"),
    **dict.fromkeys(("float", "float range"), "NUMBER"),
}

# what --table takes: the registries would import pandas
TABLES = {
    "report": "balance, coactivation, coverage, domains, drift, load, repetition, router, "
    "specialization, summary, transitions, verdict, vocabulary, windows, worth",
    "compare": "agreement, depth, documents, domains, flips, load_shift, margins, matched, "
    "movers, overall, phases, positions, summary, tokens, verdict, worth",
    "counts": "balance, diverged, load, load_shift, summary, verdict, windows",
    "models": "summary, verdict",
}


def page(text: str) -> dict[str, Any]:
    """help and epilog of a command, whose docstring ends with a paragraph "Examples:"."""
    help, _, examples = inspect.cleandoc(text).partition("\n\nExamples:\n")
    return {"help": help, "epilog": inspect.cleandoc(examples)}


class GroupedCommand(TyperCommand):
    """A command whose options are listed in the groups that their `rich_help_panel` names, as plain
    text: the panels of rich take 0.1 s to import, and of 80 columns they leave 26 to the text."""

    formats: Mapping[str, str] = {}  # name → what it reads or writes

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        for option in self.params:
            if getattr(option, "multiple", False):
                _take_several(option)

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        """Refuses a second --table: of other options that take one value the last one counts, but a
        second table reads as if both were asked for."""
        asked = [one for one in args if one.partition("=")[0] == "--table"]
        if len(asked) > 1 and not ctx.resilient_parsing:
            raise typer.BadParameter("--table is given twice: give one table")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Context) -> Any:
        """Refuses an output within a trace, and two in one place, before anything is computed for
        them."""
        from moe_inspect.trace.manifest import refuse_within_trace

        of_place: dict[Path, str] = {}
        for option in self.params:
            given = ctx.params.get(option.name)
            if option.name in OUTPUTS and isinstance(given, str | Path) and "://" not in str(given):
                # a trace may replace another
                refuse_within_trace(Path(given), a_trace=option.metavar == "DIR")
                place = Path(os.path.realpath(given))
                if place.exists() and not (place.is_file() or place.is_dir()):
                    continue  # a pipe or a device takes several
                if other := of_place.get(place):
                    raise typer.BadParameter(
                        f"{other} and {option.opts[-1]} would both write {given}: name two places"
                    )
                of_place[place] = option.opts[-1]
        return super().invoke(ctx)

    def format_options(self, ctx: Context, formatter: HelpFormatter) -> None:
        rows: dict[str, list[tuple[str, str]]] = {"Arguments": []}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                rest = "Arguments" if parameter.param_type_name == "argument" else "Options"
                rows.setdefault(_panel(parameter, rest), []).append(_shortened(parameter, *record))
        rows["Options"] = rows.pop("Options")  # last: --help is among them
        _write_sections(formatter, rows)

    def format_epilog(self, ctx: Context, formatter: HelpFormatter) -> None:
        _write_sections(formatter, {"Formats": list(self.formats.items())})
        _write_examples(formatter, self.epilog)


class GroupOfCommands(TyperGroup):
    """Commands in the groups that their `rich_help_panel` names."""

    def format_commands(self, ctx: Context, formatter: HelpFormatter) -> None:
        rows: dict[str, list[tuple[str, str]]] = {}
        longest = max(map(len, self.commands))
        for name, command in self.commands.items():
            said = command.get_short_help_str(formatter.width - 6 - longest)
            rows.setdefault(_panel(command, "Commands"), []).append((name.ljust(longest), said))
        _write_sections(formatter, rows)

    def format_epilog(self, ctx: Context, formatter: HelpFormatter) -> None:
        _write_examples(formatter, self.epilog)


def _shortened(parameter: Any, name: str, text: str) -> tuple[str, str]:
    """Shorten a line of help: the values of a choice move to the text if they are long, a lower
    bound is left to the error, and ",…" marks an option that takes several values."""

    def metavar(match: re.Match[str]) -> str:
        value = VALUES.get(match[1], f"<{match[1]}>")
        return parameter.name.upper() if len(value) > CHOICES_WIDTH else value

    short = re.sub(r"<(?:list\[)?([^][<>]+)\]?>", metavar, name).rstrip()
    choices = re.search(r"<((?:[\w.-]+\|)+[\w.-]+)>", name)
    if choices and short.endswith(parameter.name.upper()):
        unnamed = [value for value in choices[1].split("|") if value not in text]
        text = f"{', '.join(choices[1].split('|'))}. {text}" if unnamed else text
    several = ",…" if getattr(parameter, "multiple", False) else ""
    return short + several, re.sub(r"; x>=[\d.]+|\s*\[x>=[\d.]+\]", "", text)


def _panel(of: Any, otherwise: str) -> str:
    return getattr(of, "rich_help_panel", None) or otherwise


def _take_several(option: Any) -> None:
    """Let an option of several values take them repeated or comma-separated."""
    process = option.process_value

    def split(ctx: Context, value: Any) -> Any:
        return process(ctx, value and [part for text in value for part in separated(text)])

    if option.name not in DOMAINS:
        option.process_value = split


def _write_sections(formatter: HelpFormatter, rows: Mapping[str, list[tuple[str, str]]]) -> None:
    for title, records in rows.items():
        if records:
            with formatter.section(title):
                formatter.write_dl([(name, text.replace("-", HYPHEN)) for name, text in records])
    formatter.buffer[:] = [part.replace(HYPHEN, "-") for part in formatter.buffer]


def _write_examples(formatter: HelpFormatter, examples: str | None) -> None:
    if examples:
        with formatter.section("Examples"):
            for line in examples.splitlines():
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")


def traces(incomplete: str) -> list[str]:
    """Traces whose path begins so, also one folder further down; where there are none, the shell
    completes names of files."""
    begun = incomplete.rpartition("/")[2]
    start = incomplete[: len(incomplete) - len(begun)]
    found = list[str]()
    for entry in _folders(start or "."):
        if not entry.name.startswith(begun):
            continue
        if _is_trace(entry.path):
            found.append(start + entry.name)
        else:
            inside = (one for one in _folders(entry.path) if _is_trace(one.path))
            found += [f"{start}{entry.name}/{one.name}" for one in inside]
    return sorted(found)


def _folders(path: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            for entry in islice(entries, MOST):
                if entry.is_dir():
                    yield entry
    except OSError:
        return


def _is_trace(path: str) -> bool:
    return os.path.isfile(os.path.join(path, "trace.json"))


def tables(ctx: typer.Context, incomplete: str) -> list[str]:
    """Tables of the command whose --table this is."""
    known = TABLES.get(str(ctx.info_name), "").split(", ")
    return [name for name in known if name.startswith(incomplete)]


def metrics(ctx: typer.Context, incomplete: str) -> list[str]:
    """Metrics that --fail-above and --fail-below take, each with the = that follows."""
    from moe_inspect.reporting.verdict.gate import gated

    if ctx.info_name == "compare":
        from moe_inspect.comparison.compare import TABLES as known
    else:
        from moe_inspect.reporting.report import TABLES as known
    return [f"{name}=" for name in gated(known) if name.startswith(incomplete)]
