"""Alarms: raised where a rule is broken and chance does not explain it, once, naming the layer.
Gates of a report: they end with 3 and say who failed."""

from __future__ import annotations

import io
import json
import logging
import re
import threading
import warnings
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from benchmarks.calibration_of_findings import ALARMS, alarms
from moe_inspect.analysis.metrics import balance as bal
from moe_inspect.analysis.metrics.chance import LONG_DOCUMENT
from moe_inspect.analysis.metrics.registry import METRICS, metrics
from moe_inspect.analysis.metrics.uncertainty import random_loads
from moe_inspect.errors import MoeInspectError
from moe_inspect.public import report
from moe_inspect.reporting.verdict.gate import check_gates, gate, gated
from moe_inspect.trace.schema import Router
from moe_inspect.training.actions import RoutingWarning, Webhook, act
from moe_inspect.watch.alarms import Alarm, Alarms, Window, chance_limit, effect_of, effect_of_pair
from moe_inspect.watch.rules import DEFAULT_RULES, Rule, known_metrics, parse_rule, read_rules
from tests.conftest import Cli
from tests.support.chance import REGIMES, monitored, with_effects
from tests.support.sweep import sample
from tests.support.synthetic import uniform_ids, write_trace

T, E, K = 2_000, 8, 2
ROUTERS = [Router(layer, f"r{layer}", f"r{layer}", E, K) for layer in (2, 3)]
EVEN = [1000] * E
DEAD = [0, 2000, *[1000] * (E - 2)]


def window(n: int, *load: list[int], **values: list[float]) -> Window:
    loads = [np.array(of_router) for of_router in load]
    tokens_R = np.array([int(load_E.sum()) // K for load_E in loads])
    arrays = {name: np.array(value) for name, value in values.items()}
    return Window(10 * n + 1, 10 * n + 10, loads, tokens_R, arrays)


def windows_of(*loads: list[int]) -> list[Window]:
    """In which the second router has these loads, and the first an even one."""
    return [window(n, EVEN, load) for n, load in enumerate(loads)]


def judged(rules: list[str], *windows: Window) -> list[Any]:
    alarms = with_effects(Alarms(ROUTERS, [*map(parse_rule, rules)]), {0: 4.0, 1: 4.0})
    return [alarm for w in windows for alarm in alarms.see(w)]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("max_vio > 1", Rule("max_vio", ">", 1.0)),
        ("max_vio > 1 and beyond chance", Rule("max_vio", ">", 1.0)),
        ("max_vio>.5 even by chance", Rule("max_vio", ">", 0.5, beyond_chance=False)),
        ("dead_experts > 0 for 3 windows", Rule("dead_experts", ">", 0.0, 3)),
        ("entropy falling", Rule("entropy", "falling", 0.05)),
        ("entropy  falling by 0.2 for 2 windows", Rule("entropy", "falling", 0.2, 2)),
        ("drift", Rule("drift", ">", 0.2)),
        ("z_loss rising by 1", Rule("z_loss", "rising", 1.0)),
        ("drift in layers 1-2", Rule("drift", ">", 0.2, layers=frozenset((1, 2)))),
    ],
)
def test_rules_are_read_as_they_are_written(text: str, rule: Rule) -> None:
    assert parse_rule(text) == rule
    assert parse_rule(str(rule)) == rule


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("max_vio", "has no limit"),
        ("max_wio > 1", "no metric 'max_wio'"),
        ("max_vio > many", "cannot read the rule"),
        ("max_vio > 1 for 0 windows", "at least 1 window"),
        (f"max_vio > 1 for {'9' * 5000} windows", "cannot read the rule"),
        ("entropy falling by -1", "above 0, below 1: write 0.1 for 10 %"),
        ("entropy falling by 10", "above 0, below 1: write 0.1 for 10 %"),
        ("z_loss rising by 0", "by a share above 0: write"),
        ("z_loss rising by 1e999", "by a share above 0: write"),
        ("max_vio > -0.5", "max_vio is always 0 or more"),
        ("aux_loss > 1e999", "aux_loss is always 0 or more"),
        ("entropy < 2", "entropy is always from 0 to 1"),
        ("drift > 20", "drift is always from 0 to 1"),
        ("drop table", "cannot read the rule"),
        ("", "cannot read the rule"),
    ],
)
def test_what_is_no_rule_is_refused(text: str, why: str) -> None:
    with pytest.raises(MoeInspectError, match=why):
        parse_rule(text)


