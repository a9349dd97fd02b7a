"""What of a trace is looked at: routers, domains, a phase."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moe_inspect.errors import MoeInspectError
from moe_inspect.text import did_you_mean, ranges
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.schema import PHASES, Router, parse_ranges


@dataclass(frozen=True)
class Selection:
    """`routers`: indices into the trace's routers, ascending. `domains`, `phase`: None is all."""

    routers: tuple[int, ...]
    domains: frozenset[str] | None = None
    phase: str | None = None


def select(
    trace: Trace,
    layers: str | int | Iterable[int | str] | None = None,
    domains: str | Iterable[str] | None = None,
    phase: str | None = None,
) -> Selection:
    """Checks what was asked for against what the trace holds. Domains are known only once the rows
    have been read: `count` checks those."""
    chosen = parse_layers(layers, trace.routers)
    if not chosen:
        there, asked = sorted({r.layer for r in trace.routers}), _text(layers or "")
        raise MoeInspectError(
            f"no layer {asked} in {trace.path}{did_you_mean(asked, map(str, there))}: it has "
            f"layers {ranges(there)}"
        )
    if phase is not None and phase not in PHASES:
        raise MoeInspectError(f"no phase {phase!r}: there are {' and '.join(PHASES)}")
    labels = [domains] if isinstance(domains, str) else list(domains or [])
    if trace.counts_only and phase is not None:
        raise MoeInspectError(
            f"{trace.path} holds counts only, which have no phases: {trace.more_than_counts}"
        )
    return Selection(tuple(chosen), frozenset(labels) or None, phase)


def parse_layers(
    layers: str | int | Iterable[int | str] | None, routers: list[Router]
) -> list[int]:
    """The routers of "0-3,7", of 3 or of ["0-3", "7"]; all of them for None. A range takes the
    layers that exist in it (dense blocks have no router); a single layer must exist."""
    if layers is None:
        return list(range(len(routers)))
    text = _text(layers)
    parse_ranges(text)  # a complaint names all that was asked for
    wanted: set[int] = set()
    there = {r.layer for r in routers}
    for part in text.split(","):
        found = there.intersection(parse_ranges(part))
        if not found:
            return []
        wanted |= found
    return [i for i, r in enumerate(routers) if r.layer in wanted]


def _text(layers: str | int | Iterable[int | str]) -> str:
    if isinstance(layers, (str, int)):
        return str(layers)
    return ",".join(str(layer) for layer in layers)
