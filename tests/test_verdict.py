"""The verdicts on the sample traces are right, and what unevenness costs is what can be reckoned by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_inspect.report.report import report
from tests.conftest import ROOT
from tests.synthetic import write_counts


@pytest.mark.parametrize(
    ("name", "says", "never"),
    [
        ("balanced", "Experts specialise by domain in 4 of 4 routers", "never trained"),
        ("collapsed", "Layer 3 is the worst balanced: expert 6 gets 2.87x the mean load", "never trained"),
        ("untrained", "This model was never trained (random weights, seed 0), so nothing here is specialisation", "Experts specialise"),
    ],
)
def test_the_sample_traces_are_judged_right(name: str, says: str, never: str):
    said = "\n".join(report(ROOT / "sample_traces" / name).verdict())
    assert says in said
    assert never not in said


def test_the_wait_is_what_the_loads_make_it(tmp_path: Path):
    load = np.full((1, 8), 100)
    load[0, 3] = 900  # mean 200: the busiest is 4.5 times that; the even layer waits for none
    said = "\n".join(report(write_counts(tmp_path / "t", [load, np.full((1, 8), 200)], 2)).verdict())
    assert (
        f"{1 - (200 + 200) / (900 + 200):.0%} of their compute would be spent waiting for the busiest ({1 - 200 / 900:.0%} at layer 0)"
        in said
    )
