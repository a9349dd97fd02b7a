"""The README's table of metrics, written from the registry by `python -m tests.metrics_table`."""

from __future__ import annotations

import re

from moe_inspect.analysis.metrics.registry import listing
from tests.conftest import ROOT

BEGIN, END = "<!-- metrics: python -m tests.metrics_table -->", "<!-- end of metrics -->"


def table() -> str:
    rows = [
        (
            f"| `{row['metric']}` | `{row['table']}` | {_escaped(row['definition'])} | "
            f"{row['range']}; {row['even']} | {_link(row['source'])} |"
        )
        for row in listing()
    ]
    return "\n".join(
        [
            "| metric | table | definition | range; where all is even | source |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


def _link(source: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", source)


def main() -> None:
    path = ROOT / "README.md"
    before, rest = path.read_text().split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
