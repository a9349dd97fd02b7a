"""The table of what was compared: printed at the end, and written into the page that ENGINES_TABLE
names if everything ran, into the place of the engine."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.conftest import write_table
from tests.real_engines.models import write_corpus
from tests.real_engines.server import ENGINES

HEADER = """| engine | model | run | tokens | decisions with the same experts |
|---|---|---|---|---|"""


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


def table_of(rows: list[str]) -> str:
    """The rows, how many decisions were compared, and with which releases."""
    counts = [row.split("|")[5].replace(",", "").split(" of ") for row in rows]
    equal, total = (sum(map(int, column)) for column in zip(*counts, strict=True))
    releases = ", ".join(f"{name} {version(name)}" for name in ("torch", "triton", "transformers"))
    made = f"{equal:,} of {total:,} decisions. Python {platform.python_version()}, {releases}."
    return "\n".join([HEADER, *sorted(rows), "", made])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for engine in ENGINES:
        write_table(terminalreporter, engine, "ENGINES_TABLE", table_of, f" {engine}")
