"""What commands that run a model share: the options of its text and of how it is loaded, and what
must be there before anything else is done."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from moe_inspect.capture.options import BatchTokens, ModelFields, TextFields
from moe_inspect.cli.options import Options, argument, in_panel
from moe_inspect.errors import INSTALL_TRACE, MoeInspectError, missing_for_capture

model_option = in_panel("Model")
ModelArgument = Annotated[
    str, argument('A hub id, a directory, "demo" (bundled, offline).', "MODEL")
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
    """How a model is loaded."""

    panel = "Model"


def ranges_of(given: list[str] | None, what: str = "layers") -> list[int] | None:
    """["0-3", "7"] → [0, 1, 2, 3, 7]."""
    from moe_inspect.trace.schema import parse_ranges

    return None if given is None else parse_ranges(",".join(given), what)


def need_torch() -> None:
    """The capture side is an extra: says how to get it."""
    if (missing := missing_for_capture()) is not None:
        raise MoeInspectError(f"this needs {missing}: {INSTALL_TRACE}")


def check_model_and_text(
    model: str, revision: str | None, text: TextFields, output: Path | None = None
) -> None:
    """Refuse a model, a file or a field that does not exist, as far as that shows offline, before
    torch is imported, which takes seconds. The command checks again."""
    from moe_inspect.capture.corpus.documents import check_first_document
    from moe_inspect.model.load import refuse_unless_found

    if find_spec("torch") is not None:  # without it the rest of the extra may be missing too
        refuse_unless_found(model, revision)
        check_first_document(text.data, text.text_field, text.domain_field, leave_out=output)


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
