"""Options that are written once: a dataclass holds them, and each command that takes it has an
option per field."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any, get_type_hints


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
