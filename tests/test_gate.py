"""Gates end with 3 and say who failed."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd

from moe_inspect.analysis.metrics.registry import METRICS, metrics
from moe_inspect.reporting.report import report
from moe_inspect.reporting.verdict.gate import breaches, gate, gated
from tests.conftest import Cli
from tests.support.synthetic import uniform_ids, write_trace

T, E, K = 2_000, 8, 2


def trace(root: Path) -> Path:
    """Router 0 by chance; router 1: half of the tokens to experts 5 and 2."""
    rng = np.random.default_rng(0)
    ids = [uniform_ids(rng, T, E, K) for _ in range(2)]
    ids[1][rng.random(T) < 0.5] = [5, 2]
    write_trace(root, ids, E, document=np.arange(T) // 50, domain_of_document=["a", "b"])
    return root


def test_a_breach_exits_with_3_and_a_limit_on_nothing_with_2(cli_here: Cli, tmp_path: Path):
    trace(tmp_path / "t")
    load = ("report", "t", "--table", "load", "--format", "csv", "--fail-above", "max_vio=0.5")
    done = cli_here(*load, "--fail-below", "gini=0", check=3)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("failed: layer 1: max_vio is 1.")
    assert lines[0].endswith(", above 0.5")
    assert len(done.stdout.splitlines()) == 1 + 2 * E  # the table all the same
    cli_here(*load, "--layers", "0", check=0)
    for option, said in (
        ("--fail-above ginny=1", "no metric 'ginny' (did you mean gini?)"),
        ("--fail-below gini", "expected METRIC=VALUE, e.g. gini=0.5"),
        (
            "--threshold even=1",
            "no threshold 'even' (did you mean uneven?): there are uneven",
        ),
        ("--threshold uneven=-1", "give a number from 0 up"),
        ("--threshold uneven=0.3,uneven=0.4", "uneven=0.4: uneven is given twice"),
        ("--threshold uneven", "expected NAME=VALUE, e.g. uneven=0.3"),
    ):
        done = cli_here("report", "t", *option.split(), check=2)
        assert said in " ".join(done.stderr.replace("│", " ").split())


def test_every_gate_has_its_column_and_what_has_no_value_does_not_pass(tmp_path: Path):
    made = report(trace(tmp_path / "t"))
    for metric, name in gated().items():
        assert metric in made.tables[name].columns
    (line, _) = breaches(made, [gate("aux_loss=2", above=True)])  # no logits
    assert "aux_loss is NaN, which counts as above 2" in line
    # the last layer has no next one
    assert breaches(made, [gate("next_accuracy=0.9", above=True)]) == []
    assert len(breaches(made, [gate("next_accuracy=0.9", above=False)])) == 1  # positive control


def test_the_list_of_metrics_needs_no_trace(cli_here: Cli):
    said = cli_here("report", "--list-metrics", "--format", "csv").stdout
    listed = pd.read_csv(io.StringIO(said))
    assert listed["metric"].tolist() == [m.column for m in metrics().values()]
    assert len(METRICS) > 30
    assert "TRACE" in cli_here("report", check=2).stderr
