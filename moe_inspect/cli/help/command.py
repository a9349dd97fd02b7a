"""Commands whose `--help` has its options in groups, examples at its end, and the width of the
terminal."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from moe_inspect.cli.help.pages import COMMANDS, PAGES, Page

OUTPUTS = {"output", "html", "plots", "resume", "engine_log"}  # which name what is written
WIDEST = 1_000  # as wide as the terminal is
HYPHEN = "\u2011"  # lines do not break at it: names of options stay whole


class GroupedCommand(TyperCommand):
    """A command whose page of help is in PAGES."""

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self.context_settings.setdefault("max_content_width", WIDEST)
        for option in self.params:
            if getattr(option, "multiple", False):
                _take_several(option)

    @property
    def page(self) -> Page:
        return PAGES.get(self.name or "", Page())

    def invoke(self, ctx: Any) -> Any:
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

    def format_options(self, ctx: Any, formatter: Any) -> None:
        group_of: dict[str, str] = {}
        for title, names in self.page.groups.items():
            for name in names:
                group_of.setdefault(name, title)
        titles = ["Arguments", *self.page.groups, "Options"]
        rows: dict[str, list[tuple[str, str]]] = {title: [] for title in titles}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                rest = "Arguments" if parameter.param_type_name == "argument" else "Options"
                rows[group_of.get(parameter.name or "", rest)].append(record)
        _write_sections(formatter, rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        _write_examples(formatter, self.page.examples)


class FormatsCommand(GroupedCommand, ABC):
    """Adds a section "Formats" to the help. The registry is loaded only when the help is asked
    for."""

    @abstractmethod
    def formats(self) -> dict[str, str]:
        """Name → what it reads or writes."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Formats"):
            formatter.write_dl(list(self.formats().items()))
        super().format_epilog(ctx, formatter)


class TableCommand(GroupedCommand, ABC):
    """Names the tables in the help of --table: looks for them only when it is asked for."""

    @abstractmethod
    def tables_help(self) -> str:
        """The help of --table."""

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        for option in self.params:
            if option.name == "table":
                table: Any = option
                table.get_help_record = partial(self._help_record, option)

    def _help_record(self, option: Any, ctx: Any) -> tuple[str, str] | None:
        option.help = self.tables_help()
        return TyperOption.get_help_record(option, ctx)


class GroupOfCommands(TyperGroup):
    """Commands in the groups of COMMANDS."""

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self.context_settings.setdefault("max_content_width", WIDEST)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        title_of = {name: title for title, names in COMMANDS.items() for name in names}
        rows: dict[str, list[tuple[str, str]]] = {title: [] for title in [*COMMANDS, "Commands"]}
        longest = max(map(len, self.commands))
        for name in self.list_commands(ctx):
            said = self.commands[name].get_short_help_str(formatter.width - 6 - longest)
            rows[title_of.get(name, "Commands")].append((name.ljust(longest), said))
        _write_sections(formatter, rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        page = PAGES.get("" if ctx.parent is None else self.name or "", Page())
        _write_examples(formatter, page.examples)


def _take_several(option: Any) -> None:
    """An option of several values takes them repeated or comma-separated, and says so."""
    option.help = f"{option.help} Repeated or comma-separated."
    option.process_value = partial(_split_and, option.process_value)


def _split_and(process: Callable[..., Any], ctx: Any, value: Any) -> Any:
    """["a,b", "c"] → ["a", "b", "c"]. A comma after a backslash belongs to a value."""
    if value is not None:
        parts = [part for text in value for part in re.split(r"(?<!\\),", text)]
        value = [part.strip().replace("\\,", ",") for part in parts]
    return process(ctx, value)


def _write_sections(formatter: Any, rows: Mapping[str, list[tuple[str, str]]]) -> None:
    for title, records in rows.items():
        if records:
            with formatter.section(title):
                formatter.write_dl([(name, text.replace("-", HYPHEN)) for name, text in records])
    formatter.buffer[:] = [part.replace(HYPHEN, "-") for part in formatter.buffer]


def _write_examples(formatter: Any, examples: Iterable[str]) -> None:
    if examples:
        with formatter.section("Examples"):
            for line in examples:
                formatter.write(f"{'':{formatter.current_indent}}moe-inspect {line}\n")
