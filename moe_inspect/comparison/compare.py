"""Comparing traces: decision by decision where they are of one model, by the load of the experts
where one holds counts only, side by side where the models differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

# these register the tables, in this order, and how each kind is shown
import moe_inspect.comparison.decisions.shown
import moe_inspect.comparison.loads
import moe_inspect.comparison.models  # noqa: F401
from moe_inspect.comparison.aligning.pairing import DifferentModelsError
from moe_inspect.comparison.checkpoints import Checkpoints
from moe_inspect.comparison.decisions.data import Decisions
from moe_inspect.comparison.loads import Loads
from moe_inspect.comparison.models import Models
from moe_inspect.comparison.result import OF_DECISIONS, TABLES, Comparison, PairSettings
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.reader import Trace, open_trace

__all__ = ["TABLES", "Checkpoints", "Comparison", "compare", "compare_checkpoints"]
NOT_OF_MODELS = (*OF_DECISIONS, "layers", "shift_layers")


def compare(
    a: Trace | str | Path,
    b: Trace | str | Path,
    *more: Trace | str | Path,
    side_by_side: bool = False,
    noise: Trace | str | Path | None = None,
    layers: str | int | Iterable[int | str] | None = None,
    domains: str | Iterable[str] | None = None,
    phase: str | None = None,
    top: int = 20,
    shift_layers: int = 0,
    shift_positions: int = 0,
    shift_routes: int = 0,
    drop_last: bool = False,
    drop_zero_filled: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Comparison:
    """Compares the decisions of two traces, token by token: do they choose the same experts?

    Tokens are aligned by document, position and token id, or by the content of sequences where
    documents are numbered otherwise. `noise`: a second run of A, compared with A as what is no
    difference. `layers`, `domains`, `phase`: as in `report`, by A's names. `top`: rows of the
    tables of experts and documents, 0 for all. `shift_layers`: layer n of B is compared with
    n + shift_layers of A. `shift_positions`: tokens at position n of A are at n + shift_positions
    of B. `shift_routes`: the same of B's routes alone, not of its token ids. `drop_last`: without
    the last token of each sequence. `drop_zero_filled`: without tokens that one trace sends to
    expert 0 in every slot. `progress` is called with the number of decisions compared.
    MoeInspectError where the traces cannot be aligned.

    Where a trace holds counts only (`--counts-only`, the history of a training run), the load of
    the experts is compared, also while the trace is still being written. Models of other shapes, or
    with other tokenizers, are compared side by side: balance, specialization by domain, and how far
    experts follow the same spans of text, whatever tokens they are cut into; `side_by_side`: also
    two of one shape. Three traces or more are of checkpoints, in the order of training, each
    compared with the last. Options that do not apply are refused."""
    options = PairSettings(
        *(layers, domains, phase, top, shift_layers, shift_positions, shift_routes),
        *(drop_last, drop_zero_filled),
    )
    if more:
        many = f"there are {2 + len(more)} traces"
        if noise is not None or side_by_side:
            raise MoeInspectError(f"{many}: noise and side_by_side are for two")
        given = [name for name in options.given if name not in ("layers", "domains", "phase")]
        options.refuse(given, f"{many}, not two")
        traces = [a, b, *more]
        return compare_checkpoints(
            traces, layers=layers, domains=domains, phase=phase, progress=progress
        )
    first, second = open_trace(a), open_trace(b)
    if side_by_side:
        asked = Models(first, second, options, asked=True, progress=progress)
        why = "models are compared side by side, without decisions"
        options.refuse(NOT_OF_MODELS, why)
        if noise is not None:
            raise MoeInspectError(f"{why}, which noise needs: leave it out")
        return asked
    counts = first.counts_only or second.counts_only
    base = None
    if noise is not None and not counts:
        base = Decisions(first, open_trace(noise), options, progress=progress)
    try:
        if not counts:
            return Decisions(first, second, options, noise=base, progress=progress)
        made = Loads(first, second, options, progress)
    except DifferentModelsError as error:
        if noise is not None:
            raise
        made = Models(first, second, options, reasons=error.reasons, progress=progress)
        options.refuse(NOT_OF_MODELS, made.why_in_full)
        return made
    if noise is not None:
        raise MoeInspectError(f"{made.why}, which noise needs: leave it out")
    return made


def compare_checkpoints(
    traces: Sequence[Trace | str | Path],
    *,
    layers: str | int | Iterable[int | str] | None = None,
    domains: str | Iterable[str] | None = None,
    phase: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Checkpoints:
    """Compares traces of checkpoints, given in the order of training, each with the last.

    The traces are of the same text, by models of the same shape. `layers`, `domains`, `phase`: as
    in `report`. `progress` is called with the number of decisions compared. MoeInspectError where
    traces cannot be aligned."""
    if len(traces) < 2:
        raise MoeInspectError("give two or more checkpoints, in training order")
    every, options = [open_trace(one) for one in traces], PairSettings(layers, domains, phase)
    for trace in every:
        if trace.counts_only:
            raise MoeInspectError(
                f"{trace.path} holds counts only, no decisions: give two traces, whose load can be "
                "compared"
            )
    return Checkpoints([Decisions(x, every[-1], options, progress=progress) for x in every[:-1]])
