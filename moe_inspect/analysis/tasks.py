"""A pass over a trace, as tasks: for this process, for threads of it, or for the workers of a
dask.distributed cluster (`Trace.on`). The same functions do them everywhere, and what they return
comes back in the same order: sums are the same, to the last digit.

Two ways to cut a pass: by shards, or, where one shard needs what came of those before it, by
routers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, reduce
from typing import Any

from moe_inspect.progress import phase
from moe_inspect.trace.reader import Trace
from moe_inspect.workers import Threads, Workers

WORTH_A_TASK = 100_000_000  # assignments; a second or more
FEWEST_RUNS, MOST_RUNS = 8, 512  # tasks of a pass, about: no more than twice as many


def workers(*traces: Trace, threads: int = 1) -> AbstractContextManager[Workers]:
    """Those of the cluster that a pass over these traces runs on, else threads of this process."""
    scheduler = next((t.scheduler for t in traces if t.scheduler is not None), None)
    if scheduler is None:
        return nullcontext(Threads(threads))
    from moe_inspect.analysis.cluster import cluster

    return cluster(scheduler, traces)


def runs_of(trace: Trace, shards: int | None = None) -> list[range]:
    """Consecutive shards that one task reads, by their numbers: so many that sending what comes of
    them is little beside counting them, and that the number of tasks does not grow with the trace.
    `shards`: as many as there are of it, by default all."""
    n = trace.n_shards if shards is None else shards
    assignments = trace.n_tokens * sum(router.top_k for router in trace.routers)
    worth_sending = WORTH_A_TASK * trace.n_shards // max(1, assignments)
    size = max(1, min(worth_sending, n // FEWEST_RUNS), n // MOST_RUNS)
    return [range(first, min(first + size, n)) for first in range(0, n, size)]


def by_shard(
    trace: Trace, name: str | None, function: Callable[..., Any], *arguments: Any
) -> Iterator[Any]:
    """function(shard, *arguments) of every shard, in order. `name`: of the phase, as progress is
    told; None where it is too short for one."""
    here = trace.scheduler is None
    runs = [range(n, n + 1) for n in range(trace.n_shards)] if here else runs_of(trace)
    for parts in _by_run(trace, runs, name, list, function, arguments):
        yield from parts


def summed(
    trace: Trace,
    name: str | None,
    add: Callable[[Any, Any], Any],
    function: Callable[..., Any],
    *arguments: Any,
) -> Iterator[Any]:
    """What function(shard, *arguments) returns, added up within runs of shards, in order; the runs
    are the same here and on a cluster, so that sums of floats are too. add(total, other): may
    change `total`, and returns the sum."""
    return _by_run(trace, runs_of(trace), name, partial(reduce, add), function, arguments)


def _by_run(
    trace: Trace,
    runs: Sequence[range],
    name: str | None,
    gather: Callable[[Iterator[Any]], Any],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> Iterator[Any]:
    """gather(what function returns of its shards) of each run."""
    advance = phase(name, trace.n_tokens, "tokens") if name else None
    with workers(trace) as at:
        found = at.each(_of_run, (trace, gather, function, arguments), ((run,) for run in runs))
        for run, part in zip(runs, found, strict=True):
            yield part
            if advance:
                advance(sum(trace.shard(number).files.tokens for number in run))


def _of_run(
    trace: Trace,
    gather: Callable[[Iterator[Any]], Any],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    run: range,
) -> Any:
    return gather(function(trace.shard(number), *arguments) for number in run)


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
