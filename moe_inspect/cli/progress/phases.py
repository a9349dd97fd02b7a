"""The phases of commands that have several, with what each costs: seconds, as measured on two cores
of a server. Only their ratio matters: how fast this machine is, the phases that are done tell.

A assignments, S experts of all routers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_inspect.cli.progress.bar import Costs

if TYPE_CHECKING:
    from moe_inspect.trace.reader import Trace

CHARTS = 12  # of a report
VERIFYING: Costs = [("checksums", 1), ("checking rows", 6)]
MERGING: Costs = [("merging", 7)]
SAMPLING: Costs = [("sampling", 3)]


def examining(model: bool, measure: bool) -> Costs:
    """Of `moe-inspect doctor`."""
    measured = [("measuring the disk", 2), ("checking kernels", 1), ("measuring costs", 9)]
    of_model = [("loading the model", 1), *([("measuring the model", 30)] if measure else [])]
    return [
        ("loading torch", 3),
        *(measured if measure else []),
        *(of_model if model else []),
    ]


def amounts(trace: Trace, routers: Sequence[int] | None = None) -> tuple[int, int]:
    """A and S, of these routers."""
    listed = [trace.routers[r] for r in routers] if routers is not None else trace.routers
    A = trace.n_tokens * sum(router.top_k for router in listed)
    return A, sum(router.experts for router in listed)


def counting(trace: Trace, routers: Sequence[int] | None = None) -> Costs:
    A, S = amounts(trace, routers)
    reading = ("reading tokens", 6e-7 * trace.n_tokens)
    return [reading, ("counting", 1 + 1.2e-7 * A), ("computing", 0.3 + 1e-4 * S)]


def drawing(trace: Trace, routers: Sequence[int] | None = None) -> Costs:
    A, S = amounts(trace, routers)
    return [("drawing", 0.4 + 3e-4 * S + 2e-9 * A)]


def pictures(charts: int = CHARTS) -> Costs:
    return [("writing pictures", 0.8 * charts)]


def page(trace: Trace, routers: Sequence[int] | None = None, samples: bool = False) -> Costs:
    """samples: whether documents and routes are sampled, for tables of the page of a report."""
    A, S = amounts(trace, routers)
    sampled = [
        ("reading documents", 3e-7 * trace.n_tokens),
        ("counting documents", 7e-9 * A),
        ("reading routes", 0.2 + 2.5e-8 * A),
    ]
    return [
        ("reading text", 0.1 + 1e-9 * A),
        *(sampled if samples else []),
        ("writing page", 0.3 + 1.6e-4 * S),
    ]


def site_of(traces: Sequence[Trace]) -> Costs:
    """Of the page of each trace, and what the index holds of it."""
    return [
        phase
        for trace in traces
        for phase in (
            *counting(trace),
            *drawing(trace),
            *page(trace, samples=True),
            ("indexing tokens", 0.1 + 3e-8 * amounts(trace)[0]),
        )
    ]


def comparing(trace: Trace) -> Costs:
    return [("comparing", 0.3 + 4e-8 * amounts(trace)[0])]


def simulating(trace: Trace, name: str, minimize: bool = False) -> Costs:
    """Of one simulation. minimize: for fewer GPUs per token."""
    A, S = amounts(trace)
    if name != "placement":
        second = {"cache": 1e-6, "routing": 1e-5}.get(name, 2.4e-8)
        return [(f"simulating {name}", 0.3 + second * A)]
    fewer = [("sampling", 5e-8 * A), ("exchanging", 0.4 * len(trace.routers))]
    return [
        ("counting loads", 0.5 + 5e-8 * A),
        ("placing", 4e-4 * S),
        *(fewer if minimize else []),
        ("counting ranks", 0.2 + 7e-8 * A),
    ]
