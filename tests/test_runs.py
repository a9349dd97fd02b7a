"""Edges of runs of equal values."""

from __future__ import annotations

import numpy as np
import pytest

from moe_inspect.trace.runs import run_edges


@pytest.mark.parametrize(
    ("keys_KT", "edges"),
    [
        ([[]], [0]),
        ([[7]], [0, 1]),
        ([[3, 3, 3]], [0, 3]),
        ([[0, 0, 1, 0]], [0, 2, 3, 4]),
        ([[0, 0, 1, 1], [5, 6, 6, 6]], [0, 1, 2, 4]),
    ],
)
def test_a_run_ends_where_any_key_changes(keys_KT: list[list[int]], edges: list[int]):
    keys = [np.array(key_T, np.int64) for key_T in keys_KT]
    assert run_edges(*keys).tolist() == edges
    assert run_edges(np.column_stack(keys)).tolist() == edges


def test_the_end_of_the_encoded_tokens_is_an_edge():
    sequence_T = np.array([1, 1, 1, 1], np.uint32)
    assert run_edges(sequence_T, np.arange(4) < 3).tolist() == [0, 3, 4]
