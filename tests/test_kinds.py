"""Every kind of sentence has a world in which it is true and said, one in which it is not true and
it is silent, and, where it claims something of more than was recorded, one too small to tell. A new
kind has to join CASES."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import moe_inspect
from moe_inspect.reporting.verdict.findings import Finding, every_check
from moe_inspect.watch.alarms import Alarms, Window
from moe_inspect.watch.rules import (
    BATCH,
    DRIFT,
    DROP_RATE,
    GPU_LOAD,
    OF_MODEL,
    known_metrics,
    parse_rule,
)
from tests.support.chance import REGIMES, monitored, with_effects
from tests.support.synthetic import routers
from tests.support.worlds import WORLDS

ROOT = Path(__file__).parent.parent
E = 8


@dataclass(frozen=True)
class Case:
    """`says`: a pattern of "severity: text" of the finding that claims it. `true`, `false`, `few`:
    the worlds in which it is true, not true, and in which too little is known, None where that has
    no meaning."""

    says: str
    true: str
    false: str
    few: str | None


CASES = {
    "balance": Case("(warning|critical): .* worst balanced", "planted", "even", "planted, 5 documents"),
    "dead_experts": Case("warning: ", "planted", "even", "planted, 20 tokens"),
    "overloaded_experts": Case("", "planted", "even", "planted, 5 documents"),
    "starved_experts": Case("", "woven", "even", "woven, 5 documents"),
    "least_used_expert": Case("", "woven", "even", "woven, 5 documents"),
    "busiest_gpu": Case("", "planted", "even", "planted, 5 documents"),
    "training_alarms": Case("warning: 1 alarm in 60 windows of training. The first: Layer 1, expert 5: dead_experts", "training, an expert dies", "training", "training, an expert dies at the end"),
    "averaging_hides": Case("", "opposed", "even", "opposed, few tokens"),
    "uneven_batches": Case("warning: ", "woven", "even", "woven, 5 documents"),
    "overloading_domain": Case("warning: ", "planted", "even", "planted, 5 documents"),
    "unused_in_domain": Case("", "deserted", "even counts", "deserted, few tokens"),
    "domain_specialization": Case("good: Experts specialise|note: Routing differs", "planted", "even", "planted, 5 documents"),
    "domain_beyond_token": Case(".*not vocabulary alone", "planted", "even", "planted, 5 documents"),
    "token_specialization": Case("note: The token id determines", "planted", "even", "planted, 20 tokens"),
    "drift": Case("note: .*, most in layer 2: expert 3 gets 0.* in the first quarter and 2", "woven", "even", "woven, 5 documents"),
    "drift of little": Case("", "woven", "woven, hardly rising", None),
    "missing_ranks": Case("", "half the ranks", "even counts", "half the ranks, one router"),
    "different": Case("warning: Different from layer 1 on: ", "5% changed", "1% changed", "in two documents"),
    "noise": Case("warning: .*, beyond that noise", "noise", "as noise", "noise, 5 documents"),
    "load_shift": Case("warning: The load of 1 router differs by more than between", "collapsed", "redrawn", "collapsed, 5 documents"),
    "load_shift of nothing": Case("good: The load moves no more than between documents", "redrawn", "collapsed", "collapsed, 5 documents"),
    "load_shift of few documents": Case("note: Too few documents to tell whether the load moved: up to ", "collapsed, 5 documents", "collapsed", None),
    "load_shift of counts": Case("warning: ", "a steep one", "two even ones", "a steep one, few tokens"),
    "collapsed": Case("critical: B is collapsed in layer 1: expert 5 gets 78% of its tokens", "collapsed", "redrawn", "collapsed, 5 documents"),
    "collapsed of counts": Case(".*1,000 tokens choose as one", "a steep one", "two even ones", "a steep one, few tokens"),
    "as_chance": Case("warning: .* share at most 2[5-9]\\.", "another model", "5% changed", None),
    "below_chance": Case(r"warning: .* share 0\.0% .*\(2[45]\.\d%; 3 of 3 routers", "avoiding", "redrawn", "avoiding, 5 documents"),
    "domain": Case(r'note: The routing of "code" changed more than that of the other domains: 5\.', "one domain", "5% changed", "one document of it"),
    "rounding": Case("", "rounded", "anywhere", "rounded, few"),
    "different of few decisions": Case("warning: .*Rounding does not", "anywhere", "rounded", "rounded, few"),
    "never_fed of last tokens": Case(".*The last token of sequences", "last tokens", "5% changed", "last tokens, 4 documents"),
    "never_fed of zeros": Case(".*expert 0 in every", "zeros, k = 2", "redrawn", "zeros, 4 routers"),
    "never_fed of zeros in one slot": Case(".*expert 0 in every", "zeros, k = 1", "no zeros, 2 routers", "zeros, 4 routers"),
    "routes_shifted": Case("", "routes shifted", "another model", "routes shifted, 5 tokens"),
    "layers_moved of a shift": Case(".*B's layer n is A's n", "layers shifted", "another model", "layers shifted, 4 tokens"),
    "layers_moved of two": Case(".*A's . is B's", "layers swapped", "another model", "layers swapped, 4 tokens"),
    "layers_moved of stages": Case(".*A's . is B's", "layers renumbered", "another model", "layers renumbered, 4 tokens"),
    "experts_renumbered": Case("", "experts permuted", "by document", "experts permuted, 8 tokens"),
    "routes_of_another_router": Case("", "foreign routes", "collapsed alike", "foreign routes, 2 tokens"),
    "experts_renumbered of replicas": Case(".*physical ids of", "physical ids", "a model of more experts", "physical ids, 8 tokens"),
    "different_models": Case("note: .* it is no comparison of tokens", "a model of more experts", "another model", None),
    "growth": Case("", "5% changed", "same", "10 tokens changed"),
    "by_step": Case(".*Step by step: the load differs", "moved", "not moved", "moved once"),
    "repeated_rows": Case("", "padded", "lacking", "padded, 15 rows"),
    # that too little is known: where it is, and where it is not
    "few_tokens": Case("", "planted, 20 tokens", "planted", None),
    "few_documents_per_domain": Case("", "planted, 5 documents", "planted", None),
    "undecided of much": Case("note: .*Too few documents to tell whether 2%", "in two documents", "5% changed", None),
    "undecided of little": Case(r"note: Nearly the same: \d+ of 9,000 decisions \(0\.\d+%; \d\.\d+% of tokens in any layer\)", "1% changed", "5% changed", None),
    "undecided of logits": Case(".*too few to tell", "rounded, few", "rounded", None),
    # what was recorded, or compared, and how: of these tokens, and of no others
    "same": Case("", "same", "1% changed", None),
    "routers_without_load": Case("", "lacking", "even", None),
    "router_ties": Case("", "ties", "no ties", None),
    "dropped": Case("", "dropped", "empty slots", None),
    "empty_slots": Case("", "empty slots", "dropped", None),
    "sample": Case("", "even", "redrawn", None),
    "trace_warning": Case("", "lacking", "even", None),
    "missing_tokens": Case("", "shorter", "routes shifted", None),
    "missing_layers": Case("", "recorded otherwise", "same", None),
    "unchecked": Case("", "recorded otherwise", "same", None),
    "recorded": Case("", "recorded otherwise", "1% changed", None),
    "counts_only": Case("", "one interrupted", "same", None),
    "incomplete": Case("", "one interrupted", "two even ones", None),
}  # fmt: skip

CALLS = ("finding",)
OF_MODELS = {"training"}  # rooms that judge a model, not a trace: in test_audit_loss


def kinds_of_sentences() -> set[str]:
    """The checks of a report, and the first argument of every such call in the package, where it is
    a constant."""
    found = {check.__name__ for _, check in every_check()}
    for path in (ROOT / "moe_inspect").rglob("*.py"):
        if path.parent.name in OF_MODELS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(
                    ast.Name(name) | ast.Attribute(attr=name), [ast.Constant(kind), *_]
                ) if name in CALLS:
                    found.add(str(kind))
    return found


def test_every_kind_of_sentence_has_its_cases() -> None:
    assert kinds_of_sentences() == {kind.partition(" of ")[0] for kind in CASES}


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Finding]]:
    root = tmp_path_factory.mktemp("worlds")

    @cache
    def found(world: str) -> list[Finding]:
        made = WORLDS[world](root / re.sub(r"\W", "_", world))
        if isinstance(made, dict):  # by kind
            return list(made.values())
        if isinstance(made, moe_inspect.Trace):
            made = moe_inspect.report(made)
        elif isinstance(made, list | tuple):
            made = moe_inspect.compare(*made)
        return made.verdict()

    return found


@pytest.mark.parametrize("kind", CASES)
def test_a_claim_is_made_where_it_is_true_and_known(
    kind: str, findings: Callable[[str], list[Finding]]
) -> None:
    case = CASES[kind]
    for world in filter(None, (case.true, case.false, case.few)):
        of_kind = [one for one in findings(world) if one.kind == kind.partition(" of ")[0]]
        claims = [one for one in of_kind if re.match(case.says, f"{one.severity}: {one.text}")]
        assert bool(claims) == (world == case.true), (world, of_kind)


# on each metric of the load, a rule that a collapsed router breaks
ALARMS = {
    text.partition(" ")[0]: text
    for text in (
        *("max_over_mean > 1.5", "max_vio > 0.5", "max_vio_batch > 0.5"),
        *("cv > 0.5", "gini > 0.2", "entropy < 0.95"),
        *("balancedness < 0.7", "dead_experts > 0", "starved_experts > 0", "drift > 0.1"),
    )
}


def windows(of_E: list[int], tokens: int) -> list[Window]:
    """Of one router: four of chance, then of these loads, of so many tokens each."""
    rng, made = np.random.default_rng(0), list[Window]()
    for n in range(12):
        share_E = np.array(of_E if n >= 4 else [1] * E) / sum(of_E if n >= 4 else [1] * E)
        load_SE = rng.multinomial(tokens // 4, share_E, 4)
        of = [load_SE.sum(0)], np.array([tokens]), {}, [load_SE]
        made.append(Window(4 * n + 1, 4 * n + 4, *of))
    return made


def test_every_metric_of_a_rule_on_the_load_has_its_cases() -> None:
    assert set(known_metrics()) - {DROP_RATE, GPU_LOAD, *OF_MODEL} == set(ALARMS)
    assert {BATCH, DRIFT} <= set(ALARMS)


@pytest.mark.parametrize("metric", ALARMS)
def test_an_alarm_is_raised_where_it_is_true_and_known(metric: str) -> None:
    rules = [parse_rule(ALARMS[metric])]
    of_E = [0 if metric == "dead_experts" else 1, *[30] * 6, 200]
    for tokens, raised in ((20_000, True), (4, False)):
        seen = with_effects(Alarms(routers(1, E, 1), rules), {0: 1.0})
        assert any(seen.see(w) for w in windows(of_E, tokens)) == raised, tokens
    listed, chance = monitored(REGIMES["clustered 8/2"], 0)
    seen = Alarms(listed, rules)
    assert not any(seen.see(w) for w in chance)
