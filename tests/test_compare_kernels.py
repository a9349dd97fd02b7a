"""The compiled loops of `compare` give what NumPy gives, to the last digit."""

from __future__ import annotations

import numpy as np
import pytest

from moe_inspect.comparison.counting import kernels_numba, kernels_numpy
from moe_inspect.comparison.counting.router_sums import Decisions, RouterSums

V, X = 5, 30


def decisions(T: int, E: int, K: int, share: float, nowhere: float) -> Decisions:
    """Random ones, of which `share` differ between the traces and `nowhere` of the slots route
    nowhere; a few decisions name an expert twice."""
    rng = np.random.default_rng([T, E, K])
    dtype = np.uint8 if E < 256 else np.uint16
    a_TK = np.argsort(rng.random((T, E)), axis=1)[:, :K]
    b_TK = np.where(rng.random((T, K)) < share, rng.integers(0, E, (T, K)), a_TK)
    b_TK = np.where(rng.random((T, 1)) < share, b_TK[:, ::-1], b_TK)
    for ids_TK in (a_TK, b_TK):
        ids_TK[rng.random((T, K)) < nowhere] = E
    weights = rng.random((2, K, T), np.float32)
    margin_T = np.where(rng.random(T) < 0.1, np.nan, rng.random(T)).astype(np.float32)
    return Decisions(
        E,
        V,
        np.sort(rng.integers(0, V, T)),
        rng.integers(0, X, T),
        *(tuple(ids_TK.T.astype(dtype).copy()) for ids_TK in (a_TK, b_TK)),
        weights=(tuple(weights[0]), tuple(weights[1])),
        decile_T=rng.integers(0, 10, T).astype(np.uint8),
        margin_T=margin_T,
    )


def values(sums: RouterSums, E: int) -> dict[str, np.ndarray]:
    found = {name: value for name, value in vars(sums).items() if not name.startswith("_")}
    if len(sums.at):
        moved_UE, flips_EE = np.zeros((2 * V, E), np.int64), np.zeros((E, E), np.int64)
        sums.add_moves(2 * np.arange(V), moved_UE, flips_EE)
        assert not moved_UE[1::2].any()
        found |= {"moved_UE": moved_UE, "flips_EE": flips_EE}
    return found


def assert_same(plain: dict[str, np.ndarray], compiled: dict[str, np.ndarray]) -> None:
    assert plain.keys() == compiled.keys()
    for name, value in plain.items():
        np.testing.assert_array_equal(value, compiled[name], err_msg=name)


@pytest.mark.parametrize("share", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("nowhere", [0.0, 0.1])
@pytest.mark.parametrize(
    ("T", "E", "K"),
    [(0, 8, 2), (1, 8, 1), (371, 5, 5), (1023, 300, 8), (2 * kernels_numba.BLOCK + 7, 128, 8)],
)
def test_compiled_sums_are_those_of_numpy(
    T: int, E: int, K: int, share: float, nowhere: float
) -> None:
    of = decisions(T, E, K, share, nowhere)
    plain, compiled = RouterSums(of, compiled=False), RouterSums(of, compiled=True)
    by_numpy, by_numba = values(plain, E), values(compiled, E)
    assert_same(by_numpy, by_numba)
    assert plain.load_VE.sum() == sum(int((slot_T < E).sum()) for slot_T in of.a)
    if T > 1 and share:
        assert plain.missing_N.any()
        assert plain.weights_differ > 0
        assert by_numpy["moved_UE"].any()
        assert by_numpy["flips_EE"].any() or E == K
        by_numba["moved_UE"][0, 0] += 1
        with pytest.raises(AssertionError, match="moved_UE"):
            assert_same(by_numpy, by_numba)


def test_weights_of_shared_experts_by_hand() -> None:
    """Experts 1 and 2 are shared, in other slots; 3 and 4 are not; the last slots are none's."""
    a_KN, b_KN = np.array([[1], [2], [3], [9]], np.uint8), np.array([[2], [4], [1], [9]], np.uint8)
    weights_a = tuple(np.array([w], np.float32) for w in (0.5, 0.25, 0.125, 0.75))
    weights_b = tuple(np.array([w], np.float32) for w in (0.5, 0.25, 0.375, 0.0))
    for kernels in (kernels_numpy, kernels_numba):
        found = kernels.weight_difference(a_KN, b_KN, 9, np.array([0]), weights_a, weights_b)
        assert found.tolist() == [0.125 + 0.25]
