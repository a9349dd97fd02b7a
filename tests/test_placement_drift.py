"""Placements judged on what they were not fitted to, and the best that dispatch among replicas
could do."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from moe_inspect.simulate.placement import forecast
from moe_inspect.simulate.placement.forecast import busiest, descend_windows, drawn, kriging
from moe_inspect.simulate.placement.placement import POLICIES
from moe_inspect.simulate.placement.policies import Layout, colocated, shares
from moe_inspect.simulate.placement.tables import least_busiest
from tests.support.drift import CASES, drifting, mean_over_windows

GPUS, SLOTS, EXPERTS = 8, 72, 64


@pytest.mark.parametrize("case", ["bursts", "slow drift", "heavy drift"])
def test_local_search_lasts_longer_than_eplb(case: str) -> None:
    held_out, layout = [], Layout(SLOTS, GPUS)
    for layer in range(12):
        load_WE = drifting(layer, EXPERTS, 32, *CASES[case])
        fit_WE, judged_WE = load_WE[:16], load_WE[16:]
        plans = [POLICIES[name](fit_WE, layout) for name in ("local-search", "eplb-global")]
        held_out.append([mean_over_windows(plan, judged_WE, GPUS) for plan in plans])
        ours, eplb = (mean_over_windows(plan, fit_WE.sum(0)[None], GPUS) for plan in plans)
        assert ours <= eplb * (1 + 1e-9)
        assert colocated(plans[0], GPUS) == 0
        assert set(plans[0].tolist()) == set(range(EXPERTS))
    ours_L, eplb_L = np.array(held_out).T
    assert ours_L.mean() < eplb_L.mean()
    assert (ours_L < eplb_L).mean() >= 0.6


@pytest.mark.parametrize("windows", [1, 2, 3, 4, 5, 16, 700])
def test_any_number_of_windows_gives_a_placement(windows: int) -> None:
    load_WE = drifting(1, 16, windows, 0.5, 0.5, 64)
    load_WE[windows // 2] = 0  # as of a stack that saw nothing
    load_WE[:, 3] = 0  # a dead expert
    for slots, gpus in ((16, 4), (20, 4), (16, 1), (64, 2)):
        plan = POLICIES["local-search"](load_WE, Layout(slots, gpus))
        assert set(plan.tolist()) == set(range(16))
        assert colocated(plan, gpus) == 0 or slots // gpus >= 16


def test_settling_lowers_the_busiest_gpu_and_keeps_the_limit() -> None:
    rng = np.random.default_rng(0)
    load_EM = rng.lognormal(size=(24, 40))
    expert_P = POLICIES["local-search"](load_EM.sum(1), Layout(28, 7))
    slots_GS, replicas_E = expert_P.reshape(7, 4).copy(), np.bincount(expert_P)
    assert colocated(expert_P, 7) == 0
    limit = 1.02 * (load_EM.sum(1) @ shares(expert_P, 24, 7)).max()
    before = busiest(slots_GS, load_EM)
    each = load_EM / replicas_E[:, None], load_EM.sum(1) / replicas_E
    descend_windows(slots_GS, *each, limit)
    after = busiest(slots_GS, load_EM)
    assert after < 0.99 * before
    assert after == pytest.approx((load_EM.T @ shares(slots_GS.ravel(), 24, 7)).max(1).mean())
    assert (np.bincount(slots_GS.ravel()) == replicas_E).all()
    assert colocated(slots_GS.ravel(), 7) == 0
    assert (load_EM.sum(1) @ shares(slots_GS.ravel(), 24, 7)).max() <= limit * (1 + 1e-12)
    again = slots_GS.copy()
    descend_windows(again, *each, 0.0)  # no exchange keeps such a limit
    assert (again == slots_GS).all()


def test_the_forecast_is_the_mean_without_memory_and_the_last_window_with_much() -> None:
    weight_HW, variance_H = kriging(5, 3, 0.0, 2.0, 0.0)
    assert weight_HW == pytest.approx(np.full((3, 5), 0.2), abs=1e-6)
    assert variance_H == pytest.approx(2 * (1 + 1 / 5), abs=1e-6)
    weight_HW, variance_H = kriging(5, 3, 0.99, 0.0, 1.0)
    assert weight_HW.sum(1) == pytest.approx(np.ones(3))
    assert weight_HW[0, -1] > 0.97
    assert (np.diff(variance_H) > 0).all()


def test_the_variogram_finds_how_fast_loads_move() -> None:
    rng, rho, rows = np.random.default_rng(0), 0.8, [np.zeros(400)]
    for _ in range(300):
        rows.append(rho * rows[-1] + np.sqrt(1 - rho**2) * rng.normal(size=400))
    moving = np.array(rows[100:])
    noisy = moving + 0.5 * rng.normal(size=moving.shape)
    found, nugget, sill = forecast.variogram(noisy, np.full(400, 1 / 400))
    assert found == rho
    assert (nugget, sill) == (pytest.approx(0.25, rel=0.1), pytest.approx(1, rel=0.1))


def test_windows_drawn_are_like_windows_seen() -> None:
    seen_WE = np.random.default_rng(0).multinomial(5_000, np.arange(1, 21) / 210, size=32)
    drawn_ME = drawn(seen_WE, 2_000)
    mean_E = seen_WE.sum(0) / seen_WE.sum()
    assert drawn_ME.sum(1) == pytest.approx(np.ones(2_000))
    assert drawn_ME.mean(0) == pytest.approx(mean_E, rel=0.05)
    assert drawn_ME.std(0) == pytest.approx(np.sqrt(mean_E / 5_000), rel=0.35)
    chance = np.corrcoef(drawn_ME.T)[np.triu_indices(20, 1)]
    # by chance two of 20 experts correlate by up to 0.6 in 32 windows
    assert np.abs(chance).max() < 0.25
    pair_WE = np.full((32, 20), 300)
    pair_WE[::2, :2], pair_WE[1::2, :2] = 100, 900  # two experts whose bursts coincide
    assert np.corrcoef(np.log(drawn(pair_WE, 2_000)).T)[0, 1] > 0.8


def test_many_windows_are_merged() -> None:
    load_WE = np.arange(2 * (forecast.MOST + 1)).reshape(-1, 2)
    merged_WE = forecast.merged(load_WE)
    assert len(merged_WE) == forecast.MOST // 2 + 1
    assert (merged_WE.sum(0) == load_WE.sum(0)).all()
    assert (forecast.merged(load_WE[:-1]) == load_WE[:-1]).all()


def test_a_linear_program_shares_replicas_as_well_as_can_be() -> None:
    """Experts 0 on GPUs 0 and 1, 1 on GPU 0, 2 on GPU 1: all of expert 0 goes to GPU 1 where that
    balances them."""
    load_WE = np.array([[30, 40, 10], [10, 90, 0], [0, 0, 0]])
    least_W = least_busiest(load_WE, shares(np.array([0, 1, 0, 2]), 3, 2))
    assert least_W.tolist() == pytest.approx([40, 90, 0])


def test_no_subset_of_the_gpus_allows_less_than_the_linear_program() -> None:
    """By duality the least is the largest, over subsets of the GPUs, of the mean load of the
    experts that are nowhere else."""
    rng = np.random.default_rng(3)
    for _ in range(10):
        load_WE = rng.integers(0, 100, (3, 9))
        share_EG = shares(POLICIES["eplb-global"](load_WE, Layout(15, 5)), 9, 5)
        at_least_W = np.zeros(3)
        for size in range(1, 6):
            for gpus in combinations(range(5), size):
                within_E = share_EG[:, list(gpus)].sum(1) > 1 - 1e-9
                at_least_W = np.maximum(at_least_W, load_WE[:, within_E].sum(1) / size)
        found_W = least_busiest(load_WE, share_EG)
        assert found_W == pytest.approx(at_least_W)
        assert (found_W <= (load_WE @ share_EG).max(1) + 1e-9).all()
