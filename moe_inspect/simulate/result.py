"""Simulation: what every simulation comes to, and what they share in reading a trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from moe_inspect.analysis.select import Selection
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.reader import Shard, Trace

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Simulation:
    """`tables`: the main one first, under the simulation's own name. `verdict`: plain sentences, most important first.
    `settings`: what was assumed, as told to the user. `figure` draws the picture (matplotlib) when called; None where there is
    nothing to draw. `shown`: the tables that the text shows; by default the main one."""

    name: str
    tables: dict[str, pd.DataFrame]
    verdict: list[str]
    settings: dict[str, object] = field(default_factory=dict)
    figure: Callable[[], Figure] | None = None
    shown: tuple[str, ...] = ()


def need_decisions(trace: Trace, what: str) -> None:
    """MoeInspectError where the trace holds counts only: `what` ("simulate decode") needs every decision, in order."""
    if trace.counts_only:
        raise MoeInspectError(f"{trace.path} holds counts only, no order of tokens, which {what} needs: trace without --counts-only")


def seen_by(shard: Shard, router: int, selection: Selection, columns: tuple[str, ...] = ()) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Which decisions of the router the selection takes, and `columns` of their tokens.

    Returns bool [N] over the router's decisions of this shard (those of the tokens it sees, in token order), and each column
    ("token", "document", "sequence", "position", "batch" as integers; "domain", "phase" as str) of the decisions taken.
    A domain that the trace lacks takes nothing."""
    wanted = {*columns, *(["domain"] if selection.domains is not None else []), *(["phase"] if selection.phase else []), "token"}
    table = shard.tokens(sorted(wanted))
    seen_T = shard.seen(router)
    values = {name: _values(table[name]) for name in wanted}
    if seen_T is not None:
        values = {name: value[seen_T] for name, value in values.items()}
    taken_N = np.ones(len(values["token"]), bool)
    if selection.domains is not None:
        taken_N &= np.isin(values["domain"], sorted(selection.domains))
    if selection.phase:
        taken_N &= values["phase"] == selection.phase
    return taken_N, {name: values[name][taken_N] for name in columns}


def _values(column: pa.ChunkedArray) -> np.ndarray:
    return column.to_pandas().astype(str).to_numpy() if pa.types.is_dictionary(column.type) else column.to_numpy()
