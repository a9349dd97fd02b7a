"""Specialisation: the cases whose answer is known, chance that must not be called specialisation,
and what it is beyond that of another trace (`report --baseline`). That it is found where it is
planted is in test_kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_inspect.analysis.counting.token_ids import TokenIds, top_token_ids
from moe_inspect.analysis.metrics import chance
from moe_inspect.analysis.metrics import specialization as sp
from moe_inspect.analysis.metrics import uncertainty as unc
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.report import report
from moe_inspect.trace.reader import Trace
from tests.conftest import ROOT, Cli
from tests.support.synthetic import write_counts, write_trace


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_domains_on_disjoint_blocks_of_experts(n: int):
    tokens_D = np.arange(1, n + 1) * 10  # equally weighted, however many tokens each has
    assignments_DE = np.kron(np.diag(tokens_D), np.ones((1, 4), int))
    assert sp.domain_mi_bits(assignments_DE) == pytest.approx(np.log2(n))


def test_what_cannot_be_known_is_nan():
    one_domain, none = np.ones((1, 4), np.int64), np.zeros((0, 4), np.int64)
    documents = np.ones((9, 4), np.int64), np.zeros(9, np.int64)
    for found in (
        *(sp.domain_mi_bits(one_domain), sp.domain_mi_null(*documents)),
        sp.domain_mi_given_token_bits(one_domain, one_domain),
        *(sp.vocabulary_specialization(none), sp.token_mi_bits(none)),
    ):
        assert np.isnan(found).all()


def given_token(counts_XUE: np.ndarray, domain_U: np.ndarray) -> tuple[float, float]:
    """domain_mi_given_token_bits, and the mean of its null, of counts by token id and document with
    one choice each."""
    load_UE, tokens_XU = counts_XUE.sum(0), counts_XUE.sum(2)
    of = sp.Expected.of(load_UE, counts_XUE.sum(1), sp.Moved.of(tokens_XU, domain_U))
    return sp.domain_mi_given_token_bits(*of.by_domain()), float(of.null().mean())


def test_domain_beyond_token_id_by_hand():
    domain_U = np.array([0, 0, 1, 1])
    # the token id decides, and each domain has one of its own: the domain adds nothing
    decided_XUE = np.zeros((2, 4, 2), int)
    decided_XUE[0, :2, 0] = decided_XUE[1, 2:, 1] = 4
    assert sp.domain_mi_bits(np.array([[8, 0], [0, 8]])) == 1
    assert given_token(decided_XUE, domain_U) == pytest.approx((0, 0))
    # the domain decides where all have one token id, however many tokens each has
    for tokens in (1, 1000):
        crossed_XUE = np.zeros((1, 4, 2), int)
        crossed_XUE[0, :2, 0], crossed_XUE[0, 2:, 1] = 4, 4 * tokens
        bits, _ = given_token(crossed_XUE, domain_U)
        assert bits == pytest.approx(1)


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


# --- whole traces: chance, and what is planted

T, E, K, L = 6_000, 8, 2, 4
DOCUMENT = np.arange(T) // 100
DOMAINS = [("code", "law", "math", "prose")[d % 4] for d in range(60)]


def zipf_ids(rng: np.random.Generator) -> np.ndarray:
    return np.minimum(rng.zipf(1.3, T), 400).astype(np.int32)


def specialization(root: Path, ids: list[np.ndarray], token_id: np.ndarray) -> pd.DataFrame:
    of = {"document": DOCUMENT, "domain_of_document": DOMAINS, "token_id": token_id}
    return report(write_trace(root, ids, E, **of)).tables.complete("specialization")


def test_documents_of_their_own_style_are_no_domain(tmp_path: Path):
    rng = np.random.default_rng(1)
    ids = []
    for _ in range(L):
        wish_TE = rng.normal(0, 0.8, (60, E))[DOCUMENT] + rng.gumbel(size=(T, E))
        ids.append(np.argsort(-wish_TE, axis=1)[:, :K].astype(np.uint16))
    table = specialization(tmp_path / "t", ids, zipf_ids(rng))
    assert (table["domain_mi_bits"] < 1.3 * table["domain_mi_null_p99_bits"]).all()
    given = table["domain_mi_given_token_bits"] - table["domain_mi_given_token_null_bits"]
    assert abs(given.mean()) < 0.3 * table["domain_mi_given_token_null_bits"].mean()
    assert (table["domain_mi_given_token_p"] > 0.01).all()
    # positive control: a null that shuffles tokens, not documents, would have been far below
    assert (table["domain_mi_bits"] > 5 * (4 - 1) * (E - 1) / (2 * T * K * np.log(2))).all()


def test_vocabulary_is_not_taken_for_topic(tmp_path: Path):
    """Each domain has words of its own and words it shares; the expert follows the word alone."""
    rng = np.random.default_rng(3)
    domain = np.array([sorted(set(DOMAINS)).index(DOMAINS[d]) for d in DOCUMENT])
    own_T = 60 + domain * 20 + rng.integers(0, 20, T)
    token_id = np.where(rng.random(T) < 0.5, rng.integers(0, 60, T), own_T).astype(np.int32)
    first = rng.integers(0, E, 200)[token_id]
    first = np.where(token_id >= 60, (domain * 2 + token_id % 2) % E, first)
    ids = np.stack([first, (first + 1 + rng.integers(0, E - 1, T)) % E], axis=1).astype(np.uint16)
    row = specialization(tmp_path / "t", [ids], token_id).iloc[0]
    assert row["domain_mi_bits"] > 5 * row["domain_mi_null_p99_bits"]
    assert row["domain_mi_given_token_bits"] < row["domain_mi_bits"] / 100
    assert row["vocabulary_specialization"] == pytest.approx(1)


def test_expert_as_a_function_of_the_token_id(tmp_path: Path):
    rng = np.random.default_rng(4)
    token_id = zipf_ids(rng)
    ids = (token_id % E)[:, None].astype(np.uint16)
    row, count_V = specialization(tmp_path / "t", [ids], token_id).iloc[0], np.bincount(token_id)
    assert row["vocabulary_specialization"] == 1
    frequent_V = np.flatnonzero(count_V >= 8)
    share_E = np.bincount(frequent_V % E, count_V[frequent_V], E) / count_V[frequent_V].sum()
    # H(expert | token id) is 0
    assert row["token_mi_bits"] == pytest.approx(-(share_E * np.log2(share_E)).sum())
    assert row["token_mi_bits"] > 5 * row["token_mi_null_bits"]


def test_vocabulary_against_counting_by_hand(tmp_path: Path):
    token_id = np.array([0] * 8 + [1] * 10 + [2] * 3)
    ids = np.array([[0, 1]] * 6 + [[1, 2]] * 2 + [[2, 3]] * 10 + [[0, 3]] * 3, np.uint16)
    trace = write_trace(tmp_path / "t", [ids], 4, token_id=token_id, words=2)
    words = report(trace, top=5).tables["vocabulary"].set_index(["expert", "token_id"])
    expected = {  # count, fraction, fraction as first choice
        (0, 0): [6, 0.75, 0.75],
        (1, 0): [8, 1, 0.25],
        (2, 1): [10, 1, 1],
        (2, 0): [2, 0.25, 0],
        (3, 1): [10, 1, 0],
    }
    columns = words[["count", "fraction", "first_choice_fraction"]]
    assert {at: row.tolist() for at, row in columns.iterrows()} == expected
    first = report(trace, top=1).tables["vocabulary"]
    assert first["token"].tolist() == [" w0", " w0", " w1", " w1"]
    every = report(trace, top=0).tables["vocabulary"]  # rare token ids too
    assert every["count"].sum() == ids.size
    assert set(every["token_id"]) == {0, 1, 2}
    assert every.loc[every["token_id"] == 2, "token"].isna().all()  # not in this vocabulary


# --- beyond a baseline

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
