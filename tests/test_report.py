"""The report: its tables' columns, and what it says in words."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import moe_inspect
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.report import TABLES, Report, report
from moe_inspect.reporting.tables.registry import Table
from moe_inspect.trace.reader import Trace
from tests.planted import DOCUMENT, E, K, T, planted, sentences, uniform
from tests.synthetic import uniform_ids, write_counts, write_trace

COLUMNS = {
    "summary": "key value",
    "balance": "layer router experts top_k tokens assignments "
    "max_over_mean max_vio min_over_max cv "
    "gini entropy dead_experts busiest_expert "
    "expected_by_chance max_over_mean_low max_over_mean_high max_vio_batch noise_floor_batch",
    "load": "layer router expert assignments share load_ratio first_choice weight_sum",
    "domains": "layer router domain expert tokens assignments activation lift",
    "specialization": "layer router domain_mi_bits domain_mi_null_bits domain_mi_null_p99_bits "
    "domain_mi_given_token_bits "
    "domain_mi_given_token_null_bits domain_mi_given_token_p token_mi_bits token_mi_null_bits "
    "jsd_bits jsd_null_bits "
    "vocabulary_specialization",
    "vocabulary": "layer router expert token_id token count fraction",
    "coactivation": "layer router expert other probability lift",
    "transitions": "layer router next_layer expert next_expert probability lift",
    "repetition": (
        "layer router domain first_choice first_choice_random any_choice any_choice_random"
    ),
    "windows": "layer router window first_token tokens max_over_mean busiest_expert",
    "committee": "layer router domains top_k committee_experts committee_mass experts",
    "signature": "layer router domains documents signature_accuracy signature_null",
    "paths": "layer router tokens most_bits paths path_entropy_bits path_entropy_shuffled_bits",
    "loss": (
        "layer router expert domain phase assignments mean_loss_nats mean_entropy_nats compared "
        "difference_nats difference_low difference_high difference_null_p99 difference_p"
    ),
    "verdict": "severity kind layer router text",
}


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return planted(tmp_path_factory.mktemp("planted") / "t")


@pytest.fixture(scope="module")
def made(trace: Trace) -> Report:
    return report(trace)


# --- tables


def test_every_table_has_its_columns(made: Report):
    assert set(COLUMNS) <= set(TABLES)
    for name in TABLES:
        columns = list(made.tables[name].columns)
        assert set(COLUMNS.get(name, "").split()) <= set(columns)
        assert name in ("summary", "verdict") or columns[:2] == ["layer", "router"]


def test_tables_are_made_when_asked_for(trace: Trace, monkeypatch: pytest.MonkeyPatch):
    fresh = report(trace)
    unasked = Table(lambda _: pytest.fail("not asked for"), frozenset(), ())
    monkeypatch.setitem(TABLES, "specialization", unasked)
    assert len(fresh.tables["balance"]) == 4
    assert fresh.tables["balance"] is fresh.tables["balance"]
    assert list(fresh.tables) == list(TABLES)
    assert "balance" in fresh.tables
    assert "gini" not in fresh.tables
    with pytest.raises(MoeInspectError, match="no table 'gini': there are summary, balance"):
        fresh.tables["gini"]


def test_the_package_is_the_function(trace: Trace):
    assert moe_inspect.report(trace, layers="2").tables["load"]["layer"].unique().tolist() == [2]  # type: ignore[operator]
    assert moe_inspect.report(str(trace.path)).trace.n_tokens == T  # type: ignore[operator]


def test_tables_agree_with_each_other(made: Report):
    balance, load, domains = (made.tables[n] for n in ("balance", "load", "domains"))
    assert (
        load.groupby("router")["assignments"].sum().tolist()
        == balance["assignments"].tolist()
        == [T * K] * 4
    )
    assert load.groupby("router")["share"].sum().tolist() == pytest.approx([1] * 4)
    assert load.groupby("router")["load_ratio"].max().tolist() == pytest.approx(
        balance["max_over_mean"].tolist()
    )
    # the weights of a token sum to 1
    assert load["weight_sum"].sum() == pytest.approx(T * 4, rel=1e-3)
    assert (
        domains.groupby(["router", "expert"])["assignments"].sum().to_numpy()
        == load["assignments"].to_numpy()
    ).all()
    assert domains.groupby(["router", "domain"])["activation"].sum().tolist() == pytest.approx(
        [K] * 16
    )
    facts = dict(made.facts())
    assert facts["assignments"] == str(T * K * 4)
    assert facts["decisions"] == str(T * 4)
    assert facts["documents"] == "60"
    assert facts["tokens_in_law"] == "1500"
    assert facts["worst_layer"] == "3"
    assert facts["dead_experts"] == "1"


# --- the verdict


def test_what_is_planted_is_said(made: Report):
    said = sentences(made)
    worst = made.tables["balance"].iloc[3]["max_over_mean"]
    assert said[0].startswith(
        f"Layer 3 is the worst balanced: expert 5 gets {worst:.2f}x the mean load (95% interval"
    )
    assert re.search(
        r"; [1-4] of 4 routers (is|are) uneven \(at least 1.2x and beyond chance\)\.$", said[0]
    )
    row = made.tables["balance"].iloc[3]
    assert f"expected by chance: {row['expected_by_chance']:.2f}x" in said[0]
    assert (
        "1 dead expert in 1 of 4 routers (layer 3: 6): none of 6,000 tokens was routed there."
        in said
    )
    together = "\n".join(said)
    assert "veraged" not in together  # 1.3x is not fine either
    assert '"code" overloads expert 3 of layer 2' in together
    assert "most in layer 2 (" in together
    bits = made.tables["specialization"].iloc[2]
    given, null = bits["domain_mi_given_token_bits"], bits["domain_mi_given_token_null_bits"]
    assert (
        f"the domain still carries {given:.3f} bits about the expert in layer 2 (documents "
        f"by chance give {null:.3f})"
    ) in together
    assert "expert 3 takes 8" in together
    assert "The token id determines the expert most in layer 1: 100% of first choices" in together
    assert "Judged on 6,000 tokens of 60 documents in 4 domains, 4 routers." in together


def test_nothing_wrong_is_said_plainly(tmp_path: Path):
    said = sentences(uniform(tmp_path / "t"))
    assert said[0].startswith("Balance is good")
    assert "which chance explains" in said[0]
    assert any(s.startswith("No expert specialises by domain") for s in said)
    assert any(s.startswith("The token id does not determine the expert") for s in said)
    assert not any(word in " ".join(said) for word in ("dead", "overloads", "uneven", "hides"))


@pytest.mark.parametrize("seed", range(5))
def test_chance_is_never_called_a_fault(tmp_path: Path, seed: int):
    said = sentences(uniform(tmp_path / "t", T=600, E=16, K=2, L=12, seed=seed))
    assert not any(
        word in " ".join(said)
        for word in ("worst balanced", "overloads", "uneven", "specialises by domain in")
    )


def test_too_few_tokens_are_too_few(tmp_path: Path):
    said = sentences(uniform(tmp_path / "t", T=40, E=64, K=2))
    assert said[0].startswith("Too little data to judge balance")
    assert "too few to call an expert dead" in said[1]


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


def test_counts_only_has_a_verdict(tmp_path: Path):
    load = np.full((1, 8), 100)
    load[0, 3] = 900
    said = sentences(report(write_counts(tmp_path / "t", [load, np.full((1, 8), 200)], 2)))
    assert said[0].startswith("Layer 0 is the worst balanced: expert 3 gets 4.50x")
    assert "no interval from counts alone" in said[0]
    two = sentences(
        report(
            write_counts(
                tmp_path / "two", [np.vstack([load, load[:, ::-1]])], 2, domains=("law", "math")
            )
        )
    )
    assert any(
        s.startswith("Counts alone cannot tell whether experts specialise by domain") for s in two
    )


def styled(root: Path, documents: int, domains: list[str]) -> Report:
    """Every document has one favourite expert of its own, whatever its domain."""
    rng = np.random.default_rng(4)
    document = np.arange(documents * 100) // 100
    ids = uniform_ids(rng, len(document), E, K)
    first = (document * 3 + 1) % E
    ids = np.where(
        rng.random(len(document))[:, None] < 0.7, np.stack([first, (first + 1) % E], axis=1), ids
    ).astype(np.uint16)
    return report(write_trace(root, [ids], E, document=document, domain_of_document=domains))


@pytest.mark.parametrize(
    ("documents", "domains"), [(4, "abcd"), (5, "abcda"), (8, "abcdefab"), (4, "aabb")]
)
def test_too_few_documents_say_neither_yes_nor_no(tmp_path: Path, documents: int, domains: str):
    said = sentences(styled(tmp_path / "t", documents, list(domains)))
    assert any(
        s.startswith(
            f"Too few documents to tell whether experts specialise by domain: {documents} documents"
        )
        for s in said
    )
    assert not any(
        word in " ".join(said)
        for word in (
            "No expert",
            "Experts specialise",
            "overloads",
            "uneven",
            "is the worst",
            "is good",
        )
    )


def test_few_documents_are_not_blamed_on_the_model(tmp_path: Path):
    said = sentences(styled(tmp_path / "few", 3, ["a"]))
    assert said[0].startswith("Too little data to judge balance")
    assert "with fewer than 8 documents this may be the text, not the model" in said[0]
    ids = np.tile([[1, 2]], (4_000, 1)).astype(np.uint16)
    one, many = (
        sentences(
            report(write_trace(tmp_path / str(n), [ids], E, document=np.arange(4_000) * n // 4_000))
        )
        for n in (1, 40)
    )
    assert one[0].startswith("2,000 of the first 2,000 tokens are in runs")
    assert one[1].startswith("Too little data to judge balance")
    assert "this may be the text, not the model" in one[2]
    assert many[0].startswith(
        "Layer 0 is uneven (at least 1.2x and beyond chance): expert 1 gets 4.00x"
    )
    assert many[1].endswith("none of 4,000 tokens was routed there.")


def test_a_domain_of_few_documents_overloads_nothing(tmp_path: Path):
    rng = np.random.default_rng(5)
    ids, document = uniform_ids(rng, T, E, K), DOCUMENT
    for few, says in (
        ([7], "this may be their text, not the domain"),
        ([1, 7, 20, 33, 41, 50], '"law" overloads expert 3 of layer 0'),
    ):
        labels = ["law" if d in few else "prose" for d in range(60)]
        routed = np.where(np.isin(document, few)[:, None], [[3, 5]], ids).astype(np.uint16)
        said = "\n".join(
            sentences(
                report(
                    write_trace(
                        tmp_path / str(len(few)),
                        [routed],
                        E,
                        document=document,
                        domain_of_document=labels,
                    )
                )
            )
        )
        assert says in said
        assert ("overloads" in said) == (len(few) >= 5)


def test_what_pooling_hides_is_said_of_the_layers_looked_at(tmp_path: Path):
    rng = np.random.default_rng(6)
    ids = [uniform_ids(rng, T, E, K) for _ in range(3)]
    for r in (0, 1):  # each the other's complement
        ids[r] = np.where(
            rng.random(T)[:, None] < 0.4,
            np.argsort(rng.random((T, 4)), axis=1)[:, :2] + 4 * r,
            ids[r],
        ).astype(np.uint16)
    trace = write_trace(tmp_path / "t", ids, E, document=DOCUMENT)
    assert any(s.startswith("The layer average") for s in sentences(report(trace)))
    assert any(
        s.startswith("The average of the 2 layers selected")
        for s in sentences(report(trace, layers="0-1"))
    )
    # there it shows
    assert not any(s.startswith("Averaged") for s in sentences(report(trace, layers="0,2")))


def test_the_least_used_expert_is_named_with_the_domain_that_shuns_it(tmp_path: Path):
    load = np.full((2, 8), 40_000)
    load[:, 3] = 10_000, 2_000
    load[1, 5] = 78_000
    said = sentences(
        report(
            write_counts(
                tmp_path / "t", [np.full((2, 8), 40_000), load], 2, domains=("law", "math")
            )
        )
    )
    # the mean over both domains is (640 - 68 + 38) / 8 thousand, expert 5 has 118 of it
    least = (
        "Expert 3 of layer 1 is the least used: 0.16x the mean load. That layer's busiest expert "
        'gets 9.8 times as much (39.0 times on "math").'
    )
    assert least in said
    load[:, 3] = 38_000
    none = sentences(
        report(
            write_counts(
                tmp_path / "n", [np.full((2, 8), 40_000), load], 2, domains=("law", "math")
            )
        )
    )
    assert not any("least used" in s for s in none)
