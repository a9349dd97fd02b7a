"""Pairs, repetition, segments, windows, ESFT: by hand, and whole traces routed at random
against the values known for them."""

from __future__ import annotations

import io
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moe_inspect
from moe_inspect.analysis.metrics import pairs, specialization, windows
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.render.page import report_page
from moe_inspect.reporting.render.terminal import print_report
from moe_inspect.reporting.report import report
from moe_inspect.reporting.verdict.data_checks import in_runs
from tests.support.planted import sentences
from tests.support.synthetic import uniform_ids, write_counts, write_trace

SHARED = [(8, 2, 0.4643), (64, 8, 0.6791), (128, 8, 0.4123), (256, 8, 0.2271), (60, 4, 0.2468)]


@pytest.mark.parametrize(("E", "k", "known"), SHARED)
def test_random_choices_share_an_expert_as_often_as_is_known(E: int, k: int, known: float):
    assert pairs.any_choice_random(E, k) == pytest.approx(known, abs=5e-5)


def test_coactivation_by_hand():
    # decisions {0,1} twice, {0,2} once
    together = np.array([[3, 2, 1], [2, 2, 0], [1, 0, 1]])
    expected = [[np.nan, 2 / 3, 1 / 3], [1, np.nan, 0], [1, 0, np.nan]]
    np.testing.assert_allclose(pairs.coactivation(together), expected)
    # given the loads, chance has no other choice than these pairs
    lift = pairs.coactivation_lift(together)
    np.testing.assert_allclose(lift[[0, 1, 0, 2], [1, 0, 2, 0]], 1, rtol=0.02)


def test_chance_keeps_the_loads():
    uneven = np.random.default_rng(0).integers(1, 90, (6, 6))
    uneven = uneven + uneven.T
    np.fill_diagonal(uneven, 0)
    found = pairs.together_by_chance(uneven + np.diag(uneven.sum(1)))
    np.testing.assert_allclose(found.sum(1), uneven.sum(1), rtol=1e-6)


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


def test_transitions_by_hand():
    next_EN = np.array([[3, 1], [0, 4]])
    np.testing.assert_allclose(pairs.transition(next_EN, np.array([4, 4])), [[0.75, 0.25], [0, 1]])
    np.testing.assert_allclose(pairs.transition_lift(next_EN), [[2, 0.4], [0, 1.6]])
    assert pairs.next_accuracy(next_EN) == 7 / 8
    assert pairs.next_accuracy_marginal(next_EN) == 5 / 8
    assert pairs.next_accuracy_null(next_EN * 1000) == pytest.approx(5 / 8, abs=0.02)


def test_segments_by_hand():
    assert pairs.srp(np.array([6, 2])) == 1  # m = 1
    # two windows of 2 tokens, k = 1, 4 experts: one stays (f = 2), the other goes (1, 1)
    expected = max(2 * 4 / (2 * 3 + 4), 2 * 2 / (2 * 1 + 4))
    assert pairs.srp(np.array([5, 2, 1])) == pytest.approx(expected)
    assert np.isnan(pairs.srp(np.array([4, 0, 0])))


