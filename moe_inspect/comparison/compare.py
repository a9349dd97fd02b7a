"""Comparing two traces: decision by decision if they are of one model, by the load of the experts
if one holds counts only, by their summaries if the models differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

# this registers the tables of decisions, in their order, and how they are shown
import moe_inspect.comparison.decisions.shown  # noqa: F401
from moe_inspect.comparison.aligning.pairing import DifferentModelsError
from moe_inspect.comparison.decisions.data import Decisions
from moe_inspect.comparison.loads import Loads
from moe_inspect.comparison.models import Models
from moe_inspect.comparison.result import TABLES, Comparison, PairSettings
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.reader import Trace, open_trace

__all__ = ["TABLES", "Comparison", "compare"]


def compare(
    a: Trace | str | Path,
    b: Trace | str | Path,
    *,
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
    the experts is compared, also while the trace is still being written. Of models of other shapes,
    or with other tokenizers, the result is a table of the summaries of both reports. Options that
    do not apply are refused."""
    options = PairSettings(
        *(layers, domains, phase, top, shift_layers, shift_positions, shift_routes),
        *(drop_last, drop_zero_filled),
    )
    first, second = open_trace(a), open_trace(b)
    try:
        if first.counts_only or second.counts_only:
            made = Loads(first, second, options, progress)
            if noise is not None:
                raise MoeInspectError(f"{made.why}, which noise needs: leave it out")
            return made
        again = None
        if noise is not None:
            again = Decisions(first, open_trace(noise), options, progress=progress)
        return Decisions(first, second, options, noise=again, progress=progress)
    except DifferentModelsError as error:
        if noise is not None:
            raise
        return Models(first, second, options, error.reasons, progress)
