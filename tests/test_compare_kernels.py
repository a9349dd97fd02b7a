"""The compiled loops of `compare` give what NumPy gives, to the last digit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moe_inspect.comparison.counting import kernels_numba, kernels_numpy

V, X = 5, 30


def sums_of(kernels: Any, T: int, E: int, K: int, share: float, nowhere: float) -> dict[str, Any]:
    """The sums of random decisions, of which `share` differ between the traces and `nowhere` of the
    slots route nowhere; a few decisions name an expert twice."""
    rng = np.random.default_rng([T, E, K])
    a_TK = np.argsort(rng.random((T, E)), axis=1)[:, :K]
    b_TK = np.where(rng.random((T, K)) < share, rng.integers(0, E, (T, K)), a_TK)
    b_TK = np.where(rng.random((T, 1)) < share, b_TK[:, ::-1], b_TK)
    for ids_TK in (a_TK, b_TK):
        ids_TK[rng.random((T, K)) < nowhere] = E
    a, b = (tuple(ids_TK.T.astype(np.uint8 if E < 256 else np.uint16)) for ids_TK in (a_TK, b_TK))
    weights_a, weights_b = (tuple(rng.random((K, T), np.float32)) for _ in "ab")
    unit_T, cell_T = np.sort(rng.integers(0, V, T)), rng.integers(0, X, T)
    at = kernels_numpy.unequal(a, b)
    a_KN, b_KN = (np.stack([slot_T[at] for slot_T in side]) for side in (a, b))
    lost_KN, gained_KN, missing_N = kernels_numpy.sets(a_KN, b_KN, E)
    missing, moved, flips = (np.zeros(of, np.int64) for of in ((V, X), (V, E), (E, E)))
    load, weights = np.zeros((V, E + 1), np.uint32), (weights_a, weights_b)
    kernels.add_cells(missing, unit_T[at], cell_T[at], missing_N)
    kernels.add_moves(a_KN, b_KN, lost_KN, gained_KN, unit_T[at], moved, flips)
    kernels.add_load(a, unit_T, load)
    l1 = kernels_numpy.weight_difference(kernels, a_KN, b_KN, E, at, *weights)
    return {"load": load, "missing": missing, "moved": moved, "flips": flips, "l1": l1}


@pytest.mark.parametrize("share", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("nowhere", [0.0, 0.1])
@pytest.mark.parametrize(
    ("T", "E", "K"),
    [(0, 8, 2), (1, 8, 1), (371, 5, 5), (1023, 300, 8), (2 * kernels_numba.BLOCK + 7, 128, 8)],
)
def test_compiled_sums_are_those_of_numpy(
    T: int, E: int, K: int, share: float, nowhere: float
) -> None:
    plain, compiled = (
        sums_of(kernels, T, E, K, share, nowhere) for kernels in (kernels_numpy, kernels_numba)
    )
    for name, values in plain.items():
        np.testing.assert_array_equal(values, compiled[name], err_msg=name)
    assert plain["load"].sum() == T * K
    if T > 1 and share:  # there is something to compare
        assert plain["missing"].any()
        assert plain["moved"].any()
        assert plain["flips"].any() or E == K
        assert plain["l1"].any()
