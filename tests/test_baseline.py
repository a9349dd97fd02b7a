"""`report --baseline`: what specialisation is beyond that of another trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moe_inspect
from moe_inspect.analysis.metrics import chance
from moe_inspect.analysis.metrics import specialization as sp
from moe_inspect.analysis.metrics import uncertainty as unc
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.reader import Trace
from tests.conftest import Cli
from tests.support.synthetic import write_trace

SAMPLES = Path(__file__).parents[1] / "sample_traces"
T, E, K = 6_000, 8, 2


def routed(
    root: Path, effect: float, seed: int, documents: int = 30, L: int = 2, domains: int = 3
) -> Trace:
    """Each domain has an expert of its own, whose logit is `effect` higher; documents have a taste
    besides."""
    rng, ids, document_T = np.random.default_rng(seed), [], np.arange(T) // (T // documents)
    own_UE = effect * np.eye(E)[np.arange(documents) % domains]
    for _ in range(L):
        logits_UE = own_UE + rng.normal(0, 0.3, (documents, E))
        logits_TE = logits_UE[document_T] + rng.gumbel(size=(T, E))
        ids.append(np.argsort(-logits_TE, 1)[:, :K].astype(np.uint16))
    of = {"document": document_T, "domain_of_document": [f"domain {d}" for d in range(domains)]}
    return write_trace(root, ids, E, token_id=rng.integers(0, 50, T), **of)


def domain_finding(of: Trace, baseline: Trace) -> Any:
    made = moe_inspect.report(of, baseline=baseline).verdict()
    return next(one for one in made if one.kind == "domain_specialization")


def test_the_columns_are_those_of_both_reports():
    trained, untrained = SAMPLES / "balanced", SAMPLES / "untrained"
    both: Any = moe_inspect.report(trained, baseline=untrained).tables["specialization"]
    mine, its = (moe_inspect.report(path).tables["specialization"] for path in (trained, untrained))
    for name, unit in (("domain_mi", "_bits"), ("vocabulary_specialization", "")):
        here, there = (x[f"{name}{unit}"] - x[f"{name}_null{unit}"] for x in (mine, its))
        assert both[f"{name}_baseline{unit}"].tolist() == there.tolist()
        assert both[f"{name}_beyond_baseline{unit}"].tolist() == (here - there).tolist()
    assert both[mine.columns].equals(mine)


def test_the_sentence_says_what_is_beyond_it(tmp_path: Path):
    strong, weak = (routed(tmp_path / f"{x}", x, seed=1) for x in (1.5, 0.7))
    found = domain_finding(strong, weak)
    assert (found.severity, found.values["specialised_routers"]) == ("good", 2)
    table: Any = moe_inspect.report(weak).tables["specialization"]
    its = table["domain_mi_bits"] - table["domain_mi_null_bits"]
    assert f"{its[found.router]:.3f} in the baseline too" in found.text
    for other in (routed(tmp_path / "alike", 0.7, seed=2), strong):
        found = domain_finding(weak, other)
        assert (found.severity, found.values["specialised_routers"]) == ("note", 0)
        assert "but no more than the baseline's as far as these documents tell" in found.text
    few = routed(tmp_path / "few", 1.5, seed=1, documents=6)
    assert "Too few documents" in domain_finding(few, weak).text
    # a baseline of few documents does not tell either
    assert domain_finding(strong, few).values["specialised_routers"] == 0


def test_other_sentences_name_the_baseline_and_none_without():
    trained, untrained = SAMPLES / "balanced", SAMPLES / "untrained"
    with_it, without = (
        {f.kind: f.text for f in moe_inspect.report(trained, baseline=x).verdict()}
        for x in (untrained, None)
    )
    for kind in ("domain_beyond_token", "token_specialization"):
        assert "; in the baseline 0" in with_it[kind] or "; in the baseline 51%" in with_it[kind]
        assert "baseline" not in without[kind]
    assert "0.175 in the baseline too" in with_it["domain_specialization"]


def test_a_p_value_is_as_rare_as_it_says():
    """Two samples of documents whose domains differ alike: of 150, 1 % are 1.5, of which 6 or more
    have a probability of 0.004. Without the error, half of them would be beyond."""
    rng, U, D = np.random.default_rng(0), 24, 3
    domain_U, small, above = np.arange(U) % D, 0, 0
    share_DE = rng.dirichlet(np.full(E, 3.0), D)
    for _ in range(150):
        bits, errors = np.zeros(2), np.zeros(2)
        for side in range(2):
            share_UE = np.stack([rng.dirichlet(20 * share_DE[d]) for d in domain_U])
            of_UE = np.stack([rng.multinomial(300, share_E) for share_E in share_UE])
            load_DE = np.stack([of_UE[domain_U == d].sum(0) for d in range(D)])
            bits[side] = sp.domain_mi_bits(load_DE) - sp.domain_mi_null(of_UE, domain_U).mean()
            errors[side] = sp.domain_mi_error(of_UE, domain_U)
        t = (bits[0] - bits[1]) / np.hypot(*errors)
        small += unc.student_p(t, U - D) < chance.ALPHA
        above += bits[0] > bits[1]
    assert small < 6
    assert 50 < above < 100


def test_a_baseline_of_another_shape_or_of_other_domains_is_refused(tmp_path: Path):
    trace = routed(tmp_path / "a", 1.0, 0)
    for name, more in (("routers", {"L": 3}), ("domains", {"domains": 2})):
        other = routed(tmp_path / name, 1.0, 0, **more)
        with pytest.raises(MoeInspectError, match=f"has other {name} than"):
            _ = moe_inspect.report(trace, baseline=other).tables["specialization"]


def test_the_command(cli_here: Cli, tmp_path: Path):
    routed(tmp_path / "a", 1.5, 1), routed(tmp_path / "b", 0.7, 1)
    assert "beyond the baseline" in cli_here("report", "a", "--baseline", "b").stdout
    shown = cli_here("report", "a", "--baseline", "b", "--table", "summary", "--format", "csv")
    assert "baseline,b" in shown.stdout
    assert "no trace at c" in cli_here("report", "a", "--baseline", "c", check=1).stderr
