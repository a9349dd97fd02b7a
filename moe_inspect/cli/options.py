"""Options that commands share. A group of them is a dataclass; in a command that takes one as a
parameter, typer sees an option per field."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import partial, wraps
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypeGuard,
    get_args,
    get_origin,
    get_type_hints,
)

import typer
from typer import Argument, Option
from typer.models import ParameterInfo

from moe_inspect.cli.help import metrics, traces
from moe_inspect.errors import MoeInspectError
from moe_inspect.text import print_stderr

if TYPE_CHECKING:
    from moe_inspect.reporting.tables.registry import Table
    from moe_inspect.reporting.verdict.gate import Gate


REQUIRED = MISSING  # the default of what has none


def not_stdout(path: Path | None) -> Path | None:
    """The path; None for "-", which is stdout."""
    return None if path == Path("-") else path


def seconds(text: str | float) -> float:
    """ "5s", "500ms", "2m" or "5" → seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(ms|s|m|h|)", str(text).strip())
    if found is None or float(found[1]) == 0:
        raise typer.BadParameter(f"cannot read {text!r}: write a time like 5s, 500ms or 2m")
    return float(found[1]) * {"ms": 0.001, "m": 60.0, "h": 3600.0}.get(found[2], 1.0)


def option(
    help: str,
    metavar: str | None = None,
    *,
    flags: Sequence[str] = (),
    default: Any = None,
    panel: str | None = None,
    **settings: Any,
) -> Any:
    """The default of a parameter of a command, or of a field of a group: an option. flags: its
    names, if not --name. panel: its title in --help. settings: those of `typer.Option`."""
    declared = Option(*flags, help=help, metavar=metavar, rich_help_panel=panel, **settings)
    return field(default=default, metadata={"option": declared})


def argument(help: str, metavar: str, *, default: Any = None, **settings: Any) -> Any:
    """The same for an argument."""
    declared = Argument(help=help, metavar=metavar, **settings)
    return field(default=default, metadata={"option": declared})


def is_declared(value: Any) -> TypeGuard[Field[Any]]:
    """Whether this is what `option` or `argument` gave."""
    return isinstance(value, Field)


def in_panel(title: str) -> Any:
    """`option`, listed under this title in --help."""
    return partial(option, panel=title)


gate_option = in_panel("Checks, exit code 3")
selection_option = in_panel("Selection")
trace_option = in_panel("Trace")
Phase = Literal["prefill", "decode", "encode", "draft"]
TRACE = argument("The directory of a trace, or its URL (s3://…).", "TRACE", autocompletion=traces)
TraceArgument = Annotated[str, TRACE]
Output = Annotated[
    Path | None,
    option(
        "Write to this file instead of stdout.",
        "FILE",
        flags=("-o", "--output"),
        callback=not_stdout,
    ),
]
NewTrace = Annotated[
    str, trace_option("Directory of the trace to write.", "DIR", flags=("-o", "--output"))
]
Overwrite = Annotated[bool, trace_option("Replace an existing trace.")]
Scheduler = Annotated[
    str | None,
    option(
        "Run on this dask.distributed cluster; its workers see the same path.",
        "ADDRESS",
        panel="Options",
    ),
]
Layers = Annotated[list[str] | None, selection_option("Only these layers, e.g. 0-3,7.", "LAYERS")]
AsJson = Annotated[bool, option("Print the result as one JSON object.", flags=("--json",))]


@dataclass(frozen=True, kw_only=True)
class Options:
    """A group: a field per option. panel: its title in --help, but for options that have one of
    their own."""

    panel: ClassVar[str]

    def keywords(self) -> dict[str, Any]:
        """The options as keywords of the API."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer reads it: in place of each parameter that is a group of options stand
    the fields of the group. All parameters are keywords."""
    groups: dict[str, type[Options]] = {}
    parameters: list[inspect.Parameter] = []

    def add(name: str, annotation: Any, default: Any, panel: str | None = None) -> None:
        declared: Any = None
        if get_origin(annotation) is Annotated:
            annotation, declared = get_args(annotation)
        if is_declared(default):
            declared, default = default, default.default
        if declared is not None:
            declared = copy(declared.metadata["option"] if is_declared(declared) else declared)
            if not isinstance(declared, ParameterInfo):  # a `capture.options.Setting`
                facts = declared._asdict()
                del facts["more"]
                declared = Option(rich_help_panel=facts.pop("panel"), **facts)
            if get_origin(annotation) is Sequence:
                annotation = list[get_args(annotation)]
            declared.rich_help_panel = declared.rich_help_panel or panel
            # without a --no- form; flags of its own are the default of a declared option
            if default is False and declared.default is ... and not declared.param_decls:
                declared.param_decls = (f"--{name.replace('_', '-')}",)
            annotation = Annotated[annotation, declared]
        default = inspect.Parameter.empty if default is MISSING else default
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(name, kind, default=default, annotation=annotation))

    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        if isinstance(group := parameter.annotation, type) and issubclass(group, Options):
            groups[name] = group
            types = get_type_hints(group, include_extras=True)
            for each in fields(group):
                default = each if each.metadata else each.default
                add(each.name, types[each.name], default, group.panel)
        else:
            add(name, parameter.annotation, parameter.default)

    @wraps(command)
    def run(**given: Any) -> None:
        made = {
            name: group(**{each.name: given.pop(each.name) for each in fields(group)})
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
    domains: list[str] | None = option("Only tokens of these domains.", "NAMES")
    phase: Phase | None = option(
        "Only prompts (prefill), generated tokens (decode), an encoder's (encode) or "
        "rejected drafts (draft)."
    )


@dataclass(frozen=True, kw_only=True)
class FactsOptions(Options):
    """What files of other tools leave out of the model."""

    panel = "Model"

    model: str | None = option(
        "Hub id or directory of the model, for facts that the files lack.", "MODEL"
    )
    config: Path | None = option("The same from a config.json, without transformers.", "FILE")
    experts: int | None = option(
        "Experts per layer, where neither the files nor a config give it.", min=1
    )
    top_k: int | None = option(
        "Experts per token, where neither the files nor a config give it.", min=1
    )

    def keywords(self) -> dict[str, Any]:
        given = super().keywords()
        if self.model is not None and self.config is not None:
            raise typer.BadParameter("--model and --config exclude each other: give one")
        config = given.pop("config")
        return given | {"model": self.model or config}


def limit(help: str) -> Any:
    """An option that sets limits of metrics."""
    return gate_option(help, "METRIC=VALUE", autocompletion=metrics)


@dataclass(frozen=True, kw_only=True)
class GateOptions(Options):
    """Limits of metrics, for continuous integration."""

    panel = "Checks, exit code 3"

    fail_above: list[str] | None = limit(
        "Exit with 3 if the metric of any selected router is above."
    )
    fail_below: list[str] | None = limit(
        "Exit with 3 if the metric of any selected router is below."
    )

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


def exit_if_failed(failed: Sequence[str], passed: Sequence[str] = ()) -> None:
    """Print what failed and passed to stderr, and exit with 3 if anything failed."""
    for result, lines in (("passed", passed), ("failed", failed)):
        for line in lines:
            print_stderr(f"{result}: {line}")
    if failed:
        raise typer.Exit(3)
