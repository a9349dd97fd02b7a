"""Pairs of experts are ranked by evidence: what chance expects of them and how far from it they
are, against enumeration, scipy's exact tails and random routing."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from moe_inspect.analysis.metrics import pairs
from moe_inspect.analysis.metrics import uncertainty as unc
from moe_inspect.reporting.charts.pairs import coactivation, supported_lift
from moe_inspect.reporting.charts.spec import Chart
from moe_inspect.reporting.render.page import map_data
from moe_inspect.reporting.report import Report, report
from moe_inspect.reporting.tables.pairs import ALPHA, PairEvidence, chosen_together
from tests.support.synthetic import uniform_ids, write_trace


def test_two_experts_of_every_decision_cannot_meet_more_often_than_there_are_decisions():
    rng, T = np.random.default_rng(0), 5_000
    ids = np.c_[np.full((T, 2), [0, 1]), uniform_ids(rng, T, 14, 2) + 2]
    together_EE = np.zeros((16, 16), np.int64)
    np.add.at(together_EE, (ids[:, :, None], ids[:, None, :]), 1)
    expected_EE = pairs.together_by_chance(together_EE)
    assert expected_EE[0, 1] == pytest.approx(T, rel=1e-3)
    assert pairs.coactivation_lift(together_EE)[0, 1] == pytest.approx(1, rel=1e-3)


def test_tails_are_the_binomial_ones_far_out_too():
    most = np.array([50, 50, 50, 400, 400, 10_000, 10_000, 10_000])
    count = np.array([1, 20, 0, 390, 2, 5_000, 900, 10_000])
    expected = np.array([0.03, 12, 4, 200, 60, 100, 1_000, 3_000])
    upper = stats.binom.logsf(count - 1, most, expected / most)
    lower = stats.binom.logcdf(count, most, expected / most)
    known = np.minimum((np.where(count > expected, upper, lower) + np.log(2)) / np.log(10), 0)
    found, told = unc.log10_tail(count, expected, most), np.isfinite(known)
    np.testing.assert_allclose(found[told], known[told], rtol=1e-6, atol=1e-9)
    assert np.isfinite(found).all()
    assert found[5] < -5_000  # which no float holds, and which is still in order
    assert found[7] == pytest.approx(10_000 * np.log10(0.3), rel=1e-3)


def test_tails_of_real_counts_lie_between_those_of_whole_ones():
    tails = unc.log10_tail(np.array([6, 6.5, 7]), np.full(3, 2.0), np.full(3, 100.0))
    assert tails[0] > tails[1] > tails[2]
    assert unc.log10_tail(np.array([1.0]), np.array([1.0]), np.array([1.0])) == 0


def test_the_deviance_orders_as_the_tails_do():
    rng = np.random.default_rng(0)
    most = np.full(200, 500)
    expected, count = np.full(200, 40.0), rng.integers(0, 200, 200)
    tail = unc.log10_tail(count, expected, most) * np.where(count > expected, -1, 1)
    deviance = unc.signed_deviance(count, expected, most)
    assert stats.spearmanr(tail, deviance).statistic > 0.999
    assert (np.sign(deviance) == np.sign(count - expected)).all()


def planted(root: Path, T: int = 4_000, per_document: int = 40) -> Report:
    """Two routers of 64 experts, three random ones per token; a tenth of the tokens choose 7 and 8
    in both, and 60 and 61 are chosen by one token alone."""
    rng = np.random.default_rng(0)
    tenth, ids = rng.random(T) < 0.1, [uniform_ids(rng, T, 60, 3) for _ in range(2)]
    for chosen in ids:
        chosen[tenth] = np.c_[np.full((T, 2), [7, 8]), 10 + rng.integers(0, 50, T)][tenth]
        chosen[17] = [60, 61, 5]
    return report(write_trace(root, ids, 64, document=np.arange(T) // per_document))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return planted(tmp_path_factory.mktemp("planted") / "t")


@pytest.mark.parametrize("name", ["coactivation", "transitions"])
def test_tables_lead_with_evidence_not_with_what_was_seen_once(made: Report, name: str):
    table = made.tables[name]
    of_first = table[table["router"] == 0]
    other = "other" if name == "coactivation" else "next_expert"
    best = of_first.iloc[: 2 if name == "coactivation" else 4]
    assert set(best["expert"]) | set(best[other]) == {7, 8}
    assert best["supported"].all()
    once = of_first[(of_first["expert"] == 60) & (of_first[other] == 61)].iloc[0]
    assert (once["together"], once["probability"]) == (1, 1)
    assert once["lift"] > 100
    assert not once["supported"]
    beyond = of_first["together"] > of_first["expected"]
    assert of_first.loc[beyond, "log10_p"].is_monotonic_increasing
    assert beyond.is_monotonic_decreasing  # fewer than expected comes last
    lift = of_first["together"] / of_first["expected"]
    np.testing.assert_allclose(lift, of_first["lift"], rtol=1e-9)


def test_pictures_and_page_show_what_is_supported(made: Report):
    lift_EE = supported_lift(chosen_together(made, 0))
    assert lift_EE[7, 8] > 3
    assert np.isnan(lift_EE[60, 61])
    drawn = coactivation(made)
    assert isinstance(drawn, Chart)
    strongest = drawn.table
    assert strongest is not None
    assert strongest["supported"].all()
    assert set(strongest.iloc[0][["expert", "other"]]) == {7, 8}
    data, _ = map_data(made)
    assert data is not None
    partners, first = data["partners"], data["first"]
    for e, others in ((7, [8]), (60, [])):
        begin, end = partners["start"][first[0] + e : first[0] + e + 2]
        assert partners["other"][begin:end] == others


def test_random_routing_supports_no_pair(tmp_path: Path):
    """Uneven loads, tokens of a document that repeat each other's choices: nothing of it is
    co-activation."""
    rng, T, E, k = np.random.default_rng(1), 12_000, 8, 4
    weight_E = np.exp(rng.normal(0, 1, E))
    sets = np.array(list(combinations(range(E), k)))
    chance = np.prod(weight_E[sets], axis=1)
    drawn = sets[rng.choice(len(sets), T, p=chance / chance.sum())].astype(np.uint16)
    repeated = np.repeat(drawn[::20], 20, axis=0)
    none = "co-activation: no pair is chosen more often than chance explains"
    for name, ids in (("random", [drawn, rng.permutation(drawn)]), ("repeated", [repeated])):
        made = report(write_trace(tmp_path / name, ids, E, document=np.arange(T) // 20))
        assert len(made.tables["coactivation"]) == len(ids) * E * (E - 1)
        assert not made.tables["coactivation"]["supported"].any(), name
        assert not made.tables["transitions"]["supported"].any(), name
        assert coactivation(made) == none


def test_the_design_effect_is_what_spares_repeated_tokens(tmp_path: Path):
    """Positive control of the test before: the same tables with documents too few to know a design
    effect."""
    rng, T = np.random.default_rng(1), 12_000
    repeated = np.repeat(uniform_ids(rng, T // 20, 8, 4), 20, axis=0)
    known, unknown = (
        report(write_trace(tmp_path / f"{n}", [repeated], 8, document=np.arange(T) // n))
        for n in (20, 4_000)
    )
    assert not known.tables["coactivation"]["supported"].any()
    assert unknown.tables["coactivation"]["supported"].any()
    assert unknown.tables["coactivation"]["lift_sd"].isna().all()


def test_the_number_of_pairs_is_that_of_the_trace(made: Report):
    assert chosen_together(made, 0).tested == 2 * 64 * 63 // 2
    alone = report(made.trace, layers=0)
    pd = made.tables["coactivation"]
    assert alone.tables["coactivation"].equals(pd[pd["router"] == 0])


def test_one_pair_in_so_many_is_chance():
    at = np.array([0]), np.array([0])
    for tested, supported in ((100, True), (130, False)):  # p is 0.000444
        met = PairEvidence(np.array([[9]]), np.array([[2.0]]), np.array([[1_000]]), tested, 1.0)
        found = met.evidence(at)
        p = 10 ** found["log10_p"][0]
        assert p == pytest.approx(2 * stats.binom.sf(8, 1_000, 0.002), rel=1e-6)
        assert bool(found["supported"][0]) == supported == (p * tested <= ALPHA)
    # of tokens that come in documents, three times the counts are worth as much
    met = PairEvidence(np.array([[27]]), np.array([[6.0]]), np.array([[3_000]]), 100, 3.0)
    np.testing.assert_allclose(met.evidence(at)["log10_p"], found["log10_p"], rtol=1e-9)
