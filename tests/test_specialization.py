"""Specialisation: what is drawn and looked up for large tables, and what it is beyond that of
another trace (`report --baseline`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from moe_inspect.analysis.counting.token_ids import TokenIds, top_token_ids
from moe_inspect.analysis.metrics import chance
from moe_inspect.analysis.metrics import specialization as sp
from moe_inspect.errors import MoeInspectError
from moe_inspect.public import Trace, report
from tests.conftest import ROOT, Cli
from tests.support.synthetic import write_counts, write_trace
from tests.test_oracles_report import World, mi_of_shares, resampled


@pytest.mark.parametrize("D", [3, 90])  # of all signs, and of fewer
def test_nulls_are_those_of_every_draw_written_out(D: int):
    rng, domain_U = np.random.default_rng(D), np.repeat(np.arange(D), np.arange(D) % 12 + 1)
    load_UE = 60 * rng.dirichlet(np.ones(100), len(domain_U))
    load_UE[:, :2] += 40 * (domain_U < 60)[:, None]  # lead in the first domains alone
    tokens_U1, member_DU = load_UE.sum(1, keepdims=True), domain_U == np.arange(D)[:, None]
    share_E = sp.share_by_domain(member_DU @ load_UE).mean(0)
    signs_BU = chance.signs_of(len(domain_U), D * 100)
    signed_BUE = signs_BU[:, :, None] * (load_UE - tokens_U1 * share_E)
    load_BDE = np.maximum(member_DU @ signed_BUE + member_DU @ tokens_U1 * share_E, 0)
    bits_B = sp.mutual_information_bits(sp.share_by_domain(load_BDE))
    assert sp.domain_mi_null(load_UE, domain_U) == pytest.approx(bits_B, rel=1e-4)


@pytest.mark.parametrize("most", [30, 3 * sp.LOOKED_UP])
def test_information_of_counts_is_that_of_their_shares(most: int):
    """Counts whose n log n is looked up, and larger ones."""
    rng = np.random.default_rng(0)
    counts_XDE = rng.integers(0, most, (40, 3, 8)) * (rng.random((40, 3, 8)) < 0.5)
    expected = sp.mutual_information_bits(counts_XDE.sum(1).astype(float))
    assert sp.token_mi_bits(counts_XDE.sum(1).astype(np.uint32)) == pytest.approx(expected)


@pytest.mark.parametrize("ids", [0, 1, 50, 2_000])
@pytest.mark.parametrize("top", [0, 3, 20])
def test_top_token_ids_are_those_of_sorting_them_all(ids: int, top: int):
    """Counts so small that many are alike; one token id names an expert twice in a decision."""
    rng = np.random.default_rng(ids)
    occurrences_V = rng.integers(8, 40, ids)
    any_VE = rng.binomial(occurrences_V[:, None], 0.2, (ids, 5))
    any_VE[:1, 0] = 2 * occurrences_V[:1]
    expected = [
        (e, v)
        for e in range(5)
        for v in sorted(
            np.flatnonzero(any_VE[:, e]).tolist(),
            key=lambda v: (min(any_VE[v, e] / occurrences_V[v], 1), any_VE[v, e], v),
            reverse=True,
        )[: top or None]
    ]
    listed = TokenIds(np.arange(ids), occurrences_V, np.zeros(0), 1.0, np.zeros(3))
    expert_N, row_N = top_token_ids(any_VE.astype(np.uint32), listed, top)
    assert list(zip(expert_N.tolist(), row_N.tolist(), strict=True)) == expected


# --- beyond a baseline

T, E, K = 6_000, 8, 2
TRAINED, UNTRAINED = ROOT / "sample_traces/balanced", ROOT / "sample_traces/untrained"


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
    made = report(of, baseline=baseline).verdict()
    return next(one for one in made if one.kind == "domain_specialization")


def test_the_columns_are_those_of_both_reports():
    both: Any = report(TRAINED, baseline=UNTRAINED).tables["specialization"]
    mine, its = (report(path).tables["specialization"] for path in (TRAINED, UNTRAINED))
    for name, unit in (("domain_mi", "_bits"), ("vocabulary_specialization", "")):
        here, there = (x[f"{name}{unit}"] - x[f"{name}_null{unit}"] for x in (mine, its))
        assert both[f"{name}_baseline{unit}"].tolist() == there.tolist()
        assert both[f"{name}_beyond_baseline{unit}"].tolist() == (here - there).tolist()
    assert both[mine.columns].equals(mine)
    # Student's t of the difference, with the errors that resampled documents give
    errors, freedom = [], []
    for w in (World(TRAINED), World(UNTRAINED)):
        weights = resampled(tuple(w.strata.tolist()), 200)
        by_domain = [w.domain_U == d for d in range(len(w.domains))]
        loads = [w.by_unit(r.chosen) for r in w.routers]
        bits = [
            [mi_of_shares(np.stack([x[of] @ load_UE[of] for of in by_domain])) for x in weights]
            for load_UE in loads
        ]
        errors.append(np.std(bits, axis=1))
        freedom.append(len(w.units) - len(w.domains))
    t = both["domain_mi_beyond_baseline_bits"] / np.hypot(*errors)
    p = np.minimum(stats.t.sf(t, min(freedom)) * len(both), 1)
    assert both["domain_mi_beyond_baseline_p"].to_numpy() == pytest.approx(p, rel=1e-4)


def test_the_sentence_says_what_is_beyond_it(tmp_path: Path):
    strong, weak = (routed(tmp_path / f"{x}", x, seed=1) for x in (1.5, 0.7))
    found = domain_finding(strong, weak)
    assert (found.severity, found.values["specialised_routers"]) == ("good", 2)
    table: Any = report(weak).tables["specialization"]
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
    with_it, without = (
        {f.kind: f.text for f in report(TRAINED, baseline=x).verdict()} for x in (UNTRAINED, None)
    )
    for kind in ("domain_beyond_token", "token_specialization"):
        beyond = {"token_specialization": "; 64% beyond chance, in the baseline 51%)"}
        assert beyond.get(kind, " beyond chance, in the baseline 0.0") in with_it[kind]
        assert "baseline" not in without[kind]
    assert "0.175 in the baseline too" in with_it["domain_specialization"]
    assert not any("--random-init" in text for text in with_it.values())


def test_a_baseline_of_another_shape_or_of_other_domains_is_refused(tmp_path: Path):
    trace = routed(tmp_path / "a", 1.0, 0)
    for name, more in (("routers", {"L": 3}), ("domains", {"domains": 2})):
        other = routed(tmp_path / name, 1.0, 0, **more)
        with pytest.raises(MoeInspectError, match=f"has other {name} than"):
            _ = report(trace, baseline=other).tables["specialization"]


def test_the_command(cli_here: Cli, tmp_path: Path):
    routed(tmp_path / "a", 1.5, 1), routed(tmp_path / "b", 0.7, 1)
    assert "beyond the baseline" in cli_here("report", "a", "--baseline", "b").stdout
    shown = cli_here("report", "a", "--baseline", "b", "--table", "summary", "--format", "csv")
    assert "baseline,b" in shown.stdout
    assert "no trace at c" in cli_here("report", "a", "--baseline", "c", check=1).stderr
    write_counts(tmp_path / "n", [np.ones((1, E), int)] * 2, 2, ["a"])
    said = "error: the baseline n holds counts only, no documents\n"
    assert cli_here("report", "a", "--baseline", "n", check=1).stderr == said
