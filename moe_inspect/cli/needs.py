"""What commands of the capture side need before anything else is done."""

from __future__ import annotations

import signal

from moe_inspect.errors import INSTALL_TRACE, MoeInspectError


def need_torch() -> None:
    """The capture side is an extra: says how to get it."""
    try:
        import torch  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import transformers  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise MoeInspectError(f"this needs {error.name}: {INSTALL_TRACE}") from None


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
