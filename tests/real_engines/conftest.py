"""The table of what was compared: printed at the end, and written into the page that ENGINES_TABLE
names if everything ran, into the place of the engine."""

from __future__ import annotations

import platform
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.conftest import write_table
from tests.real_engines.models import write_corpus
from tests.real_engines.server import ENGINES

# engine → what of it is compared
COMPARED = dict.fromkeys(ENGINES, "decisions with the same experts") | {
    "llama-cpp": "assignments to the same experts",
    "plugin": "decisions with the same experts",
    "plugin-sglang": "decisions with the same experts",
}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


def table_of(what: str, rows: list[str]) -> str:
    """The rows, how much was compared, and with which releases."""
    header = f"| engine | model | run | tokens | {what} |\n|---|---|---|---|---|"
    counts = [row.split("|")[5].replace(",", "").split(" of ") for row in rows]
    equal, total = (sum(map(int, column)) for column in zip(*counts, strict=True))
    releases = ", ".join(f"{name} {version(name)}" for name in ("torch", "triton", "transformers"))
    total_of = f"{equal:,} of {total:,} {what.split()[0]}"
    made = f"{total_of}. Python {platform.python_version()}, {releases}."
    return "\n".join([header, *sorted(rows), "", made])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for engine, what in COMPARED.items():
        table = partial(table_of, what)
        write_table(terminalreporter, engine, "ENGINES_TABLE", table, f" {engine}")
