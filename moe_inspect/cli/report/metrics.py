"""`moe-inspect report --list-metrics`."""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from moe_inspect.cli.emit import Format, emit, text_to

if TYPE_CHECKING:
    from rich.console import Console


def list_metrics(form: Format, output: Path | None, safe_csv: bool) -> None:
    """Writes every metric: on a terminal as a list that fits it, else as a table."""
    if form is Format.table and output is None and sys.stdout.isatty():
        from moe_inspect.reporting.render.console import console_for

        with text_to(None) as file:
            print_metrics(console_for(file))
        return
    import pandas as pd

    from moe_inspect.analysis.metrics.registry import listing

    emit(pd.DataFrame(listing()), form, output, safe_csv)


def print_metrics(console: Console) -> None:
    """The metrics of each table under its name, with definition, range, value if everything is even
    and source."""
    from rich.text import Text

    from moe_inspect.analysis.metrics.registry import listing
    from moe_inspect.reporting.render.console import wrapped

    indent, listed = Text("    "), listing()
    order = {name: n for n, name in enumerate(dict.fromkeys(row["table"] for row in listed))}
    listed.sort(key=lambda row: order[row["table"]])
    for table, rows in groupby(listed, lambda row: row["table"]):
        console.print(Text(f"table {table}", style="bold"))
        for row in rows:
            even = f"even {row['even']}" if row["even"] else ""
            facts = [row["range"], even, row["unit"], row["source"]]
            said = " · ".join(fact for fact in facts if fact)
            parts = [(Text("  "), row["metric"], "bold"), (indent, row["definition"], "")]
            for lead, text, style in [*parts, (indent, said, "dim")]:
                for line in wrapped(Text(text, style=style), console, lead):
                    console.print(line, soft_wrap=True)
