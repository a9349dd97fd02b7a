"""What must hold of every metric there is: even routing gives the value it says, numbering experts
anew changes nothing, and it explains itself. Arguments are made by their names, whose last letters
are their axes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_inspect.analysis.metrics.registry import (
    METRICS,
    Metric,
    listing,
    metric,
    metrics,
    metrics_of,
)

metrics()
E, K, T = 12, 3, 8_800  # so that even counts are whole numbers
SIZES = dict(zip("LDENSVWUMXP2", (2, 3, E, E, 5, 6, 4, 7, 17, 4, 9, 2), strict=True))
DECISIONS = 100
EVEN: dict[str, object] = {
    "together_EE": np.where(np.eye(E, dtype=bool), T * K // E, T * K * (K - 1) // (E * (E - 1))),
    "next_EN": np.full((E, E), T * K * K // E**2),
    "load_E": np.full(E, T * K // E),
    "assignments_DE": np.full((3, E), T * K // E),
    "weight_sum_DE": np.full((3, E), T / E),
    "weight_mass_sum": DECISIONS * K / E,
    "tokens_D": np.full(3, T),
    "first_same_D": np.full(3, 11),
    "any_same_D": np.full(3, 11 * E * (1 - math.comb(E - K, K) / math.comb(E, K))),
    "pairs_D": np.full(3, 11 * E),
    "windows_M": np.eye(1, 17, 16 * K // E, dtype=int)[0] * E,
    "any_VE": np.full((6, E), 10),
    "first_choice_VE": np.full((6, E), 10),
    "occurrences_V": np.full(6, 10 * E // K),
    "z_sum": DECISIONS * math.log(E) ** 2,
    "entropy_sum": DECISIONS * math.log(E),
    "topk_mass_sum": DECISIONS * K / E,
    "weight_entropy_sum": DECISIONS * math.log(K),
    "vio_sum_S": np.zeros(5),
    **dict.fromkeys(("common_sum", "chosen"), DECISIONS * K),
    **dict.fromkeys(("decisions", "logit_decisions", "weight_decisions", "documents"), DECISIONS),
    **dict.fromkeys(("ties", "tokens", "same_first_sum", "same_order_sum", "gamma_sum"), DECISIONS),
    **dict.fromkeys(("top1_margin_sum", "boundary_margin_sum", "weight_margin_sum"), 0.0),
    **dict.fromkeys(
        ("weights_apart_sum", "kl_sum", "mismatch_sum", "differing_sum", "apart_sum"), 0.0
    ),
    "ranks": 4,
    "top_k": K,
    "hits_D": np.full(3, 5),
    "documents_D": np.full(3, 15),
    "tokens_P": np.full(E**2, 7),
    "capacity_factor": 1.25,
}
# of what a sum is a share
WHOLE = ("decisions", "logit_decisions", "weight_decisions", "tokens", "chosen", "documents")


def axes_of(parameter: str) -> str:
    last = parameter.rpartition("_")[2]
    return last if last.isupper() else ""


def even(parameter: str) -> object:
    if parameter in EVEN:
        return EVEN[parameter]
    return np.full([SIZES[axis] for axis in axes_of(parameter)], 7)


def drawn(parameter: str, rng: np.random.Generator) -> object:
    """Uneven counts; what must be in an order or in proportion is."""
    axes = axes_of(parameter)
    if not axes:
        return EVEN[parameter]
    values = rng.integers(0, 50, [SIZES[axis] for axis in axes])
    if parameter == "together_EE":
        values = values + values.T
        np.fill_diagonal(values, values.sum(1) // (K - 1))
    if parameter == "load_LE":
        values[:, 4:6] = 0, 1  # one dead, one starved
    return values + (parameter == "tokens_D")


def renumbered(values: object, axes: str, order: dict[str, list[int]]) -> np.ndarray:
    array = np.asarray(values)
    for axis, letter in enumerate(axes):
        if letter in order:
            array = np.take(array, order[letter], axis)
    return array


def value_of(m: Metric, arguments: dict[str, object]) -> np.ndarray:
    value = np.asarray(m.function(**arguments), float)
    assert value.ndim == len(m.axes), f"{m.name} says that its axes are {m.axes!r}"
    return value


def ideal_of(m: Metric) -> float:
    known = {"E": E, "k": K, "T": T, "D": 3, "L": 2, "C": math.comb, "log": math.log}
    return float(eval(m.ideal, known)) if isinstance(m.ideal, str) else m.ideal


@pytest.mark.parametrize("name", METRICS)
def test_even_routing_gives_the_value_it_says(name: str):
    m = METRICS[name]
    value = value_of(m, {p: even(p) for p in m.parameters})
    value = value[~np.isnan(value)]  # the diagonal of pairs
    assert value.size
    np.testing.assert_allclose(value, ideal_of(m), atol=1e-9)


@pytest.mark.parametrize("name", METRICS)
def test_other_routing_gives_another_value(name: str):
    """The positive control of the test before."""
    m = METRICS[name]
    rng = np.random.default_rng(3)
    arguments = {p: drawn(p, rng) for p in m.parameters}
    for p in m.parameters:
        if p.endswith(("_sum", "ties")):
            arguments[p] = 1.5 * DECISIONS
        if p == "top_k":
            arguments[p] = E - 2  # so many that domains have some in common
    value = value_of(m, arguments)
    assert np.nanmax(np.abs(value - ideal_of(m))) > 1e-3


@pytest.mark.parametrize("name", METRICS)
@given(seed=st.integers(0, 2**32 - 1), data=st.data())
@settings(max_examples=12, deadline=None)
def test_numbering_experts_anew_changes_nothing(name: str, seed: int, data: st.DataObject):
    m, rng = METRICS[name], np.random.default_rng(seed)
    arguments = {p: drawn(p, rng) for p in m.parameters}
    # which of two equally loaded experts is packed first is a matter of their numbers
    if "ranks" in arguments:
        arguments["load_WE"] = rng.permuted(np.arange(SIZES["W"] * E) * 97 % 101).reshape(-1, E)
    order = {"E": data.draw(st.permutations(range(E))), "N": data.draw(st.permutations(range(E)))}
    turned = {
        p: renumbered(v, axes_of(p), order) if axes_of(p) else v for p, v in arguments.items()
    }
    expected = renumbered(value_of(m, arguments), m.axes, order)
    np.testing.assert_allclose(value_of(m, turned), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.filterwarnings("error")
def test_what_cannot_be_known_is_nan_or_nothing_not_an_error(name: str):
    m = METRICS[name]
    nothing = {
        p: np.zeros_like(np.asarray(even(p))) if axes_of(p) or p in WHOLE else even(p)
        for p in m.parameters
    }
    value = value_of(m, nothing)
    assert np.isnan(value).all() or (value == 0).all()


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_explains_itself(name: str):
    m = METRICS[name]
    assert len(m.first_sentence) > 20
    assert m.unit
    assert m.range
    assert m.first_sentence[0].isupper() or m.first_sentence[0] in "½("


def test_a_name_is_given_once():
    with pytest.raises(AssertionError, match="two metrics gini"):

        @metric("balance", ideal=0.0, range="")
        def gini() -> None:
            pass


def test_the_listing_has_every_metric():
    assert [row["metric"] for row in listing()] == [m.column for m in metrics().values()]


@pytest.mark.parametrize("name", metrics_of("balance", {"load_LE"}))
def test_no_load_has_no_value_and_routers_do_not_mix(name: str) -> None:
    function = metrics_of("balance", {"load_LE"})[name].function
    load_LE = np.array([[0, 0, 0, 0], [1, 2, 3, 4], [0, 0, 9, 3], [5, 5, 5, 5]])
    alone = [float(function(load_E[None])[0]) for load_E in load_LE]
    assert np.isnan(alone).tolist() == [True, False, False, False]
    assert function(load_LE) == pytest.approx(alone, nan_ok=True, rel=1e-12)
