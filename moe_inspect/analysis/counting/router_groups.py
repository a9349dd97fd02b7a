"""The pass over a trace where token ids are counted too: some routers at a time, so that their
tables fit in memory, and of those some per thread. Each router's decisions are read once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from moe_inspect.analysis.counting.count_shard import (
    PreparedShard,
    Windows,
    count_routers,
    kernels,
    prepare_shard,
)
from moe_inspect.analysis.counting.counts import Counts, empty_like, joined
from moe_inspect.analysis.counting.select import Selection
from moe_inspect.analysis.counting.token_ids import (
    Plan,
    ShardRows,
    TokenTables,
    by_token_id,
    plans_of,
)
from moe_inspect.analysis.tasks import by_router
from moe_inspect.progress import Advance, phase
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.shard import Shard

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