def test_a_file_of_rules(tmp_path: Path) -> None:
    path = tmp_path / "rules.txt"
    path.write_text("# of this run\nmax_vio > 1  # high\n\ndrift\n")
    assert [rule.metric for rule in read_rules(path)] == ["max_vio", "drift"]
    for name, text, said in (
        ("rules.txt", "max_vio > 1\nmax_vio !\n", r"rules.txt line 2: cannot read"),
        ("rules.txt", "# none\n", "holds no rules"),
        ("none.txt", "", "cannot read the rules"),
    ):
        path.write_text(text)
        with pytest.raises(MoeInspectError, match=said):
            read_rules(tmp_path / name)


def test_an_alarm_names_layer_expert_step_and_help() -> None:
    (alarm,) = judged(["dead_experts > 0 for 2 windows"], *windows_of(EVEN, DEAD, DEAD))
    assert (alarm.layer, alarm.router, alarm.experts) == (3, 1, (0,))
    assert (alarm.since, alarm.step, alarm.value) == (11, 30, 1.0)
    assert alarm.text.startswith("Layer 3, expert 0: dead_experts above 0 since step 11 (rule")
    (falling,) = judged(["entropy falling"], *windows_of(EVEN, [4000, *[571] * 7]))
    assert "down from 1 since" in falling.text
    assert "arXiv:" in alarm.help
    assert json.loads(json.dumps(alarm.record()))["layer"] == 3


AGAIN = [DEAD, DEAD, EVEN, EVEN, DEAD, EVEN, EVEN, EVEN, DEAD]
MOVED = [2000, 0, *[1000] * (E - 2)]  # by an eighth


