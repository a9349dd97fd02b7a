"""Options that commands share. A group of them is a dataclass; in a command that takes one as a
parameter, typer sees an option per field."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import MISSING, dataclass, fields
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_origin, get_type_hints

import typer
from typer import Argument, Option

from moe_inspect.cli.help import metrics, traces
from moe_inspect.errors import MoeInspectError
from moe_inspect.text import print_stderr

if TYPE_CHECKING:
    from moe_inspect.reporting.tables.registry import Table
    from moe_inspect.reporting.verdict.gate import Gate


def not_stdout(path: Path | None) -> Path | None:
    """The path; None for "-", which is stdout."""
    return None if path == Path("-") else path


def seconds(text: str | float) -> float:
    """ "5s", "500ms", "2m" or "5" → seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(ms|s|m|h|)", str(text).strip())
    if found is None or float(found[1]) == 0:
        raise typer.BadParameter(f"cannot read {text!r}: write a time like 5s, 500ms or 2m")
    return float(found[1]) * {"ms": 0.001, "m": 60.0, "h": 3600.0}.get(found[2], 1.0)


def in_panel(title: str) -> Any:
    """`Option`, listed under this title in --help."""
    return partial(Option, rich_help_panel=title)


gate_option = in_panel("Checks, exit code 3")
selection_option = in_panel("Selection")
trace_option = in_panel("Trace")
Phase = Literal["prefill", "decode", "encode", "draft"]
TRACE = Argument(
    metavar="TRACE", help="The directory of a trace, or its URL (s3://…).", autocompletion=traces
)
TraceArgument = Annotated[str, TRACE]
Output = Annotated[
    Path | None,
    Option(
        "-o",
        "--output",
        metavar="FILE",
        callback=not_stdout,
        help="Write to this file instead of stdout.",
    ),
]
NewTrace = Annotated[
    str,
    trace_option(
        "-o", "--output", metavar="DIR", help="Directory of the trace to write, or its URL."
    ),
]
Overwrite = Annotated[bool, trace_option(help="Replace an existing trace.")]
Scheduler = Annotated[
    str | None,
    Option(
        metavar="ADDRESS",
        help="Run on this dask.distributed cluster, whose workers see the trace at the same path.",
        rich_help_panel="Options",
    ),
]
Layers = Annotated[
    list[str] | None, selection_option(metavar="LAYERS", help="Only these layers, e.g. 0-3,7.")
]
CommitEvery = Annotated[
    float | None,
    trace_option(
        metavar="TIME",
        parser=seconds,
        help="Commit at this interval, e.g. 5s, so that moe-inspect watch shows it early (default: "
        "when a shard is full).",
    ),
]
AsJson = Annotated[bool, Option("--json", help="Print the result as one JSON object.")]


@dataclass(frozen=True, kw_only=True)
class Options:
    """A group: a field per option. panel: its title in --help, but for options that have one of
    their own."""

    panel: ClassVar[str]

    def keywords(self) -> dict[str, Any]:
        """The options as keywords of the API."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def names(*groups: type[Options]) -> tuple[str, ...]:
    """The options of these groups."""
    return tuple(field.name for group in groups for field in fields(group))


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer reads it: in place of each parameter that is a group of options stand
    the fields of the group. All parameters are keywords."""
    groups: dict[str, type[Options]] = {}
    parameters: list[inspect.Parameter] = []

    def add(name: str, default: Any, annotation: Any, panel: str | None = None) -> None:
        default = inspect.Parameter.empty if default is MISSING else default
        kind = inspect.Parameter.KEYWORD_ONLY
        if get_origin(annotation) is Annotated:
            option = copy(annotation.__metadata__[0])
            option.rich_help_panel = option.rich_help_panel or panel
            if default is False and not option.param_decls:  # without a --no- form
                option.param_decls = (f"--{name.replace('_', '-')}",)
            annotation = Annotated[annotation.__origin__, option]
        parameters.append(inspect.Parameter(name, kind, default=default, annotation=annotation))

    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        if isinstance(group := parameter.annotation, type) and issubclass(group, Options):
            groups[name] = group
            types = get_type_hints(group, include_extras=True)
            for field in fields(group):
                add(field.name, field.default, types[field.name], group.panel)
        else:
            add(name, parameter.default, parameter.annotation)

    @wraps(command)
    def run(**given: Any) -> None:
        made = {
            name: group(**{field.name: given.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**given, **made)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


@dataclass(frozen=True, kw_only=True)
class SelectionOptions(Options):
    """What of a trace is looked at."""

    panel = "Selection"

    layers: Layers = None
    domain: Annotated[
        list[str] | None, Option(metavar="NAME", help="Only tokens of this domain.")
    ] = None
    phase: Annotated[
        Phase | None,
        Option(
            help="Only prompt tokens (prefill), generated ones (decode), an encoder's (encode), or "
            "rejected drafts (draft)."
        ),
    ] = None

    def keywords(self) -> dict[str, Any]:
        given = super().keywords()
        return {"domains": given.pop("domain"), **given}


def limit(help: str) -> Any:
    """An option that sets limits of metrics."""
    return gate_option(metavar="METRIC=VALUE", autocompletion=metrics, help=help)


@dataclass(frozen=True, kw_only=True)
class GateOptions(Options):
    """Limits of metrics, for continuous integration."""

    panel = "Checks, exit code 3"

    fail_above: Annotated[
        list[str] | None, limit("Exit with 3 if the metric of any selected router is above.")
    ] = None
    fail_below: Annotated[
        list[str] | None, limit("Exit with 3 if the metric of any selected router is below.")
    ] = None

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics, as they were given."""
        texts = [*(self.fail_above or []), *(self.fail_below or [])]
        return [text.partition("=")[0].strip() for text in texts]

    def gates(self, tables: Mapping[str, Table]) -> list[Gate]:
        """Raises a usage error for what is no gate on a metric of these tables."""
        from moe_inspect.reporting.verdict.gate import gate

        found: list[Gate] = []
        for option, texts in (("--fail-above", self.fail_above), ("--fail-below", self.fail_below)):
            try:
                found += [gate(text, option == "--fail-above", tables) for text in texts or []]
            except MoeInspectError as error:
                raise typer.BadParameter(f"{option}: {error}") from None
        return found


def exit_if_failed(lines: Sequence[str]) -> None:
    """Says what failed, if anything did, and exits with 3."""
    for line in lines:
        print_stderr(line)
    if lines:
        raise typer.Exit(3)
