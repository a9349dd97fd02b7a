"""Sentences against chance: the nulls over documents hold their level, reports on routing by chance
alone claim nothing, and noise floors are what chance gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import moe_inspect
from benchmarks.calibration_of_findings import claims
from benchmarks.coverage_of_intervals import coverage
from moe_inspect.analysis.metrics import chance
from moe_inspect.analysis.metrics import uncertainty as unc
from moe_inspect.public import report
from tests.support.chance import REGIMES, drawn
from tests.support.generated import Kind, written
from tests.support.synthetic import uniform_ids, write_counts
from tests.test_oracles_report import World, design_effect, floors_of, share

E = 8


def test_many_units_are_judged_as_few():
    """More units than signs are drawn for are added up: the null stays as wide."""
    rng = np.random.default_rng(2)
    of_UE = rng.multinomial(20, np.full(E, 1 / E), 3 * chance.MOST_UNITS)
    wide, narrow = (
        chance.evenness_nulls(of, np.zeros(len(of), np.int64))[0].mean()
        for of in (of_UE, of_UE.reshape(3, -1, E).sum(0))
    )
    assert wide == pytest.approx(narrow, rel=0.02)


def test_one_shuffle_has_the_variance_of_independent_tokens():
    """As of long traces. Shuffled within their documents, tokens keep what these have in common."""
    for value, null in ((0.32, 0.3), (0.3, 0.3)):
        error = np.sqrt(2 * null * (1 - null) / 5_000)
        expected = stats.t.sf((value - null) / error, 5_000)
        assert chance.shuffled_p(value, [null], 5_000) == pytest.approx(expected)
    document_T = np.repeat([4, 7, 4], [30, 40, 30])
    order_T = chance.shuffled_within(document_T, np.random.default_rng(0))
    assert sorted(order_T.tolist()) == list(range(100)) != order_T.tolist()
    assert (document_T[order_T] == document_T).all()


@pytest.mark.parametrize("statistic", ["busiest", "ratio"])
def test_intervals_hold_the_truth(statistic: str):
    """95 of 100 in the long run: 86 or fewer have a probability of 0.0003."""
    for regime in ("even, iid", "x2", "x2, heavy-tailed lengths", "x2, 5 documents"):
        held, none = coverage(statistic, regime, 100)
        assert (held >= 0.87, none) == (True, 0), (regime, held)


CHEAP = [
    *("lengths by domain", "500 tokens", "passes of 3", "clustered 8/2", "clustered 64/8"),
    *("6 documents", "two domains of five", "ids by document", "counts, clustered 64/8"),
]


def test_reports_on_chance_hardly_ever_claim_anything(tmp_path: Path):
    """Of 18 reports, 5 % are 0.9; 4 or more have a probability of 0.01."""
    claimed = {
        (name, seed): claims(
            report(drawn(tmp_path / f"{name}{seed}", REGIMES[name], seed)).verdict()
        )
        for name in CHEAP
        for seed in range(2)
    }
    assert sum(map(bool, claimed.values())) < 4, claimed


def test_a_large_table_has_fewer_draws_of_the_same_signs() -> None:
    few, fewer, all_ = (chance.signs_of(40, cells) for cells in (2**14, 2**16, 2**10))
    assert (len(few), len(fewer), len(all_)) == (199, 101, chance.SIGNS)
    assert (few == all_[: len(few)]).all()
    assert 1 / (1 + len(fewer)) < chance.ALPHA  # so many can tell
    nulls = [signs.sum(1) for signs in (few, all_)]  # of routers with other numbers of experts
    p = chance.joint_p([50.0, 0.0], nulls)
    assert p[0] < chance.ALPHA < 0.5 < p[1]


# --- noise floors

FLOORS = {  # of 256, 1,024, 4,096 and 16,384 tokens
    (8, 2): (1.15, 1.08, 1.04, 1.02),
    (64, 8): (1.41, 1.20, 1.10, 1.05),
    (256, 8): (2.13, 1.52, 1.26, 1.13),
}


@pytest.mark.parametrize(("E", "k"), FLOORS)
def test_noise_floor_is_the_published_one(E: int, k: int):
    floors = [1 + unc.noise_floor(256 * 4**n, E, k) for n in range(4)]
    assert floors == pytest.approx(FLOORS[E, k], abs=0.02 + 0.01 * (E == 256))


def test_noise_floors_known_without_drawing():
    assert [unc.noise_floor(100, 8, 8), unc.noise_floor(1, 8, 2)] == [0, 3]
    assert np.isnan(unc.noise_floor(0, 8, 2))
    T = 64 * unc.GAUSSIAN_FROM // 8  # from here on Gaussian
    assert unc.noise_floor(T - 1, 64, 8) == pytest.approx(unc.noise_floor(T, 64, 8), rel=0.05)


@pytest.mark.parametrize(
    ("T", "E", "k", "filled"),
    [(400, 4, 4, 0.5), (900, 8, 8, 0.97), (300, 32, 32, 0.1), (90, 8, 5, 0.6)],
)
def test_empty_slots_make_noise_also_where_every_expert_may_be_chosen(
    T: int, E: int, k: int, filled: float
):
    rng, drawn = np.random.default_rng(1), list[float]()
    for _ in range(1_500):
        load_E = np.bincount(uniform_ids(rng, T, E, k)[rng.random((T, k)) < filled], minlength=E)
        drawn.append(load_E.max() / load_E.mean() - 1)
    floors = unc.noise_floor(T * filled, E, k, filled), unc.noise_of([T * filled], E, k, filled)[0]
    assert floors == pytest.approx((np.mean(drawn),) * 2, rel=0.06)
    assert unc.noise_floor(T, E, k) == pytest.approx(0 if k == E else floors[0], rel=0.6), "control"


def test_the_gaussian_floor_by_hand():
    """Of two experts, one of them chosen by each token: E|2X/T − 1| is √(2/(πT))."""
    assert unc.noise_floor(2_000, 2, 1) == pytest.approx(np.sqrt(2 / (np.pi * 2_000)), rel=0.01)


def test_floors_between_simulated_sizes():
    sizes = np.array([1, 100, 300, 1_500])
    between = unc.noise_of(sizes, 64, 8)[0]
    assert between == pytest.approx([unc.noise_floor(int(T), 64, 8) for T in sizes], rel=0.05)


def test_an_interval_of_nothing_is_unknown():
    assert np.isnan(unc.interval(np.full(3, np.nan))).all()


def test_the_floors_of_two_loads_pool_them(tmp_path: Path) -> None:
    w = World(written(Kind(lengths=(19, 31, 9, 44, 27, 61, 12, 35, 22), empty=0.1)))
    loads = [2 * np.roll(np.arange(40, 48), layer)[None] for layer in range(5)]
    counted = write_counts(tmp_path / "c", loads, 2, ["domain 0"])
    table = moe_inspect.compare(w.root, counted).tables["load_shift"]
    for r in w.routers:
        load_2E, effect = np.stack([r.load, loads[r.layer][0]]), max(1, design_effect(w, r))
        [floor] = floors_of(share(load_2E.sum(0)), load_2E.sum(1) / r.k, r.k, effect)
        found = table.loc[r.index, ["load_shift_floor", "jsd_bits_floor"]]
        assert found.tolist() == pytest.approx(floor)
        shift = np.abs(np.diff(share(load_2E), axis=0)).sum() / 2
        assert table["load_shift"][r.index] == pytest.approx(shift)
