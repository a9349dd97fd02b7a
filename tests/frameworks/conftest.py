"""The table of what was compared: printed at the end, and written into the page that
FRAMEWORKS_TABLE names if everything ran."""

from __future__ import annotations

import platform
import socket
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import pytest

from tests.conftest import write_table
from tests.frameworks.truth import WEIGHT_ERROR, Compared

Check = Callable[..., None]
HEADER = """| framework | model and run | decisions equal | largest error of a gate weight |
|---|---|---|---|"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def check(record_property: Callable[[str, object], None]) -> Check:
    """Asserts that all decisions of a comparison, `total` of them, are equal and the gate weights
    within `tolerance`; adds a row to the table."""

    def check(
        framework: str, run: str, found: Compared, total: int, tolerance: float = WEIGHT_ERROR
    ) -> None:
        assert found.equal == found.total == total
        assert not found.weight_error > tolerance
        error = (
            "not compared"
            if found.weight_error != found.weight_error
            else f"{found.weight_error:.0e}"
        )
        equal = f"{found.equal:,} of {found.total:,}"
        try:
            name = f"{framework} {version(framework)}"
        except PackageNotFoundError:  # read from a folder
            name = framework
        record_property("frameworks", f"| {name} | {run} | {equal} | {error} |")

    return check


def table_of(rows: list[str]) -> str:
    """The rows, and how many decisions were compared with which releases."""
    counts = [row.split("|")[3].replace(",", "").split(" of ") for row in rows]
    equal, total = (sum(map(int, column)) for column in zip(*counts, strict=True))
    releases = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    made = f"{equal:,} of {total:,} decisions. Python {platform.python_version()}, {releases}."
    return "\n".join([HEADER, *sorted(rows), "", made])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    write_table(terminalreporter, "frameworks", "FRAMEWORKS_TABLE", table_of)
