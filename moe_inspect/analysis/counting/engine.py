"""The pass over a trace: the counts of every shard, added up; on the threads of this machine, or on
a dask cluster."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from moe_inspect.analysis.counting.cluster import on_cluster
from moe_inspect.analysis.counting.count_shard import Windows, count_shard
from moe_inspect.analysis.counting.counts import Counts, joined
from moe_inspect.analysis.counting.router_counts import BASE, SRP_LENGTHS, WANTS
from moe_inspect.analysis.counting.router_groups import count_by_token_id, counting
from moe_inspect.analysis.counting.select import Selection
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.reader import Trace, open_trace

WINDOWS = 64  # where no length is asked for
WINDOW_CELLS = 2**24  # of the load of every window, all routers
Arguments = tuple[Selection, frozenset[str], Windows | None, bool]  # of count_shard
# assignments from which the compiled kernels are worth the second that loading them takes
LONG = 20_000_000


def count_trace(
    trace: Trace,
    selection: Selection,
    wants: Iterable[str] = BASE,
    *,
    window: int | None = None,
    top: int = 20,
    threads: int | None = None,
    scheduler: Any = None,
    progress: Callable[[int], None] | None = None,
) -> Counts:
    """The counts of what is selected. `wants`: names of WANTS; {"token_ids"} alone leaves out what
    is of a router but not by token id. `window`: tokens of a window, by default so many that there
    are WINDOWS. `top`: token ids per expert, 0 for all. `threads`: None is one per core.
    `scheduler`: a dask.distributed client, or the address of a scheduler whose workers see the
    trace at the same path. `progress` is told of the decisions of every shard done. MoeInspectError
    where the selection holds no token, naming what there is.

    Shards are added in their order however they were shared out: the same trace gives the same
    counts, to the last digit."""
    asked = frozenset(wants)
    assert asked <= set(WANTS), f"no such counts: {asked - set(WANTS)}"
    windows = windows_of(trace, selection, window) if "windows" in asked else None
    nothing_W = np.full(windows.count if windows else 0, -1, np.int64)
    total = Counts(
        trace.routers,
        selection.routers,
        wants=asked,
        window_tokens=windows.tokens if windows else 0,
        first_token_W=nothing_W,
    )
    arguments = (selection, asked, windows, is_long(trace, selection, asked))
    threads = len(os.sched_getaffinity(0)) if threads is None else threads
    if "token_ids" in asked:
        total = count_by_token_id(
            trace,
            arguments,
            total,
            base=asked != frozenset({"token_ids"}),
            top=top,
            threads=threads if arguments[-1] else 1,  # what numpy counts holds the GIL
            scheduler=scheduler,
            progress=progress,
        )
    else:
        advance = counting(trace, selection.routers)
        parts = (
            _on_threads(trace, arguments, threads)
            if scheduler is None
            else _on_cluster(trace, arguments, scheduler)
        )
        for shard, part in zip(trace.shards, parts, strict=True):
            total.add(part)
            decisions = shard.files.tokens * len(selection.routers)
            advance(decisions)
            if progress:
                progress(decisions)
    missing = (selection.domains or frozenset[str]()) - total.labels
    if missing:
        raise MoeInspectError(
            f"no domain {', '.join(sorted(missing))} in {trace.path}: it has "
            f"{', '.join(sorted(total.labels))}"
        )
    if not total.tokens:
        of_phase = f" of phase {selection.phase}" if selection.phase else ""
        raise MoeInspectError(
            f"{trace.path} holds no tokens{of_phase}"
            + ("" if trace.n_tokens else " yet: nothing is committed")
        )
    return total


def is_long(trace: Trace, selection: Selection, wants: frozenset[str] = BASE) -> bool:
    """Whether to count by the compiled kernels."""
    routers = [trace.routers[r] for r in selection.routers]
    # the NumPy reference loops over every expert
    cells = sum(r.experts for r in routers) * len(SRP_LENGTHS) if "srp" in wants else 0
    return trace.n_tokens * (sum(r.top_k for r in routers) + cells / 2) >= LONG


def _on_threads(trace: Trace, arguments: Arguments, threads: int) -> Iterator[Counts]:
    """The counts of every shard, in order; no more of them at once than there are threads and one.
    The routers of the last shards are shared out, so that no thread is left with a whole shard
    while others have none."""
    selection, _, _, fast = arguments
    if threads == 1 or not fast:  # what numpy counts holds the GIL
        yield from (count_shard(shard, *arguments) for shard in trace.shards)
        return
    count, L = sum(1 for _ in trace.shards), len(selection.routers)
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[list[Future[Counts]]] = deque()
        # a shard keeps what was read of it: none is held longer than needed
        for i, shard in enumerate(trace.shards):
            n = min(threads, L) if count - i <= threads and not trace.counts_only else 1
            shares = [selection.routers[j * L // n : (j + 1) * L // n] for j in range(n)]
            ahead.append([pool.submit(count_shard, shard, *arguments, share) for share in shares])
            if len(ahead) > threads:
                yield joined(share.result() for share in ahead.popleft())
        while ahead:
            yield joined(share.result() for share in ahead.popleft())


def _on_cluster(trace: Trace, arguments: Arguments, scheduler: Any) -> Iterator[Counts]:
    """The same, a task per shard."""
    path = str(trace.path.resolve()) if isinstance(trace.path, Path) else str(trace.path)
    keys = ((shard.files.rank, shard.files.index) for shard in trace.shards)
    return on_cluster(scheduler, _shard_of, ((path, key, arguments) for key in keys))


def _shard_of(path: str, which: tuple[int, int], arguments: Arguments) -> Counts:
    """What a worker does: opens the trace where it stands, counts one shard of it, (rank, index).
    The trace may have grown since."""
    (shard,) = (
        shard for shard in open_trace(path).shards if (shard.files.rank, shard.files.index) == which
    )
    return count_shard(shard, *arguments)


def windows_of(trace: Trace, selection: Selection, window: int | None) -> Windows:
    """Windows of `window` tokens of the trace in execution order (of those, the selection's are
    counted). The ranks of a distributed run worked side by side: each fills its share of a
    window."""
    before: dict[tuple[int, int], int] = {}
    length: dict[int, int] = {}
    for shard in trace.shards:
        before[shard.files.rank, shard.files.index] = length.get(shard.files.rank, 0)
        length[shard.files.rank] = length.get(shard.files.rank, 0) + shard.files.tokens
    longest = max(length.values(), default=0)
    tokens = max(1, -(-longest // WINDOWS) if window is None else window // max(1, len(length)))
    count = -(-longest // tokens)
    experts = sum(trace.routers[r].experts for r in selection.routers)
    if count * experts > max(WINDOW_CELLS, WINDOWS * experts):
        least = -(-longest * experts // WINDOW_CELLS) * max(1, len(length))
        raise MoeInspectError(
            f"window {window} cuts the trace into {count:,}: more than memory is kept for, give "
            f"{least} or more"
        )
    return Windows(tokens, count, before)
