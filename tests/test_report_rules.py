"""`report --rules FILE`: the alarms of a trace after the fact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import moe_inspect
from moe_inspect.alarms.alarms import Alarms
from moe_inspect.alarms.of_trace import alarms_of, windows_of
from moe_inspect.alarms.rules import parse_rule
from moe_inspect.analysis.counting.select import select
from moe_inspect.errors import MoeInspectError
from moe_inspect.training import RoutingMonitor
from tests.conftest import ROOT, Cli
from tests.support.chance import REGIMES, Planted, drawn
from tests.support.trained import counted
from tests.test_training import loop

RULES = ["max_vio > 0.1 even by chance for 2 windows", "drift > 0.01 even by chance"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """A history, and the alarms that were raised while it was written."""
    path = tmp_path_factory.mktemp("run") / "h"
    model = counted().train()
    with RoutingMonitor(model, path, log_steps=2, rules=RULES, on_alarm=lambda a: None) as monitor:
        loop(model, monitor, 8)
    return path, monitor.raised


def test_they_are_those_that_were_raised_in_training(run: tuple[Path, list[Any]]) -> None:
    path, raised = run
    found = alarms_of(moe_inspect.open_trace(path), [parse_rule(rule) for rule in RULES])
    assert found == raised
    assert {a.metric for a in found} == {"max_vio", "drift"}


def test_the_command_exits_with_3_where_there_are_any(
    cli: Cli, run: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    rules = tmp_path / "rules.txt"
    rules.write_text("\n".join(RULES))
    done = cli("report", run[0], "--rules", rules, check=3)
    assert f"alarm: {run[1][0].text}" in done.stderr
    assert done.stderr.count("help: ") == 2
    done = cli("report", run[0], "--rules", rules, "--layers", "1", check=3)
    assert "Layer 0" not in done.stderr
    rules.write_text("max_vio > 4\n")
    assert "alarm" not in cli("report", run[0], "--rules", rules).stderr
    rules.write_text("max_vio ! 4\n")
    assert "line 1: cannot read the rule" in cli("report", run[0], "--rules", rules, check=2).stderr
    rules.write_text("z_loss > 4\n")
    assert "does not hold z_loss" in cli("report", run[0], "--rules", rules, check=1).stderr


def test_a_trace_of_decisions_is_cut_into_windows(cli: Cli, tmp_path: Path) -> None:
    trace = moe_inspect.open_trace(ROOT / "sample_traces/collapsed")
    windows = list(windows_of(trace, select(trace), window=2000)[0])
    assert sum(int(w.tokens_R[0]) for w in windows) == trace.n_tokens
    rules = [parse_rule("max_vio > 1.8 for 2 windows")]
    found = alarms_of(trace, rules, window=2000)
    assert {a.layer for a in found} == {3}
    balanced = moe_inspect.open_trace(ROOT / "sample_traces/balanced")
    assert not alarms_of(balanced, rules, window=2000)
    with pytest.raises(MoeInspectError, match="does not hold aux_loss"):
        alarms_of(trace, [parse_rule("aux_loss > 1")])


BY_CHANCE: dict[str, tuple[str, list[str], int]] = {
    name: (name, ["max_vio > 0.2", "dead_experts > 0"], 500)
    for name in ("clustered 8/2", "6 documents", "two domains of five")
}
BY_CHANCE["drift of 6 documents"] = ("6 documents", ["drift > 0.01"], 64)


@pytest.mark.parametrize("case", BY_CHANCE)
def test_what_may_be_chance_to_the_verdict_is_no_alarm(case: str, tmp_path: Path) -> None:
    """Documents that each have a taste of their own, as the report knows; six of them tell nothing.
    Control: the same windows, taken for independent tokens, raise alarms."""
    name, texts, window = BY_CHANCE[case]
    trace = drawn(tmp_path / "t", replace(REGIMES[name], L=2, taste=1.0), 1)
    rules = [parse_rule(text) for text in texts]
    (balance,) = [f for f in moe_inspect.report(trace).verdict() if f.kind == "balance"]
    assert balance.severity in ("good", "note")
    assert not alarms_of(trace, rules, window=window)
    windows = list(windows_of(trace, select(trace), window=window)[0])
    blind = Alarms(trace.routers, rules, effects={0: 1.0, 1: 1.0})
    assert [alarm for w in windows for alarm in blind.see(w)]


def test_what_is_planted_is_an_alarm(tmp_path: Path) -> None:
    trace = drawn(tmp_path / "t", replace(REGIMES["clustered 64/8"], documents=60), 0, Planted(3.0))
    found = alarms_of(trace, [parse_rule("max_vio > 0.5 for 2 windows")], window=1000)
    assert {(a.router, a.experts) for a in found} == {(1, (5,))}
