"""Every kind of sentence that claims something has a trace in which it is true, one in which it is
not and it is silent, and one too small to tell: CASES. The others state facts: FACTS. A new kind
has to join one of them."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moe_inspect
from moe_inspect.alarms.alarms import Alarms
from moe_inspect.alarms.rules import BATCH, DRIFT, DROP_RATE, OF_MODEL, known_metrics, parse_rule
from moe_inspect.alarms.window import Window
from moe_inspect.reporting.verdict.findings import Finding
from tests.chance import REGIMES, drawn_pair, monitored
from tests.planted import DOMAINS, planted, uniform
from tests.synthetic import routers, uniform_ids, write_counts, write_trace
from tests.test_compare_findings import (
    DOCUMENTS,
    avoiding,
    changed,
    collapsing,
    of_documents,
    random,
    routes,
    said,
)

ROOT = Path(__file__).parent.parent
T, E, K = 6_000, 8, 2


def woven(root: Path, documents: int = 60) -> Any:
    """Router 0: experts 4 and 5 lead in every domain, expert 6 is starved. Router 1: every pass has
    an expert of its own. Router 2: expert 3 rises through the trace. Router 3 chooses as 2 did."""
    rng, at_T = np.random.default_rng(0), np.arange(T)
    logits = rng.gumbel(size=(4, T, E))
    logits[0] += [0, 0, 0, 0, 1, 1.1, -4, 0]
    logits[1, at_T, at_T // 250 % E] += 2
    logits[2, :, 3] += 3 * at_T / T - 1.5
    logits[3] = logits[2] + rng.gumbel(size=(T, E)) / 4
    ids = [np.argsort(-of_TE, 1)[:, :K].astype(np.uint16) for of_TE in logits]
    document = at_T * documents // T
    return write_trace(
        root, ids, E, document=document, domain_of_document=DOMAINS, batch_tokens=250
    )


def opposed(root: Path, tokens: int = T) -> Any:
    """The busiest expert of router 0 is the least used one of the others: the average is even."""
    logits = np.random.default_rng(0).gumbel(size=(4, tokens, E))
    logits[0, :, 0] += 1
    logits[1:, :, 0] -= 0.3
    ids = [np.argsort(-of_TE, 1)[:, :K].astype(np.uint16) for of_TE in logits]
    return write_trace(root, ids, E, document=np.arange(tokens) // 100)


def counts(root: Path, *loads: list[list[int]], times: int = 1) -> Any:
    return write_counts(
        root, [times * np.array(load) for load in loads], K, ["a", "b", "c"][: len(loads[0])]
    )


def zeros(name: str, k: int, L: int, tokens: int = 3_000) -> Callable[[Path], Any]:
    """k of 8 experts at L routers; a hundredth of the tokens of B have expert 0 everywhere, if that
    is its name, else B is routed anew."""

    def made(root: Path) -> Any:
        rng = np.random.default_rng(4)
        a, b = ([uniform_ids(rng, tokens, E, k) for _ in range(L)] for _ in range(2))
        if name == "filled":
            b, at_T = [x.copy() for x in a], rng.random(tokens) < 0.01
            for of_TK in b:
                of_TK[at_T] = 0
        alike: dict[str, Any] = {"document": np.arange(tokens) // 50, "token_id": np.arange(tokens)}
        return [write_trace(root / x, ids, E, **alike) for x, ids in (("a", a), ("b", b))]

    return made


EVEN_LOAD, STARVED = [100] * 8, [1, *[114] * 7]
STEEP, DEAD = [450, *[78] * 7], [100] * 4 + [0] * 4
# a world: a trace, or two that are compared, or the findings on them
WORLDS: dict[str, Callable[[Path], Any]] = {
    "planted": planted,
    "planted, 5 documents": lambda root: planted(root, document=np.arange(T) * 5 // T),
    "planted, 20 tokens": lambda root: planted_short(root, 20),
    "even": lambda root: uniform(root).verdict(),
    "woven": woven,
    "woven, 5 documents": lambda root: woven(root, 5),
    "opposed": opposed,
    "opposed, few tokens": lambda root: opposed(root, 300),
    "deserted": lambda root: counts(root, [STARVED, EVEN_LOAD], times=100),
    "deserted, few tokens": lambda root: counts(root, [STARVED, EVEN_LOAD]),
    "even counts": lambda root: counts(root, *[[EVEN_LOAD, EVEN_LOAD]] * 4, times=100),
    "half the ranks": lambda root: counts(root, *[[DEAD]] * 4),
    "half the ranks, one router": lambda root: counts(root, [DEAD]),
    # two traces
    "5% changed": lambda root: said(root, routes(), changed(routes(), random(0.05, 1))),
    "1% changed": lambda root: said(root, routes(), changed(routes(), random(0.01, 1))),
    "in two documents": lambda root: said(root, routes(), changed(routes(), of_documents(7, 8))),
    "noise": lambda root: noisy(root, 0.06),
    "as noise": lambda root: noisy(root, 0.02),
    "noise, 5 documents": lambda root: noisy(root, 0.06, 5),
    "collapsed": lambda root: said(root, routes(), collapsing()),
    "collapsed, 5 documents": lambda root: said(root, routes(), collapsing(), documents=5),
    "avoiding": lambda root: said(root, routes(), avoiding(routes())),
    "avoiding, 5 documents": lambda root: said(root, routes(), avoiding(routes()), documents=5),
    "redrawn": lambda root: said(root, routes(), routes(9)),
    "one domain": lambda root: said(root, routes(), changed(routes(), in_one_domain())),
    "one document of it": lambda root: said(root, routes(), changed(routes(), of_documents(1))),
    "rounded": lambda root: drawn_pair(root, REGIMES["iid 64/8"], 0, "rounding")[:2],
    "anywhere": lambda root: drawn_pair(root, REGIMES["iid 64/8"], 0, "anywhere")[:2],
    "rounded, few": lambda root: drawn_pair(root, REGIMES["200 tokens"], 0, "rounding")[:2],
    "last tokens": lambda root: last_tokens(root, 60),
    "last tokens, 4 documents": lambda root: last_tokens(root, 4),
    "zeros, k = 2": zeros("filled", 2, 2),
    "zeros, k = 1": zeros("filled", 1, 12),
    "zeros, 4 routers": zeros("filled", 1, 4),
    "no zeros, 2 routers": zeros("routed", 1, 2, 6_000),
    # two traces of counts
    "a steep one": lambda root: two_counts(root, STEEP, 100),
    "a steep one, few tokens": lambda root: two_counts(root, STEEP, 1),
    "two even ones": lambda root: two_counts(root, EVEN_LOAD, 100),
}


def planted_short(root: Path, tokens: int) -> Any:
    """What `planted` has, so short."""
    first = next(iter(planted(root / "whole").shards))
    ids = [np.stack(list(first.slots(r)), 1)[:tokens] for r in range(4)]
    token_id = np.minimum(np.random.default_rng(0).zipf(1.3, T), 499)[:tokens]
    return write_trace(root / "short", ids, E, document=np.arange(tokens) // 2, token_id=token_id)


def noisy(root: Path, share: float, documents: int = DOCUMENTS) -> Any:
    ids = routes()
    runs = (changed(ids, random(of, seed)) for seed, of in enumerate((share, 0.02)))
    return said(root, ids, *runs, documents=documents)


def in_one_domain() -> np.ndarray:
    return random(0.02, 3) | of_documents(*range(1, DOCUMENTS, 3)) & random(0.3, 4)


def last_tokens(root: Path, documents: int) -> Any:
    ids = routes()
    last_T = np.arange(len(ids[0])) % (len(ids[0]) // documents) == len(ids[0]) // documents - 1
    other = changed(changed(changed(ids, last_T, router=0), last_T), last_T, router=2)
    return said(root, ids, other, documents=documents)


def two_counts(root: Path, load: list[int], times: int) -> Any:
    return [counts(root / name, [of], times=times) for name, of in (("a", EVEN_LOAD), ("b", load))]


@dataclass(frozen=True)
class Case:
    """`says`: a pattern of "severity: text" of the finding that claims it. `true`, `false`, `few`:
    the worlds in which it is true, not true, and in which too little is known."""

    says: str
    true: str
    false: str
    few: str


CASES = {
    "balance": Case("(warning|critical): .* worst balanced", "planted", "even", "planted, 5 documents"),
    "dead_experts": Case("warning: ", "planted", "even", "planted, 20 tokens"),
    "overloaded_experts": Case("", "planted", "even", "planted, 5 documents"),
    "starved_experts": Case("", "woven", "even", "woven, 5 documents"),
    "least_used_expert": Case("", "woven", "even", "woven, 5 documents"),
    "idle_gpus": Case("", "planted", "even", "planted, 5 documents"),
    "averaging_hides": Case("", "opposed", "even", "opposed, few tokens"),
    "uneven_batches": Case("warning: ", "woven", "even", "woven, 5 documents"),
    "overloading_domain": Case("warning: ", "planted", "even", "planted, 5 documents"),
    "unused_in_domain": Case("", "deserted", "even counts", "deserted, few tokens"),
    "domain_specialization": Case("good: Experts specialise|note: Routing differs", "planted", "even", "planted, 5 documents"),
    "domain_beyond_token": Case(".*not vocabulary alone", "planted", "even", "planted, 5 documents"),
    "token_specialization": Case("note: The token id determines", "planted", "even", "planted, 20 tokens"),
    "committee": Case("", "woven", "even", "woven, 5 documents"),
    "signature": Case("", "planted", "even", "planted, 5 documents"),
    "paths": Case("", "woven", "even", "woven, 5 documents"),
    "drift": Case("", "woven", "even", "woven, 5 documents"),
    "missing_ranks": Case("", "half the ranks", "even counts", "half the ranks, one router"),
    "different": Case("", "5% changed", "1% changed", "in two documents"),
    "noise": Case("warning: ", "noise", "as noise", "noise, 5 documents"),
    "load_shift": Case("warning: ", "collapsed", "redrawn", "collapsed, 5 documents"),
    "load_shift of counts": Case("warning: ", "a steep one", "two even ones", "a steep one, few tokens"),
    "collapsed": Case("", "collapsed", "redrawn", "collapsed, 5 documents"),
    "collapsed of counts": Case(".*design effect of 1,000", "a steep one", "two even ones", "a steep one, few tokens"),
    "below_chance": Case("", "avoiding", "redrawn", "avoiding, 5 documents"),
    "domain": Case("", "one domain", "5% changed", "one document of it"),
    "rounding": Case("", "rounded", "anywhere", "rounded, few"),
    "not_rounding": Case("", "anywhere", "rounded", "rounded, few"),
    "last_token": Case("", "last tokens", "5% changed", "last tokens, 4 documents"),
    "zero_filled": Case("", "zeros, k = 2", "redrawn", "zeros, 4 routers"),
    "zero_filled of one slot": Case("", "zeros, k = 1", "no zeros, 2 routers", "zeros, 4 routers"),
}  # fmt: skip
# kinds whose three cases take more than a synthetic trace: the tests that have them
ELSEWHERE = {
    "hard_tokens": "test_loss_table.py",
    "loss": "test_compare_loss.py",
    "by_step": "test_compare_steps.py",
    "vocabulary": "test_compare_models.py",
    **dict.fromkeys(
        (
            *("routes_shifted", "layers_shifted", "layers_swapped", "layers_renumbered"),
            *("experts_renumbered", "routes_of_another_router", "physical_ids"),
        ),
        "misrecorded.py",
    ),
}
# what a trace holds, how it was recorded, what cannot be told of it, and figures without a claim
FACTS = {
    *("routers_without_load", "router_ties", "repeated_rows", "dropped", "empty_slots", "sample"),
    *("trace_warning", "few_tokens", "few_documents_per_domain", "same", "misaligned", "growth"),
    *("different_unknown", "rounding_unknown", "missing_tokens", "missing_layers", "unchecked"),
    *("recorded", "counts_only", "incomplete", "refused", "different_models", "text", "saturation"),
}


CALLS = ("finding", "_crowd", "Misalignment")


def kinds_of_sentences() -> set[str]:
    """The first argument of every such call in the package, where it is a constant."""
    found = set[str]()
    for path in (ROOT / "moe_inspect").rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in CALLS:
                kind = node.args[0] if node.args else None
                if isinstance(kind, ast.Constant):
                    found.add(str(kind.value))
                elif isinstance(kind, ast.Name) and kind.id == "KIND":
                    found.add("domain_specialization")
    return found


def test_every_kind_of_sentence_has_its_cases() -> None:
    named = [{kind.partition(" of ")[0] for kind in CASES}, set(ELSEWHERE), FACTS]
    assert kinds_of_sentences() == set.union(*named)
    assert sum(map(len, named)) == len(set.union(*named)), "a kind is in one of them"
    for kind, file in ELSEWHERE.items():
        assert f'"{kind}"' in (ROOT / "tests" / file).read_text(), kind


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Finding]]:
    root = tmp_path_factory.mktemp("worlds")

    @cache
    def found(world: str) -> list[Finding]:
        made = WORLDS[world](root / re.sub(r"\W", "_", world))
        if isinstance(made, dict):  # by kind
            return list(made.values())
        if isinstance(made, moe_inspect.Trace):
            return moe_inspect.report(made).verdict()
        made = made if isinstance(made[0], Finding) else moe_inspect.compare(*made).verdict()
        return list(made)

    return found


@pytest.mark.parametrize("kind", CASES)
def test_a_claim_is_made_where_it_is_true_and_known(
    kind: str, findings: Callable[[str], list[Finding]]
) -> None:
    case = CASES[kind]
    for world in (case.true, case.false, case.few):
        of_kind = [one for one in findings(world) if one.kind == kind.partition(" of ")[0]]
        claims = [one for one in of_kind if re.match(case.says, f"{one.severity}: {one.text}")]
        assert bool(claims) == (world == case.true), (world, of_kind)


# metric of the load → a rule that a collapsed router breaks
ALARMS = {
    "max_over_mean": "> 1.5",
    "max_vio": "> 0.5",
    "max_vio_batch": "> 0.5",
    "min_over_max": "< 0.5",
    "cv": "> 0.5",
    "gini": "> 0.2",
    "entropy": "< 0.95",
    "effective_experts": "< 7",
    "balancedness": "< 0.7",
    "dead_experts": "> 0",
    "starved_experts": "> 0",
    "drift": "> 0.1",
}


def windows(of_E: list[int], tokens: int) -> list[Window]:
    """Of one router: four of chance, then of these loads, of so many tokens each."""
    rng, made = np.random.default_rng(0), list[Window]()
    for n in range(12):
        share_E = np.array(of_E if n >= 4 else [1] * E, float)
        load_SE = rng.multinomial(tokens // 4, share_E / share_E.sum(), 4)
        load = [load_SE.sum(0)]
        made.append(Window(4 * n + 1, 4 * n + 4, load, np.array([tokens]), {}, [load_SE]))
    return made


def test_every_metric_of_a_rule_on_the_load_has_its_cases() -> None:
    assert set(known_metrics()) - {DROP_RATE, *OF_MODEL} == set(ALARMS)
    assert {BATCH, DRIFT} <= set(ALARMS)


@pytest.mark.parametrize("metric", ALARMS)
def test_an_alarm_is_raised_where_it_is_true_and_known(metric: str) -> None:
    rules = [parse_rule(f"{metric} {ALARMS[metric]}")]
    of_E = [0 if metric == "dead_experts" else 1, *[30] * 6, 200]
    for tokens, raised in ((20_000, True), (4, False)):
        seen = Alarms(routers(1, E, 1), rules, effects={0: 1.0})
        assert any(seen.see(w) for w in windows(of_E, tokens)) == raised, tokens
    listed, chance = monitored(REGIMES["clustered 8/2"], 0)
    seen = Alarms(listed, rules)
    assert not any(seen.see(w) for w in chance)
