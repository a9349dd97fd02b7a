"""A pass over a trace, as tasks: for this process, for threads of it, or for the workers of a
dask.distributed cluster (`Trace.on`). The same functions do them everywhere, and what they return
comes back in the same order: sums are the same, to the last digit.

Two ways to cut a pass: by shards, or, where one shard needs what came of those before it, by
routers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from moe_inspect.analysis.threads import Threads, Workers
from moe_inspect.progress import phase
from moe_inspect.trace.reader import Trace

MOST_RUNS = 512  # about: no more than twice as many


def workers(*traces: Trace, threads: int = 1) -> AbstractContextManager[Workers]:
    """Those of the cluster that a pass over these traces runs on, else threads of this process."""
    scheduler = next((t.scheduler for t in traces if t.scheduler is not None), None)
    if scheduler is None:
        return nullcontext(Threads(threads))
    from moe_inspect.analysis.cluster import cluster

    return cluster(scheduler, traces)


def runs_of(shards: int) -> list[range]:
    """Consecutive shards that one task reads, by their numbers: each on its own, or of very many
    shards so many that the number of tasks does not grow with the trace."""
    size = max(1, shards // MOST_RUNS)
    return [range(first, min(first + size, shards)) for first in range(0, shards, size)]


def by_shard(
    trace: Trace, name: str | None, function: Callable[..., Any], *arguments: Any
) -> Iterator[Any]:
    """function(shard, *arguments) of every shard, in order. `name`: of the phase, as progress is
    told; None where it is too short for one."""
    advance = phase(name, trace.n_tokens, "tokens") if name else None
    runs = runs_of(trace.n_shards)
    with workers(trace) as at:
        found = at.each(_of_run, (trace, function, arguments), ((run,) for run in runs))
        for run, parts in zip(runs, found, strict=True):
            yield from parts
            if advance:
                advance(sum(trace.shard(number).files.tokens for number in run))


def _of_run(
    trace: Trace, function: Callable[..., Any], arguments: tuple[Any, ...], run: range
) -> list[Any]:
    return [function(trace.shard(number), *arguments) for number in run]


def by_router(
    trace: Trace,
    routers: Sequence[int],
    name: str,
    function: Callable[..., dict[int, Any]],
    *arguments: Any,
) -> dict[int, Any]:
    """function(trace, routers, *arguments), which goes through all shards in order and returns
    something of each of the routers. Here it is called once."""
    with workers(trace) as at:
        n = min(at.width, len(routers))
        shares = [routers[len(routers) * i // n : len(routers) * (i + 1) // n] for i in range(n)]
        # a function that is called here tells of its shards
        advance = phase(name, len(routers), "routers") if trace.scheduler is not None else None
        whole = dict[int, Any]()
        tasks = ((share, *arguments) for share in shares)
        for share, part in zip(shares, at.each(function, (trace,), tasks), strict=True):
            whole |= part
            if advance:
                advance(len(share))
    return whole
