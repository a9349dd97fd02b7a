"""The report: its tables' columns, and what it says in words."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.report import TABLES, Report, report
from moe_inspect.reporting.tables.registry import Table
from moe_inspect.reporting.verdict.checks import CHECKS
from moe_inspect.reporting.verdict.findings import SEVERITIES
from moe_inspect.trace.reader import Trace
from tests.conftest import ROOT, Cli
from tests.support.planted import K, T, planted, sentences
from tests.support.synthetic import uniform_ids, write_trace

COLUMNS = {
    "summary": "key value",
    "balance": "layer router experts top_k tokens assignments max_over_mean max_vio "
    "cv gini entropy dead_experts busiest_expert expected_by_chance max_over_mean_low "
    "max_over_mean_high max_vio_batch",
    "load": "layer router expert assignments share load_ratio first_choice weight_sum",
    "domains": "layer router domain expert tokens assignments activation lift",
    "specialization": "layer router domain_mi_bits domain_mi_null_bits "
    "domain_mi_given_token_bits domain_mi_given_token_null_bits domain_mi_given_token_p "
    "token_mi_bits vocabulary_specialization",
    "vocabulary": "layer router expert token_id token count fraction",
    "coactivation": "layer router expert other probability lift",
    "transitions": "layer router next_layer expert next_expert probability lift",
    "repetition": "layer router domain first_choice first_choice_random",
    "windows": "layer router window first_token tokens max_over_mean busiest_expert",
    "verdict": "severity kind layer router text",
}


def test_every_table_has_its_columns(planted_report: Report):
    assert set(COLUMNS) <= set(TABLES)
    for name in TABLES:
        columns = list(planted_report.tables[name].columns)
        assert set(COLUMNS.get(name, "").split()) <= set(columns)
        assert name in ("summary", "verdict") or columns[:2] == ["layer", "router"]


def test_tables_are_made_when_asked_for(planted_trace: Trace, monkeypatch: pytest.MonkeyPatch):
    fresh = report(planted_trace)
    unasked = Table(lambda _: pytest.fail("not asked for"), frozenset(), ())
    monkeypatch.setitem(TABLES, "specialization", unasked)
    assert len(fresh.tables["balance"]) == 4
    assert fresh.tables["balance"] is fresh.tables["balance"]
    assert list(fresh.tables) == list(TABLES)
    assert "balance" in fresh.tables
    assert "gini" not in fresh.tables
    with pytest.raises(MoeInspectError, match="no table 'gini': there are summary, balance"):
        fresh.tables["gini"]


def test_facts_and_tables_agree(planted_report: Report):
    balance, load = (planted_report.tables[name] for name in ("balance", "load"))
    largest = load.groupby("router")["load_ratio"].max().to_numpy()
    assert largest == pytest.approx(balance["max_over_mean"].to_numpy())
    assert load["weight_sum"].sum() == pytest.approx(T * 4, rel=1e-3)  # those of a token sum to 1
    known = {"assignments": T * K * 4, "decisions": T * 4, "documents": 60, "tokens_in_law": 1500}
    known |= {"worst_layer": 3, "dead_experts": 1}
    facts = dict(planted_report.facts())
    assert {name: facts[name] for name in known} == {name: str(n) for name, n in known.items()}


def test_what_is_planted_is_said(planted_report: Report):
    said, row = sentences(planted_report), planted_report.tables["balance"].iloc[3]
    worst = f"expert 5 gets {row['max_over_mean']:.2f}x the mean load (95% interval"
    assert said[0].startswith(f"Layer 3 is the worst balanced: {worst}")
    of = r"; [1-4] of 4 routers (is|are) uneven \(at least 1.2x and beyond chance\)\.$"
    assert re.search(of, said[0])
    assert f"expected by chance: {row['expected_by_chance']:.2f}x" in said[0]
    dead = "1 dead expert in 1 of 4 routers (layer 3: 6): none of 6,000 tokens was routed there."
    assert dead in said
    together = "\n".join(said)
    assert "veraged" not in together  # 1.3x is not fine either
    bits = planted_report.tables["specialization"].iloc[2]
    given, null = bits["domain_mi_given_token_bits"], bits["domain_mi_given_token_null_bits"]
    for part in (
        '"code" overloads expert 3 of layer 2',
        "most in layer 2 (",
        f"the domain still carries {given:.3f} bits about the expert in layer 2 (documents "
        f"by chance give {null:.3f})",
        "expert 3 takes 8",
        "The token id determines the expert most in layer 1: 100% of first choices",
        "Judged on 6,000 tokens of 60 documents in 4 domains, 4 routers.",
    ):
        assert part in together


@pytest.mark.parametrize(
    ("status", "word"), [("recording", "still being recorded"), ("interrupted", "interrupted")]
)
def test_an_unfinished_trace_warns(tmp_path: Path, status: str, word: str):
    made = report(planted(tmp_path / "t", status=status))
    (warning,) = [f for f in made.verdict() if f.kind == "trace_warning"]
    assert word in warning.text
    assert warning.severity == "warning"
    assert word in dict(made.facts())["warning"]
    assert len(made.tables["load"]) == 32


SAMPLES = {
    "balanced": ("Experts specialise by domain in 2 of 4 routers, and", "never trained"),
    "collapsed": ("Layer 3 is the worst balanced: expert 6 gets 2.87x", "never trained"),
    "untrained": ("never trained (random weights, seed 0), so", "Experts specialise"),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_the_sample_traces_are_judged_right(name: str):
    said = "\n".join(sentences(report(ROOT / "sample_traces" / name)))
    says, never = SAMPLES[name]
    assert says in said
    assert never not in said


def test_what_moves_from_pass_to_pass_is_told_though_the_sum_is_even(tmp_path: Path):
    rng, T = np.random.default_rng(3), 20_000
    even, moved = (uniform_ids(rng, T, E, 2) for E in (8, 4))
    moved[T // 2 :] += 4
    document = np.arange(T) * 60 // T
    said = dict[str, list[str]]()
    for name, ids in (("even", even), ("moved", moved)):
        made = report(write_trace(tmp_path / name, [ids], 8, document=document))
        said[name] = [f.text for f in made.verdict() if f.kind == "uneven_batches"]
    assert said["even"] == []
    passes = np.split(moved.reshape(-1), 40)
    load_BE = np.array([np.bincount(ids, minlength=8) for ids in passes])
    each = (load_BE.max(1) / load_BE.mean(1)).mean()
    together = load_BE.sum(0).max() / load_BE.sum(0).mean()
    assert each > 2 > 1.1 > together
    assert f"a pass gets {each:.2f}x the mean load on average (" in said["moved"][0]
    assert f", over all passes {together:.2f}x." in said["moved"][0]


def test_findings_carry_their_numbers_come_most_important_first_and_are_made_once():
    made = report(ROOT / "sample_traces" / "collapsed")
    found, again = made.verdict(), made.verdict()
    order = [min(SEVERITIES.index(f.severity), 2) for f in found]
    assert order == sorted(order)
    first = found[0]
    assert (first.kind, first.severity, first.layer, first.router) == ("balance", "critical", 3, 3)
    assert f"{first.values['max_over_mean']:.2f}x the mean load" in first.text
    assert {f.kind for f in found} <= {check.__name__ for _, of in CHECKS for check in of}
    assert len({f.kind for f in found}) == len(found)
    assert found is not again
    assert all(one is other for one, other in zip(found, again, strict=True))
    assert len(made.tables["verdict"]) == len(found)


def test_the_verdict_is_a_table_and_json_has_its_numbers(cli_here: Cli):
    trace = ROOT / "sample_traces" / "collapsed"
    lines = cli_here("report", trace, "--table", "verdict", "--format", "json").stdout.splitlines()
    rows = [json.loads(line) for line in lines]
    columns = ["severity", "kind", "layer", "router", "text"]
    assert all(list(row) == [*columns, "values"] for row in rows)
    found = report(trace).verdict()
    assert [row["text"] for row in rows] == [f.text for f in found]
    assert [row["values"] for row in rows] == [f.values for f in found]
    assert rows[-1]["layer"] is None
    text = cli_here("report", trace, "--table", "verdict", "--format", "csv").stdout
    assert list(pd.read_csv(io.StringIO(text)).columns) == columns
