"""The pass over a trace: the counts of every shard, added up."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from moe_inspect.analysis.counting.count_shard import (
    PreparedShard,
    Windows,
    count_routers,
    count_shard,
    kernels,
    prepare_shard,
)
from moe_inspect.analysis.counting.counts import Counts, empty_like, joined, merge, no_counts
from moe_inspect.analysis.counting.router_counts import BASE, SRP_LENGTHS, WANTS
from moe_inspect.analysis.counting.select import Selection
from moe_inspect.analysis.counting.token_ids import (
    Plan,
    ShardRows,
    TokenTables,
    by_token_id,
    plans_of,
)
from moe_inspect.analysis.tasks import by_router, runs_of, workers
from moe_inspect.errors import MoeInspectError
from moe_inspect.progress import Advance, phase
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.shard import Shard
from moe_inspect.workers import Threads, Workers

WINDOWS = 64  # where no length is asked for
WINDOW_CELLS = 2**24  # of the load of every window, all routers
MOST_PAIRS = 2**26  # of experts, of all routers: 512 MiB of counts
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
    progress: Callable[[int], None] | None = None,
) -> Counts:
    """The counts of what is selected. `wants`: names of WANTS; {"token_ids"} alone leaves out what
    is of a router but not by token id. `window`: tokens of a window, by default so many that there
    are WINDOWS. `top`: token ids per expert, 0 for all. `threads`: None is one per core; a trace
    that is on a cluster is counted there. `progress` is told of the decisions done.
    MoeInspectError where the selection holds no token, naming what there is.

    Shards are added in their order however they were shared out: the same trace gives the same
    counts, to the last digit."""
    asked = frozenset(wants)
    assert asked <= set(WANTS), f"no such counts: {asked - set(WANTS)}"
    windows = windows_of(trace, selection, window) if "windows" in asked else None
    sizes = (windows.tokens, windows.count) if windows else (0, 0)
    total = no_counts(trace.routers, selection.routers, asked, sizes)
    arguments = (selection, asked, windows, is_long(trace, selection, asked))
    threads = len(os.sched_getaffinity(0)) if threads is None else threads
    if not arguments[-1]:
        threads = 1  # what numpy counts holds the GIL
    if "token_ids" in asked:
        total = count_by_token_id(
            trace,
            arguments,
            total,
            base=asked != frozenset({"token_ids"}),
            top=top,
            threads=threads,
            progress=progress,
        )
    else:
        advance, runs = counting(trace, selection.routers), runs_of(trace)
        with workers(trace, threads=threads) as at:
            for run, part in zip(runs, _parts(trace, arguments, at, runs), strict=True):
                total.add(part)
                tokens = sum(trace.shard(number).files.tokens for number in run)
                advance(tokens * len(selection.routers))
                if progress:
                    progress(tokens * len(selection.routers))
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


def too_many_pairs(trace: Trace, routers: Iterable[int]) -> bool:
    """Whether counts of pairs of experts would take too much memory."""
    return sum(trace.routers[r].experts ** 2 for r in routers) > MOST_PAIRS


def is_long(trace: Trace, selection: Selection, wants: frozenset[str] = BASE) -> bool:
    """Whether to count by the compiled kernels."""
    routers = [trace.routers[r] for r in selection.routers]
    # the NumPy reference loops over every expert
    cells = sum(r.experts for r in routers) * len(SRP_LENGTHS) if "srp" in wants else 0
    return trace.n_tokens * (sum(r.top_k for r in routers) + cells / 2) >= LONG


def _parts(
    trace: Trace, arguments: Arguments, at: Workers, runs: Sequence[range]
) -> Iterator[Counts]:
    """The counts of every run of shards, in order. The routers of the last runs are shared out
    among threads, so that none is left with a whole run while others have nothing."""
    routers, width = arguments[0].routers, at.width
    here = isinstance(at, Threads)
    splits = here and not trace.counts_only
    pieces_of = [
        min(width, len(routers)) if splits and len(runs) - i <= width else 1
        for i in range(len(runs))
    ]
    tasks = (
        (run, routers[j * len(routers) // n : (j + 1) * len(routers) // n])
        for run, n in zip(runs, pieces_of, strict=True)
        for j in range(n)
    )
    found = at.each(_counts_of, (trace, *arguments, not here), tasks)
    for n in pieces_of:
        yield joined(next(found) for _ in range(n))


def _counts_of(
    trace: Trace,
    selection: Selection,
    wants: frozenset[str],
    windows: Windows | None,
    fast: bool,
    sent: bool,
    run: range,
    routers: tuple[int, ...],
) -> Counts:
    """The counts of a run of shards at some routers. `sent`: to another process."""
    asked = selection, wants, windows, fast, routers
    parts = (count_shard(trace.shard(number), *asked) for number in run)
    counts = merge(parts) if len(run) > 1 else next(parts)
    for of in counts.of.values() if sent else ():
        of.narrow()
    return counts


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
    tokens = -(-longest // WINDOWS) if window is None else window // max(1, len(length))
    tokens = max(1, min(tokens, longest))
    count = -(-longest // tokens)
    experts = sum(trace.routers[r].experts for r in selection.routers)
    if count * experts > max(WINDOW_CELLS, WINDOWS * experts):
        least = -(-longest * experts // WINDOW_CELLS) * max(1, len(length))
        raise MoeInspectError(
            f"window {window} cuts the trace into {count:,} windows, too many for memory: give "
            f"{least} or more"
        )
    return Windows(tokens, count, before)


TABLE_BYTES = 84 * 2**20  # of the tables of the routers that are counted together


@dataclass(frozen=True)
class GroupRequest:
    """What is counted of any group of routers. `base`: also what is not by token id. `top`: token
    ids per expert that are listed."""

    selection: Selection
    wants: frozenset[str]
    windows: Windows | None
    fast: bool
    base: bool
    plans: Mapping[str, Plan]
    top: int

    def prepared(self, shard: Shard) -> tuple[PreparedShard, dict[str, ShardRows]]:
        """What is read of a shard once for all routers."""
        prepared = prepare_shard(shard, self.selection, self.wants, self.windows)
        rows = {
            stack: ShardRows.of(shard, seen, self.plans[stack], kernels(self.fast))
            for stack, (seen, _) in prepared.stacks.items()
        }
        return prepared, rows


class RouterGroup:
    """The counts of some routers while shards are added, in their order."""

    def __init__(self, trace: Trace, request: GroupRequest, empty: Counts, routers: list[int]):
        self.request, self.routers, self.counts = request, tuple(routers), empty_like(empty)
        self.by = kernels(request.fast)
        self.tables = {
            r: TokenTables(request.plans[trace.routers[r].stack], trace.routers[r]) for r in routers
        }

    def add(self, prepared: PreparedShard, rows: Mapping[str, ShardRows]) -> None:
        def visit(r: int, slots: Any) -> None:
            self.tables[r].add(rows[part.routers[r].stack], slots, self.by)

        part = replace(prepared.part, of={})
        if self.request.base:
            part.of = count_routers(prepared, self.routers, self.by, visit)
        else:
            for stack, (seen, _) in prepared.stacks.items():
                for r in self.routers:
                    if part.routers[r].stack == stack:
                        visit(r, seen.of(prepared.shard.slots(r), r))
        self.counts.add(part)

    def result(self) -> Counts:
        """Tables are given back one by one."""
        for r in self.routers:
            self.counts.by_token_id[r] = by_token_id(self.tables.pop(r), self.request.top)
        return self.counts


def count_by_token_id(
    trace: Trace,
    arguments: tuple[Selection, frozenset[str], Windows | None, bool],
    empty: Counts,
    *,
    base: bool,
    top: int,
    threads: int,
    progress: Callable[[int], None] | None = None,
) -> Counts:
    """The counts of a trace with those by token id. `arguments`: of count_shard. `empty`: what is
    added to."""
    selection, *_ = arguments
    request = GroupRequest(*arguments, base, plans_of(trace, selection, every=not top), top)
    routers = list(selection.routers)
    if trace.scheduler is not None:
        found = by_router(trace, routers, "counting", _on_a_worker, request, empty)
        if progress:
            progress(trace.n_tokens * len(routers))
        return joined(found.values())
    advance = counting(trace, routers)

    def told(decisions: int) -> None:
        advance(decisions)
        if progress:
            progress(decisions)

    parts = list[Counts]()
    for group in _groups(trace, request, routers):
        parts += _on_threads(trace, request, empty, group, threads, told)
    return joined(parts)


def counting(trace: Trace, routers: Sequence[int]) -> Advance:
    """Begins the phase in which the decisions of these routers are counted."""
    return phase("counting", trace.n_tokens * len(routers), "decisions")


def _groups(trace: Trace, request: GroupRequest, routers: list[int]) -> Iterator[list[int]]:
    """Routers whose tables fit in TABLE_BYTES, at least one at a time."""
    group, total = list[int](), 0
    for r in routers:
        size = request.plans[trace.routers[r].stack].bytes(trace.routers[r].experts)
        if group and total + size > TABLE_BYTES:
            yield group
            group, total = [], 0
        group.append(r)
        total += size
    yield group


def _on_threads(
    trace: Trace,
    request: GroupRequest,
    empty: Counts,
    routers: list[int],
    threads: int,
    progress: Advance,
) -> list[Counts]:
    """The counts of a group, in parts. While a shard is counted the tokens of the next are read."""
    n = min(threads, len(routers))
    shares = [routers[i * len(routers) // n : (i + 1) * len(routers) // n] for i in range(n)]
    groups = [RouterGroup(trace, request, empty, share) for share in shares]
    with ThreadPoolExecutor(n) as pool:
        running = list[Future[None]]()
        for shard in trace.shards:
            prepared = request.prepared(shard)
            for share in running:
                share.result()
            running = [pool.submit(group.add, *prepared) for group in groups]
            progress(shard.files.tokens * len(routers))
        for share in running:
            share.result()
    # one after the other: numpy holds the GIL, and each takes the memory that the last gave back
    return [group.result() for group in groups]


def _on_a_worker(
    trace: Trace, routers: list[int], request: GroupRequest, empty: Counts
) -> dict[int, Counts]:
    """The counts of these routers by groups, each under the first of its routers."""
    return {
        group[0]: part
        for group in _groups(trace, request, routers)
        for part in _on_threads(trace, request, empty, group, 1, lambda done: None)
    }
