"""What commands that run a model share: the options of its text and of how it is loaded, and what
must be there before anything else is done."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_inspect.capture.options import BatchTokens, ModelFields, TextFields
from moe_inspect.cli.options import Options, argument, in_panel, option
from moe_inspect.errors import INSTALL_TRACE, MoeInspectError, missing_for_capture

if TYPE_CHECKING:
    from moe_inspect.model.custom.spec import RouterSpec


model_option = in_panel("Model")
ModelArgument = Annotated[
    str | None,
    argument(
        'A hub id, a directory, "demo" (bundled, offline); with --loader, the argument for your '
        "function.",
        "MODEL",
    ),
]


@dataclass(frozen=True, kw_only=True)
class TextOptions(Options, TextFields):
    """The text that is fed to a model."""

    panel = "Text"


@dataclass(frozen=True, kw_only=True)
class HeldOutText(TextOptions):
    """The text on which a loss is measured."""

    panel = "Held-out text"

    batch_tokens: BatchTokens = 2048


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options, ModelFields):
    """How a model is loaded, and where its routers are."""

    panel = "Model"

    loader: str | None = option(
        "Load a custom model: the function returns (model, tokenizer).", "FILE.py:FUNCTION"
    )
    routers: str | None = option(
        "The routers of a custom model: a RouterSpec or a list of them.", "FILE.py:NAME"
    )

    def keywords(self) -> dict[str, Any]:
        """With the loader and the routers that the options name."""
        from moe_inspect.model.own import load_object

        loader = load_object(self.loader) if self.loader is not None else None
        return {**super().keywords(), "loader": loader, "routers": _routers_of(self.routers)}

    def check(self, model: str | None) -> str:
        """The argument MODEL, which only a loader does without."""
        if model is None and self.loader is None:
            raise typer.BadParameter("give a MODEL, or --loader FILE.py:FUNCTION")
        return model or ""


def _routers_of(reference: str | None) -> list[RouterSpec] | None:
    """Of "FILE.py:NAME", a RouterSpec or several."""
    from moe_inspect.model.custom.spec import RouterSpec
    from moe_inspect.model.own import load_object

    if reference is None:
        return None
    found = load_object(reference)
    if isinstance(found, RouterSpec):
        return [found]
    if not hasattr(found, "__iter__"):
        kind = type(found).__name__
        raise MoeInspectError(f"{reference} is a {kind}, not a RouterSpec or a list of them")
    return list(found)


def ranges_of(given: list[str] | None, what: str = "layers") -> list[int] | None:
    """["0-3", "7"] → [0, 1, 2, 3, 7]."""
    from moe_inspect.trace.schema import parse_ranges

    return None if given is None else parse_ranges(",".join(given), what)


def need_torch() -> None:
    """The capture side is an extra: says how to get it."""
    if (missing := missing_for_capture()) is not None:
        raise MoeInspectError(f"this needs {missing}: {INSTALL_TRACE}")


def quiet() -> None:
    """transformers' own bars and notices would tear ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def stop_cleanly() -> None:
    """Ctrl-C and a scheduler's SIGTERM close what is being written; a second one does not cut the
    closing short."""

    def stop(*_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def prepare() -> None:
    """Before a model is loaded."""
    need_torch()
    stop_cleanly()
    quiet()
