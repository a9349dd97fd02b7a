"""What commands of the capture side need before anything else is done."""

from __future__ import annotations

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