def test_random_choices_have_the_values_of_chance(tmp_path: Path):
    rng = np.random.default_rng(1)
    T, E, k = 12_000, 8, 2
    ids = [uniform_ids(rng, T, E, k) for _ in range(2)]
    of = {"document": np.arange(T) // 200, "domain_of_document": ["a", "b"]}
    made = report(write_trace(tmp_path / "t", ids, E, shard_tokens=4_000, **of))
    assert made.tables["coactivation"]["probability"].to_numpy() == pytest.approx(1 / 7, abs=0.02)
    assert len(made.tables["coactivation"]) == 2 * E * (E - 1)
    assert made.tables["transitions"]["probability"].to_numpy() == pytest.approx(k / E, abs=0.03)
    repetition = made.tables["repetition"]
    assert repetition["first_choice"].to_numpy() == pytest.approx(1 / 8, abs=0.02)
    assert repetition["any_choice"].to_numpy() == pytest.approx(0.4643, abs=0.03)
    locality = made.tables["locality"].iloc[0]
    for m in (4, 16, 64):
        assert locality[f"srp_{m}"] == pytest.approx(locality[f"srp_{m}_by_load"], abs=0.01)
    assert locality["next_accuracy"] == pytest.approx(locality["next_accuracy_null"], abs=0.01)
    drift = made.tables["drift"]
    np.testing.assert_allclose(drift["total_variation"], drift["total_variation_floor"], rtol=0.15)
    np.testing.assert_allclose(drift["window_jsd_bits"], drift["window_jsd_floor_bits"], rtol=0.25)
    for name in ("coactivation", "transitions"):
        lift = made.tables[name]
        assert (np.abs(lift["lift"] - 1) < 4 * lift["lift_sd"]).all()
    for name in ("first_choice", "any_choice"):
        of = ("_low", "", "_random", "_high")
        low, value, random, high = (repetition[name + end] for end in of)
        assert ((low < value) & (value < high)).all()
        # independent choices of even load: the interval holds the value of chance, but for one in
        # twenty
        assert ((low < random) & (random < high)).mean() >= 0.5
    repetitions = ["first_choice_repetition", "any_choice_repetition"]
    for name in (*repetitions, "srp_4", "srp_16", "srp_64", "next_accuracy"):
        low, value, high = (locality[name + of] for of in ("_low", "", "_high"))
        assert low < value < high < 1.3 * low


def test_intervals_are_wider_where_documents_differ_and_missing_where_they_are_few(tmp_path: Path):
    """Half of the documents repeat every choice, half none; or every document does both."""
    rng = np.random.default_rng(5)
    T, E, each = 4_000, 8, 100
    fresh = uniform_ids(rng, T, E, 2)
    held = np.repeat(uniform_ids(rng, T // each, E, 2), each, axis=0)
    document = np.arange(T) // each
    halves = np.where((np.arange(T) % each < each // 2)[:, None], held, fresh)
    apart = np.where((document % 2 == 0)[:, None], held, fresh)
    ids = {"apart": apart, "mixed": halves, "few": halves[: 4 * each]}
    value_of, width_of = {}, {}
    for name, chosen in ids.items():
        trace = write_trace(tmp_path / name, [chosen], E, document=document[: len(chosen)])
        row = report(trace).tables["repetition"].iloc[0]
        value_of[name] = row["any_choice"]
        width_of[name] = row["any_choice_high"] - row["any_choice_low"]
    assert value_of["apart"] == pytest.approx(value_of["mixed"], abs=0.02)
    assert width_of["apart"] > 5 * width_of["mixed"]
    assert np.isnan(width_of["few"])


def test_one_pass_counts_what_is_prepared(tmp_path: Path):
    told: list[int] = []
    rng = np.random.default_rng(2)
    trace = write_trace(tmp_path / "t", [uniform_ids(rng, 500, 8, 2)], 8)
    made = report(trace, progress=told.append)
    made.prepare(["coactivation", "drift", "balance"])
    for name in ("coactivation", "drift", "balance", "load"):
        assert made.tables[name].size
    assert sum(told) == 500
    assert made.tables["esft"].size
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
    without = "Experts 64-127 of 256 have no load"
    ranks = f"{without}, in every router: these look like the counts of 3 of 4 ranks"
    assert ranks in said("m", [gone, gone])
    assert f"{without}: these" in said("one layer", [gone, gone], layers=1)
    hurt[0, 64:96] = load[0, 64:96]
    dead = hurt * (np.arange(256) != 70)
    assert "Only experts 64-95 of 256 have any load" in said("a dead one among them", [hurt, dead])
    by_chance = load * (rng.random((2, 1, 256)) > 0.1)
    assert "ranks" not in said("dead by chance", list(by_chance))


def test_warm_up_rows_are_noticed(tmp_path: Path):
    rng = np.random.default_rng(3)
    ids, token_id = uniform_ids(rng, 1_000, 8, 2), rng.integers(1, 99, 1_000)
    plain = sentences(report(write_trace(tmp_path / "a", [ids], 8, token_id=token_id)))
    ids[:64], token_id[:64] = [1, 2], 0
    warmed = write_trace(tmp_path / "b", [ids], 8, token_id=token_id)
    assert not any("warm-up" in s for s in plain)
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


def test_nothing_in_a_corpus_steers_the_terminal(tmp_path: Path):
    ids = uniform_ids(np.random.default_rng(4), 900, 8, 2)
    of = {"document": np.arange(900) // 300, "domain_of_document": ["\x1b[31mred\x07", "b", "c"]}
    trace = write_trace(tmp_path / "t", [ids], 8, **of)
    file = io.StringIO()
    print_report(report(trace), file)
    print_report(report(trace), file, full=True)
    assert "\x1b" not in file.getvalue()
    assert "\x07" not in file.getvalue()
    assert "\\x1b[31mred" in file.getvalue()


def test_packing_by_hand():
    packed = windows.pack(np.array([[4, 3, 2, 1], [1, 2, 3, 9]]), 2)
    assert packed.tolist() == [[0, 1, 1, 0]] * 2
    assert windows.pack(np.array([[5, 4, 3]]), 2).tolist() == [[0, 1, 1]]
    load_WE = np.array([[4, 3, 2, 1], [1, 2, 3, 4]])
    assert windows.balancedness_fresh(load_WE, 2) == 1
    assert windows.simulated_drop_rate(np.array([[8, 0, 0, 0]]), 1.25).tolist() == [5 / 8]


@pytest.mark.parametrize("total", [60, 6_000])
def test_independent_choices_have_the_marginals_drawn_one_by_one_or_not(total: int):
    rng, E, share_N = np.random.default_rng(2), 12, np.array([0.5, 0.25, 0.15, 0.1, 0.0])
    row_E = rng.multinomial(total, np.full(E, 1 / E))
    mean_EN = np.mean([pairs._independent(row_E, share_N, rng) for _ in range(400)], axis=0)
    np.testing.assert_allclose(mean_EN.sum(1), row_E)
    expected_EN = np.outer(row_E, share_N)
    error_EN = np.sqrt(expected_EN * (1 - share_N) / 400)
    assert (np.abs(mean_EN - expected_EN) <= 5 * error_EN).all()


@pytest.mark.parametrize("N", [1, 5, 256, 9_000])
def test_choices_are_those_of_numpy(N: int):
    share_N = np.random.default_rng(3).dirichlet(np.full(N, 0.3))
    drawn, numpys = (np.random.default_rng(4) for _ in range(2))
    for size in (0, 1, 20_000):
        chosen_X = pairs._choices(share_N, size, drawn)
        assert (chosen_X == numpys.choice(N, size, p=share_N)).all()


def test_too_many_experts_are_not_counted_by_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is by pairs is left out, which the page says; the rest is as it was."""
    rng = np.random.default_rng(0)
    ids = [uniform_ids(rng, 300, 8, 2) for _ in range(2)]
    trace = write_trace(tmp_path / "t", ids, 8, document=np.arange(300) // 30, words=1)
    whole = report(trace)
    load, page = whole.tables["load"], report_page(whole)
    monkeypatch.setattr("moe_inspect.analysis.counting.engine.MOST_PAIRS", 2 * 8**2 - 1)
    made = report(trace)
    said = "too many experts to count pairs of them: no coactivation table; select fewer layers"
    assert said in report_page(made)
    assert said not in page
    with pytest.raises(MoeInspectError, match=said):
        made.tables["coactivation"]
    assert made.tables["load"].equals(load)
    assert len(report(trace, layers=0).tables["coactivation"])
    with pytest.raises(MoeInspectError, match="too many experts to count pairs"):
        moe_inspect.compare(trace, trace)


def test_ids_beyond_16_bits(tmp_path: Path) -> None:
    ids = np.array([[40_000, 3], [65_534, 40_001]], np.uint16)
    trace = write_trace(tmp_path / "t", [ids], 65_535)
    assert next(iter(trace.shards)).ids(0).tolist() == ids.tolist()


def test_many_domains_are_compared_by_a_sample_of_their_pairs() -> None:
    load_DE = np.random.default_rng(0).integers(0, 50, (specialization.FEW_DOMAINS + 1, 16))
    share_DE = specialization.share_by_domain(load_DE)
    both_P2E = np.stack([share_DE[side] for side in np.triu_indices(len(load_DE), 1)], 1)
    exact = specialization.mutual_information_bits(both_P2E).mean()
    assert specialization.jsd_bits(load_DE) == pytest.approx(exact, rel=0.01)
