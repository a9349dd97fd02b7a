"""What a shell completes besides commands and options: traces, tables, metrics."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

MOST = 200  # folders looked into


def traces(incomplete: str) -> list[str]:
    """Traces whose path begins so, also one folder further down; where there are none, the shell
    completes names of files."""
    begun = incomplete.rpartition("/")[2]
    start = incomplete[: len(incomplete) - len(begun)]
    found = list[str]()
    for entry in _folders(start or "."):
        if not entry.name.startswith(begun):
            continue
        if _is_trace(entry.path):
            found.append(start + entry.name)
        else:
            inside = (one for one in _folders(entry.path) if _is_trace(one.path))
            found += [f"{start}{entry.name}/{one.name}" for one in inside]
    return sorted(found)


def _folders(path: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            for entry, _ in zip(entries, range(MOST), strict=False):
                if entry.is_dir():
                    yield entry
    except OSError:
        return


def _is_trace(path: str) -> bool:
    return os.path.isfile(os.path.join(path, "trace.json"))


def tables(ctx: Any, incomplete: str) -> list[str]:
    """Tables of the command whose --table this is."""
    if ctx.info_name == "compare":
        from moe_inspect.comparison.compare import TABLES as known
    else:
        from moe_inspect.reporting.report import TABLES as known
    return [name for name in known if name.startswith(incomplete)]


def metrics(ctx: Any, incomplete: str) -> list[str]:
    """Metrics that --fail-above and --fail-below take, each with the = that follows."""
    from moe_inspect.reporting.verdict.gate import gated

    if ctx.info_name == "compare":
        from moe_inspect.comparison.compare import TABLES as known
    else:
        from moe_inspect.reporting.report import TABLES as known
    return [f"{name}=" for name in gated(known) if name.startswith(incomplete)]
