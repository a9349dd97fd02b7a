"""What of a trace is looked at: routers, domains, a phase; and which tokens of a shard that takes.

T tokens taken, R decisions of a router in the shard.
"""

# pyarrow has no types
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moe_inspect.analysis.counting.kernels import Order, Slots, order_of
from moe_inspect.errors import MoeInspectError
from moe_inspect.text import separated
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.schema import PHASES, Layers, sees
from moe_inspect.trace.shard import Shard, codes, numbers


@dataclass(frozen=True)
class Selection:
    """`routers`: indices into the trace's routers, ascending. `domains`, `phase`: None is all."""

    routers: tuple[int, ...]
    domains: frozenset[str] | None = None
    phase: str | None = None


def select(
    trace: Trace,
    layers: Layers = None,
    domains: str | Iterable[str] | None = None,
    phase: str | None = None,
) -> Selection:
    """Checks what was asked for against what the trace holds. A text of domains is one by that
    name, else several: "law,code"."""
    chosen = trace.router_index(layers)
    if phase is not None and phase not in PHASES:
        raise MoeInspectError(f"no phase {phase!r}: there are {' and '.join(PHASES)}")
    labels = [domains] if isinstance(domains, str) else list(domains or [])
    if labels:
        table, there = "counts" if trace.counts_only else "documents", set[str]()
        for shard in trace.shards:
            code, names = codes(shard.table(table, ["domain"])["domain"])
            there |= {names[d] for d in np.unique(code)}
        labels = [x for text in labels for x in ([text] if text in there else separated(text))]
        if missing := {*labels} - there:
            raise MoeInspectError(
                f"no domain {', '.join(sorted(missing))} in {trace.path}: it has "
                f"{', '.join(sorted(there))}"
            )
    if trace.counts_only and phase is not None:
        raise MoeInspectError(
            f"{trace.path} holds counts only, which have no phases: {trace.more_than_counts}"
        )
    return Selection(tuple(chosen), frozenset(labels) or None, phase)


@dataclass(frozen=True)
class SelectedTokens:
    """The tokens of a shard that the selection takes and a stack's routers see. `keep_R` says which
    of a router's R decisions are theirs, None where all are; the other arrays are of the tokens
    kept, in token order."""

    stack: str
    keep_R: np.ndarray | None
    rows: int
    number_T: np.ndarray
    domain_T: np.ndarray
    domains: list[str]
    document_T: np.ndarray
    token_id_T: np.ndarray
    batch_T: np.ndarray
    sequence_T: np.ndarray | None
    position_T: np.ndarray | None

    def of(self, columns: Slots, router: int) -> Slots:
        """The decisions of the tokens kept; columns of R rows each."""
        if len(columns[0]) != self.rows:
            raise MoeInspectError(
                f"damaged trace: router {router} has {len(columns[0])} decisions of a shard's "
                f"{self.rows} tokens"
            )
        return columns if self.keep_R is None else tuple(column[self.keep_R] for column in columns)

    @cached_property
    def order(self) -> Order | None:
        """How the tokens follow each other within their sequences, where that was asked for."""
        if self.sequence_T is None or self.position_T is None:
            return None
        return order_of(self.document_T, self.sequence_T, self.position_T)


def selected_tokens(
    shard: Shard, selection: Selection, stack: str = "", order: bool = False
) -> SelectedTokens:
    """Reads the tokens table of a shard and drops what the selection leaves out or the stack's
    routers do not see."""
    by_phase = bool(selection.phase or stack)
    names = ["document", "token_id", "batch", *(("sequence", "position") if order else ())]
    table = shard.tokens([*names, "domain", *(["phase"] if by_phase else [])])
    code_T, domains = codes(table["domain"])
    keep_T = seen_T = np.ones(len(table), bool)
    if selection.domains is not None:
        keep_T = among(domains, selection.domains)[code_T]
    if by_phase:
        phase_T, phases = codes(table["phase"])
        seen_T = np.array([sees(stack, phase) for phase in phases], bool)[phase_T]
        if selection.phase:
            keep_T = keep_T & among(phases, {selection.phase})[phase_T]
    taken_T, keep_R = keep_T & seen_T, keep_T[seen_T]
    taken = {name: numbers(table[name])[taken_T] for name in names}
    return SelectedTokens(
        stack,
        None if keep_R.all() else keep_R,
        len(keep_R),
        np.flatnonzero(taken_T),
        code_T[taken_T],
        domains,
        taken["document"],
        taken["token_id"],
        taken["batch"],
        taken.get("sequence"),
        taken.get("position"),
    )


def among(labels: list[str], wanted: Container[str]) -> np.ndarray:
    """Which of the labels are wanted. bool"""
    return np.array([label in wanted for label in labels], bool)
