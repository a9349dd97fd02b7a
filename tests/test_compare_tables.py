"""Loops over decisions that differ, and `mismatch` of arrays, against sets and Python loops. The
tables themselves: test_oracles_compare."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

import moe_inspect
from moe_inspect.comparison.counting import kernels


@pytest.mark.parametrize(("T", "L", "E", "K"), [(1, 1, 4, 1), (40, 3, 9, 3), (371, 2, 300, 2)])
def test_mismatch_of_arrays(T: int, L: int, E: int, K: int) -> None:
    rng = np.random.default_rng([T, E])
    a, b = (np.argsort(rng.random((T, L, E)))[..., :K].astype(np.int64) for _ in "ab")
    same = rng.random((T, L)) < 0.5
    b[same] = a[same]
    for side in (a, b):
        side[rng.random(side.shape) < 0.1] = -1
    sets_a, sets_b = ([[{*k} - {-1} for k in t] for t in x.tolist()] for x in (a, b))
    differs = np.array(
        [[x != y for x, y in zip(*t, strict=True)] for t in zip(sets_a, sets_b, strict=True)]
    )
    found = moe_inspect.mismatch(a, b)
    assert found["set_mismatch"] == pytest.approx(differs.mean())
    assert found["set_mismatch_by_layer"] == pytest.approx(differs.mean(0))
    assert found["tokens_mismatch"] == pytest.approx(differs.any(1).mean())
    assert found["order"] == pytest.approx((a == b).all(2).mean())
    for r in range(L):
        both = [(x[r], y[r]) for x, y in zip(sets_a, sets_b, strict=True)]
        common, size = sum(len(x & y) for x, y in both), sum(max(map(len, of)) for of in both)
        assert found["overlap_by_layer"][r] == pytest.approx(common / size)


@pytest.mark.parametrize(
    ("T", "E", "K"), [(0, 8, 2), (1, 8, 1), (371, 5, 5), (1023, 300, 8), (9_000, 128, 8)]
)
def test_the_loops_over_decisions(T: int, E: int, K: int) -> None:
    """Some decisions are the same, some slots route nowhere, a few name an expert twice."""
    rng, V = np.random.default_rng([T, E, K]), 3
    a_TK = np.argsort(rng.random((T, E)), axis=1)[:, :K]
    b_TK = np.where(rng.random((T, K)) < 0.3, rng.integers(0, E, (T, K)), a_TK)
    for ids_TK in (a_TK, b_TK):
        ids_TK[rng.random((T, K)) < 0.1] = E
    a_KT, b_KT = (ids_TK.T.astype(np.uint16) for ids_TK in (a_TK, b_TK))
    weights_a_KT, weights_b_KT = rng.random((2, K, T), np.float32)
    unit_T = np.sort(rng.integers(0, V, T))
    at, *asked = kernels.unequal((*a_KT,), (*b_KT,))
    lost_KN, gained_KN, missing_N = kernels.sets(*asked, E)
    moved_VE, flips_EE = np.zeros((V, E), np.int64), np.zeros((E, E), np.int64)
    kernels.add_moves(*asked, lost_KN, gained_KN, unit_T[at], moved_VE, flips_EE)
    l1_T = kernels.weight_difference(*asked, E, at, (*weights_a_KT,), (*weights_b_KT,))
    moved, flips = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    for t in range(T):
        a, b = ([e for e in ids_TK[t].tolist() if e < E] for ids_TK in (a_TK, b_TK))
        lost, gained = [e for e in a if e not in b], [e for e in b if e not in a]
        moved.update((int(unit_T[t]), e) for e in gained)
        moved.subtract((int(unit_T[t]), e) for e in lost)
        flips.update((e, f) for e in lost for f in gained)
        if a_TK[t].tolist() == b_TK[t].tolist():
            pairs = [(j, j) for j in range(K)]
        else:
            pairs = [(i, j) for i in range(K) for j in range(K) if a_TK[t, i] == b_TK[t, j] < E]
        apart = sum(abs(float(weights_a_KT[i, t] - weights_b_KT[j, t])) for i, j in pairs)
        assert l1_T[t] == pytest.approx(apart, abs=1e-5)
        if t in at:
            common = min(len(a) - len(lost), len(b) - len(gained))
            assert missing_N[at.tolist().index(t)] == max(len(a), len(b)) - common
    assert {x: moved_VE[x] for x in moved} == moved
    assert moved_VE.sum() == sum(moved.values())
    assert {x: flips_EE[x] for x in flips} == flips
    assert flips_EE.sum() == flips.total()
