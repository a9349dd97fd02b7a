"""The pass over a trace: the counts of every shard, added up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from moe_inspect.analysis.aggregate import BASE, WANTS, Counts
from moe_inspect.analysis.fragment import Windows, count_shard
from moe_inspect.analysis.select import Selection
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.reader import Trace

WINDOWS = 64  # where no length is asked for
WINDOW_CELLS = 2**24  # of the load of every window, all routers


def count_trace(
    trace: Trace,
    selection: Selection,
    wants: Iterable[str] = BASE,
    *,
    window: int | None = None,
    threads: int | None = None,
    scheduler: Any = None,
    progress: Callable[[int], None] | None = None,
) -> Counts:
    """The counts of what is selected. `wants`: names of WANTS. `window`: tokens of a window, by default so many that there
    are WINDOWS. `progress` is told of the decisions of every shard done. MoeInspectError where the selection holds no token,
    naming what there is."""
    asked = frozenset(wants)
    assert asked <= set(WANTS), f"no such counts: {asked - set(WANTS)}"
    windows = windows_of(trace, selection, window) if "windows" in asked else None
    nothing_W = np.full(windows.count if windows else 0, -1, np.int64)
    total = Counts(trace.routers, selection.routers, wants=asked, window_tokens=windows.tokens if windows else 0, first_token_W=nothing_W)
    for shard in trace.shards:
        total.add(count_shard(shard, selection, asked, windows))
        if progress:
            progress(shard.files.tokens * len(selection.routers))
    missing = (selection.domains or set()) - total.labels
    if missing:
        raise MoeInspectError(f"no domain {', '.join(sorted(missing))} in {trace.path}: it has {', '.join(sorted(total.labels))}")
    if not total.tokens:
        said = f" of phase {selection.phase}" if selection.phase else ""
        raise MoeInspectError(f"{trace.path} holds no tokens{said}" + ("" if trace.n_tokens else " yet: nothing is committed"))
    return total


def windows_of(trace: Trace, selection: Selection, window: int | None) -> Windows:
    """Windows of `window` tokens of the trace in execution order (of those, the selection's are counted). The ranks of a
    distributed run worked side by side: each fills its share of a window."""
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
        raise MoeInspectError(f"window {window} cuts the trace into {count:,}: more than memory is kept for, give {least} or more")
    return Windows(tokens, count, before)
