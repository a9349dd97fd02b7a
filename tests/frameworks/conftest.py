"""The tables of what was compared and audited: printed at the end, and written into the page that
FRAMEWORKS_TABLE names if everything ran."""

from __future__ import annotations

import platform
import socket
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pytest

from moe_inspect.training import LossAudit
from tests.conftest import write_table
from tests.frameworks.truth import WEIGHT_ERROR, Compared

Check = Callable[..., None]
Row = Callable[..., None]
HEADER = """| framework | model and run | decisions equal | largest error of a gate weight |
|---|---|---|---|"""
LOSSES_HEADER = """| framework | loss | what it is | ÷ coefficient | gradient | selection bias |
|---|---|---|---|---|---|"""


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
        record_property("frameworks", f"| {named(framework)} | {run} | {equal} | {error} |")

    return check


def named(framework: str) -> str:
    try:
        return f"{framework} {version(framework)}"
    except PackageNotFoundError:  # read from a folder
        return framework


@pytest.fixture
def audit_row(record_property: Callable[[str, object], None]) -> Row:
    """Adds what `audit_loss` has found to the table of losses. Nothing is critical."""

    def row(framework: str, loss: str, audit: LossAudit, coefficient: float = 1) -> None:
        assert audit.ok, audit
        said = {f.kind: f for f in audit.findings}
        cells = ["no loss is computed", "", ""]
        if audit.formula is not None:
            assert not audit.either
            assert not np.isnan(audit.moves_R).any()  # its gradient was compared
            padding = "padding counted" if audit.formula.padding else "padding left out"
            unknown = "No pass has padding" in said["loss_formula"].text
            what = ", ".join([audit.formula.words, *[padding] * (not unknown)])
            cells = [what, f"{audit.factor / coefficient:.4g}", "the formula's"]
        elif "loss_unknown" in said:
            cells[0] = "no published formula"
        bias, size = ("loss_bias" in said), said.get("loss_bias_update")
        cells.append("of the choice alone" * bias)
        if size is not None:
            low, high = (f"{size.values[name]:.2g}" for name in ("low", "high"))
            cells[-1] += f"; + {low}" + f" to {high}" * (low != high) + " where idle"
        record_property("losses", f"| {named(framework)} | {loss} | {' | '.join(cells)} |")

    return row


def table_of(rows: list[str]) -> str:
    """The rows, and how many decisions were compared with which releases."""
    counts = [row.split("|")[3].replace(",", "").split(" of ") for row in rows]
    equal, total = (sum(map(int, column)) for column in zip(*counts, strict=True))
    releases = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    made = f"{equal:,} of {total:,} decisions. Python {platform.python_version()}, {releases}."
    return "\n".join([HEADER, *sorted(rows), "", made])


def losses_table_of(rows: list[str]) -> str:
    return "\n".join([LOSSES_HEADER, *sorted(rows)])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    write_table(terminalreporter, "frameworks", "FRAMEWORKS_TABLE", table_of, " of frameworks")
    write_table(terminalreporter, "losses", "FRAMEWORKS_TABLE", losses_table_of, " of losses")
