"""The pass over a trace: the counts of every shard, added up."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from moe_inspect.analysis.counting import token_ids
from moe_inspect.analysis.counting.count_shard import (
    PreparedShard,
    Windows,
    count_routers,
    count_shard,
    prepare_shard,
)
from moe_inspect.analysis.counting.counts import Counts, empty_like, joined, merge, no_counts
from moe_inspect.analysis.counting.router_counts import BASE, WANTS, RouterDecisions
from moe_inspect.analysis.counting.select import Selection
from moe_inspect.analysis.tasks import by_router, runs_of, shares, workers
from moe_inspect.errors import MoeInspectError
from moe_inspect.progress import Advance, phase
from moe_inspect.trace.reader import Trace
from moe_inspect.workers import Threads

WINDOWS = 64  # where no length is asked for
WINDOW_CELLS = 2**24  # of the load of every window, all routers
MOST_PAIRS = 2**26  # of experts, of all routers: 512 MiB of counts
# of the tables by token id, and of pairs, of the routers that are counted together
TABLE_BYTES = 84 * 2**20
# of pairs alone: more would not fit in 1 GiB if each thread had counts of its own
PAIR_BYTES = 2**28


@dataclass(frozen=True)
class CountRequest:
    """What is counted, and `empty`: counts of nothing. `plans`: the tables by token id of each
    stack, where they were asked for; `top`: token ids per expert that are listed."""

    selection: Selection
    wants: frozenset[str]
    windows: Windows | None
    empty: Counts
    plans: Mapping[str, token_ids.TokenIdPlan]
    top: int


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
    by_id = "token_ids" in asked
    plans = token_ids.plans_of(trace, selection, every=not top) if by_id else {}
    request = CountRequest(selection, asked, windows, total, plans, top)
    threads = len(os.sched_getaffinity(0)) if threads is None else threads
    many_pairs = sum(_pair_bytes(request, r) for r in selection.routers) > PAIR_BYTES
    if by_id or (many_pairs and not trace.counts_only):
        total = _by_groups(trace, request, threads, progress)
    else:
        for part in _of_runs(trace, request, threads, progress):
            total.add(part)
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


def windows_of(trace: Trace, selection: Selection, window: int | None) -> Windows:
    """Windows of `window` tokens of the trace in execution order (of those, the selection's are
    counted). The ranks of a distributed run worked side by side: each fills its share of a
    window."""
    before, length = dict[tuple[int, int], int](), Counter[int]()
    for files in (shard.files for shard in trace.shards):
        before[files.rank, files.index] = length[files.rank]
        length[files.rank] += files.tokens
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


def _counting(
    trace: Trace, routers: Sequence[int], progress: Callable[[int], None] | None
) -> Advance:
    """Begins the phase in which the decisions of these routers are counted. What it returns is
    called with the number of decisions done, and tells `progress` too."""
    advance = phase("counting", trace.n_tokens * len(routers), "decisions")

    def told(decisions: int) -> None:
        advance(decisions)
        if progress:
            progress(decisions)

    return told


# --- by runs of shards


def _of_runs(
    trace: Trace, request: CountRequest, threads: int, progress: Callable[[int], None] | None
) -> Iterator[Counts]:
    """The counts of every run of shards, in order. The routers of the last runs are shared out
    among threads, so that none is left with a whole run while others have nothing; not those of
    small shards joined, which are read for all routers at once."""
    routers, runs = request.selection.routers, runs_of(trace)
    told = _counting(trace, routers, progress)
    with workers(trace, threads=threads) as at:
        here = isinstance(at, Threads)
        most = min(at.width, len(routers)) if here and not trace.counts_only else 1
        pieces_of = [
            most if left <= at.width and not any(map(trace.is_joined, run)) else 1
            for left, run in zip(range(len(runs), 0, -1), runs, strict=True)
        ]
        tasks = (
            (run, share)
            for run, n in zip(runs, pieces_of, strict=True)
            for share in shares(routers, n)
        )
        found = at.each(_counts_of, (trace, request), tasks)
        for run, n in zip(runs, pieces_of, strict=True):
            yield joined(next(found) for _ in range(n))
            told(sum(trace.shard(number).files.tokens for number in run) * len(routers))


def _counts_of(trace: Trace, request: CountRequest, run: range, routers: tuple[int, ...]) -> Counts:
    """The counts of a run of shards at some routers, in narrow types: several runs wait in memory,
    or are sent, until they are added."""
    asked = request.selection, request.wants, request.windows, routers
    parts = (count_shard(trace.shard(number), *asked) for number in run)
    counts = merge(parts) if len(run) > 1 else next(parts)
    for router_counts in counts.of.values():
        router_counts.narrow(WANTS)
    return counts


# --- by groups of routers, whose tables by token id and of pairs fit in memory


class RouterGroup:
    """The counts of some routers while shards are added, in their order."""

    def __init__(self, request: CountRequest, routers: Sequence[int]):
        self.request, self.routers, self.counts = request, routers, empty_like(request.empty)
        listed = request.empty.routers
        self.tables = {
            r: token_ids.TokenTables(request.plans[listed[r].stack], listed[r])
            for r in (routers if request.plans else ())
        }

    def add(self, prepared: PreparedShard, rows: Mapping[str, token_ids.ShardRows]) -> None:
        def visit(decisions: RouterDecisions) -> None:
            self.tables[decisions.r].add(rows[decisions.router.stack], decisions)

        counts = count_routers(prepared, self.routers, visit if self.tables else None)
        self.counts.add(replace(prepared.part, of=counts))

    def result(self) -> Counts:
        """Tables are given back one by one."""
        for r in [*self.tables]:
            self.counts.by_token_id[r] = token_ids.by_token_id(self.tables.pop(r), self.request.top)
        for of in self.counts.of.values():  # the largest of what is kept of each router
            of.narrow({"pairs", "transitions", "windows"})
        return self.counts


def _by_groups(
    trace: Trace, request: CountRequest, threads: int, progress: Callable[[int], None] | None
) -> Counts:
    routers = request.selection.routers
    if trace.scheduler is not None:
        found = by_router(trace, routers, "counting", _on_a_worker, request)
        if progress:
            progress(trace.n_tokens * len(routers))
        return joined(found.values())
    told = _counting(trace, routers, progress)
    groups = _groups(request, routers)
    return joined(
        part for group in groups for part in _on_threads(trace, request, group, threads, told)
    )


def _groups(request: CountRequest, routers: Sequence[int]) -> Iterator[list[int]]:
    """Routers whose tables fit in TABLE_BYTES, or in PAIR_BYTES without token ids; at least one at
    a time."""
    group, total, limit = list[int](), 0, TABLE_BYTES if request.plans else PAIR_BYTES
    for r in routers:
        router = request.empty.routers[r]
        size = _pair_bytes(request, r)
        if request.plans:
            size += request.plans[router.stack].bytes(router.experts)
        if group and total + size > limit:
            yield group
            group, total = [], 0
        group.append(r)
        total += size
    yield group


def _pair_bytes(request: CountRequest, router: int) -> int:
    """Memory of a router's counts of pairs of experts, also while those of a shard are added."""
    pairs = ("pairs" in request.wants) + 2 * ("transitions" in request.wants)
    return pairs * 8 * request.empty.routers[router].experts ** 2


