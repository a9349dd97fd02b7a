"""Noise floors and intervals say what chance would show: checked by making chance."""

from __future__ import annotations

import time

import numpy as np
import pytest

from moe_inspect.analysis.metrics import uncertainty as unc
from tests.support.synthetic import uniform_ids

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
    ("T", "E", "k"), [(1, 4, 1), (1, 8, 2), (20, 16, 4), (300, 8, 7), (200, 4, 1)]
)
def test_noise_floor_is_what_drawing_gives(T: int, E: int, k: int):
    rng, floor = np.random.default_rng(1), unc.noise_floor(T, E, k)
    busiest = [np.bincount(uniform_ids(rng, T, E, k).ravel()).max() for _ in range(1_500)]
    drawn = np.mean(busiest) * E / (k * T) - 1
    assert floor == pytest.approx(drawn, rel=0.06)
    assert floor != pytest.approx(drawn * 1.2, rel=0.06)  # positive control


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


def test_floors_are_quick():
    unc.noise.cache_clear()
    began = time.process_time()
    for T in (1_000, 30_000, 1_000_000):
        unc.noise_floor(T, 256, 8)
    assert time.process_time() - began < 1.0


@pytest.mark.parametrize("style", [0.0, 0.7])
def test_interval_covers_the_truth(style: float):
    """Where one expert is the busiest and where all are alike: of 60 traces at most a few intervals
    may miss the truth, with documents that differ as with ones that do not."""
    rng, strata_U, truth = np.random.default_rng(3), np.repeat([0, 1], 30), 65 * 8 / 240 - 1
    missed = missed_even = 0
    for _ in range(60):
        # 100 tokens of each of 60 documents, which have preferences of their own (`style` 0: none)
        logits_UTE = rng.normal(0, style, (60, 1, 8)) + rng.gumbel(size=(60, 100, 8))
        chosen_UTK = np.argsort(-logits_UTE, axis=2)[:, :, :2]
        assignments_UE = (chosen_UTK[..., None] == np.arange(8)).sum((1, 2))
        # 40 more of expert 0 in each document
        low, high = unc.max_vio_interval(assignments_UE + 40 * np.eye(8, dtype=int)[0], strata_U)
        missed += not low <= truth <= high
        low, high = unc.max_vio_interval(assignments_UE, strata_U)
        assert low < assignments_UE.sum(0).max() / assignments_UE.sum() * 8 - 1 < high
        missed_even += low > 0
    assert max(missed, missed_even) <= 8


def test_the_design_effect_by_hand():
    """Of 50 tokens 30 go to expert 0: 24 is the variance of independent ones, over both experts.
    Documents of 10 are off by −1 but for one, by 4: 40 in squares, times 5/4."""
    assignments_UE = np.array([[5, 5]] * 4 + [[10, 0]])
    tokens_U = np.full(5, 10)
    alone = unc.design_effect(assignments_UE, tokens_U, np.zeros(5, np.int64))
    assert alone == pytest.approx(40 * 5 / 4 / 24)
    # a second domain alike has documents enough to vary by itself
    both = np.r_[assignments_UE, assignments_UE], np.r_[tokens_U, tokens_U]
    assert unc.design_effect(*both, np.repeat([0, 1], 5)) == pytest.approx(2 * 40 * 5 / 4 / 48)
    assert unc.design_effect(*both, np.repeat([0, 1], [4, 6])) == pytest.approx(80 * 10 / 9 / 48)


def test_the_interval_of_a_ratio_covers_the_truth_where_documents_differ():
    """Documents whose tokens repeat their expert at a rate of their own, 0.3 on average."""
    rng = np.random.default_rng(6)
    weights_RU = unc.resample_weights(np.zeros(50, np.int64))
    missed = naive = 0
    for _ in range(200):
        of_U = rng.integers(50, 150, 50)
        hits_U = rng.binomial(of_U, rng.beta(3, 7, 50))
        low, high = unc.ratio_interval(hits_U, of_U, weights_RU)
        missed += not low <= 0.3 <= high
        # as if tokens were independent
        share, tokens = hits_U.sum() / of_U.sum(), of_U.sum()
        naive += abs(share - 0.3) > 1.96 * np.sqrt(share * (1 - share) / tokens)
    assert missed <= 20
    assert naive > 60


def test_too_few_documents_have_no_interval():
    weights_RU = unc.resample_weights(np.zeros(5, np.int64))
    assert unc.resample_weights(np.zeros(4, np.int64)) is None
    few_UE, one_domain_U = np.ones((4, 8), np.int64), np.zeros(4, np.int64)
    for found in (
        unc.ratio_interval(np.ones(4), np.ones(4), None),
        unc.ratio_interval(np.zeros(5), np.zeros(5), weights_RU),
        unc.interval(np.full(3, np.nan)),
        unc.max_vio_interval(few_UE, one_domain_U),
        unc.design_effect(few_UE, np.ones(4), one_domain_U),
    ):
        assert np.isnan(found).all()


def test_resampling_keeps_the_variance_of_a_mean():
    values_U = np.random.default_rng(5).normal(size=8)
    weights_RU = unc.resample_weights(np.zeros(8, np.int64), R=40_000)
    assert (weights_RU @ values_U / 8).var() == pytest.approx(values_U.var(ddof=1) / 8, rel=0.05)


def test_an_interval_leaves_out_a_fortieth_at_each_end():
    assert unc.interval(np.r_[np.arange(41.0), np.nan]).tolist() == [1, 39]
