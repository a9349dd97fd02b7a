"""What a shell completes besides commands and options: traces, tables, metrics."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST = 200  # folders looked into
PACKAGE = Path(__file__).parents[2]
# command → where its tables are
FOLDERS = {
    "report": ("reporting/tables", "reporting/verdict"),
    "compare": ("comparison", "comparison/tables"),
}


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
    return [name for name in tables_in(*FOLDERS[ctx.info_name]) if name.startswith(incomplete)]


def tables_in(*folders: str, of: str = "TABLES") -> list[str]:
    """The functions with the decorator @table in these folders of the package, that register with
    this dict. Their files are read, not imported: that would take pandas, and a second."""
    found = list[str]()
    for folder in folders:
        for file in sorted((PACKAGE / folder).glob("*.py")):
            functions = [
                f for f in ast.parse(file.read_bytes()).body if isinstance(f, ast.FunctionDef)
            ]
            found += [f.name for f in functions if any(_is_table(d, of) for d in f.decorator_list)]
    return found


def _is_table(decorator: ast.expr, registry: str) -> bool:
    """Whether it is @table(…), by default with TABLES."""
    if not isinstance(decorator, ast.Call) or ast.unparse(decorator.func) != "table":
        return False
    given = [ast.unparse(word.value) for word in decorator.keywords if word.arg == "tables"]
    return (given or ["TABLES"]) == [registry]


def metrics(ctx: Any, incomplete: str) -> list[str]:
    """Metrics that --fail-above and --fail-below take, each with the = that follows."""
    from moe_inspect.reporting.verdict.gate import gated

    if ctx.info_name == "compare":
        from moe_inspect.comparison.compare import TABLES as known
    else:
        from moe_inspect.reporting.report import TABLES as known
    return [f"{name}=" for name in gated(known) if name.startswith(incomplete)]