def _on_threads(
    trace: Trace, request: CountRequest, routers: list[int], threads: int, told: Advance
) -> list[Counts]:
    """The counts of a group, in parts. While a shard is counted the tokens of the next are read."""
    n = min(threads, len(routers))
    groups = [RouterGroup(request, share) for share in shares(routers, n)]
    with ThreadPoolExecutor(n) as pool:
        running: Iterable[None] = ()
        for shard in trace.shards:
            prepared = prepare_shard(shard, request.selection, request.wants, request.windows)
            rows = dict[str, token_ids.ShardRows]()
            for stack, (seen, token_rows) in [*prepared.stacks.items()] if request.plans else []:
                rows[stack] = token_ids.rows_of(shard, seen, request.plans[stack])
                units = rows[stack].unit_T, request.plans[stack].units
                token_rows = replace(token_rows, id_unit_T=units[0], id_units=units[1])
                prepared.stacks[stack] = seen, token_rows
            list(running)  # waits for them, and raises what they raise
            running = pool.map(RouterGroup.add, groups, [prepared] * n, [rows] * n)
            told(shard.files.tokens * len(routers))
        list(running)
    # one after the other: numpy holds the GIL, and each takes the memory that the last gave back
    return [group.result() for group in groups]


def _on_a_worker(trace: Trace, routers: list[int], request: CountRequest) -> dict[int, Counts]:
    """The counts of these routers by groups, each under the first of its routers."""
    return {
        group[0]: part
        for group in _groups(request, routers)
        for part in _on_threads(trace, request, group, 1, lambda done: None)
    }
