"""The verdicts on the sample traces are right, and what unevenness costs is what can be reckoned by
hand."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_inspect.reporting.report import report
from moe_inspect.reporting.verdict import checks
from moe_inspect.reporting.verdict.checks import CHECKS
from moe_inspect.reporting.verdict.data_checks import missing_ranks
from moe_inspect.reporting.verdict.findings import SEVERITIES, Finding
from tests.conftest import ROOT, Cli
from tests.planted import sentences
from tests.synthetic import uniform_ids, write_counts, write_trace


@pytest.mark.parametrize(
    ("name", "says", "never"),
    [
        (
            "balanced",
            (
                "Experts specialise by domain in 2 of 4 routers, and routing differs by domain "
                "in 2 "
                "more; most in layer 3"
            ),
            "never trained",
        ),
        (
            "collapsed",
            "Layer 3 is the worst balanced: expert 6 gets 2.87x the mean load",
            "never trained",
        ),
        (
            "untrained",
            (
                "This model was never trained (random weights, seed 0), so nothing here is "
                "specialisation"
            ),
            "Experts specialise",
        ),
    ],
)
def test_the_sample_traces_are_judged_right(name: str, says: str, never: str):
    said = "\n".join(sentences(report(ROOT / "sample_traces" / name)))
    assert says in said
    assert never not in said


def test_the_wait_is_what_the_loads_make_it(tmp_path: Path):
    load = np.full((1, 8), 100)
    load[0, 3] = 900  # mean 200: the busiest is 4.5 times that; the even layer waits for none
    said = "\n".join(
        sentences(report(write_counts(tmp_path / "t", [load, np.full((1, 8), 200)], 2)))
    )
    assert (
        f"GPUs would idle {1 - (200 + 200) / (900 + 200):.0%} of the time "
        f"({1 - 200 / 900:.0%} at layer 0)"
    ) in said


def test_specialised_routers_are_counted_by_the_threshold_stated():
    made = report(ROOT / "sample_traces" / "balanced", thresholds={"specialised": 0.185})
    table = made.tables["specialization"]
    share = (table["domain_mi_bits"] - table["domain_mi_null_bits"]) / 3  # log₂ of 8 experts
    assert (share >= 0.185).sum() == 1
    assert any(
        f.text.startswith("Experts specialise by domain in 1 of 4 routers") for f in made.verdict()
    )


def test_what_moves_from_pass_to_pass_is_told_though_the_sum_is_even(tmp_path: Path):
    rng, T = np.random.default_rng(3), 20_000
    even, moved = (uniform_ids(rng, T, E, 2) for E in (8, 4))
    moved[T // 2 :] += 4
    document = np.arange(T) * 60 // T
    made = {
        n: report(write_trace(tmp_path / n, [ids], 8, document=document))
        for n, ids in (("even", even), ("moved", moved))
    }
    said = {
        name: [f.text for f in one.verdict() if f.kind == "uneven_batches"]
        for name, one in made.items()
    }
    assert said["even"] == []
    load_BE = np.array(
        [np.bincount(pass_TK.reshape(-1), minlength=8) for pass_TK in np.split(moved, 40)]
    )
    each = (load_BE.max(1) / load_BE.mean(1)).mean()
    together = load_BE.sum(0).max() / load_BE.sum(0).mean()
    assert each > 2 > 1.1 > together
    assert f"a pass gets {each:.2f}x the mean load on average (" in said["moved"][0]
    assert f", over all passes {together:.2f}x." in said["moved"][0]
    assert f"GPUs would idle {1 - 1 / each:.0%} of the time in that layer" in said["moved"][0]


def test_a_dead_expert_is_no_good_balance(tmp_path: Path):
    rng, T = np.random.default_rng(3), 20_000
    ids, document = [uniform_ids(rng, T, E, 2) for E in (8, 7)], np.arange(T) * 60 // T
    said = report(write_trace(tmp_path / "t", ids, 8, document=document)).verdict()
    assert said[0].text.startswith("1 dead expert in 1 of 2 routers (layer 1: 7)")
    assert said[1].text.startswith("No expert is overloaded: at worst, in layer 1")
    assert [f.severity for f in said[:2]] == ["warning", "good"]


def test_findings_carry_their_numbers_and_come_most_important_first():
    found = report(ROOT / "sample_traces" / "collapsed").verdict()
    order = [min(SEVERITIES.index(f.severity), 2) for f in found]
    assert order == sorted(order)
    first = found[0]
    assert (first.kind, first.severity, first.layer, first.router) == ("balance", "critical", 3, 3)
    assert f"{first.values['max_over_mean']:.2f}x the mean load" in first.text
    assert {f.kind for f in found} <= {check.__name__ for _, of in CHECKS for check in of}
    assert len({f.kind for f in found}) == len(found)


def test_a_check_runs_once_per_report(monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []

    def counting(data: Any) -> Finding | None:
        asked.append(1)
        return missing_ranks(data)

    monkeypatch.setattr(checks, "CHECKS", (("", (counting,)),))
    made = report(ROOT / "sample_traces" / "collapsed")
    assert made.verdict() == made.verdict() == []
    assert made.tables["verdict"].empty
    assert len(asked) == 1


def test_the_verdict_is_a_table_and_json_has_its_numbers(cli_here: Cli):
    trace = ROOT / "sample_traces" / "collapsed"
    lines = cli_here("report", trace, "--table", "verdict", "--format", "json").stdout.splitlines()
    rows = [json.loads(line) for line in lines]
    assert [list(row) for row in rows] == [
        ["severity", "kind", "layer", "router", "text", "values"]
    ] * len(rows)
    found = report(trace).verdict()
    assert [row["text"] for row in rows] == [f.text for f in found]
    assert [row["values"] for row in rows] == [f.values for f in found]
    assert rows[-1]["layer"] is None
    text = cli_here("report", trace, "--table", "verdict", "--format", "csv").stdout
    assert list(pd.read_csv(io.StringIO(text)).columns) == [
        "severity",
        "kind",
        "layer",
        "router",
        "text",
    ]
