"""Balance metrics: by hand, and what must hold for every metric there is."""

from __future__ import annotations

import numpy as np
import pytest

from moe_inspect.analysis.metrics import balance as bal
from moe_inspect.analysis.metrics.registry import metrics_of

METRICS = metrics_of("balance", {"load_LE"})


def one(name: str, load: list[int]) -> float:
    return float(METRICS[name].function(np.array([load]))[0])


def test_by_hand_on_two_routers_of_four_experts():
    load_LE = np.array([[4, 2, 2, 0], [1, 1, 1, 1]])
    assert bal.max_over_mean(load_LE).tolist() == [2, 1]
    assert bal.max_vio(load_LE).tolist() == [1, 0]
    # deviations 2, 0, 0, −2 around a mean of 2
    assert bal.cv(load_LE) == pytest.approx([np.sqrt(2) / 2, 0])
    assert bal.gini(load_LE) == pytest.approx([(-3 * 0 - 2 + 2 + 3 * 4) / (4 * 8), 0])
    # 1/2, 1/4, 1/4
    assert bal.entropy(load_LE) == pytest.approx(
        [(0.5 * np.log(2) + 0.5 * np.log(4)) / np.log(4), 1]
    )
    assert bal.dead_experts(load_LE).tolist() == [1, 0]
    assert bal.starved_experts(np.array([[40, 40, 40, 1], [1, 1, 1, 1]])).tolist() == [1, 0]
    assert bal.starved_experts(np.array([[40, 40, 20, 20]]), 0.7).tolist() == [2]
    assert bal.balancedness(load_LE).tolist() == [0.5, 1]
    # three passes of 8 tokens (max_vio 1, 0 and 0.5), one of 4 (0.9): half as large counts; one of
    # 3 does not
    assert bal.max_vio_batch(
        np.array([1.5, 0.9, 9]), np.array([3, 1, 1]), np.array([8, 4, 3])
    ) == pytest.approx(0.6)
    assert bal.max_vio(np.array([[12, 8, 10]])).tolist() == [0.2]  # exactly, though 1.2 − 1 is not
    assert bal.busiest_expert(load_LE).tolist() == [0, 0]
    assert bal.load_ratio(load_LE)[0].tolist() == [2, 1, 1, 0]


@pytest.mark.parametrize("name", METRICS)
def test_no_load_has_no_value_and_routers_do_not_mix(name: str):
    loads = [0, 0, 0, 0], [1, 2, 3, 4], [0, 0, 9, 3], [5, 5, 5, 5]
    alone = [one(name, load) for load in loads]
    assert np.isnan(alone).tolist() == [True, False, False, False]
    assert METRICS[name].function(np.array(loads)) == pytest.approx(alone, nan_ok=True, rel=1e-12)
