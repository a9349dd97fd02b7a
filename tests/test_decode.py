"""Distinct experts of a decode step: the baselines' known values, a brute force, and the compiled
loop against its NumPy reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_inspect.simulate.decode import Steps, independent, simulate_decode
from tests.support.synthetic import uniform_ids, write_trace

UNIFORM = [(8, 2, 7.20, 8.00), (64, 8, 42.0, 63.1), (128, 8, 51.6, 111.8), (256, 8, 57.4, 163.3)]


@pytest.mark.parametrize(("E", "k", "of_8", "of_32"), UNIFORM)
def test_uniform_routing_reads_what_the_formula_says(
    E: int, k: int, of_8: float, of_32: float, tmp_path: Path
) -> None:
    assert independent(E, k, 8) == pytest.approx(of_8, abs=0.06)
    assert independent(E, k, 32) == pytest.approx(of_32, abs=0.06)
    ids = uniform_ids(np.random.default_rng(0), 64 * 240, E, k)
    document = np.repeat(np.arange(64), 240)
    trace = write_trace(tmp_path / "t", [ids], E, document=document, batch_tokens=240)
    table = simulate_decode(trace, batches=[8, 32]).tables["decode"]
    found = table.set_index("batch")["distinct_experts"]
    assert found[8] == pytest.approx(of_8, rel=0.01)
    assert found[32] == pytest.approx(of_32, rel=0.01)


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_steps_equal_a_brute_force_however_the_trace_is_cut(
    seed: int, batch: int, parts: int
) -> None:
    rng = np.random.default_rng(seed)
    T, E, k = int(rng.integers(1, 60)), 6, 2
    ids_KT, position_T = uniform_ids(rng, T, E, k).astype(np.int16).T.copy(), rng.integers(0, 4, T)
    ids_KT[rng.random((k, T)) < 0.1] = -1
    steps = distinct = 0
    for p in range(4):
        chosen = [set(ids_KT[:, t].tolist()) - {-1} for t in range(T) if position_T[t] == p]
        for start in range(0, len(chosen) - batch + 1, batch):
            steps += 1
            distinct += len(set.union(*chosen[start : start + batch]))
    of = Steps(E, [batch])
    for part in np.array_split(np.arange(T), parts):
        of.add(np.ascontiguousarray(ids_KT[:, part]), position_T[part])
    assert (of.steps_B[0], of.distinct_B[0]) == (steps, distinct)


def test_bytes_a_token(tmp_path: Path) -> None:
    config = {"hidden_size": 10, "moe_intermediate_size": 4}
    manifest = {"model": {"config": config}, "capture": {"weights": False, "dtype": "bfloat16"}}
    ids = uniform_ids(np.random.default_rng(0), 50, 4, 2)
    trace = write_trace(tmp_path / "t", [ids], 4, manifest=manifest)
    for expert_mb, expected in ((None, 2 * 3 * 10 * 4 * 2), (1.5, 3e6)):
        table = simulate_decode(trace, batches=[1], expert_mb=expert_mb).tables["decode"]
        assert table["bytes_per_token"].item() == expected
