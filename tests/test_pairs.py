"""Pairs of experts: what chance expects of them, against enumeration, and how far from it they are,
against scipy's exact tails; what the page and pictures show of them. And routes that look wrong."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import moe_inspect
from moe_inspect.analysis.metrics import pairs
from moe_inspect.analysis.metrics import uncertainty as unc
from moe_inspect.errors import MoeInspectError
from moe_inspect.public import report
from moe_inspect.reporting.charts.pairs import coactivation, supported_lift
from moe_inspect.reporting.render.page import map_data
from moe_inspect.reporting.report import Report
from moe_inspect.reporting.tables.pairs import chosen_together, supported_pairs
from moe_inspect.reporting.verdict.data_checks import in_runs
from tests.support.planted import sentences
from tests.support.synthetic import uniform_ids, write_counts, write_trace


@pytest.mark.parametrize(("E", "k"), [(6, 2), (9, 3), (14, 10)])
@pytest.mark.parametrize("spread", [0.0, 0.3, 2.5])
@pytest.mark.parametrize("heaviest", [1.0, 3_000.0])
def test_chance_is_exact_also_where_experts_are_in_nearly_all_decisions(
    E: int, k: int, spread: float, heaviest: float
):
    """All sets of k experts, the probability of each the product of weights."""
    weight_E = np.exp(np.random.default_rng(2).normal(0, spread, E))
    weight_E[:2] *= heaviest, heaviest / 2
    member_SE = np.array([np.isin(np.arange(E), s) for s in combinations(range(E), k)])
    share_S = np.where(member_SE, weight_E, 1).prod(1)
    together_EE = 1e6 * (member_SE.T * share_S / share_S.sum()) @ member_SE
    expected_EE = pairs.together_by_chance(together_EE)
    apart_EE = together_EE - np.diag(np.diagonal(together_EE))
    rtol = 1e-8 if heaviest == 1 else 2e-3
    np.testing.assert_allclose(expected_EE, apart_EE, rtol=rtol)
    assert (expected_EE == expected_EE.T).all()


def test_one_pass_counts_what_is_prepared(tmp_path: Path):
    told: list[int] = []
    rng = np.random.default_rng(2)
    trace = write_trace(tmp_path / "t", [uniform_ids(rng, 500, 8, 2)], 8)
    made = report(trace, progress=told.append)
    made.prepare(["coactivation", "drift", "balance"])
    for name in ("coactivation", "drift", "balance", "load"):
        assert made.tables[name].size
    assert sum(told) == 500
    assert made.tables["repetition"].size
    assert sum(told) == 1_000


def test_ranks_that_are_missing(tmp_path: Path):
    def said(name: str, loads: list[np.ndarray], k: int = 8, **asked: Any) -> str:
        return " ".join(sentences(report(write_counts(tmp_path / name, loads, k), **asked))[:2])

    rng = np.random.default_rng(0)
    load = rng.integers(50_000, 99_000, (1, 256)) * 8
    one, gone, hurt, same = (np.zeros((1, 256), np.int64) for _ in range(4))
    one[0, :8], same[0, :8] = load[0, :8], 800
    only = said("as many as are chosen", [one, one])
    assert "Only experts 0-7 of 256 have any load, in every router" in only
    assert "ranks" not in said("one choice", [same, same])
    gone[0] = load[0] * (np.arange(256) // 64 != 1)
    one_layer = said("one layer", [gone, gone], layers=1)
    assert "Experts 64-127 of 256 have no load: these" in one_layer
    hurt[0, 64:96] = load[0, 64:96]
    dead = hurt * (np.arange(256) != 70)
    assert "Only experts 64-95 of 256 have any load" in said("a dead one among them", [hurt, dead])
    by_chance = load * (rng.random((2, 1, 256)) > 0.1)
    assert "ranks" not in said("dead by chance", list(by_chance))


def test_warm_up_rows_are_noticed(tmp_path: Path):
    rng = np.random.default_rng(3)
    ids, token_id = uniform_ids(rng, 1_000, 8, 2), rng.integers(1, 99, 1_000)
    ids[:64], token_id[:64] = [1, 2], 0
    warmed = write_trace(tmp_path / "b", [ids], 8, token_id=token_id)
    said = "64 of the first 1,000 tokens are in runs of 16 or more identical rows"
    for limit, is_said in ((0.01, True), (0.064, True), (0.0641, False)):
        found = sentences(report(warmed, thresholds={"repeated": limit}))
        assert any(s.startswith(said) for s in found) == is_said
    assert in_runs(np.zeros((15, 2), int)) == 0
    assert in_runs(np.repeat([[1], [2], [3]], [16, 15, 17], 0)) == 33
    of = {"document": np.arange(1_000) // 100, "domain_of_document": ["a", *"bbbbbbbbb"]}
    trace = write_trace(tmp_path / "c", [ids], 8, token_id=token_id, **of)
    for domain, warm in (("a", True), ("b", False)):
        said = sentences(report(trace, domains=domain))
        assert any("identical rows" in sentence for sentence in said) == warm


def test_too_many_experts_are_not_counted_by_pairs(tmp_path: Path) -> None:
    """Of ids beyond 16 bits too. The page says what is left out."""
    ids = np.array([[40_000, 3], [65_534, 40_001]], np.uint16)
    trace = write_trace(tmp_path / "t", [ids], 65_535)
    assert next(iter(trace.shards)).ids(0).tolist() == ids.tolist()
    made, said = report(trace), "too many experts to count pairs of them: no coactivation table"
    with pytest.raises(MoeInspectError, match=said):
        made.tables["coactivation"]
    assert set(np.flatnonzero(made.tables["load"]["assignments"])) == set(ids.ravel())
    made.prepare(["coactivation", "load"])
    assert said in "\n".join(made.charts()[1])
    with pytest.raises(MoeInspectError, match="too many experts to count pairs"):
        moe_inspect.compare(trace, trace)


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


def test_the_deviance_orders_as_the_tails_do():
    rng = np.random.default_rng(0)
    most = np.full(200, 500)
    expected, count = np.full(200, 40.0), rng.integers(0, 200, 200)
    tail = unc.log10_tail(count, expected, most) * np.where(count > expected, -1, 1)
    deviance = unc.signed_deviance(count, expected, most)
    assert stats.spearmanr(tail, deviance).statistic > 0.999
    assert (np.sign(deviance) == np.sign(count - expected)).all()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Two routers of 64 experts, three random ones per token; a tenth of the tokens choose 7 and 8
    in both, and 60 and 61 are chosen by one token alone."""
    rng, T = np.random.default_rng(0), 4_000
    tenth, ids = rng.random(T) < 0.1, [uniform_ids(rng, T, 60, 3) for _ in range(2)]
    for chosen in ids:
        chosen[tenth] = np.c_[np.full((T, 2), [7, 8]), 10 + rng.integers(0, 50, T)][tenth]
        chosen[17] = [60, 61, 5]
    root = tmp_path_factory.mktemp("planted") / "t"
    return report(write_trace(root, ids, 64, document=np.arange(T) // 40))


@pytest.mark.parametrize("name", ["coactivation", "transitions"])
def test_supported_pairs_are_those_of_the_whole_table(made: Report, name: str):
    (rows, listed), table = supported_pairs(made, name), made.tables.complete(name)
    expected = table[table["supported"]]
    assert 0 < len(expected) < len(table) == listed
    pd.testing.assert_frame_equal(rows.reset_index(drop=True), expected.reset_index(drop=True))


def test_pictures_and_page_show_what_is_supported(made: Report):
    lift_EE = supported_lift(chosen_together(made, 0))
    assert lift_EE[7, 8] > 3
    assert np.isnan(lift_EE[60, 61])
    strongest = coactivation(made).table
    assert strongest["supported"].all()
    assert set(strongest.iloc[0][["expert", "other"]]) == {7, 8}
    data, _ = map_data(made)
    partners, first = data["partners"], data["first"]
    for e, others in ((7, [8]), (60, [])):
        begin, end = partners["start"][first[0] + e : first[0] + e + 2]
        assert partners["other"][begin:end] == others