@pytest.mark.parametrize(
    ("rule", "loads", "steps"),
    [
        ("dead_experts > 0", AGAIN, [10, 90]),  # again after the rule was kept for a while
        ("drift > 0.12", [EVEN, MOVED], [20]),  # from the window before
        ("drift > 0.12", [[n // 100 for n in load] for load in (EVEN, MOVED)], []),  # by chance
    ],
)
def test_when_a_rule_raises_an_alarm(rule: str, loads: list[list[int]], steps: list[int]) -> None:
    assert [a.step for a in judged([rule], *windows_of(*loads))] == steps


@pytest.mark.parametrize("tokens", [16, 200, 5000])
def test_chance_alone_raises_nothing(tokens: int) -> None:
    """Windows of tokens that choose at random, against rules that look at the least."""
    rules = ["max_vio > 0", "dead_experts > 0", "entropy < 1", "starved_experts > 0", "drift > 0"]
    rng = np.random.default_rng(tokens)
    alarms = Alarms(ROUTERS, [parse_rule(rule) for rule in rules])
    raised, blind = 0, 0
    for n in range(100):
        ids_RTK = rng.random((len(ROUTERS), tokens, E)).argsort(2)[..., :K]
        loads = [np.bincount(of_TK.ravel(), minlength=E).tolist() for of_TK in ids_RTK]
        raised += len(alarms.see(window(n, *loads)))
        blind += sum(bal.max_vio(np.array(loads)) > 0)
    assert raised <= 1
    assert blind == 200  # control: without the floor every window breaks "max_vio > 0"


@pytest.mark.parametrize("name", sample(ALARMS, 2))
def test_runs_of_chance_raise_no_alarm(name: str) -> None:
    """In 10 runs 5 % are 0.5, and 3 have a probability of 0.01. Control: a dead expert is found."""
    assert sum(bool(alarms(REGIMES[name], seed)) for seed in range(10)) < 3
    found = [a for seed in range(3) for a in alarms(REGIMES[name], seed, dead=3)]
    of_dead = [(a.layer, a.experts) for a in found if a.rule == DEFAULT_RULES[0]]
    assert of_dead == [(1, (3,))] * 6


def test_documents_that_are_alike_are_no_alarm() -> None:
    """Control: with a design effect of independent tokens, the same runs raise alarms."""
    routers, windows = monitored(replace(REGIMES["clustered 8/2"], taste=1.0), 0)
    rules = [parse_rule("max_vio > 0.1")]
    blind = with_effects(Alarms(routers, rules), dict.fromkeys(range(len(routers)), 1.0))
    assert sum(len(blind.see(w)) for w in windows) >= 2
    told = Alarms(routers, rules)
    assert not sum(len(told.see(w)) for w in windows)
    assert all(5 < told.effect(r) < 50 for r in range(len(routers)))


def test_windows_are_pooled_until_a_dead_expert_can_be_told() -> None:
    """512 experts, one per token, 16,384 tokens per window: a mean load of 32."""
    router, rng = Router(0, "r", "r", 512, 1), np.random.default_rng(5)
    rules = [parse_rule("dead_experts > 0 for 3 windows"), parse_rule("dead_experts > 0")]
    share = np.where(np.arange(512) == 7, 0, 1 / 511)
    even = np.full(512, 1 / 512)
    for effect, of_E, expected in ((4.0, share, 2), (4.0, even, 0), (1e4, share, 0)):
        alarms, T = with_effects(Alarms([router], rules), {0: effect}), 2**14
        loads = enumerate(rng.multinomial(T, of_E, 12))
        windows = (Window(n, n, [load_E], np.array([T])) for n, load_E in loads)
        found = [alarm for w in windows for alarm in alarms.see(w)]
        assert [a.experts for a in found] == [(7,)] * expected
        assert all(2 <= a.step <= 4 for a in found)


def test_the_max_vio_of_steps_is_against_chance() -> None:
    """Steps of 16 tokens are uneven by chance, of which their mean over steps is sure."""
    rng, rule = np.random.default_rng(3), ["max_vio_batch > 0.5"]

    def steps(share_E: np.ndarray) -> Window:
        recent = [rng.multinomial(32, share_E, 32), rng.multinomial(32, np.full(E, 1 / E), 32)]
        loads = [load_SE.sum(0) for load_SE in recent]
        return Window(1, 32, loads, np.full(2, 512), {}, recent)

    even, uneven = np.full(E, 1 / E), np.r_[0.7, np.full(E - 1, 0.3 / (E - 1))]
    assert bal.max_vio(np.stack(steps(even).recent)).mean() > 0.5
    assert not judged(rule, steps(even))
    assert [(a.layer, a.experts) for a in judged(rule, steps(uneven))] == [(2, (0,))]


def test_the_limit_is_what_random_choices_give() -> None:
    rng = np.random.default_rng(1)
    ids = rng.random((400, 1024, E)).argsort(2)[..., :K]
    load_WE = np.stack([np.bincount(w.reshape(-1), minlength=E) for w in ids])
    vio_W = bal.max_vio(load_WE)
    for tail, high in ((0.05, 1.1), (1 / 400, 1.3)):
        limit = chance_limit("max_vio", 4 * 1024, E, K, True, 4.0, tail)
        assert 0.9 < limit / np.quantile(vio_W, 1 - tail) < high
    drawn_WE = random_loads(1024, E, K, 400)
    assert bal.max_vio(drawn_WE).mean() == pytest.approx(vio_W.mean(), rel=0.05)
    assert (drawn_WE.sum(1) == 1024 * K).all()
    assert drawn_WE.max() <= 1024
    # no limit is above what is possible: every token chooses the expert, which is E / k
    for metric, most in (("max_over_mean", E / K), ("max_vio", E / K - 1)):
        assert chance_limit(metric, 40, E, K, True, 1_000.0, 1e-9) == most
        assert chance_limit(metric, 1e6, E, K, True, 1.0, 1e-9) < most


def test_the_design_effect_of_a_run() -> None:
    """Tokens that come in fours: 4; one jump of the load does not move it."""
    rng = np.random.default_rng(2)
    loads = [4 * rng.multinomial(500, np.full(E, 1 / E)) for _ in range(41)]
    pairs = [effect_of_pair(a, b, 1) for a, b in pairwise(loads)]
    assert np.mean(pairs) == pytest.approx(4, rel=0.2)
    assert 3 < effect_of(pairs, E) < 6
    assert effect_of([*pairs, 1e6], E) == pytest.approx(effect_of(pairs, E), rel=0.1)
    assert effect_of([4.0], E) > 10  # one pair hardly tells
    assert effect_of([1e5] * 9, E) == LONG_DOCUMENT


def test_a_model_that_moves_is_still_judged() -> None:
    """The load of every window is another one: chance of documents does not reach that far."""
    busy = [[4 * 2300 if e == n % 2 else 2300 for e in range(E)] for n in range(5)]
    found = Alarms(ROUTERS, [parse_rule("max_vio > 1 for 5 windows")])
    assert [a.layer for n in range(5) for a in found.see(window(n, EVEN, busy[n]))] == [3]


def test_every_metric_can_be_a_rule() -> None:
    rules = [f"{m} {how}" for m in known_metrics() for how in ("> 0", "< 0", "falling", "rising")]
    judged(rules, *[window(n, EVEN, DEAD, z_loss=[0.0, 0.0]) for n in range(2)])


(BROKEN,) = judged(["dead_experts > 0"], window(0, EVEN, DEAD))


def test_actions(caplog: pytest.LogCaptureFixture) -> None:
    got, called = list[Any](), list[Alarm]()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    webhook = Webhook(f"http://127.0.0.1:{server.server_port}/", most_per_hour=2)
    with pytest.warns(RoutingWarning, match="Layer 3, expert 0"):
        assert not act(BROKEN, ["warn", "log", called.append, webhook])
    assert called == [BROKEN]
    assert "Layer 3, expert 0" in caplog.text
    assert act(BROKEN, ["stop"])
    for _ in range(3):
        webhook(BROKEN)
    webhook.close()
    server.shutdown()
    assert [post["layer"] for post in got] == [3, 3]  # bounded
    assert "not posted" in caplog.text


def test_a_webhook_that_is_not_there_stops_no_training(caplog: pytest.LogCaptureFixture) -> None:
    webhook = Webhook("http://127.0.0.1:9/", timeout_s=1)
    webhook(BROKEN)
    webhook.close()
    assert "could not post" in caplog.text
    with pytest.raises(MoeInspectError, match="is not a webhook"):
        Webhook("file:///etc/passwd")


def test_a_warning_is_shown_without_its_line(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():  # shown as Python shows them, in a log
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        act(BROKEN, ["warn"])
        warnings.warn("another", stacklevel=1)
        logging.captureWarnings(False)
    ours, another = (record.getMessage() for record in caplog.records)
    assert ours == f"{BROKEN}\n"
    assert re.match(r"\S+:\d+: UserWarning: another\n", another)


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
    passed, failed = done.stderr.strip().splitlines()
    gini = report(tmp_path / "t").tables["balance"]["gini"]
    assert passed == f"passed: gini is at least {gini.min():.6g} (layer {gini.idxmin()}), limit 0"
    assert failed.startswith("failed: layer 1: max_vio is 1.")
    assert failed.endswith(", above 0.5")
    assert len(done.stdout.splitlines()) == 1 + 2 * E  # the table all the same
    done = cli_here(*load, "--layers", "0", check=0)
    assert re.fullmatch(
        r"passed: max_vio is at most 0\.0\d+ \(layer 0\), limit 0\.5\n", done.stderr
    )
    for option, said in (
        ("--fail-above ginny=1", "no metric 'ginny' (did you mean gini?)"),
        ("--fail-below gini", "expected METRIC=VALUE, e.g. gini=0.5"),
        ("--threshold even=1", "no threshold 'even' (did you mean uneven?): there are uneven"),
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
    (line, _) = check_gates(made, [gate("aux_loss=2", above=True)]).failed  # no logits
    assert "aux_loss is NaN, which counts as above 2" in line


def test_the_list_of_metrics_needs_no_trace(cli_here: Cli):
    said = cli_here("report", "--list-metrics", "--format", "csv").stdout
    listed = pd.read_csv(io.StringIO(said))
    assert listed["metric"].tolist() == [m.column for m in metrics().values()]
    assert len(METRICS) > 30
    assert "TRACE" in cli_here("report", check=2).stderr
