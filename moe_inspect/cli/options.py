"""Options that are written once: a dataclass holds them, and each command that takes it has an
option per field."""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields
from enum import StrEnum
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperOption

from moe_inspect.cli.help.command import GroupedCommand


def not_stdout(path: Path | None) -> Path | None:
    """The path; None for "-", which is stdout."""
    return None if path == Path("-") else path


Output = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        metavar="FILE",
        callback=not_stdout,
        help="Write to this file instead of stdout.",
        show_default=False,
    ),
]
Html = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Also write a self-contained page that opens in any browser.",
        show_default=False,
    ),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Run on this dask.distributed cluster, whose workers see the trace at the same path.",
        show_default=False,
    ),
]
Layers = Annotated[
    list[str] | None,
    typer.Option(metavar="LAYERS", help="Only these layers, e.g. 0-3,7.", show_default=False),
]
Domains = Annotated[
    list[str] | None,
    typer.Option(
        "--domain",
        metavar="NAME",
        help="Only tokens of this domain.",
        show_default=False,
    ),
]


def seconds(text: str | float) -> float:
    """ "5s", "500ms", "2m" or "5" → seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(ms|s|m|h|)", str(text).strip())
    if found is None or float(found[1]) == 0:
        raise typer.BadParameter(f"cannot read {text!r}: write a time like 5s, 500ms or 2m")
    return float(found[1]) * {"ms": 0.001, "m": 60.0, "h": 3600.0}.get(found[2], 1.0)


CommitEvery = Annotated[
    float | None,
    typer.Option(
        "--commit-every",
        metavar="TIME",
        parser=seconds,
        help="Commit at this interval, e.g. 5s, so that moe-inspect watch shows it early (default: "
        "when a shard is full).",
        show_default=False,
    ),
]


# how a model is loaded, and where its routers are

Dequantize = Annotated[
    bool,
    typer.Option(
        "--dequantize",
        help="Dequantise the weights of an MXFP4, FP8 or compressed-tensors checkpoint while "
        "reading them.",
    ),
]
RandomInit = Annotated[
    int | None,
    typer.Option(
        metavar="SEED",
        help="Initialise the weights at random with this seed instead of reading them: the "
        "untrained baseline.",
        show_default=False,
    ),
]
Loader = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.py:FUNCTION",
        help="Load a custom model: the function returns (model, tokenizer).",
        show_default=False,
    ),
]
Routers = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.py:NAME",
        help="The routers of a custom model: a RouterSpec or a list of them.",
        show_default=False,
    ),
]


class Phase(StrEnum):
    prefill = "prefill"
    decode = "decode"
    encoder = "encode"
    draft = "draft"


OfPhase = Annotated[
    Phase | None,
    typer.Option(
        "--phase",
        help="Only prompt tokens (prefill), generated ones (decode), an encoder's (encode), or "
        "rejected drafts (draft).",
        show_default=False,
    ),
]


def with_options(of: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """For a command with the parameter `options`, of the dataclass `of`: typer sees an option for
    each of its fields in that place, and the command gets them as one object."""
    names = [field.name for field in fields(of)]

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**given: Any) -> None:
            command(options=of(**{name: given.pop(name) for name in names}), **given)

        types = get_type_hints(of, include_extras=True)
        shared = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=types[field.name],
            )
            for field in fields(of)
        ]
        parameters: list[inspect.Parameter] = []
        for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
            parameters += (
                shared
                if name == "options"
                else [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
            )
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorated


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
